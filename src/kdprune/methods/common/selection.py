"""Which blocks to replace: an exact dynamic programme under a net-parameter budget (KDP, section 2)."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from kdprune.methods.common.target import Target

# Above any sum of log similarities: with it as a part of every block's score, more blocks always score higher.
_ONE_MORE = 1e5

# Best total score and the blocks that reach it, by parameters removed.
_Table: TypeAlias = dict[int, tuple[float, tuple[range, ...]]]


def open_layers(layers: int, protect: float) -> range:
    """The layers that may be removed: all but the first and last ``ceil(protect · L)``."""
    kept = math.ceil(protect * layers)
    return range(kept, max(layers - kept, kept))


def candidate_blocks(layers: range, shortest: int, longest: int) -> list[range]:
    """Every block inside ``layers`` with shortest ≤ length ≤ longest, by start, then by length."""
    return [
        range(start, start + length)
        for start in layers
        for length in range(shortest, longest + 1)
        if start + length <= layers.stop
    ]


def reachable(
    candidates: Sequence[range], score: Callable[[range], float], removal: Callable[[range], int],
    most: float = math.inf,
) -> _Table:
    """For every total removal that some set of separated blocks reaches, the set of greatest total score.

    Two blocks are separated by at least one kept layer, because a stand-in is folded into the layer before its
    gap. Exact: ``kept[p]`` and ``cut[p]`` are the best tables for the layers before p when layer p−1 is kept,
    respectively ends a block; a block may start only where ``kept`` holds.

    Args:
        candidates: blocks to choose from.
        score: value of a block.
        removal: net parameters it removes.
        most: totals beyond this are not looked at, nor what they could lead to.
    """
    last = max((block.stop for block in candidates), default=0)
    kept: list[_Table] = [{} for _ in range(last + 1)]
    kept[0][0] = (0.0, ())
    cut: list[_Table] = [{} for _ in range(last + 1)]
    for position in range(last + 1):
        if position:
            _merge(kept[position], kept[position - 1])
            _merge(kept[position], cut[position - 1])
        for block in candidates:
            if block.start == position:
                gain, size = score(block), removal(block)
                extended = {
                    removed + size: (total + gain, (*blocks, block))
                    for removed, (total, blocks) in kept[position].items() if removed + size <= most
                }
                _merge(cut[block.stop], extended)
    result: _Table = {}
    _merge(result, kept[last])
    _merge(result, cut[last])
    return result


def _merge(into: _Table, other: _Table) -> None:
    for removed, entry in other.items():
        if removed not in into or entry[0] > into[removed][0]:
            into[removed] = entry


def select_blocks(
    similarity: Tensor, candidates: Sequence[range], removal: Callable[[range], int], target: Target, slack: int = 0,
) -> list[range]:
    """The blocks whose net removal meets ``target`` as closely as possible from above, with greatest Σ log similarity.

    With ``slack``, of all sets that remove at most so much more than ``target``, one of the most blocks: several short
    ones, each with a stand-in of its own, lose less than one long one (research/small-models/better.md).

    Args:
        similarity: score of a block [s, e) at entry [s, e], shape (L+1, L+1), in (0, 1].
        candidates: blocks to choose from.
        removal: net parameters removed by a block (layers minus stand-in).
        target: parameters to remove.
        slack: parameters that may go beyond the target; of sets that are level the one that removes least is taken.

    Raises:
        KDPruneError: no set of blocks removes that much (says the largest ratio that can be reached).
    """
    one_more = _ONE_MORE if slack else 0.0
    table = reachable(candidates, lambda block: one_more + _log(similarity[block.start, block.stop]), removal)
    target.check(max(table), *out_of_reach(candidates))
    enough = [removed for removed in table if removed >= target.parameters]
    near = [removed for removed in enough if removed <= max(min(enough), target.parameters + slack)]
    return list(table[max(near, key=lambda removed: (table[removed][0], -removed))][1])


def out_of_reach(candidates: Sequence[range]) -> tuple[str, str]:
    """What keeps sets of these blocks from removing more, and what the user can do, for :meth:`Target.check`."""
    longest = max(map(len, candidates), default=0)
    return (f"the unprotected layers of this model allow in blocks of at most {longest}",
            "lower the ratio, protect fewer layers (protect=…) or allow longer blocks (max_block=…)")


def _log(value: Tensor) -> float:
    # A block whose ends are unrelated (similarity ≤ 0) must never look attractive.
    return math.log(max(float(value), 1e-12))
