"""What pruned models can still do: tasks, with paired intervals, and the text they write."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from book_records import Page, Section
from book_tables import GAP, markdown, mean, title

from kdprune.report.bootstrap import RESAMPLES, Lead, lead, paired_bootstrap
from kdprune.report.comparison_records import Comparison, Row, Unit, task_name
from kdprune.report.comparison_table import cells, dense_cells
from kdprune.report.retention import by_task, carries_signal, row_name
from kdprune.report.task_records import Generation, TaskScore

READING = f"""Scores in percent, perplexities as they are. Above chance: mean over the tasks with signal of
(score − chance) / (dense − chance), BLiMP one of them, by the mean over its paradigms. In brackets the middle 95 % of
{RESAMPLES:,} paired resamples of every task's items: against the dense model's own answers, and against the best of the
other methods by this measure, with a two-sided p that is not corrected for their number. Answers are averaged over
seeds first (`report/bootstrap.py`): the intervals are about items, not about seeds or calibration text."""
WRITTEN = ("same beginning", "same tokens", "repeated")


# --------------------------------------------------------------------------------------------- tasks


def tasks(page: Page, section: Section) -> str:
    """A table a model of tasks by method, and which tasks carry signal; ``ours``: the method that has peers.

    ``record`` names another record than the page's; how to read the table stands where it is the page's. Units without
    tasks (seeds on which they were not scored) are left out; "" where none has any.
    """
    parts = []
    for model, found in page.comparisons(section.get("record")).items():
        scored = {name: units for name, units in _scored(found).items() if units}
        if scored:
            parts += [f"### {model}", _tasks_table(found, scored, section["ours"]), signal(found)]
    reading = [] if "record" in section else [READING]
    return "\n\n".join([*reading, *parts]) if parts else ""


def signal(found: Comparison) -> str:
    """Which tasks the dense model is above chance in by more than two standard errors, and which not."""
    rows = [score for score in by_task(found.dense.tasks) if score.is_share]
    said = [f"{score.task} ({_percent(score.value)}, chance {_percent(score.chance)}, ±{_percent(score.stderr)}, "
            f"{score.items:,} items)" for score in rows]
    sure = [carries_signal(score) for score in rows]
    with_, without = ([text for text, one in zip(said, sure, strict=True) if one is wanted] for wanted in (True, False))
    line = f"Carry signal (dense − chance > 2 standard errors): {', '.join(with_) or 'none'}. Do not: " \
           f"{', '.join(without) or 'none'}."
    weak = [row_name(score) for score in found.dense.tasks if score.task == "blimp" and not carries_signal(score)]
    return f"{line} Of BLiMP's phenomena alone do not: {', '.join(weak)}." if weak else line


def _scored(found: Comparison) -> dict[str, list[list[TaskScore]]]:
    """Variant → the scores of each of its units that has them."""
    return {row.variant.name: [by_task(unit.tasks) for unit in _units(found, row) if unit.tasks] for row in found.rows}


def _units(found: Comparison, row: Row) -> list[Unit]:
    return [unit for unit in found.units if unit.variant == row.variant.name]


def _tasks_table(found: Comparison, scored: Mapping[str, Sequence[Sequence[TaskScore]]], ours: str) -> str:
    dense = by_task(found.dense.tasks)
    kept = {name: lead(dense, units, [dense], above_chance=True) for name, units in scored.items()}
    own = [row.variant.name for row in found.rows if row.variant.options.get("method") == ours]
    others = [(one.difference, name) for name, one in kept.items() if one is not None and name not in own]
    best = max(others)[1] if others else None
    means = {name: _means(units) for name, units in scored.items()}
    names = [task_name(score) for score in dense]
    tops = {task_name(score): (max if score.higher_is_better else min)(
        one[task_name(score)] for one in means.values() if task_name(score) in one) for score in dense}
    rows = [["dense", *(_shown(score, score.value) for score in dense), "100", "", ""]]
    for name in sorted(scored, key=lambda name: -(one.difference if (one := kept[name]) else -math.inf)):
        shown = [_shown(score, means[name].get(task)) for task, score in zip(names, dense, strict=True)]
        marked = [f"**{text}**" if means[name].get(task) == tops[task] else text
                  for task, text in zip(names, shown, strict=True)]
        against = lead(dense, scored[name], scored[best], above_chance=True) if best and name in own else None
        rows.append([title([found], name), *marked, _kept(kept[name]), _against(against), str(len(scored[name]))])
    heads = ["", *names, "above chance", "against " + (f"`{best}`" if best else "the best peer"), "seeds"]
    return markdown(heads, rows)


def _means(units: Sequence[Sequence[TaskScore]]) -> dict[str, float]:
    """Task → its score, mean over the units."""
    found: dict[str, list[float]] = {}
    for scores in units:
        for score in scores:
            if score.value is not None:
                found.setdefault(task_name(score), []).append(score.value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _shown(score: TaskScore, value: float | None) -> str:
    if value is None:
        return GAP
    return f"{100 * value:.1f}" if score.is_share else f"{value:,.2f}"


def _percent(value: float | None) -> str:
    return GAP if value is None else f"{100 * value:.1f}"


def _kept(found: Lead | None) -> str:
    """"71.3 [66.0, 76.4]": what is kept above chance; the difference from the dense model, which keeps all."""
    if found is None:
        return GAP
    return f"{100 + 100 * found.difference:.1f} [{100 + 100 * found.low:.1f}, {100 + 100 * found.high:.1f}]"


def _against(found: Lead | None) -> str:
    if found is None:
        return ""
    p = "p < .001" if found.p < 0.001 else f"p = {found.p:.3f}".replace("0.", ".", 1)
    return f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}], {p}"


# --------------------------------------------------------------------------------------------- what they write


def writing(page: Page, section: Section) -> str:
    """A table a model: how long each variant's text is the dense model's, how much is at its place, what repeats.

    In brackets the middle 95 % of resamples of the prompts, of the mean over seeds. "" where nothing was written.
    """
    parts = []
    for model, found in page.comparisons(section.get("record")).items():
        written = {row.variant.name: [unit.generation for unit in _units(found, row) if unit.generation]
                   for row in found.rows}
        rows = [row for row in found.rows if written[row.variant.name]]
        if not rows or found.dense.generation is None:
            continue
        dense = found.dense.generation
        table = [["dense", *dense_cells(found, WRITTEN), ""]]
        for row in sorted(rows, key=lambda row: -(mean(row.same_beginning) or 0.0)):
            some = written[row.variant.name]
            table.append([title([found], row.variant.name), *(
                f"{cell} {_interval(some, name)}" for cell, name in zip(
                    cells(row, WRITTEN), ("same_beginning", "same_tokens", "repeated"), strict=True)), str(len(some))])
        parts += [f"### {model}", markdown(["", *WRITTEN, "seeds"], table),
                  f"{dense.new_tokens} tokens, greedy, after each of {len(dense.repeated)} prompts of {dense.prompt}."]
    return "\n\n".join(parts)


def _interval(found: Sequence[Generation], name: str) -> str:
    """"[3.1, 9.8]", percent; resampled are the prompts, all seeds' together."""
    values = np.mean([np.array(getattr(one, name), dtype=np.float64) for one in found], axis=0)
    one = paired_bootstrap([values], [100.0])
    return f"[{one.low:.1f}, {one.high:.1f}]"
