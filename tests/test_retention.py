"""Retained performance against figures by hand."""

import math
from typing import Any

import pytest

from kdprune.errors import KDPruneError
from kdprune.report.retention import carries_signal, retention, row_name
from kdprune.report.task_records import TaskScore


def score(task: str, value: float, stderr: float | None, chance: float | None, **changes: Any) -> TaskScore:
    given = {"group": task, "metric": "acc", "items": 100, "higher_is_better": True, **changes}
    return TaskScore(task=task, value=value, stderr=stderr, chance=chance, **given)


DENSE = [
    score("a", 0.8, 0.05, 0.5), score("b", 0.3, 0.1, 0.25), score("blimp", 0.9, 0.02, 0.5, group="binding"),
    score("text", 40.0, None, None, metric="perplexity", higher_is_better=False),
]
PRUNED = [
    score("text", 400.0, None, None, metric="perplexity", higher_is_better=False),
    score("blimp", 0.8, 0.03, 0.5, group="binding"), score("b", 0.35, 0.1, 0.25), score("a", 0.65, 0.04, 0.5),
]


def test_retention_by_hand() -> None:
    found = retention(DENSE, PRUNED)
    assert found.mean == pytest.approx(1.8 / 2.0)
    assert found.above_chance == pytest.approx((0.15 / 0.3 + 0.3 / 0.4) / 2)
    assert found.signal == ["a", "blimp: binding"]
    assert found.left_out == ["b"]
    first = (0.04**2 + (0.5 * 0.05) ** 2) / 0.3**2
    second = (0.03**2 + (0.75 * 0.02) ** 2) / 0.4**2
    assert found.above_chance_stderr == pytest.approx(math.sqrt(first + second) / 2)
    whole = 0.04**2 + 0.1**2 + 0.03**2 + 0.81 * (0.05**2 + 0.1**2 + 0.02**2)
    assert found.mean_stderr == pytest.approx(math.sqrt(whole) / 2.0)
    same = retention(DENSE, DENSE)
    assert (same.mean, same.above_chance) == (1.0, 1.0)


def test_a_benchmark_counts_once_above_chance() -> None:
    """Two rows of BLiMP, of one and of three paradigms, beside a task: the paper's mean has three scores, ours two."""
    rows = [("binding", 0.9, "1"), ("islands", 0.7, "3")]
    dense, pruned = ([score("a", first, 0.05, 0.5), *(
        score("blimp", value - less, 0.02, 0.5, group=group, right=["1"] * int(count)) for group, value, count in rows)]
        for first, less in ((0.8, 0.0), (0.65, 0.1)))
    found = retention(dense, pruned)
    assert found.mean == pytest.approx((0.65 + 0.8 + 0.6) / (0.8 + 0.9 + 0.7))
    assert found.above_chance == pytest.approx((0.15 / 0.3 + (0.65 - 0.5) / (0.75 - 0.5)) / 2)
    assert (found.signal, found.left_out) == (["a", "blimp"], [])


def test_signal_is_two_standard_errors_above_chance() -> None:
    assert carries_signal(score("a", 0.61, 0.05, 0.5))
    assert not carries_signal(score("a", 0.6, 0.05, 0.5))
    assert not carries_signal(score("a", 0.9, None, 0.5))
    assert not carries_signal(score("a", 0.9, 0.01, None))
    nothing = retention([score("a", 0.5, 0.1, 0.5)], [score("a", 0.4, 0.1, 0.5)])
    assert (nothing.above_chance, nothing.signal, nothing.left_out) == (None, [], ["a"])
    unknown = retention([score("a", 0.9, 0.1, 0.5)], [score("a", 0.7, None, 0.5)])
    assert (unknown.above_chance, unknown.above_chance_stderr) == (pytest.approx(0.5), None)


@pytest.mark.parametrize(("dense", "pruned", "message"), [
    (DENSE, PRUNED[1:3], "got a, a, acc of one model alone"),
    ([score("a", 0.5, 0.1, 0.0)], [score("a", 0.5, 0.1, 0.0, items=50)], "got 100 and 50 items of a"),
    (DENSE[3:], PRUNED[:1], "got no score above 0"),
])
def test_scores_that_do_not_compare(dense: list[Any], pruned: list[Any], message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        retention(dense, pruned)


def test_what_a_row_is() -> None:
    assert [item.is_share for item in DENSE] == [True, True, True, False]
    assert (DENSE[2].key, row_name(DENSE[2])) == (("blimp", "binding", "acc"), "blimp: binding")
