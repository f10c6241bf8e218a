"""A comparison's ``report.html`` and ``table.md``, made from its record alone."""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from kdprune.report import comparison_plots as plots
from kdprune.report import comparison_table as table
from kdprune.report import summary
from kdprune.report.comparison_records import Comparison, Row
from kdprune.report.page import environment
from kdprune.report.results import write_file
from kdprune.report.summary import SPACE, Tile


@dataclass(frozen=True)
class Shown:
    """A picture with its heading, what it says and how to read it; ``width`` 2: a third of the page, 3: half."""

    title: str
    svg: str
    reading: str
    width: int = 3


def render_comparison(comparison: Comparison) -> str:
    """The whole page as a string."""
    titles = table.columns(comparison)
    return environment().get_template("comparison.html.jinja").render(
        comparison=comparison, titles=titles, headline=headline(comparison), tiles=tiles(comparison),
        dense=table.dense_cells(comparison, titles), groups=groups(comparison),
        cells=lambda row: table.cells(row, titles), failure=table.failure, pictures=pictures(comparison),
        texts=table.text_rows(comparison),
        tasks=table.task_rows(comparison), protocol=table.protocol(comparison), best=best(comparison),
        blocks=lambda row: "; ".join(_blocks(choice) for choice in row.blocks) or "–")


def write_comparison(comparison: Comparison, folder: Path, page: Path | None = None) -> list[Path]:
    """Writes ``table.md`` and ``report.html``."""
    return [write_file(folder / "table.md", table.render_markdown(comparison)),
            write_file(page or folder / "report.html", render_comparison(comparison))]


def groups(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Rows by the group they stand in; one unnamed group outside ablations."""
    return [(name, list(rows)) for name, rows in groupby(comparison.rows, key=lambda row: row.variant.group)]


def ranked(comparison: Comparison) -> list[Row]:
    """Rows that have a figure, least excess loss first."""
    found = [row for row in comparison.rows if row.excess_loss is not None and row.excess_loss.mean is not None]
    return sorted(found, key=_excess)


def best(comparison: Comparison) -> str:
    """Name of the variant of least excess loss; empty if there is none."""
    return next((row.variant.name for row in ranked(comparison)), "")


def headline(comparison: Comparison) -> str:
    """The comparison in one sentence."""
    rows, count = ranked(comparison), len(comparison.rows)
    share, outside = summary.percent(comparison.ratio), summary.OUTSIDE[comparison.of]
    what = f"{count} ways to remove {share} of {summary.model_name(comparison.model)}{outside}"
    if comparison.kind == "ablation":
        what = f"{count} variants of one method at {share} fewer parameters{outside}"
    if not rows:
        return f"{what}: none came to an end."
    if len(rows) == 1:
        return f"{what}: {rows[0].variant.title} alone came to an end, {_figure(rows[0])}."
    first, second = rows[:2]
    return (f"{what}: {first.variant.title} loses least, {_figure(first)}, "
            f"then {second.variant.title}, {_figure(second)}.")


def tiles(comparison: Comparison) -> list[Tile]:
    """The headline figures."""
    rows = ranked(comparison)
    found = [Tile(f"{summary.decimals(comparison.dense.perplexity)}", "perplexity of the dense model",
                  f"{summary.count(comparison.dense.parameters)} parameters")]
    if rows:
        found.append(Tile(f"{_excess(rows[0]):.3f}", "least excess loss", rows[0].variant.title))
        timed = [(row.seconds.mean or 0.0, row.variant.title) for row in rows if row.seconds]
        if timed:
            least, title = min(timed)
            found.append(Tile(summary.duration(least), "least time to prune", title))
    total = len(comparison.units) + len(comparison.failures)
    found.append(Tile(f"{len(comparison.units)}{SPACE}of{SPACE}{total}", "runs came to an end",
                      f"{len(comparison.rows)} variants, {len(comparison.seeds)} seeds"))
    return found


def pictures(comparison: Comparison) -> list[Shown]:
    """What the page draws: of a comparison quality against size, cost and speed; of an ablation its parts."""
    rows = ranked(comparison)
    if not rows:
        return []
    if comparison.kind == "ablation":
        return _ablation_pictures(comparison)
    bars = "Bars: standard deviation over seeds."
    found = [
        Shown("Excess loss", plots.excess_by_variant(rows, "Excess loss"), f"Lower is better, left. {bars}"),
        Shown("Quality against size", plots.quality_against_size(comparison),
              f"Further right: smaller; lower: better. Whole layers or widths are removed, so that no method meets the "
              f"ratio asked for, {summary.percent(comparison.ratio, 1)}, exactly. {bars}"),
        Shown("Quality against cost", plots.quality_against_cost(comparison),
              "Further left: cheaper to prune. Time depends on the machine and on what else runs on it."),
    ]
    if any(row.decode for row in rows):  # a model that is streamed from disk has no speed worth the name
        found.append(Shown("Quality against speed", plots.quality_against_speed(comparison),
                           f"Further right: faster at writing token by token. {bars}"))
    return found


def _ablation_pictures(comparison: Comparison) -> list[Shown]:
    """One picture of the parts that are there or not, one of each sweep."""
    base = comparison.rows[0]
    switched = [row for row in ranked(comparison) if row.variant.value is None]
    line = "Dashed: the base, with its standard deviation over seeds."
    found = [Shown("Parts", plots.excess_by_variant(switched, "Parts", base),
                   f"The base with one part changed. {line}")] if len(switched) > 1 else []
    for name, rows in groups(comparison):
        known = [row for row in rows if row.variant.value is not None and row.excess_loss is not None]
        if known:
            found.append(Shown(name, plots.sweep(known, name, base), line, width=2))
    return found


def _blocks(choice: list[tuple[int, int]]) -> str:
    return ", ".join(summary.layer_range(block) for block in choice)


def _excess(row: Row) -> float:
    found = row.excess_loss
    return float("inf") if found is None or found.mean is None else found.mean


def _figure(row: Row) -> str:
    return f"{_excess(row):.3f} nats"
