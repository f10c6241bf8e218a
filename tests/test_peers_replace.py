"""Methods that put something in the gap: LLM-Streamline, ReplaceMe, KDP without its kernel, LinearPatch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import WIDTH, WIRINGS, build
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.methods.common.block_data import block_states
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.peers.linear import fit_affine
from kdprune.methods.peers.linearpatch import LinearPatch, channel_scales, hadamard, patch_matrix
from kdprune.methods.peers.replaceme import ReplaceMe, folded_weights, interface, least_squares
from kdprune.methods.peers.streamline import LayerFit, Streamline
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Drop, Rewrite, Substitute, apply_edits, bypassed
from kdprune.runtime.run import Run
from kdprune.train.gradients import Sums
from kdprune.train.loop import Schedule, fit

pytestmark = pytest.mark.usefixtures("one_thread")

# name: (method, options that make it quick).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "streamline-none": ("streamline", {"stand_in": "none"}),
    "streamline-ffn": ("streamline", {"stand_in": "ffn", "epochs": 2}),
    "streamline-layer": ("streamline", {"stand_in": "layer", "epochs": 2}),
    "replaceme-cosine": ("replaceme", {"epochs": 2}),
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
    cosines = {}
    for start in range(6 - len(block) + 1):
        pair = endpoints(model, tokens, range(start, start + len(block)))
        cosines[start] = float(cosine_similarity(*pair, dim=-1).mean())
    assert block.start == max(cosines, key=lambda start: cosines[start])


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


@pytest.mark.parametrize("size", [1, 32, 96, 128, 33])
def test_hadamard_is_orthonormal(size: int) -> None:
    matrix, power = hadamard(size), size & -size
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    entries = matrix[matrix != 0].abs()
    assert len(entries) == size * power
    torch.testing.assert_close(entries, torch.full_like(entries, power**-0.5))


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
    assert (Streamline().stand_in, Streamline().epochs, ReplaceMe().solver) == ("ffn", 10, "cosine")
