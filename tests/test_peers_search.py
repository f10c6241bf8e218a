"""EvoPress against exhaustive search, and what it says it took."""

import itertools
import math

import pytest
import torch
from families import LAYERS, build
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.common.result_files import ResultCodec
from kdprune.methods.peers.drop import runs
from kdprune.methods.peers.evopress import EvoPress, Judge, LayerSets
from kdprune.model import teacher
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import Drop, apply_edits
from kdprune.model.teacher import Teacher
from kdprune.runtime.run import Run
from kdprune.testing import CALIBRATION

pytestmark = pytest.mark.usefixtures("one_thread")


def share(model: PreTrainedModel, count: int) -> float:
    """A ratio that takes so many layers."""
    return (count - 0.5) * layer_sizes(model)[0] / model.num_parameters()


@torch.no_grad()
def divergence(model: PreTrainedModel, gone: tuple[int, ...], tokens: TokenSet) -> float:
    """The oracle: KL of all next-token distributions of the dense model and of a pruned copy, in float64."""
    pruned = apply_edits(model, [Drop(block) for block in runs(gone)])
    p, q = (one(tokens.ids, attention_mask=tokens.mask.long()).logits.double().log_softmax(-1)[tokens.mask]
            for one in (model, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("name", "count"), [("llama3", 2), ("gemma3", 3), ("gpt2", 1)])
def test_it_finds_what_exhaustive_search_finds(name: str, count: int) -> None:
    model = build(name, std=0.3)
    values = {gone: divergence(model, gone, CALIBRATION) for gone in itertools.combinations(range(LAYERS), count)}
    found = EvoPress(ratio=share(model, count), screen=1.0, judge=1.0, first=4, offspring=6, passes=90)(
        model, CALIBRATION, Run(batch_size=3))
    chosen = tuple(layer for block in found.blocks for layer in block)
    assert chosen == min(values, key=lambda gone: values[gone])
    assert found.search is not None
    assert found.search["divergence"][-1] == pytest.approx(values[chosen], rel=1e-4)
    # On the same rows the parent stays unless a mutant is better.
    assert found.search["divergence"] == sorted(found.search["divergence"], reverse=True)


def test_growing_rows_find_it_too() -> None:
    """Mutants are compared on a quarter of the rows, those that survive on all of them."""
    model = build("llama3", std=0.3)
    values = {gone: divergence(model, gone, CALIBRATION) for gone in itertools.combinations(range(LAYERS), 2)}
    found = EvoPress(ratio=share(model, 2), screen=0.25, judge=1.0, first=8, offspring=8, survivors=3, passes=80)(
        model, CALIBRATION)
    assert tuple(layer for block in found.blocks for layer in block) == min(values, key=lambda gone: values[gone])


def test_the_passes_are_counted_and_within_the_budget() -> None:
    model, calls = build("llama3"), 0

    def count(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        nonlocal calls
        calls += output.shape[0]

    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(count)
    found = EvoPress(ratio=share(model, 2), first=5, offspring=4, screen=0.2, judge=0.5, passes=12)(
        model, CALIBRATION, Run(batch_size=2))
    hook.remove()
    assert found.search is not None
    assert found.search["passes"] == calls / len(CALIBRATION)
    assert 2 < found.search["passes"] <= 12
    assert found.tokens == CALIBRATION.tokens  # of so many draws each row is one
    again = ResultCodec(model).unpack(*ResultCodec(model).pack(found))
    assert (again.blocks, again.search, again.tokens) == (found.blocks, found.search, found.tokens)


def test_the_default_budget_is_the_papers() -> None:
    model = build("llama3")
    rows = CALIBRATION.select(torch.arange(128) % len(CALIBRATION))
    effort = EvoPress(ratio=share(model, 3)).effort(model, rows)
    assert (effort.screened, effort.judged, effort.generations) == (2, 32, math.ceil(3 * 3 / 1.5))
    assert effort.rows == 128 + 64 * 2 + 6 * (32 * 2 + 3 * 32)


def test_sets_meet_the_target_and_have_nothing_to_spare() -> None:
    sizes, target, draw = [5, 9, 5, 7, 9, 5, 7, 3], 17, torch.Generator().manual_seed(0)
    sets = LayerSets(range(1, 8), sizes, target, draw)
    wanted = {frozenset(found) for count in range(1, 8) for found in itertools.combinations(range(1, 8), count)
              if target <= sum(sizes[i] for i in found) < target + min(sizes[i] for i in found)}
    seen, current = set(), sets.random()
    for _ in range(600):
        seen |= {sets.random(), current}
        current = sets.mutated(current)
    assert seen == wanted  # every such set is drawn, and no other
    equal = LayerSets(range(8), [4] * 8, 9, draw)
    parent = equal.random()
    assert {len(equal.mutated(parent)) for _ in range(20)} == {3} == {len(parent)}
    assert {len(parent - equal.mutated(parent)) for _ in range(60)} == {1, 2, 3}


def test_a_divergence_that_is_not_a_number_is_infinite() -> None:
    model = build("llama3")
    with torch.no_grad():
        next(decoder_layers(model)[3].parameters()).fill_(math.nan)
    known = Teacher(model, CALIBRATION, 64, keep=torch.arange(len(CALIBRATION)))
    judge = Judge(model, CALIBRATION, known, 8, lambda _: None)
    assert judge([frozenset({1}), frozenset({4})], torch.arange(3)) == [math.inf] * 2
    with pytest.raises(KDPruneError, match="no finite divergence"):
        EvoPress(ratio=0.2, passes=8, first=2, offspring=2)(model, CALIBRATION)


def test_what_it_refuses() -> None:
    model = build("llama3")
    with pytest.raises(KDPruneError, match=r"got passes 2, expected [\d.]+ or more: what the dense model") as refusal:
        EvoPress(ratio=0.2, passes=2).check(model, CALIBRATION)
    least = float(str(refusal.value).split("expected ")[1].split()[0])
    EvoPress(ratio=0.2, passes=least).check(model, CALIBRATION)
    EvoPress(blocks=((1, 3),), passes=0.1).check(model, CALIBRATION)
    assert EvoPress(blocks=((1, 3),))(model, CALIBRATION).search is None
    with pytest.raises(KDPruneError, match="the largest the layers that may be taken out allow"):
        EvoPress(ratio=0.95).check(model, CALIBRATION)


def test_passes_hold_where_the_dense_distributions_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama3")
    kept = EvoPress(ratio=0.2, passes=20)(model, CALIBRATION).search
    monkeypatch.setattr(teacher, "KEPT", 0)
    again = EvoPress(ratio=0.2, passes=20)(model, CALIBRATION).search
    assert kept is not None
    assert again is not None
    assert max(kept["passes"], again["passes"]) <= 20
    assert len(again["divergence"]) < len(kept["divergence"])  # whose rows are counted again
