"""Stand-ins that are ordinary decoder layers: of fewer channels, and of the model's own size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EARLIER, EARLIER_FAMILIES, LAYERS, build
from test_methods import random_tokens
from tiny_checkpoint import random_ids, tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kdprune
from kdprune.errors import KDPruneError
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.result_files import ResultCodec
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers, family_of, norms_behind_mlp
from kdprune.model.streaming import load_streamed
from kdprune.model.structures import channels_of, has_mlp_biases, mlp_channels, norm_affine
from kdprune.model.surgery import apply_edits
from kdprune.planning.plan import plan
from kdprune.run.heal import put_in
from kdprune.runtime.run import Run
from kdprune.testing import logits_of, saved_and_loaded

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = range(1, 4)
RIDGE = 1e-2
# Where a norm stands behind the sum, the solve takes it for the identity.
SOLVED = [*(name for name in EARLIER if name != "opt-350m"), "granite", "falcon", "olmo2"]


def fitted(model: PreTrainedModel, **options: Any) -> MethodResult:
    method = KDP(**{"form": "stock", "refine": False, "blocks": ((1, 4),), "ridge": RIDGE, **options})
    method.check(model, random_tokens())
    return method(model, random_tokens(), Run(batch_size=4))


def left(model: PreTrainedModel, boundary: int) -> Tensor:
    """h at ``boundary`` of all tokens that are fitted, (n, d), float64."""
    found = layer_states(model, random_tokens().fitted(0.1), [boundary], batch_size=4)
    return torch.cat([states[boundary] for _, states in found]).flatten(0, 1).double()


def seen(pruned: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of the layer in the block's place: what its MLP's projection out reads, and the state that the MLP adds to.

    What the MLP puts out is copied: Falcon adds attention to it in place. BLOOM's is the sum itself.
    """
    layer, family = decoder_layers(pruned)[BLOCK.start], family_of(pruned)
    read, added = list[Tensor](), list[Tensor]()
    out = family.mlp_out if family.model_type == "bloom" else family.mlp[-1]
    hooks = [
        layer.get_submodule(family.mlp_out).register_forward_pre_hook(lambda _, args: read.append(args[0])),
        layer.get_submodule(out).register_forward_hook(lambda *args: added.append(args[2].clone()))]
    state = left(pruned, BLOCK.start + 1)
    for hook in hooks:
        hook.remove()
    inputs, outputs = (torch.cat([part.flatten(0, -2) for part in parts]).double() for parts in (read, added))
    return inputs, state - outputs * family.multiplier(layer)


def normalised(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("form", ["layer", "stock"])
@pytest.mark.parametrize("name", SOLVED)
@torch.no_grad()
def test_the_read_out_is_that_of_least_squares(name: str, form: str) -> None:
    """Against a factorisation of all tokens at once, with the ridge as rows of its own."""
    model = build(name)
    options = {} if form == "stock" else {"channels": 9}
    pruned = apply_edits(model, fitted(model, form=form, **options).edits)
    inputs, base = seen(pruned)
    wanted, family = left(model, BLOCK.stop) - base, family_of(model)
    layer, norms = decoder_layers(pruned)[BLOCK.start], norms_behind_mlp(family)
    aim = wanted / family.multiplier(layer)
    if norms:
        before, after = (norm_affine(getattr(part, norms[0]), 32)[0].double()
                         for part in (decoder_layers(model)[BLOCK.start], layer))
        aim = normalised(wanted / before)
    shift_in = inputs.mean(0) if has_mlp_biases(model) else inputs.new_zeros(inputs.shape[1])
    shift_out = aim.mean(0) if has_mlp_biases(model) else aim.new_zeros(aim.shape[1])
    x = inputs - shift_in
    penalty = (RIDGE * x.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    solution = torch.linalg.lstsq(
        torch.cat((x, penalty)), torch.cat((aim - shift_out, aim.new_zeros(len(penalty), aim.shape[1])))).solution
    expected = x @ solution + shift_out
    out = layer.get_submodule(family.mlp_out)
    torch.testing.assert_close(out(inputs.float()).double(), expected, rtol=1e-3, atol=1e-3)
    if norms:
        direction = normalised(expected)
        scale = (wanted * direction).sum(0) / direction.square().sum(0)
        torch.testing.assert_close(after, scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SOLVED)
def test_its_channels_are_the_blocks(name: str) -> None:
    """Each of them one of a layer of the block, read through the norm of the layer in its place."""
    model = build(name)
    pruned = apply_edits(model, fitted(model, form="layer", channels=9).edits)
    theirs = torch.cat([mlp_channels(model, index).lines for index in BLOCK]).flatten(1)
    mine = mlp_channels(pruned, BLOCK.start).lines.flatten(1)
    assert len(mine) == 9
    assert torch.cdist(mine, theirs).min(1).values.max() < 1e-3


@pytest.mark.parametrize("name", EARLIER_FAMILIES)
def test_of_the_models_size_it_is_a_stock_checkpoint(name: str, tmp_path: Path) -> None:
    """test_contract.py loads such ones, of every family, where kdprune is not installed."""
    model = build(name)
    pruned = apply_edits(model, fitted(model).edits)
    assert type(pruned) is type(model)
    saved_and_loaded(pruned, tmp_path)
    assert not (tmp_path / "modeling_kdp.py").exists()
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == model.config.model_type
    assert config["architectures"] == [type(model).__name__]
    assert not {"kdp", "auto_map", "per_layer_config"} & set(config)
    sizes = {sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(pruned)}
    assert len(decoder_layers(pruned)) == LAYERS - 2
    assert len(sizes) == 1


@pytest.mark.parametrize("name", EARLIER_FAMILIES)
def test_no_family_of_transformers_has_layers_of_different_sizes(name: str) -> None:
    """Their configs hold them, no model is built of them: that is why a narrower layer needs a class of ours. Where
    this fails, form "layer" can be a stock checkpoint of that family too."""
    channels = {"opt": "ffn_dim", "gpt2": "n_inner"}.get(name, "intermediate_size")
    model = build(name)
    given = {**model.config.to_dict(), "per_layer_config": {2: {channels: 24}}}
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    assert config.is_heterogeneous
    config.allow_global_per_layer_attribute_access = True
    with torch.device("meta"):
        assert channels_of(AutoModelForCausalLM.from_config(config)) == channels_of(model)
        wide = AutoModelForCausalLM.from_config(config)
    assert [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(wide)] == [
        sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]


@pytest.mark.parametrize("form", ["layer", "stock"])
@pytest.mark.parametrize("name", EARLIER_FAMILIES)
def test_the_ratio_is_met(name: str, form: str) -> None:
    model, ratio = build(name), 0.2
    result = fitted(model, form=form, blocks=None, ranking="similarity", ratio=ratio, of="layers", protect=0.0)
    pruned = apply_edits(model, result.edits)
    removed = [sum(p.numel() for layer in decoder_layers(m) for p in layer.parameters()) for m in (model, pruned)]
    net = 1 - removed[1] / removed[0]
    one = (1 if form == "stock" else 0.03) / LAYERS  # a layer more, or a channel or two
    assert ratio <= net <= ratio + one
    assert [fit["parameters"] for fit in result.fit] == [
        sum(p.numel() for p in edit.context.parameters()) for edit in result.edits]


@pytest.mark.parametrize("form", ["layer", "stock"])
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama3.1", "phi3"])
def test_refined_and_from_the_cache(name: str, form: str) -> None:
    """What an ordinary layer has not stays away; whatever it has is trained, and can be healed."""
    model = build(name)
    options = {} if form == "stock" else {"channels": 9}
    result = fitted(model, form=form, refine=True, refine_epochs=2, rate=1e-4, **options)
    [fit] = result.fit
    assert fit["refined"] in (True, False)
    assert len(fit["step3"]["loss"]) == 2
    codec = ResultCodec(model)
    pruned, again = (apply_edits(model, edits) for edits in (
        result.edits, codec.unpack(*codec.pack(result)).edits))
    assert torch.equal(logits_of(pruned), logits_of(again))
    inside = f"{family_of(model).layers}.{BLOCK.start}."
    slot = decoder_layers(pruned)[BLOCK.start]
    assert put_in(pruned, model, result.edits) == [inside + key for key, _ in slot.named_parameters()]


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_of_a_streamed_model_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    streamed = load_streamed(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    [first], [second] = fitted(model).edits, fitted(streamed).edits
    for key, weight in first.context.state_dict().items():
        assert torch.equal(weight, second.context.state_dict()[key]), key


def test_damage_is_measured_with_it() -> None:
    model = build("llama3")
    tokens = random_tokens(rows=40)
    result = KDP(form="stock", refine=False, ratio=0.3, of="layers", protect=0.0)(model, tokens, Run(batch_size=4))
    assert result.damage
    assert all(edit.stand_in is None for edit in result.edits)


@pytest.mark.parametrize(("options", "message"), [
    ({"channels": 9}, "got channels 9 with form 'stock', expected none: the classes of transformers build"),
    ({"kernel": "linear+data"}, "got kernel 'linear\\+data' with form 'stock', expected 'data'"),
    ({"context": "none", "form": "layer"}, "got context 'none' with form 'layer', expected 'attention'"),
    ({"fill": True}, "got fill True with form 'stock', expected False"),
])
def test_what_it_cannot_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        KDP(**{"form": "stock", **options})


def test_a_run_says_what_it_made(tmp_path: Path) -> None:
    """Saved, loaded back and compared by the run itself; record and card know whether kdprune is needed."""
    result = kdprune.prune(
        tiny_llama(), tmp_path / "out", form="stock", calibration=random_ids(), blocks=((2, 4),), refine_epochs=1)
    assert result.results.stock is True
    assert [fit.ordinary for fit in result.results.fit] == [True]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "import kdprune" not in card
    assert "ordinary decoder layer with" in card


def test_more_channels_than_a_layer_has_are_refused() -> None:
    with pytest.raises(KDPruneError, match="got channels 49 with form 'layer', expected at most the 48"):
        fitted(build("llama3"), form="layer", channels=49)


@pytest.mark.parametrize("form", ["layer", "stock"])
def test_the_plan_counts_it(form: str, tmp_path: Path) -> None:
    model = build("gemma3")
    model.config.save_pretrained(tmp_path)
    found = plan(tmp_path, form=form, blocks=((1, 4),))
    pruned = apply_edits(model, fitted(model, form=form, fill=form == "layer").edits)
    assert found.pruned.parameters == pruned.num_parameters()
    assert found.ordinary
