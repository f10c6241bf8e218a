"""Retained performance: what a pruned model keeps of the dense one's scores.

With score p_i of the pruned and d_i of the dense model, chance c_i, i = 1 … n:

    mean        = Σ p_i / Σ d_i                                     all accuracy-like rows (the paper's measure)
    above chance = mean over S of (p_i − c_i) / (d_i − c_i),  S = {i : d_i − c_i > 2 · stderr(d_i)}

Perplexities enter neither. Of the first i is a row, as the paper has it, so that BLiMP counts as often as it has rows;
of the second a benchmark, whose rows are one score (:func:`by_task`). Standard errors take the two models' errors as
independent; both answer the same items, so the true ones are smaller as a rule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdprune.errors import KDPruneError
from kdprune.report.task_records import TaskScore

SIGNAL = 2.0  # standard errors above chance from which a task says something


@dataclass(frozen=True)
class Retention:
    """Shares of the dense model's performance, 1 = nothing lost.

    above_chance: None where no benchmark carries signal; signal: those that do; left_out: the accuracy-like ones that
    do not, and enter `mean` alone; mean_stderr, above_chance_stderr: None where a row has no standard error.
    """

    mean: float
    above_chance: float | None
    signal: list[str]
    left_out: list[str]
    mean_stderr: float | None = None
    above_chance_stderr: float | None = None


def carries_signal(score: TaskScore) -> bool:
    """Whether a score is above chance by more than two standard errors."""
    if score.value is None or score.chance is None or score.stderr is None:
        return False
    return score.value - score.chance > SIGNAL * score.stderr


def row_name(score: TaskScore) -> str:
    """"sciq", "blimp: binding"."""
    return score.task if score.group in ("", score.task) else f"{score.task}: {score.group}"


def retention(dense: Sequence[TaskScore], pruned: Sequence[TaskScore]) -> Retention:
    """Retained performance of `pruned` against `dense`, scores of the same rows in any order.

    Raises KDPruneError where the rows or their items differ, and where no row is accuracy-like or all dense
    scores are 0.
    """
    pairs = _pairs(dense, pruned)
    total = sum(_number(d.value) for d, _ in pairs)
    if not total:
        raise KDPruneError("got no score above 0 that is not a perplexity, expected one; give a suite with tasks")
    mean = sum(_number(p.value) for _, p in pairs) / total
    variances = [
        None if d.stderr is None or p.stderr is None else (p.stderr**2 + (mean * d.stderr) ** 2) / total**2
        for d, p in pairs
    ]
    whole = list(zip(*(by_task(scores) for scores in zip(*pairs, strict=True)), strict=True))
    kept = [(d, p) for d, p in whole if carries_signal(d)]
    shares = [_above(d, p) for d, p in kept]
    return Retention(
        mean,
        sum(share for share, _ in shares) / len(shares) if shares else None,
        [row_name(d) for d, _ in kept],
        [row_name(d) for d, _ in whole if not carries_signal(d)],
        _root(variances),
        _root([None if error is None else (error / len(shares)) ** 2 for _, error in shares]) if shares else None,
    )


def by_task(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Scores with the rows of a benchmark that has several, each a mean of tasks, as one: the mean over all tasks.

    value = Σ_g n_g value_g / Σ_g n_g, n_g the tasks of row g; stderr = √Σ (n_g stderr_g)² / Σ n_g. Rows of which a
    record does not say which items were right count as one task each.
    """
    groups: dict[tuple[str, str, str], list[TaskScore]] = {}
    for score in scores:  # the perplexities of several texts stay as they are
        groups.setdefault((score.task, "" if score.is_share else score.group, score.metric), []).append(score)
    return [_one(rows) if len(rows) > 1 else rows[0] for rows in groups.values()]


def _one(rows: Sequence[TaskScore]) -> TaskScore:
    sizes = [max(1, len(row.right)) for row in rows]
    kept = all(row.right for row in rows)

    def weighed(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(
            size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)

    errors = [row.stderr for row in rows]
    return rows[0].model_copy(update={
        "group": rows[0].task, "value": weighed("value"), "chance": weighed("chance"),
        "stderr": None if None in errors else math.hypot(
            *(size * (error or 0.0) for size, error in zip(sizes, errors, strict=True))) / sum(sizes),
        "items": sum(row.items for row in rows),
        "right": [text for row in rows for text in row.right] if kept else []})


def _pairs(dense: Sequence[TaskScore], pruned: Sequence[TaskScore]) -> list[tuple[TaskScore, TaskScore]]:
    """Accuracy-like rows of both models, in the dense model's order."""
    left = {score.key: score for score in dense if score.is_share}
    right = {score.key: score for score in pruned if score.is_share}
    if differing := left.keys() ^ right.keys():
        raise KDPruneError(
            f"got {', '.join(sorted(differing)[0])} of one model alone, expected the same tasks of both; "
            "evaluate both with the same suite")
    for key, score in left.items():
        if score.items != right[key].items:
            raise KDPruneError(
                f"got {score.items} and {right[key].items} items of {row_name(score)}, expected the same; "
                "evaluate both with the same limit and data")
    return [(score, right[key]) for key, score in left.items()]


def _number(value: float | None) -> float:
    """A score that was measured; one that was not counts as nothing."""
    return 0.0 if value is None else value


def _above(dense: TaskScore, pruned: TaskScore) -> tuple[float, float | None]:
    """(p − c) / (d − c) and its standard error."""
    chance = _number(dense.chance)
    span = _number(dense.value) - chance
    share = (_number(pruned.value) - chance) / span
    if dense.stderr is None or pruned.stderr is None:
        return share, None
    return share, math.hypot(pruned.stderr, share * dense.stderr) / span


def _root(variances: Sequence[float | None]) -> float | None:
    """√Σ, or None where a term is missing."""
    known = [variance for variance in variances if variance is not None]
    return math.sqrt(sum(known)) if len(known) == len(variances) else None
