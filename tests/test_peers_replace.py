"""Methods that put something in the gap: LLM-Streamline, ReplaceMe, KDP without its kernel, LinearPatch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import WIDTH, WIRINGS, build
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned import bypassed
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.methods.common.block_data import block_states
from kdprune.methods.common.distance import measure_distances
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.peers.drop import runs
from kdprune.methods.peers.linear import fit_affine
from kdprune.methods.peers.linearpatch import LinearPatch, channel_scales, hadamard, paley, patch_matrix
from kdprune.methods.peers.replaceme import ReplaceMe, folded_weights, interface, least_squares, nearest_runs
from kdprune.methods.peers.streamline import LayerFit, Streamline, new_ffn
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Drop, Rewrite, Substitute, apply_edits
from kdprune.runtime.run import Run
from kdprune.train.gradients import Sums
from kdprune.train.loop import Schedule, fit
from kdprune.train.trial import RATES

pytestmark = pytest.mark.usefixtures("one_thread")

# name: (method, options that make it quick).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "streamline-none": ("streamline", {"stand_in": "none"}),
    "streamline-ffn": ("streamline", {"stand_in": "ffn", "epochs": 2, "rate": 3e-3}),
    "streamline-layer": ("streamline", {"stand_in": "layer", "epochs": 2, "rate": 1e-3}),
    "replaceme-cosine": ("replaceme", {"epochs": 2, "rate": 1e-3}),
    "replaceme-least-squares": ("replaceme", {"solver": "least_squares"}),
    "linear": ("linear", {"protect": 0.0}),
    "linearpatch": ("linearpatch", {}),
}
STOCK = {"streamline-none", "streamline-layer", "replaceme-cosine", "replaceme-least-squares"}
NORMS_BEHIND = {"gemma3", "opt-350m"}  # ReplaceMe's map does not reach the stream there


def random_tokens(rows: int = 8, length: int = 12, seed: int = 0) -> TokenSet:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), "random")  # type: ignore[arg-type]


def padded_tokens(filler: int) -> TokenSet:
    """Rows of different lengths, padded on either side with ``filler``."""
    tokens = random_tokens()
    mask = tokens.mask.clone()
    mask[0, :3], mask[2, 7:], mask[5, :5], mask[7, 9:] = False, False, False, False
    return TokenSet(tokens.ids.masked_fill(~mask, filler), mask, "padded")  # type: ignore[arg-type]


def method(case: str, **options: Any) -> DepthMethod:
    name, quick = CASES[case]
    made = METHODS[name](**{**quick, **options})
    assert isinstance(made, DepthMethod)
    return made


def prune(case: str, model: PreTrainedModel, tokens: TokenSet, seed: int = 0, **options: Any) -> MethodResult:
    made = method(case, **options)
    made.check(model, tokens)
    return made(model, tokens, Run(seed, batch_size=3))


def logits(model: PreTrainedModel, tokens: TokenSet | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=(tokens or random_tokens(2, seed=9)).ids).logits


def endpoints(model: PreTrainedModel, tokens: TokenSet, block: range) -> tuple[Tensor, Tensor]:
    """h_s and h_e of the real tokens of all rows: the oracle's own pass, batch by batch."""
    found = [[states[index][batch.mask] for index in (block.start, block.stop)]
             for batch, states in layer_states(model, tokens, [block.start, block.stop], 3)]
    before, after = zip(*found, strict=True)
    return torch.cat(before), torch.cat(after)


# ------------------------------------------------------------------------------------------ every method


@pytest.mark.parametrize("case", CASES)
def test_what_is_fitted_beside_the_layers_has_a_record(case: str) -> None:
    result = prune(case, build("llama3"), random_tokens())
    assert len(result.fit) == (0 if case in STOCK else len(result.blocks))


@pytest.mark.parametrize("case", CASES)
def test_one_seed_one_result_and_padding_enters_nothing(case: str) -> None:
    model = build("llama3")
    found = [apply_edits(model, prune(case, model, padded_tokens(filler)).edits).state_dict() for filler in (0, 41)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


@pytest.mark.parametrize("case", CASES)
def test_explicit_blocks_are_taken(case: str) -> None:
    model = build("llama3")
    result = prune(case, model, random_tokens(), blocks=((4, 6), (1, 3)))
    assert result.blocks == [range(1, 3), range(4, 6)]
    kept = 4 if case == "streamline-layer" else 2
    assert apply_edits(model, result.edits).config.num_hidden_layers == kept


@pytest.mark.parametrize(("case", "options", "rows", "message"), [
    ("replaceme-cosine", {"blocks": ((0, 2),)}, 8, "got block \\[0, 2\\), expected one that starts at layer 1"),
    ("streamline-layer", {"blocks": ((2, 3),)}, 8, "got a block of one layer"),
    *((case, {"ratio": 0.99}, 8, "got ratio 0.99, expected at most") for case in CASES),
    *((case, {"blocks": ((1, 3), (3, 5))}, 8, "at least one kept layer between") for case in CASES),
    *((case, {}, 1, "got one row of calibration") for case in CASES if case != "streamline-none"),
])
def test_refusals_in_one_line(case: str, options: dict[str, Any], rows: int, message: str) -> None:
    with pytest.raises(KDPruneError, match=message) as error:
        method(case, **options).check(build("llama3"), random_tokens(rows))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ LLM-Streamline


def test_streamline_takes_the_run_of_greatest_cosine() -> None:
    model, tokens = build("llama3"), random_tokens()
    block = prune("streamline-none", model, tokens).blocks[0]
    with torch.no_grad():
        hidden = model(input_ids=tokens.ids, output_hidden_states=True).hidden_states  # the last behind the norm
    cosines = {start: float(cosine_similarity(hidden[start], hidden[start + len(block)], dim=-1).mean())
               for start in range(6 - len(block) + 1)}
    assert block.start == max(cosines, key=lambda start: cosines[start])
    plain = prune("streamline-none", model, tokens, last_state="plain").blocks[0]
    last = range(6 - len(block), 6)
    cosines[last.start] = float(cosine_similarity(*endpoints(model, tokens, last), dim=-1).mean())
    assert plain.start == max(cosines, key=lambda start: cosines[start])


def test_streamlines_network_starts_small_and_without_biases() -> None:
    stand_in = new_ffn(128, torch.Generator().manual_seed(0))
    for module in (stand_in.phase, stand_in.readout):
        weight = module.weight.detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
        assert abs(float(weight.mean())) < 3e-4
        assert not module.bias.any()
    again = new_ffn(128, torch.Generator().manual_seed(0))
    assert torch.equal(stand_in.phase.weight, again.phase.weight)


@pytest.mark.parametrize("case", ["streamline-ffn", "streamline-layer", "replaceme-cosine"])
def test_a_rate_that_is_not_given_is_the_one_that_held_out_rows_find_best(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, blocks = build("llama3"), random_tokens(40), ((1, 3),)
    told: list[tuple[float, float]] = []
    for place in ("stand_in_fit", "replaceme"):
        room = "peers" if place == "replaceme" else "common"
        monkeypatch.setattr(f"kdprune.methods.{room}.{place}.saying", lambda *_: lambda *pair: told.append(pair))
    found = prune(case, model, tokens, rate=None, blocks=blocks)
    [rate] = found.rates
    assert [pair[0] for pair in told] == list(RATES[: len(told)])
    assert rate == min(told, key=lambda pair: pair[1])[0]
    assert len(told) == min(RATES.index(rate) + 2, len(RATES))
    # The same draws, so the same bits as with that rate given.
    again = prune(case, model, tokens, rate=rate, blocks=blocks)
    assert not again.rates
    states = [apply_edits(model, result.edits).state_dict() for result in (found, again)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert found.training == again.training > 0


def test_training_is_counted_in_parameters_times_tokens() -> None:
    model, tokens = build("llama3"), padded_tokens(0)
    fitted = int(tokens.mask[:7].sum())  # 8 rows, one held out
    layer = sum(parameter.numel() for parameter in decoder_layers(model)[1].parameters())
    expected = {"streamline-ffn": 8 * WIDTH**2 + 5 * WIDTH, "streamline-layer": layer, "replaceme-cosine": WIDTH**2}
    for case, parameters in expected.items():
        assert prune(case, model, tokens, blocks=((1, 3),)).training == 2 * fitted * parameters
    for case in ("linear", "linearpatch", "replaceme-least-squares"):
        assert prune(case, model, tokens, blocks=((1, 3),)).training == 0


def test_streamlines_network_has_the_papers_form() -> None:
    edit = prune("streamline-ffn", build("llama3"), random_tokens()).edits[0]
    assert isinstance(edit, Substitute)
    assert edit.context is None
    stand_in, x = edit.stand_in, torch.randn(5, WIDTH)
    assert sum(p.numel() for p in stand_in.parameters()) == 8 * WIDTH**2 + 5 * WIDTH
    hidden = (x @ stand_in.phase.weight.T + stand_in.phase.bias).clamp_min(0)
    torch.testing.assert_close(stand_in(x), hidden @ stand_in.readout.weight.T + stand_in.readout.bias)


@pytest.mark.parametrize("name", WIRINGS)
def test_streamlines_layer_is_the_models_own_and_sees_no_future_token(name: str) -> None:
    model, tokens = build(name), padded_tokens(0)
    states, = block_states(model, tokens, [range(2, 5)], 0.2, Run(batch_size=3))
    fitting, rows = LayerFit(model, states, Run()), torch.tensor([1, 4, 2])
    before = fitting.predict(rows).detach()
    _, after_one = endpoints(model, tokens.select(rows), range(2, 3))
    torch.testing.assert_close(before[tokens.mask[rows]], after_one, rtol=1e-4, atol=1e-4)
    changed = states.inputs[torch.tensor([1])]
    changed[0, 7] += 1.0
    states.inputs.put(torch.tensor([1]), changed)
    after = fitting.predict(rows).detach()
    assert torch.equal(after[0, :7], before[0, :7])
    assert not torch.allclose(after[0, 7:], before[0, 7:])


@pytest.mark.parametrize("form", ["ffn", "layer"])
def test_streamline_learns(form: str) -> None:
    model, tokens = build("llama3"), random_tokens(24)
    options = {"blocks": ((1, 4),), "epochs": 15, "batch": 4}
    trained, start = (
        apply_edits(model, prune(f"streamline-{form}", model, tokens, **{**options, **extra}).edits)
        for extra in ({}, {"epochs": 1, "rate": 1e-9}))
    place = {"ffn": 1, "layer": 2}[form]  # the state that stands for h_4
    target = endpoints(model, tokens, range(1, 4))[1]
    errors = [(endpoints(pruned, tokens, range(place))[1] - target).square().mean() for pruned in (trained, start)]
    assert errors[0] < 0.9 * errors[1]


# ------------------------------------------------------------------------------------------ ReplaceMe


@pytest.mark.parametrize("name", ["opt", *(name for name in WIRINGS if name not in NORMS_BEHIND)])
def test_replaceme_folded_is_unfolded(name: str) -> None:
    model, block = build(name), range(2, 4)
    matrix = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    folded = apply_edits(model, [Rewrite(1, folded_weights(model, 1, matrix)), Drop(block)])
    projection = decoder_layers(model)[1].get_submodule(family_of(model).mlp_out)
    hook = projection.register_forward_hook(lambda _, __, output: output @ matrix.T)
    with bypassed(model, block):
        unfolded = logits(model)
    hook.remove()
    torch.testing.assert_close(logits(folded), unfolded, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), unfolded, atol=1e-2)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "gpt_neox"])
def test_replacemes_least_squares_is_lstsqs(name: str) -> None:
    model, tokens, block = build(name), random_tokens(16), range(2, 4)
    with interface(model, block) as states:
        output, rest, target = states(tokens)
    before, after = endpoints(model, tokens, block)
    torch.testing.assert_close(output + rest, before)
    torch.testing.assert_close(target, after)
    expected = torch.linalg.lstsq(output.double(), (target - rest).double()).solution.T
    torch.testing.assert_close(least_squares(model, tokens, block, 0.0, 5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["replaceme-cosine", "replaceme-least-squares"])
def test_replaceme_brings_the_stream_nearer(case: str) -> None:
    model, tokens, block = build("llama3"), random_tokens(24), (2, 4)
    pruned = apply_edits(model, prune(case, model, tokens, blocks=(block,), **(
        {"epochs": 10, "rate": 0.02} if "cosine" in case else {})).edits)
    before, after = endpoints(model, tokens, range(*block))
    found = endpoints(pruned, tokens, range(1, 2))[1]
    assert cosine_similarity(found, after, dim=-1).mean() > cosine_similarity(before, after, dim=-1).mean() + 0.02
    if case != "replaceme-cosine":
        assert (found - after).square().mean() < (before - after).square().mean()


@pytest.mark.parametrize("compared", ["stream", "update"])
def test_replacemes_cosine_is_adam_on_its_distance(compared: str) -> None:
    model, tokens, block = build("llama3"), random_tokens(4), range(2, 4)
    found = prune("replaceme-cosine", model, tokens, blocks=((2, 4),), compared=compared, epochs=1, batch=3, rate=0.01)
    with interface(model, block) as states:
        output, rest, target = states(tokens.select(slice(0, 3)))  # the last row is held out
    matrix = torch.eye(WIDTH, requires_grad=True)
    mapped = output @ matrix.T
    pair = (rest + mapped, target) if compared == "stream" else (mapped, target - rest)
    (1 - cosine_similarity(*pair, dim=-1)).mean().backward()
    step = torch.optim.Adam([matrix], lr=1.0)
    torch.optim.lr_scheduler.OneCycleLR(  # sets the rate a schedule of one step starts from
        step, 0.01, total_steps=2, pct_start=0.05, cycle_momentum=False, final_div_factor=1e4)
    step.step()
    expected = matrix.detach()
    [rewrite] = [edit for edit in found.edits if isinstance(edit, Rewrite)]
    folded = folded_weights(model, 1, expected)
    for name, weight in rewrite.weights.items():
        torch.testing.assert_close(weight, folded[name], rtol=1e-4, atol=1e-6)


def test_replaceme_takes_the_nearest_run_at_the_last_token() -> None:
    model, tokens = build("llama3"), padded_tokens(0)
    [block] = prune("replaceme-least-squares", model, tokens).blocks
    with torch.no_grad():
        hidden = model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True).hidden_states
    last = torch.stack([row.nonzero()[-1, 0] for row in tokens.mask])
    angles = {}
    for start in range(1, 6 - len(block) + 1):
        pair = (hidden[start][range(8), last].double(), hidden[start + len(block)][range(8), last].double())
        angles[start] = float(cosine_similarity(*pair, dim=-1).arccos().mean())
    assert block.start == min(angles, key=lambda start: angles[start])


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_nearest_runs_are_greedy_and_never_run_out_of_room(seed: int, length: int, count: int, more: int) -> None:
    allowed = range(1, 1 + length * count + more)
    distance = torch.rand(allowed.stop + 1, allowed.stop + 1, generator=torch.Generator().manual_seed(seed))
    found = nearest_runs(distance, allowed, length, count)
    layers = [layer for block in found for layer in block]
    assert len(found) == count
    assert len(set(layers)) == len(layers) == count * length
    assert set(layers) <= set(allowed)
    blocks = [range(s, s + length) for s in range(allowed.start, allowed.stop - length + 1)]
    ranked = sorted(blocks, key=lambda block: float(distance[block.start, block.stop]))
    if more >= (length - 1) * count:  # room enough for any: then each is the nearest of those beside the others
        chosen: list[range] = []
        for block in ranked:
            if len(chosen) < count and not any(set(block) & set(other) for other in chosen):
                chosen.append(block)
        assert found == sorted(chosen, key=lambda block: block.start)


def test_replaceme_cuts_in_several_places() -> None:
    model, tokens = build("llama3"), random_tokens()
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters()) / model.num_parameters()
    result = prune("replaceme-least-squares", model, tokens, cuts=2, ratio=1.5 * layer)
    distance = measure_distances(model, tokens, Run(batch_size=3), normed=True).angular
    order = sorted(range(1, 6), key=lambda start: float(distance[start, start + 1]))
    assert sorted(layer for block in result.blocks for layer in block) == sorted(order[:2])
    assert apply_edits(model, result.edits).config.num_hidden_layers == 4
    with pytest.raises(KDPruneError, match="got 6 cuts for 5 layers"):
        method("replaceme-least-squares", cuts=6).check(model, tokens)


def test_replacemes_cosine_starts_from_dropping() -> None:
    model = build("gpt2")
    edits = prune("replaceme-cosine", model, random_tokens(), blocks=((2, 4),), epochs=1, rate=1e-12).edits
    torch.testing.assert_close(
        logits(apply_edits(model, edits)), logits(apply_edits(model, [Drop(range(2, 4))])), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ linear maps


def fitted_site(solve: Callable[..., StandInFit]) -> tuple[StandInFit, np.ndarray, np.ndarray]:
    """A fitting of the block [1, 4) and numpy's h_s and h_e of the rows it may be fitted on."""
    model, tokens = build("llama3"), padded_tokens(0)
    states, = block_states(model, tokens, [range(1, 4)], 0.25, Run(batch_size=3))
    pair = endpoints(model, tokens.select(slice(0, 6)), range(1, 4))
    return solve(model, states), *(state.double().numpy() for state in pair)


def test_linear_is_numpys_ridge_regression() -> None:
    ridge = 0.01
    fitting, before, after = fitted_site(lambda model, states: fit_affine(model, states, ridge, Run()))
    centred, update = before - before.mean(0), after - before
    penalty = np.sqrt(ridge * (centred**2).sum() / WIDTH) * np.eye(WIDTH)
    expected = np.linalg.lstsq(
        np.vstack((centred, penalty)), np.vstack((update - update.mean(0), np.zeros_like(penalty))), rcond=None)[0].T
    readout = fitting.stand_in.readout
    np.testing.assert_allclose(readout.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        readout.bias.detach(), update.mean(0) - expected @ before.mean(0), rtol=1e-4, atol=1e-4)
    assert fitting.stand_in.residual
    assert not fitting.stand_in.normalize


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 32, 36, 44, 60, 76, 84, 108, 140])
def test_paleys_matrices_are_hadamards(order: int) -> None:
    matrix = paley(order)
    assert matrix.shape == (order, order)
    assert set(matrix.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [6, 40, 52, 92])
def test_paley_refuses_what_it_does_not_give(order: int) -> None:
    with pytest.raises(ValueError, match=f"got order {order}, expected q \\+ 1 or 2"):
        paley(order)


@pytest.mark.parametrize(("size", "whole"), [
    *((size, size) for size in (1, 2, 12, 20, 28, 32, 36, 40, 96, 128, 576, 640, 896, 960, 1152)),
    (33, 1), (18, 2), (52, 4), (92, 4), (184, 8)])  # where Paley gives none: runs of the greatest divisor it gives
def test_hadamard_is_orthonormal(size: int, whole: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    entries = matrix[matrix != 0].abs()
    assert len(entries) == size * whole
    torch.testing.assert_close(entries, torch.full_like(entries, whole**-0.5))
    if size & (size - 1) == 0:  # Sylvester's: rows of characters, H_ij = (−1)^popcount(i & j) / √d
        signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
        torch.testing.assert_close(matrix, torch.tensor(signs, dtype=torch.float64) * size**-0.5)


@pytest.mark.parametrize("size", [32, 96, 128])
def test_the_patch_is_symmetric_and_with_unit_scales_the_identity(size: int) -> None:
    scales = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patch = patch_matrix(scales)
    torch.testing.assert_close(patch, patch.T)
    torch.testing.assert_close(torch.linalg.eigvalsh(patch), scales.sort().values)
    torch.testing.assert_close(patch_matrix(torch.ones(size)), torch.eye(size, dtype=torch.float64))


def test_the_scales_align_mean_magnitudes_in_the_rotated_basis() -> None:
    def unfitted(model: PreTrainedModel, states: Any) -> StandInFit:
        return StandInFit(model, states, StandIn(WIDTH, kind="linear", features=0), None, Run())

    fitting, before, after = fitted_site(unfitted)
    rotation = hadamard(WIDTH).numpy()
    expected = np.abs(after @ rotation).mean(0) / np.abs(before @ rotation).mean(0)
    np.testing.assert_allclose(channel_scales(fitting), expected, rtol=1e-6)


@pytest.mark.parametrize("blocks_by", ["cosine", "channels", "influence"])
def test_linearpatch_takes_neither_the_first_layer_nor_the_last(blocks_by: str) -> None:
    model, tokens = build("llama3"), random_tokens()
    hidden = torch.stack([next(layer_states(model, tokens, [index], 8))[1][index] for index in range(7)])
    cosine = [[float(cosine_similarity(hidden[s], hidden[e], dim=-1).mean()) for e in range(7)] for s in range(7)]
    channels = [[float(cosine_similarity(hidden[s], hidden[e], dim=1).mean()) for e in range(7)] for s in range(7)]
    result = prune("linearpatch", model, tokens, blocks_by=blocks_by)
    if blocks_by == "influence":
        order = sorted(range(1, 5), key=lambda layer: -cosine[layer][layer + 1])
        layers = sorted(layer for block in result.blocks for layer in block)
        assert layers == sorted(order[: len(layers)])
        pruned = apply_edits(model, result.edits)
        assert pruned.num_parameters() <= 0.75 * model.num_parameters()
        assert len(result.edits) == len(runs(layers))
    else:
        [block] = result.blocks
        score = cosine if blocks_by == "cosine" else channels
        assert block.start == max(range(1, 6 - len(block)), key=lambda start: score[start][start + len(block)])
    assert all(block.start >= 1 and block.stop <= 5 for block in result.blocks)


def test_linearpatch_is_one_matrix() -> None:
    edit = LinearPatch(blocks=((1, 4),))(build("llama3"), random_tokens()).edits[0]
    assert isinstance(edit, Substitute)
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(edit.stand_in(x), x @ edit.stand_in.readout.weight)
    assert not edit.stand_in.readout.bias.any()


# ------------------------------------------------------------------------------------------ the loop's new options


def test_weight_decay_shrinks_and_clipping_makes_every_step_count() -> None:
    def trained(slopes: list[float], **options: float) -> float:
        weight, slope = nn.Parameter(torch.ones(1)), torch.tensor(slopes)
        schedule = Schedule(20, 1, 0.01, **options)
        fit([weight], lambda rows: Sums({"loss": (slope[rows] * weight).sum()}, 1), len(slopes), schedule,
            torch.Generator().manual_seed(0), name="slope")
        return float(weight.detach())

    assert trained([0.0], weight_decay=0.0) == 1.0
    assert 0.9 < trained([0.0], weight_decay=0.1) < 1.0
    # One row's gradient is a thousand times that of the three that disagree with it.
    assert trained([1000.0, -1.0, -1.0, -1.0]) < 1.0 < trained([1000.0, -1.0, -1.0, -1.0], clip=0.5)


def test_the_defaults_are_the_papers() -> None:
    assert (Streamline().stand_in, Streamline().epochs, ReplaceMe().solver) == ("layer", 10, "cosine")
    assert all(METHODS[name]().last_state == "normed" for name in ("shortgpt", "uidl", "streamline", "replaceme"))
