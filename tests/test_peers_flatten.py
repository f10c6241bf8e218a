"""FlattenGPT: against sums of layers run one by one, torch's least squares, and the paper's matrix of similarities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, WIDTH, build
from tiny_checkpoint import Bench, Outcome, command
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.kernel.operators import Moments
from kdprune.methods.common.block_data import block_states
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.peers.flattengpt import FlattenGPT, groups
from kdprune.methods.peers.flattening import FlattenFit, Pool
from kdprune.model.activations import layer_arguments, recorded
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import FoldedLayer
from kdprune.model.passes import run_layers
from kdprune.model.structures import StructurePart, attention_parts, mlp_parts
from kdprune.model.surgery import Rewrite, Substitute, apply_edits
from kdprune.model.widths import set_weights
from kdprune.report.results import Results
from kdprune.runtime.run import Run
from kdprune.testing import CALIBRATION, random_stand_in
from kdprune.testing.method import run_method
from kdprune.testing.models import saved_and_loaded

pytestmark = pytest.mark.usefixtures("one_thread")
START, STOP = 2, 4
ROWS = CALIBRATION.select(slice(0, 10))  # none padded
# Separate projections, one fused one of either kind, Conv1D, biases and shifts, sublayers in parallel, a multiplier.
WIRED = ("llama3.1", "phi3", "gpt2", "gpt_neox", "opt", "gemma", "granite")


# ------------------------------------------------------------------------------------------ the algebra


def regression(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Moments]:
    """Rows x (n, p), a map of all of them (q, p), y = W x + noise, and their moments."""
    draw = torch.Generator().manual_seed(seed)
    x, w = torch.randn(50, 8, generator=draw).double(), torch.randn(3, 8, generator=draw).double()
    x[:, 4:] += x[:, :4]  # what goes is told by what stays
    y = x @ w.T + torch.randn(50, 3, generator=draw).double() + 2
    moments = Moments(8, 3)
    moments.update(x[:20], y[:20])
    moments.update(x[20:], y[20:])
    return x, w, y, moments


@pytest.mark.parametrize("ridge", [1e-13, 0.1, 10.0])
@pytest.mark.parametrize("intercept", [False, True])
def test_a_refit_is_a_least_squares_of_augmented_rows(ridge: float, intercept: bool) -> None:
    x, w, y, moments = regression()
    kept = torch.tensor([1, 4, 6])
    start = w[:, kept]
    matrix, offset = moments.refit(kept, start, ridge, intercept)
    own_x, own_y = (x - x.mean(0), y - y.mean(0)) if intercept else (x, y)
    root = (ridge * own_x.square().sum() / 8).sqrt()
    rows = torch.cat((own_x[:, kept], root * torch.eye(3)))
    expected = torch.linalg.lstsq(rows, torch.cat((own_y, root * start.T))).solution.T
    torch.testing.assert_close(matrix, expected)
    mean = y.mean(0) - expected @ x[:, kept].mean(0) if intercept else torch.zeros(3)
    torch.testing.assert_close(offset, mean.double())


def test_a_refit_towards_a_map_of_all_inputs_is_nystroms() -> None:
    x, w, _, _ = regression()
    moments = Moments(8, 3)
    moments.update(x, x @ w.T)
    kept, rest = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5, 6])
    c = x.T @ x
    penalty = 0.5 * c.trace() / 8 * torch.eye(4)
    expected = w[:, kept].T + torch.linalg.inv(c[kept][:, kept] + penalty) @ c[kept][:, rest] @ w[:, rest].T
    torch.testing.assert_close(moments.refit(kept, w[:, kept], 0.5, False)[0], expected.T)


def test_leverages_are_those_of_the_singular_values() -> None:
    x, _, _, moments = regression()
    _, singular, rows = torch.linalg.svd(x, full_matrices=False)
    shrunk = singular.square() / (singular.square() + 2.0 * singular.square().mean())
    torch.testing.assert_close(moments.leverages(2.0), (rows.square() * shrunk[:, None]).sum(0))


@pytest.mark.parametrize("name", ["llama3.1", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "bloom"])
def test_lines_and_biases_are_placed_where_they_were(name: str) -> None:
    model = build(name)
    layer = decoder_layers(model)[1]
    own = dict(layer.named_parameters())
    for part in [*attention_parts(model, layer), *mlp_parts(model, layer)]:
        found = part.placed(layer, part.lines(layer), torch.empty(0) if part.inputs else part.biases(layer))
        assert found
        assert all(torch.equal(value.to(own[key].dtype), own[key]) for key, value in found.items())


# ------------------------------------------------------------------------------------------ which layers


def deleted(similarity: Tensor, count: int) -> list[list[int]]:
    """The oracle: as printed, an upper triangle from which a column and a row are deleted with every pair joined.

    Of the layers l − 1, l, the row is that of l and the column that of l − 1, so that row and column of the new layer
    are those of its first and its last.
    """
    found = [[layer] for layer in range(len(similarity))]
    for _ in range(count):
        at = int(similarity.diagonal(1).argmax())
        found[at : at + 2] = [found[at] + found[at + 1]]
        rows = [row for row in range(len(similarity)) if row != at + 1]
        columns = [column for column in range(len(similarity)) if column != at]
        similarity = similarity[rows][:, columns]
    return [group for group in found if len(group) > 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 4, 8])
def test_groups_are_those_of_the_matrix_with_deletions(seed: int, count: int) -> None:
    cosine = torch.rand(13, 13, generator=torch.Generator().manual_seed(seed)).double()
    found = groups(cosine, [range(12)], [10] * 12, 10 * count - 5)
    assert [list(group) for group in found] == deleted(cosine[:12, :12], count)


def test_groups_stay_inside_the_runs_and_count_what_goes_at_least() -> None:
    cosine = torch.ones(7, 7).double()
    assert groups(cosine, [range(2), range(3, 6)], [1] * 6, 3) == [range(2), range(3, 6)]
    # Of the first two one parameter goes at least, whichever stays.
    cosine[0, 1] = 2
    assert groups(cosine, [range(6)], [1, 9, 9, 9, 9, 9], 2) == [range(3)]


# ------------------------------------------------------------------------------------------ what becomes of them


@torch.no_grad()
def silence(model: PreTrainedModel, layer: nn.Module, parts: list[StructurePart], gone: Tensor) -> None:
    """Structures that are never heard: zero in the projections into the sublayer and out of it."""
    for part in parts:
        lines, biases = part.lines(layer), torch.empty(0) if part.inputs else part.biases(layer).clone()
        lines[gone] = 0
        if not part.inputs:
            biases[gone] = 0
        own = dict(layer.named_parameters())
        for name, value in part.placed(layer, lines, biases).items():
            own[name].copy_(value)


@torch.no_grad()
def added(model: PreTrainedModel, index: int, kind: str, state: Tensor) -> Tensor:
    """What one sublayer of a layer adds to this state: the layer's output, less the state, while a hook makes zero what
    the other one puts out."""
    family, layer = family_of(model), decoder_layers(model)[index]
    other = layer.get_submodule(family.mlp_out if kind == "attention" else family.attention_out)
    hook = other.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    args, kwargs = layer_arguments(model, index, ROWS)
    output = layer(state, *args, **kwargs)
    hook.remove()
    return (output if isinstance(output, Tensor) else output[0]) - state


@torch.no_grad()
def states(model: PreTrainedModel, *indices: int) -> list[Tensor]:
    with recorded(model, indices) as seen:
        run_layers(model, ROWS)
    return [seen[index] for index in indices]


@pytest.mark.parametrize("name", WIRED)
def test_layers_that_fit_into_one_become_their_parallel_sum(name: str) -> None:
    """Half the heads and channels of the one are silent, and the other half of the other: all that speak stay."""
    model = build(name)
    for index, first in ((START, True), (STOP - 1, False)):
        layer = decoder_layers(model)[index]
        for parts in (attention_parts(model, layer), mlp_parts(model, layer)):
            count = len(parts[-1].members)
            half = torch.arange(count // 2) if first else torch.arange(count // 2, count)
            silence(model, layer, parts, half)
    method = FlattenGPT(blocks=((START, STOP),), ridge=1e-6)
    pruned = apply_edits(model, run_method(method, model, ROWS).edits)
    (h,) = states(model, START)
    u = h + sum(added(model, index, "attention", h) for index in range(START, STOP))
    read = h if family_of(model).is_parallel(decoder_layers(model)[START]) else u
    expected = u + sum(added(model, index, "mlp", read) for index in range(START, STOP))
    torch.testing.assert_close(states(pruned, START + 1)[0], expected, rtol=1e-4, atol=1e-4)
    assert (states(model, STOP)[0] - expected).abs().max() > 0.01  # which is not what the dense layers give


@pytest.mark.parametrize("towards", ["sum", "states"])
def test_the_down_projection_is_torchs_least_squares(towards: str) -> None:
    model = build("llama3.1")
    options: Any = {"towards": towards, "refit": "both"}
    method = FlattenGPT(blocks=((START, STOP),), ridge=1e-12, held=0.2, **options)
    pruned = apply_edits(model, run_method(method, model, ROWS).edits)
    layer: Any = decoder_layers(pruned)[START]
    given: list[Tensor] = []
    hook = layer.mlp.down_proj.register_forward_hook(lambda _, args, __: given.append(args[0]))
    h, left = states(pruned, START, START + 1)
    hook.remove()
    u = left - layer.mlp.down_proj(given[0])
    if towards == "states":
        wanted = states(model, STOP)[0] - u
    else:
        wanted = sum(added(model, index, "mlp", u) for index in range(START, STOP))
    fitted = slice(0, 8)  # a fifth of the rows is held out
    rows, wanted = given[0][fitted].flatten(0, 1).double(), wanted[fitted].flatten(0, 1).double()
    expected = torch.linalg.lstsq(rows, wanted).solution.T.float()
    torch.testing.assert_close(layer.mlp.down_proj.weight, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(h, states(model, START)[0])


def test_the_heads_kept_are_those_of_greatest_importance() -> None:
    """Heads, one a query here, by their outputs, which hooks show; rows are found again behind the other norm."""
    model = build("llama2")
    scores, rows = [], []
    layers: list[Any] = [decoder_layers(model)[index] for index in range(START, STOP)]
    (h,) = states(model, START)
    for index, layer in zip(range(START, STOP), layers, strict=True):
        seen: list[Tensor] = []
        hook = layer.self_attn.o_proj.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        added(model, index, "attention", h)
        hook.remove()
        z, norms = seen[0].flatten(0, 1)[: 8 * 24], layer.self_attn.o_proj.weight.norm(dim=0)
        scores += (z * norms).unflatten(1, (4, 8)).square().sum(-1).mean(0).tolist()
        rows += list((layer.self_attn.q_proj.weight * layer.input_layernorm.weight).unflatten(0, (4, 8)))
    best = sorted(sorted(range(8), key=lambda head: -scores[head])[:4])
    assert len({head // 4 for head in best}) == 2  # of both layers, else this shows little
    pruned = apply_edits(
        model, run_method(FlattenGPT(blocks=((START, STOP),), held=0.2), model, ROWS).edits)
    attention: Any = decoder_layers(pruned)[START]
    found = (attention.self_attn.q_proj.weight * attention.input_layernorm.weight).unflatten(0, (4, 8))
    torch.testing.assert_close(found, torch.stack([rows[head] for head in best]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "olmo2", "bloom", "ministral", "smollm3"])
def test_heads_that_cannot_stand_side_by_side_are_those_of_one_layer(name: str) -> None:
    """Norms of queries and keys, slopes, windows and rotations are a layer's own, and the layer keeps its number's."""
    model = build(name)
    found = run_method(FlattenGPT(blocks=((START - 1, START + 1),)), model, ROWS)
    (source,) = [edit.layer for edit in found.edits if isinstance(edit, Rewrite)]
    pruned, family = apply_edits(model, found.edits), family_of(model)
    kept, whole = decoder_layers(pruned)[START - 1], decoder_layers(model)[source]
    for path in family.qkv:
        assert torch.equal(kept.get_submodule(path).weight, whole.get_submodule(path).weight)
    for field in ("layer_types", *family.per_layer):
        if (values := getattr(model.config, field, None)) is not None:
            assert getattr(pruned.config, field)[START - 1] == values[source]


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_norm_behind_has_the_scale_of_least_error(name: str) -> None:
    """No other scale of the norm behind the MLP brings the fitted states nearer to the sum of the layers."""
    model = build(name)
    run = Run(batch_size=16)
    (block,) = block_states(model, ROWS, [range(START, STOP)], 0.2, run)
    fit = FlattenFit(model, block, run)
    fit.solve("sum", "mlp", 1e-3)
    pool: Pool = fit.pool("mlp")
    norm: Any = fit.module.get_submodule(pool.behind or "")

    @torch.no_grad()
    def error() -> float:
        total = 0.0
        for rows in fit.passes():
            _, wanted = fit.seen(pool, rows, "sum")
            _, stream = fit._entering("mlp", rows)
            given = fit._run(fit.module, rows, fit.source, block.inputs[rows]) - stream
            total += float((given - wanted.view_as(given)).double().square().sum())
        return total

    least, weight = error(), norm.weight.detach().clone()
    for seed in range(3):
        other = weight + 0.05 * torch.randn(len(weight), generator=torch.Generator().manual_seed(seed))
        set_weights(norm, {"weight": other}, "a norm")
        assert error() > least


def test_it_removes_as_few_layers_as_meet_the_ratio() -> None:
    model = build("llama3.1")
    size, total = layer_sizes(model)[0], model.num_parameters()
    for count in (1, 3, LAYERS - 1):
        method = FlattenGPT(ratio=count * size / total)
        pruned = apply_edits(model, run_method(method, model).edits)
        assert total - pruned.num_parameters() == count * size
        assert type(pruned) is type(model)


def prune(bench: Bench, out: Path, *flags: object) -> Outcome:
    """What the command prints of a run on the tiny checkpoint."""
    return command(
        "prune", bench.model, "-o", out, "--method", "flattengpt", "--calibration", bench.calibration,
        "--heldout", bench.heldout, "--samples", 12, "--length", 32, "--device", "cpu", *flags)


def test_the_command_writes_a_stock_checkpoint(bench: Bench, tmp_path: Path) -> None:
    """transformers loads it without this package's classes; blocks that touch are in the record as they were given."""
    outcome = prune(bench, tmp_path / "out", "--blocks", "1-3,3-5", "--towards", "states", "--refit", "both")
    assert outcome.status == 0, outcome.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers == 4
    found = Results.load(tmp_path / "out")
    assert [tuple(block) for block in found.blocks] == [(1, 3), (3, 5)]
    assert found.parameters.pruned == model.num_parameters()


def test_layers_that_hold_stand_ins_are_left(tmp_path: Path) -> None:
    dense = build("llama3.1")
    given = apply_edits(dense, [Substitute(range(1, 2), random_stand_in(WIDTH))])
    folded = [index for index, layer in enumerate(decoder_layers(given)) if isinstance(layer, FoldedLayer)]
    pruned = apply_edits(given, run_method(FlattenGPT(ratio=0.15), given).edits)
    assert sum(isinstance(layer, FoldedLayer) for layer in decoder_layers(pruned)) == len(folded) == 1
    saved_and_loaded(pruned, tmp_path)
    with pytest.raises(KDPruneError, match=f"got layer {folded[0]} in a block, which holds a stand-in"):
        FlattenGPT(blocks=((folded[0], folded[0] + 2),)).check(given, CALIBRATION)


# ------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(("options", "message"), [
    ({"blocks": ((2, 3),)}, "two layers or more"), ({"blocks": ((1, 4), (3, 5))}, "none in two blocks"),
    ({"blocks": ((4, 7),)}, "of 6"), ({"ratio": 0.9}, "expected at most"),
    ({"ratio": 0.5, "protect": 0.4}, "expected at most"), ({"ridge": 0.0}, "ridge")])
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        FlattenGPT(**options).check(build("llama3.1"), CALIBRATION)


def test_blocks_may_touch() -> None:
    model = build("llama3.1")
    found = run_method(FlattenGPT(blocks=((3, 5), (1, 3))), model)
    assert found.blocks == [range(1, 3), range(3, 5)]
    assert len(decoder_layers(apply_edits(model, found.edits))) == LAYERS - 2


@pytest.mark.parametrize(("flags", "message"), [
    (["--blocks", "1-2"], "two layers or more of 6"), (["--ratio", "0.9"], "ratio 0.9, expected at most 0."),
    (["--towards", "state"], "did you mean 'states'")])
def test_the_command_refuses_in_one_line(flags: list[str], message: str, bench: Bench, tmp_path: Path) -> None:
    outcome = prune(bench, tmp_path / "out", *flags)
    assert outcome.status == 2
    assert outcome.err.startswith("kdprune: error: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert not (tmp_path / "out").exists()
