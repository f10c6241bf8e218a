"""The dynamic programme against brute force."""

import itertools
import math

import pytest
import torch

from kdprune.errors import KDPruneError
from kdprune.methods.common.selection import candidate_blocks, open_layers, reachable, select_blocks
from kdprune.methods.common.target import Target


def separated(blocks: tuple[range, ...]) -> bool:
    return all(second.start > first.stop for first, second in itertools.pairwise(blocks))


def brute_force(candidates, score, removal):
    best: dict[int, float] = {0: 0.0}
    for count in range(1, 5):
        for blocks in itertools.combinations(sorted(candidates, key=lambda block: block.start), count):
            if separated(blocks):
                removed, total = sum(map(removal, blocks)), sum(map(score, blocks))
                best[removed] = max(best.get(removed, -math.inf), total)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_dynamic_programme_equals_brute_force(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    layers = 9
    similarity = torch.rand(layers + 1, layers + 1, generator=draw, dtype=torch.float64) * 0.9 + 0.05
    sizes = torch.randint(5, 9, (layers,), generator=draw).tolist() if seed % 2 else [7] * layers
    candidates = candidate_blocks(range(1, 9), 2, 4)

    def score(block: range) -> float:
        return math.log(float(similarity[block.start, block.stop]))

    def removal(block: range) -> int:
        return sum(sizes[index] for index in block) - 3

    table, expected = reachable(candidates, score, removal), brute_force(candidates, score, removal)
    assert table.keys() == expected.keys()
    for removed, (total, blocks) in table.items():
        assert total == pytest.approx(expected[removed])
        assert separated(blocks)
        assert sum(map(removal, blocks)) == removed
        assert sum(map(score, blocks)) == pytest.approx(total)
    target = 12
    wanted = Target(target / 100, "all", 100)
    chosen = select_blocks(similarity, candidates, removal, wanted)
    removed = sum(map(removal, chosen))
    assert removed == min(value for value in expected if value >= target)
    assert sum(map(score, chosen)) == pytest.approx(expected[removed])
    slack = 6
    chosen = select_blocks(similarity, candidates, removal, wanted, slack)
    assert target <= sum(map(removal, chosen)) <= target + slack
    sets = [blocks for count in range(1, 5) for blocks in itertools.combinations(candidates, count)
            if separated(blocks) and target <= sum(map(removal, blocks)) <= target + slack]
    assert len(chosen) == max(map(len, sets))
    best = max(sum(map(score, blocks)) for blocks in sets if len(blocks) == len(chosen))
    assert sum(map(score, chosen)) == pytest.approx(best)


def test_the_most_similar_block_wins_at_equal_removal() -> None:
    similarity = torch.full((11, 11), 0.5)
    similarity[4, 7] = 0.9
    chosen = select_blocks(similarity, candidate_blocks(range(1, 9), 2, 4), len, Target(0.3, "all", 10))
    assert chosen == [range(4, 7)]


def test_too_large_a_ratio_says_the_largest_possible() -> None:
    similarity = torch.full((9, 9), 0.5)
    with pytest.raises(KDPruneError, match=r"got ratio 0\.9, expected at most 0\.6"):
        select_blocks(similarity, candidate_blocks(range(1, 7), 2, 6), lambda block: len(block), Target(0.9, "all", 10))


@pytest.mark.parametrize(("layers", "share", "expected"), [(32, 0.1, range(4, 28)), (16, 0.1, range(2, 14)),
                                                           (6, 0.0, range(6)), (4, 0.49, range(2, 2))])
def test_protected_ends(layers: int, share: float, expected: range) -> None:
    assert open_layers(layers, share) == expected


def test_candidates_cover_all_lengths() -> None:
    assert candidate_blocks(range(2, 5), 2, 3) == [range(2, 4), range(2, 5), range(3, 5)]
