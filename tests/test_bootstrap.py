"""The paired bootstrap over items against all resamples of a few items, and against the formula for its variance."""

import itertools
import math

import numpy as np
import pytest

from kdprune.errors import KDPruneError
from kdprune.report.bootstrap import lead, paired_bootstrap
from kdprune.report.retention import retention
from kdprune.report.task_records import TaskScore


def test_against_every_resample_of_few_items() -> None:
    strata, weights = [np.array([1.0, 0.0, -1 / 3, 1.0]), np.array([-1.0, 2 / 3, 1.0])], [0.7, 0.4]
    sums = [[weight * sum(drawn) / len(drawn) for drawn in itertools.product(values, repeat=len(values))]
            for values, weight in zip(strata, weights, strict=True)]
    every = np.array([first + second for first, second in itertools.product(*sums)])  # 4⁴ · 3³, all as likely
    found = paired_bootstrap(strata, weights, seed=3, resamples=100_000)
    assert found.difference == pytest.approx(every.mean(), abs=1e-12)
    share = 2 * min((every <= 1e-12).mean(), (every >= -1e-12).mean())
    assert found.p == pytest.approx(share, abs=4 * 2 * math.sqrt(share / 2 / 100_000))
    for value, level in ((found.low, 0.025), (found.high, 0.975)):
        assert np.quantile(every, level - 0.003) - 1e-9 <= value <= np.quantile(every, level + 0.003) + 1e-9


def test_interval_is_the_normal_one_for_many_items() -> None:
    draw = np.random.default_rng(0)
    strata = [draw.integers(-3, 4, size) / 3 for size in (400, 900)]
    found = paired_bootstrap(strata, [0.5, 0.5])
    error = math.sqrt(sum(0.25 * values.var() / len(values) for values in strata))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.03)
    assert (found.high + found.low) / 2 == pytest.approx(found.difference, abs=0.05 * error)
    assert found.items == 1300
    assert paired_bootstrap(strata, [0.5, 0.5]) == found
    assert paired_bootstrap(strata, [0.5, 0.5], seed=1) != found


def test_p_under_no_difference_and_under_a_clear_one() -> None:
    assert paired_bootstrap([np.zeros(50)], [1.0]).p == 1.0
    clear = paired_bootstrap([np.ones(50)], [1.0], resamples=999)
    assert (clear.difference, clear.low, clear.high, clear.p) == (1.0, 1.0, 1.0, 2 / 1000)
    draw, small = np.random.default_rng(5), 0
    for seed in range(200):  # two methods that answer alike: p below 0.1 in about a tenth of the cases
        answers = draw.random((2, 150)) < 0.6
        small += paired_bootstrap([answers[0] * 1.0 - answers[1]], [1.0], seed=seed, resamples=2000).p < 0.1
    assert 8 <= small <= 34


def score(group: str, value: float, right: list[str], chance: float | None = 0.5, **changes: object) -> TaskScore:
    return TaskScore.model_validate({
        "task": group, "group": group, "metric": "acc", "value": value, "stderr": 0.01, "chance": chance,
        "items": sum(map(len, right)), "higher_is_better": True, "right": right, **changes})


DENSE = [score("a", 0.9, [], items=6), score("b", 0.7, [], items=5), score("noise", 0.51, [], items=4),
         score("text", 40.0, [], None, metric="perplexity", higher_is_better=False)]


def seeds(*answers: tuple[list[str], str, str]) -> list[list[TaskScore]]:
    """Scores of one method, a seed an entry: the two tasks of row a, the one of b, and the row without signal."""
    share = [[[text.count("1") / len(text) for text in part] for part in (a, [b], [noise])] for a, b, noise in answers]
    return [[score("a", sum(values[0]) / len(a), a), score("b", values[1][0], [b]),
             score("noise", values[2][0], [noise]), DENSE[3]]
            for values, (a, b, noise) in zip(share, answers, strict=True)]


FIRST = seeds((["1101", "10"], "11110", "1010"), (["1111", "10"], "11010", "0010"))
SECOND = seeds((["0101", "11"], "10010", "1110"))


@pytest.mark.parametrize("above_chance", [False, True])
def test_the_lead_is_the_difference_of_retained_performance(above_chance: bool) -> None:
    def kept(method: list[list[TaskScore]]) -> float:
        found = [retention(DENSE, scores) for scores in method]
        return float(np.mean([share.above_chance if above_chance else share.mean for share in found]))

    found = lead(DENSE, FIRST, SECOND, above_chance=above_chance)
    assert found is not None
    assert found.difference == pytest.approx(kept(FIRST) - kept(SECOND))
    assert found.low <= found.difference <= found.high
    assert found.items == (11 if above_chance else 15)


def test_records_without_items_and_other_items() -> None:
    old = [[entry.model_copy(update={"right": []}) for entry in scores] for scores in SECOND]
    assert lead(DENSE, FIRST, old, above_chance=True) is None
    assert lead(DENSE, FIRST, [], above_chance=True) is None
    fewer = seeds((["010", "11"], "10010", "1110"))
    with pytest.raises(KDPruneError, match="got 6 and 5 items of a, expected the same items"):
        lead(DENSE, FIRST, fewer, above_chance=True)
    with pytest.raises(KDPruneError, match="got 1 strata and 2 weights"):
        paired_bootstrap([np.ones(3)], [1.0, 1.0])
