"""A paired bootstrap over items: is the lead of one method over another more than the choice of items?

With a_ij and b_ij whether item j of task row i was right, averaged over the seeds of each method, the lead is

    D = Σ_i w_i · mean over the row's tasks of mean over j of (a_ij − b_ij),

w_i = 1 / Σ d for the retained mean, 1 / (|S| (d_i − c_i)) over S for the one above chance, d and c the dense model's
scores and chance as in :mod:`kdprune.report.retention`. Resampled are the items of each task, with replacement and both
methods' together; the dense model is the yardstick and is held fixed. Source: Efron & Tibshirani 1993, section 13.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdprune.errors import KDPruneError
from kdprune.report.retention import by_task, carries_signal
from kdprune.report.task_records import TaskScore

RESAMPLES = 10_000
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Lead:
    """A difference of two methods, of shares of the dense model's performance.

    low, high: the middle 95 % of the resamples; p: two-sided, twice the smaller share of resamples on one side of 0,
    (1 + count) / (1 + resamples); items: how many the difference is over.
    """

    difference: float
    low: float
    high: float
    p: float
    items: int


def paired_bootstrap(
    differences: Sequence[np.ndarray], weights: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES,
) -> Lead:
    """The lead Σ w · mean(differences) over strata and what resampling the items of each stratum makes of it.

    A resampled mean depends on how often each distinct value is drawn alone, so these counts are drawn: multinomial,
    the same distribution as drawing item by item.

    Args:
        differences: one array of items a stratum, shape (n,): what one method scored less what the other did.
        weights: of each stratum's mean.
        seed: of the draws.

    Raises:
        KDPruneError: no strata, an empty one, or not as many weights.
    """
    if not differences or len(differences) != len(weights) or any(not len(values) for values in differences):
        raise KDPruneError(f"got {len(differences)} strata and {len(weights)} weights, expected as many of both, "
                           "at least one, and items in each")
    draw = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for values, weight in zip(differences, weights, strict=True):
        distinct, counts = np.unique(np.asarray(values, dtype=np.float64).round(9), return_counts=True)
        drawn = draw.multinomial(len(values), counts / len(values), size=resamples)
        sums += weight * (drawn @ distinct) / len(values)
    low, high = np.quantile(sums, (0.025, 0.975))
    # What is 0 but for rounding counts on both sides.
    below, above = int((sums <= 1e-12).sum()), int((sums >= -1e-12).sum())
    exact = sum(weight * float(np.mean(values)) for values, weight in zip(differences, weights, strict=True))
    p = min(1.0, 2 * (1 + min(below, above)) / (1 + resamples))
    return Lead(exact, float(low), float(high), p, sum(len(values) for values in differences))


def lead(
    dense: Sequence[TaskScore], first: Sequence[Sequence[TaskScore]], second: Sequence[Sequence[TaskScore]], *,
    above_chance: bool, seed: int = 0, resamples: int = RESAMPLES,
) -> Lead | None:
    """Retained performance of the first method less the second's, each given by the scores of its seeds.

    Returns None where a record does not say which items were right (runs older than that), or no row carries signal.
    Raises KDPruneError where the two did not answer the same items.
    """
    if above_chance:  # where a benchmark counts once
        dense, first, second = by_task(dense), [by_task(one) for one in first], [by_task(one) for one in second]
    weights = _weights(dense, above_chance)
    sides = [[_items(scores, weights) for scores in method] for method in (first, second)]
    if not weights or not all(sides) or any(found is None for side in sides for found in side):
        return None
    one, other = (_averaged([found for found in side if found is not None]) for side in sides)
    differences, strata = [], []
    for key, weight in weights.items():
        _check(key, [part.size for part in one[key]], [part.size for part in other[key]])
        for left, right in zip(one[key], other[key], strict=True):
            differences.append(left - right)
            strata.append(weight / len(one[key]))
    return paired_bootstrap(differences, strata, seed=seed, resamples=resamples)


def _weights(dense: Sequence[TaskScore], above_chance: bool) -> dict[Key, float]:
    """What a row's score counts in the share retained."""
    rows = [score for score in dense if score.is_share]
    if above_chance:
        kept = [score for score in rows if carries_signal(score)]
        return {score.key: 1 / (len(kept) * ((score.value or 0.0) - (score.chance or 0.0))) for score in kept}
    total = sum(score.value or 0.0 for score in rows)
    return {score.key: 1 / total for score in rows} if total else {}


def _items(scores: Sequence[TaskScore], rows: Mapping[Key, float]) -> dict[Key, list[np.ndarray]] | None:
    """Items of every row as arrays of 0 and 1, one a task; None where one of the rows does not have them."""
    found = {score.key: [np.frombuffer(text.encode(), dtype=np.uint8) - 48.0 for text in score.right]
             for score in scores if score.right}
    return {key: found[key] for key in rows} if rows.keys() <= found.keys() else None


def _averaged(seeds: Sequence[dict[Key, list[np.ndarray]]]) -> dict[Key, list[np.ndarray]]:
    """The mean over seeds, item by item."""
    for found in seeds[1:]:
        for key, parts in found.items():
            _check(key, [part.size for part in seeds[0][key]], [part.size for part in parts])
    return {key: [np.mean([found[key][number] for found in seeds], axis=0) for number in range(len(parts))]
            for key, parts in seeds[0].items()}


def _check(key: Key, one: Sequence[int], other: Sequence[int]) -> None:
    if one != other:
        raise KDPruneError(f"got {sum(one)} and {sum(other)} items of {key[1] or key[0]}, expected the same items; "
                           "evaluate both with the same suite, data and limit")
