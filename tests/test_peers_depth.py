"""Methods that take layers out by a score, and the merge: each against an oracle of its own."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from families import EARLIER_FAMILIES, LAYERS, WIRINGS, build
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.methods.common import budget
from kdprune.methods.common.budget import shortest_blocks
from kdprune.methods.common.distance import Distances, measure_channel_cosine, measure_distances
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.target import Target
from kdprune.methods.peers.drop import (
    SLEB,
    UIDL,
    ShortGPT,
    block_influence,
    cheapest_layers,
    losses_without,
    runs,
)
from kdprune.methods.peers.laco import NEAR, Judge, LaCo, MergeSchedule, Walk
from kdprune.methods.peers.llm_pruner import LLMPruner
from kdprune.methods.peers.merging import (
    Merger,
    edits_of,
    final_states,
    first_tokens,
    mean_cosine,
    merged_names,
    rdsc_merge,
)
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers, final_norm
from kdprune.model.losses import mean_loss
from kdprune.model.surgery import Drop, Rewrite, apply_edits, layers_replaced
from kdprune.runtime.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
PEERS = ("shortgpt", "uidl", "sleb", "laco")


@torch.no_grad()
def loss_without(model: PreTrainedModel, tokens: TokenSet, gone: Iterable[int], batch_size: int) -> float:
    """The oracle: the whole stack without the layers ``gone`` is run; infinite where the loss is not a number."""
    gone = set(gone)
    alive = [layer for index, layer in enumerate(decoder_layers(model)) if index not in gone]
    with layers_replaced(model, alive):
        loss = mean_loss(model, tokens, batch_size)
    return loss if math.isfinite(loss) else math.inf


def padded_tokens(side: str = "right", rows: int = 7, length: int = 12, seed: int = 0) -> TokenSet:
    """Rows with 0 … 6 tokens of padding on the right, the left, or inside ("mixed": either side)."""
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        left = side == "left" or (side == "mixed" and row % 2)
        mask[row, slice(0, row) if left else slice(length - row, None)] = False
    return TokenSet(ids.masked_fill(~mask, 0), mask, "test")  # type: ignore[arg-type]


def states_of(model: PreTrainedModel, tokens: TokenSet, normed: bool = False) -> np.ndarray:
    """All states of all rows in one forward pass, (L+1, N, T, d), for brute force; as ``hidden_states`` has them, the
    last behind the final norm, where ``normed``."""
    if normed:
        with torch.no_grad():
            hidden = model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True)
        return torch.stack(hidden.hidden_states).double().numpy()
    found = next(layer_states(model, tokens, range(LAYERS + 1), batch_size=len(tokens)))[1]
    return torch.stack([found[index] for index in range(LAYERS + 1)]).double().numpy()


def brute_cosine(first: np.ndarray, second: np.ndarray) -> float:
    size = np.linalg.norm(first) * np.linalg.norm(second)
    return 0.5 if size == 0 else float(np.clip(first @ second / size, -1, 1))


def measured(model: PreTrainedModel, tokens: TokenSet, **options: Any) -> Distances:
    return measure_distances(model, tokens, Run(batch_size=3), **options)


# ------------------------------------------------------------------------------------------ distances


@pytest.mark.parametrize("side", ["right", "left", "mixed"])
def test_distances_equal_brute_force_over_recorded_states(side: str) -> None:
    model, tokens = build("llama3"), padded_tokens(side)
    states, mask = states_of(model, tokens), tokens.mask.numpy()
    found = measured(model, tokens)
    for s, e in itertools.product(range(LAYERS + 1), repeat=2):
        cosines = [brute_cosine(states[s, n, t], states[e, n, t]) for n, t in np.argwhere(mask)]
        assert found.cosine[s, e].item() == pytest.approx(np.mean(cosines), abs=1e-9)
        last = [np.flatnonzero(row)[-1] for row in mask]
        angles = [math.acos(brute_cosine(states[s, n, t], states[e, n, t])) / math.pi for n, t in enumerate(last)]
        assert found.angular[s, e].item() == pytest.approx(np.mean(angles), abs=1e-7)
    assert found.tokens == mask.sum() == tokens.tokens
    assert found.cosine.dtype == found.angular.dtype == torch.float64


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2", "gpt_neox", "opt", "stablelm"])
def test_normed_distances_are_those_of_hidden_states(name: str) -> None:
    model, tokens = build(name), padded_tokens("right")
    states, mask = states_of(model, tokens, normed=True), tokens.mask.numpy()
    found, plain = measured(model, tokens, normed=True), measured(model, tokens)
    for s in range(LAYERS + 1):
        cosines = [brute_cosine(states[s, n, t], states[LAYERS, n, t]) for n, t in np.argwhere(mask)]
        assert found.cosine[s, LAYERS].item() == pytest.approx(np.mean(cosines), abs=1e-6)
    assert torch.equal(found.cosine[:-1, :-1], plain.cosine[:-1, :-1])
    assert not torch.allclose(found.cosine[:-1, -1], plain.cosine[:-1, -1], atol=1e-4)


def test_the_cosine_over_tokens_is_torchs_along_them() -> None:
    model, tokens = build("llama3"), padded_tokens("mixed")
    states = torch.from_numpy(states_of(model, tokens))
    found = measure_channel_cosine(model, tokens, Run(batch_size=3))
    for s, e in itertools.combinations(range(LAYERS + 1), 2):
        rows = [torch.cosine_similarity(states[s, n, real][None], states[e, n, real][None]).mean()
                for n, real in enumerate(tokens.mask)]
        torch.testing.assert_close(found[s, e], torch.stack(rows).mean(), rtol=1e-9, atol=1e-9)


def hand_made(monkeypatch: pytest.MonkeyPatch, states: list[list[list[float]]]) -> tuple[PreTrainedModel, TokenSet]:
    """A model and tokens whose states, (S, T, d), are the ones given, whatever they would be."""
    model = build("llama2")
    tokens = TokenSet(torch.ones(1, len(states[0]), dtype=torch.long),  # type: ignore[arg-type]
                      torch.ones(1, len(states[0]), dtype=torch.bool), "hand")  # type: ignore[arg-type]
    values = {index: torch.tensor([rows]) for index, rows in enumerate(states)}
    monkeypatch.setattr("kdprune.methods.common.distance.layer_states", lambda *_: iter([(tokens, values)]))
    return model, tokens


def test_block_influence_of_hand_made_states(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = [1.0, 0.0], [0.0, 2.0]
    diagonal, back, zero = [1.0, 1.0], [-3.0, 0.0], [0.0, 0.0]
    # Two tokens a state; layers: keep, turn by 45° or nothing, by 90° and keep, turn back, vanish, come back.
    states = [[x, y], [x, y], [diagonal, y], [[-1.0, 1.0], y], [back, y], [zero, y], [y, zero]]
    model, tokens = hand_made(monkeypatch, states)
    root = math.sqrt(0.5)
    expected = [0, (1 - root) / 2, 1 / 2, (1 - root) / 2, 0.5 / 2, (0.5 + 0.5) / 2]
    distances = measured(model, tokens)
    assert block_influence(distances.cosine) == pytest.approx(expected, abs=1e-12)
    # The last token alone counts for the angle: y at all states but the last, which is zero there.
    assert distances.angular[0, :6].tolist() == pytest.approx([0] * 6, abs=1e-7)
    assert distances.angular[0, 6].item() == pytest.approx(math.acos(0.5) / math.pi)


# ------------------------------------------------------------------------------------------ ShortGPT and UIDL


def test_runs_and_cheapest_layers() -> None:
    assert runs([7, 3, 4]) == [range(3, 5), range(7, 8)]
    assert runs([]) == []
    assert cheapest_layers([4, 0, 2], [5, 5, 7, 5, 3], 8) == [4, 0]
    assert cheapest_layers([4, 0, 2], [5, 5, 7, 5, 3], 9) == [4, 0, 2]


def test_shortgpt_takes_the_layers_of_least_influence() -> None:
    model, tokens = build("qwen3"), padded_tokens("mixed")
    with torch.no_grad():  # two layers, apart from each other, that hardly change the state
        for index in (1, 4):
            for name, weight in decoder_layers(model)[index].named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(0.01)
    states = states_of(model, tokens, normed=True)
    influence = [np.mean([1 - brute_cosine(states[index, n, t], states[index + 1, n, t])
                          for n, t in np.argwhere(tokens.mask.numpy())]) for index in range(LAYERS)]
    order = np.argsort(influence)
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters()) / model.num_parameters()
    for count in range(1, LAYERS):
        result = ShortGPT(ratio=(count - 0.5) * layer)(model, tokens)
        assert result.blocks == runs(order[:count].tolist())
    assert ShortGPT(ratio=1.5 * layer)(model, tokens).blocks == [range(1, 2), range(4, 5)]
    assert result.tokens == tokens.tokens
    inner = ShortGPT(ratio=1.5 * layer, protect=0.3)(model, tokens)  # layers 2 and 3 alone are open
    assert inner.blocks == [range(2, 4)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_uidl_takes_the_block_whose_ends_are_nearest_at_the_last_real_token(side: str) -> None:
    for seed in range(3):
        model, tokens = build("llama3", seed), padded_tokens(side, seed=seed)
        states = states_of(model, tokens, normed=True)
        layer = sum(p.numel() for p in decoder_layers(model)[0].parameters()) / model.num_parameters()
        for count in (1, 2, 3):
            angles = {}
            for start in range(1, LAYERS - count + 1):
                angles[start] = np.mean([
                    math.acos(brute_cosine(states[start, n, t], states[start + count, n, t])) / math.pi
                    for n, t in enumerate(np.flatnonzero(row)[-1] for row in tokens.mask.numpy())])
            start = min(angles, key=lambda key: angles[key])
            found = UIDL(ratio=(count - 0.5) * layer)(model, tokens)
            assert found.blocks == [range(start, start + count)]
    assert {len(block) for block in shortest_blocks(model, UIDL(ratio=2.5 * layer).target(model), range(LAYERS))} == {3}


def test_every_start_has_its_shortest_block_where_layers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [100] * 4 + [80] * 10 + [81] * 10 + [100] * 2
    monkeypatch.setattr(budget, "layer_sizes", lambda _: sizes)
    model = build("llama3")
    target = Target(0.25, "layers", sum(sizes))
    found = budget.shortest_blocks(model, target, range(len(sizes)))
    for block in found:
        assert sum(sizes[block.start : block.stop]) >= target.parameters > sum(sizes[block.start : block.stop - 1])
    assert [block.start for block in found] == [
        start for start in range(len(sizes)) if sum(sizes[start:]) >= target.parameters]


@pytest.mark.parametrize(("name", "expected"), [
    ("shortgpt", (0, 0)), ("uidl", (1, 0)), ("sleb", (1, 1)), ("streamline", (0, 0)), ("replaceme", (1, 0)),
    ("linearpatch", (1, 1)), ("laco", (1, 0)), ("llm-pruner", (1, 0)), ("kdp", (1, 1)), ("slicegpt", None)])
def test_each_method_keeps_the_layers_that_its_own_code_keeps(name: str, expected: tuple[int, int] | None) -> None:
    model = build("llama3")
    method = METHODS[name]()
    assert method.protected(model) == expected
    if isinstance(method, DepthMethod) and name not in ("laco", "kdp"):
        start, end = method.protected(model) or (0, 0)
        assert method.allowed(model) == range(start, LAYERS - end)
        assert dataclasses.replace(method, protect=0.34).protected(model) == (3, 3)
        assert dataclasses.replace(method, blocks=((2, 4),)).protected(model) is None


def test_llm_pruner_keeps_four_and_two_of_thirty_two() -> None:
    config = build("llama3").config
    config.num_hidden_layers = 32
    assert LLMPruner().protected(AutoModelForCausalLM.from_config(config)) == (4, 2)


# ------------------------------------------------------------------------------------------ SLEB


def copied_without(model: PreTrainedModel, gone: tuple[int, ...]) -> PreTrainedModel:
    return apply_edits(model, [Drop(block) for block in runs(gone)])


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_sleb_equals_greedy_search_over_pruned_copies(name: str) -> None:
    model, tokens = build(name, std=0.3), padded_tokens("mixed", rows=5)
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters()) / model.num_parameters()
    gone: tuple[int, ...] = ()
    for count in range(1, LAYERS - 1):
        inner = [index for index in range(1, LAYERS - 1) if index not in gone]
        losses = {index: mean_loss(copied_without(model, (*gone, index)), tokens, 2) for index in inner}
        gone = (*gone, min(losses, key=lambda index: losses[index]))
        found = SLEB(ratio=(count - 0.5) * layer)(model, tokens, Run(batch_size=2))
        assert found.blocks == runs(gone)
        assert found.tokens == tokens.tokens


@pytest.mark.parametrize(
    ("name", "side"), [*((name, "mixed") for name in WIRINGS), ("llama3", "left"), ("llama3", "right")])
def test_losses_from_the_states_in_front_are_those_of_the_whole_model(name: str, side: str) -> None:
    model, tokens = build(name), padded_tokens(side, rows=5)
    types = copy.deepcopy(getattr(model.config, "layer_types", None))
    before = model(tokens.ids).logits
    for gone, candidates in (([], range(LAYERS)), ([2], (0, 1, 3, 4)), ([4, 1, 3], (2, 5))):
        seen: list[int] = []
        found = losses_without(model, tokens, gone, list(candidates), 2, seen.append)
        assert found == pytest.approx(
            {layer: loss_without(model, tokens, [*gone, layer], 2) for layer in candidates}, rel=1e-6)
        assert len(set(found.values())) == len(candidates) == sum(seen) / 3
    assert getattr(model.config, "layer_types", None) == types
    assert torch.equal(model(tokens.ids).logits, before)


def test_no_layer_in_front_of_a_candidate_is_run_again() -> None:
    model, tokens = build("llama3"), padded_tokens(rows=3)
    calls = [0] * LAYERS
    for index, layer in enumerate(decoder_layers(model)):
        attention: Any = layer.self_attn
        attention.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    losses_without(model, tokens, [2], [1, 3, 4], 8)
    assert calls == [1, 1, 0, 1 + 1, 2, 3]


def test_rows_with_many_logits_go_through_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("llama3"), padded_tokens(rows=5)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(len(logits)))
    expected = losses_without(model, tokens, [], [1, 3], 16)
    assert max(seen) == 5
    monkeypatch.setattr("kdprune.evaluation.perplexity.LOGITS", 2 * tokens.ids.shape[1] * model.config.vocab_size)
    seen.clear()
    assert losses_without(model, tokens, [], [1, 3], 16) == pytest.approx(expected, rel=1e-6)
    assert max(seen) == 2


def test_a_loss_that_is_not_a_number_is_infinite() -> None:
    model, tokens = build("llama3"), padded_tokens(rows=3)
    with torch.no_grad():
        next(decoder_layers(model)[3].parameters()).fill_(math.nan)
    losses = losses_without(model, tokens, [], [1, 3, 4], 2)
    assert losses == {1: math.inf, 3: loss_without(model, tokens, [3], 2), 4: math.inf}
    assert math.isfinite(losses[3])


def test_sleb_against_exhaustive_search() -> None:
    """One layer: greedy is the optimum. More: it can only be worse than the best subset, and each of its steps is the
    best extension of the step before."""
    model, tokens = build("llama3", std=0.3), padded_tokens("mixed", rows=5)
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters()) / model.num_parameters()
    before: set[int] = set()
    for count in (1, 2, 3):
        losses = {gone: loss_without(model, tokens, gone, 16)
                  for gone in itertools.combinations(range(1, LAYERS - 1), count)}
        found = SLEB(ratio=(count - 0.5) * layer)(model, tokens)
        chosen = tuple(index for block in found.blocks for index in block)
        assert losses[chosen] >= min(losses.values())
        assert losses[chosen] == min(loss for gone, loss in losses.items() if before <= set(gone))
        before = set(chosen)
        if count == 1:
            assert losses[chosen] == min(losses.values())


def test_sleb_looks_at_so_many_sequences_only() -> None:
    model, tokens = build("llama3"), padded_tokens(rows=7)
    found = SLEB(ratio=0.2, sequences=3)(model, tokens)
    assert found.tokens == 12 + 11 + 10
    assert found.blocks == SLEB(ratio=0.2)(model, tokens.select(slice(0, 3))).blocks


# ------------------------------------------------------------------------------------------ LaCo: weights


def layer_weights(model: PreTrainedModel, index: int) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in decoder_layers(model)[index].named_parameters()}


def test_the_papers_form_is_the_sum_of_differences_and_the_codes_telescopes() -> None:
    model = build("llama3")
    group = [layer_weights(model, index) for index in range(1, 5)]
    paper, code = rdsc_merge(group, "paper"), rdsc_merge(group, "code")
    for name, base in group[0].items():
        direct = base.double()
        for other in group[1:]:
            direct = direct + (other[name].double() - base.double())
        torch.testing.assert_close(paper[name].double(), direct, rtol=1e-5, atol=1e-6)
        running = base.double().clone()  # the notebook: the base that is subtracted is the one just updated
        for other in group[1:]:
            running += other[name].double() - running
        torch.testing.assert_close(code[name].double(), running, rtol=0, atol=1e-12)
        assert torch.equal(code[name], group[-1][name])
    assert not any(torch.equal(paper[name], code[name]) for name in group[0] if "norm" not in name)
    single = rdsc_merge(group[:2], "paper")  # with m = 1 both forms are θ_{l+1}
    for name, weight in group[1].items():
        torch.testing.assert_close(single[name], weight, rtol=1e-6, atol=1e-6)


def test_sums_in_half_precision_are_taken_in_float32() -> None:
    group = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 1.0078125, 1.015625)]
    assert rdsc_merge(group, "paper")["w"].tolist() == [1.0234375]


@pytest.mark.parametrize("name", EARLIER_FAMILIES)
def test_projections_are_the_matrices_of_attention_and_mlp_with_their_biases(name: str) -> None:
    model = build(name)
    projections, everything = merged_names(model, "projections"), merged_names(model, "all")
    left = [name for name in everything if name not in projections]
    weights = layer_weights(model, 0)
    assert set(projections) < set(everything) == set(weights)
    assert left
    assert all(weights[name].dim() == 1 and ("norm" in name or "ln_" in name) for name in left)
    assert sum(weights[name].dim() == 2 for name in projections) == sum(w.dim() == 2 for w in weights.values())


def test_merging_all_parameters_in_the_codes_form_deletes_layers() -> None:
    model = build("llama3")
    ids = padded_tokens(rows=1).ids
    merged = LaCo(form="code", merged="all", blocks=((2, 4),))(model, padded_tokens())
    assert merged.tokens == 0
    assert {edit.layer for edit in merged.edits if isinstance(edit, Rewrite)} == {1}
    assert merged.blocks == [range(2, 4)]
    with torch.no_grad():
        found = apply_edits(model, merged.edits)(ids).logits
        assert torch.equal(found, apply_edits(model, [Drop(range(1, 3))])(ids).logits)


def test_merged_layers_merge_again() -> None:
    model = build("llama3")
    merger = Merger(model, "paper", merged_names(model, "all"))
    upper = merger.merge(merger.dense(), 2, 2)  # 3, 4 → 2; then 2*, 5 → 1
    both = merger.merge(upper, 1, 2)
    assert [slot.index for slot in upper] == [0, 1, 2, 5]
    assert [slot.index for slot in both] == [0, 1]
    theta = [layer_weights(model, index) for index in range(LAYERS)]
    for name, weight in (both[1].weights or {}).items():
        inner = theta[3][name] + theta[4][name] - theta[2][name]
        torch.testing.assert_close(weight, inner + theta[5][name] - theta[1][name], rtol=1e-5, atol=1e-6)
    edits = edits_of(both, LAYERS)
    assert [edit.layer for edit in edits if isinstance(edit, Rewrite)] == [1]
    assert [edit.block for edit in edits if isinstance(edit, Drop)] == [range(2, 6)]
    pruned = apply_edits(model, edits)
    assert len(decoder_layers(pruned)) == 2
    for name, weight in (both[1].weights or {}).items():
        assert torch.equal(decoder_layers(pruned)[1].get_parameter(name), weight)


# ------------------------------------------------------------------------------------------ LaCo: search


def by_the_book(model: PreTrainedModel, tokens: TokenSet, layers: int, interval: int, threshold: float) -> list[int]:
    """The loop as PEERS prints it, on copies with merged weights (projections, paper's form): surviving layers."""
    def final(which: PreTrainedModel) -> list[torch.Tensor]:
        found, depth = [], which.config.num_hidden_layers
        for row in range(len(tokens)):
            batch = tokens.select(slice(row, row + 1))
            state = next(layer_states(which, batch, [depth], 1))[1][depth]
            found.append(final_norm(which)(state)[0, batch.mask[0]].detach().flatten().double())
        return found

    names, dense, current = merged_names(model, "projections"), final(model), copy.deepcopy(model)
    alive, position = list(range(LAYERS)), LAYERS - 1 - layers
    while position >= 0:
        count = min(layers - 1, len(alive) - 1 - position)
        if count < 1:
            position -= 1
            continue
        candidate = copy.deepcopy(current)
        inside = list(decoder_layers(candidate))
        with torch.no_grad():
            for name in names:
                base = inside[position].get_parameter(name)
                old = base.clone()
                for other in inside[position + 1 : position + count + 1]:
                    base += other.get_parameter(name) - old
        candidate = apply_edits(candidate, [Drop(range(position + 1, position + count + 1))])
        cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(dense, final(candidate), strict=True)]
        if sum(cosines) / len(cosines) > threshold:
            current, alive = candidate, alive[: position + 1] + alive[position + count + 1 :]
            position -= interval
        else:
            position -= 1
    return alive


@pytest.mark.parametrize(("layers", "interval"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_the_loop_is_the_papers(layers: int, interval: int) -> None:
    model, tokens = build("llama3"), padded_tokens("mixed", rows=4)
    for threshold in (-2.0, 0.6, 0.8):
        kept = by_the_book(model, tokens, layers, interval, threshold)
        method = LaCo(form="paper", merge_layers=layers, interval=interval, threshold=threshold)
        if len(kept) == LAYERS:
            with pytest.raises(KDPruneError, match="expected one below"):
                method(model, tokens)
            continue
        result = method(model, tokens, Run(batch_size=3))
        assert result.blocks == runs(set(range(LAYERS)) - set(kept))
        assert result.tokens == tokens.tokens


def judge_of(model: PreTrainedModel, tokens: TokenSet) -> Judge:
    return Judge(model, Merger(model, "paper", merged_names(model, "projections")), tokens, 16, lambda _: None)


def same_walk(one: Walk, other: Walk) -> bool:
    return [slot.index for slot in one.slots] == [slot.index for slot in other.slots] and (
        one.order, one.rejected) == (other.order, other.rejected)


def test_the_search_finds_the_strictest_threshold_that_removes_enough() -> None:
    model, tokens = build("llama3", seed=2), padded_tokens("mixed", rows=4)
    judge = judge_of(model, tokens)
    for (layers, interval), wanted in itertools.product(((2, 1), (3, 1), (3, 2)), range(1, LAYERS + 1)):
        schedule = MergeSchedule(LAYERS, layers, LAYERS - 1 - layers, 0, interval, 0)
        found = judge.strictest(schedule, wanted)
        grid = torch.linspace(-1.01, 1.01, 149).tolist()
        enough = [threshold for threshold in grid if judge.walk(schedule, threshold).removed >= wanted]
        assert (found.removed >= wanted) == bool(enough)
        assert found.removed in schedule.reachable()
        assert same_walk(judge.walk(schedule, math.nextafter(found.accepted, -1)), found)
        if enough:
            assert judge.walk(schedule, found.accepted + NEAR).removed < wanted
            assert found.accepted > max(enough)


def test_the_search_takes_the_number_that_comes_nearest() -> None:
    """Of several at the strictest threshold; against every number on its own."""
    model, tokens = build("llama3", seed=2), padded_tokens("mixed", rows=4)
    judge = judge_of(model, tokens)
    for ratio in (0.15, 0.3, 0.45):
        method = LaCo(form="paper", ratio=ratio, of="layers")
        alone = [judge.strictest(schedule, method.wanted(model)) for schedule in method.schedules(model)]
        best = min((walk for walk in alone if walk.removed >= method.wanted(model)), key=lambda walk: walk.order)
        assert same_walk(method.search(model, judge), best)


def test_similarity_is_one_for_the_same_and_sees_no_padding() -> None:
    model, tokens = build("llama3"), padded_tokens("left", rows=4)
    dense = final_states(model, tokens, 3)
    assert mean_cosine(dense, dense) == pytest.approx(1)
    other = final_states(copied_without(model, (2,)), tokens, 3)
    rows = []
    for row in range(4):
        a, b = (torch.cat(side)[row][tokens.mask[row]].double().flatten() for side in (dense, other))
        rows.append(float(a @ b / a.norm() / b.norm()))
    assert mean_cosine(dense, other) == pytest.approx(sum(rows) / 4)
    assert mean_cosine(dense, [state * math.nan for state in other]) == -math.inf


def test_sentences_are_the_first_real_tokens() -> None:
    tokens = padded_tokens("mixed", rows=4)
    for row, cut in enumerate(first_tokens(tokens, 10).batches(1)):
        real = tokens.ids[row][tokens.mask[row]][:10]
        assert torch.equal(cut.ids[cut.mask], real)
        assert cut.mask[0].tolist() == [True] * len(real) + [False] * (10 - len(real))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_laco_meets_the_ratio_to_the_layer(count: int) -> None:
    model, tokens = build("llama3"), padded_tokens()
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters()) / model.num_parameters()
    for form in ("paper", "code"):
        result = LaCo(ratio=(count - 0.5) * layer, form=form)(model, tokens)
        assert sum(map(len, result.blocks)) == count


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("method", PEERS)
def test_given_blocks_are_taken_and_nothing_is_looked_at(method: str) -> None:
    model, tokens = build("llama3"), padded_tokens()
    result = METHODS[method](blocks=((4, 5), (1, 3)))(model, tokens)
    assert result.blocks == [range(1, 3), range(4, 5)]
    assert result.tokens == 0
    rewritten = sorted(edit.layer for edit in result.edits if isinstance(edit, Rewrite))
    assert rewritten == ([0, 3] if method == "laco" else [])


@pytest.mark.parametrize(("method", "options", "message"), [
    *((name, {"ratio": 0.95}, r"got ratio 0.95, expected at most 0\.\d+, the largest") for name in PEERS),
    *((name, {"blocks": ((1, 3), (3, 4))}, "at least one kept layer between") for name in PEERS),
    *((name, {"blocks": ((4, 9),)}, "the model's layers") for name in PEERS),
    ("sleb", {"protect": 0.4}, "expected at most 0, the largest"),
    ("laco", {"blocks": ((0, 2),)}, "expected a start of 1 or more"),
    ("laco", {"highest": 6}, "expected at most 5, the last layer"),
    ("laco", {"merge_layers": 6}, "no layer can be merged"),
    ("laco", {"lowest": 4}, "no layer can be merged"),
])
def test_what_cannot_be_is_refused_before_any_work(method: str, options: dict[str, Any], message: str) -> None:
    settings = METHODS[method](**{"ratio": 0.2, **options})
    with pytest.raises(KDPruneError, match=message) as refusal:
        settings.check(build("llama3"), padded_tokens())
    assert "\n" not in str(refusal.value)


def test_laco_refuses_layers_of_different_shapes() -> None:
    model = build("llama2")
    layer: Any = decoder_layers(model)[3]
    layer.mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    with pytest.raises(KDPruneError, match="layers 0 and 3 with parameters of different shapes"):
        LaCo().check(model, padded_tokens())


def test_sleb_refuses_rows_without_a_next_token() -> None:
    tokens = padded_tokens(length=1, rows=1)
    with pytest.raises(KDPruneError, match="two tokens in a row"):
        SLEB().check(build("llama2"), tokens)


@pytest.mark.parametrize("method", ["sleb", "laco"])
def test_counts_below_their_least_are_refused(method: str) -> None:
    name = {"sleb": "sequences", "laco": "sentences"}[method]
    with pytest.raises(KDPruneError, match=f"got {name} 0"):
        METHODS[method](**{name: 0})
