"""What stands before a stand-in: the attention of one of the block's layers."""

from collections.abc import Callable

import pytest
import torch
from families import WIRINGS
from test_methods import QUICK, generator, random_tokens
from transformers import PreTrainedModel

from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.result_files import ResultCodec
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.activations import layer_states
from kdprune.model.block_states import PathRows, collect_block_states
from kdprune.model.families import decoder_layers, norm_before_mlp
from kdprune.model.surgery import Substitute, apply_edits, context_layer
from kdprune.runtime.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
Build = Callable[..., PreTrainedModel]
BLOCK = range(1, 4)


def site_of(model: PreTrainedModel, source: int) -> StandInFit:
    """An unfitted stand-in for BLOCK behind the attention of layer ``source``."""
    states = collect_block_states(model, random_tokens(rows=4), [BLOCK], Run(batch_size=4), held=1, path=PathRows(1, 1))
    return StandInFit(model, states[0], Shape(32, "fourier", 5, 0, True, True).build(generator()), source, Run())


def in_the_model(model: PreTrainedModel, fitting: StandInFit) -> torch.Tensor:
    """What leaves the fitting's slot in the pruned model, (N, T, d)."""
    pruned = apply_edits(model, [fitting.edit()])
    found = layer_states(pruned, fitting.states.tokens, [BLOCK.start + 1], batch_size=4)
    return torch.cat([states[BLOCK.start + 1] for _, states in found])


def run(model: PreTrainedModel, **options: object) -> MethodResult:
    return KDP(blocks=((1, 4),), **{**QUICK, **options})(model, random_tokens(), Run(batch_size=4))


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize("source", [1, 3])
def test_a_fit_sees_what_the_pruned_model_computes(source: int, name: str, tiny_model: Build) -> None:
    """Masks, rotations and attention type of the layer that the context comes from, in the fit as in the model."""
    model = tiny_model(name)
    fitting = site_of(model, source)
    with torch.no_grad():
        torch.testing.assert_close(fitting.predict(torch.arange(4)), in_the_model(model, fitting), rtol=1e-4, atol=1e-4)
    norm = norm_before_mlp(model, decoder_layers(model)[source])
    states = torch.randn(3, 32, generator=generator())
    assert torch.equal(fitting.to_kernel(states), norm(states))


def test_the_context_is_started_from_the_first_layer_of_the_block(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    result = run(model, refine=False)
    weight = result.edits[0].context.state_dict()["self_attn.q_proj.weight"]
    assert torch.equal(weight, decoder_layers(model)[BLOCK.start].self_attn.q_proj.weight)
    assert result.fit[0]["context_layer"] == BLOCK.start
    assert Shape(32, "fourier", 5, 0, residual=True, context=False).source(BLOCK) is None


@pytest.mark.parametrize("name", WIRINGS)
def test_freed_parameters_are_counted(name: str, tiny_model: Build) -> None:
    model, options = tiny_model(name), {"kernel": "linear+learned+data", "features": 6, "channels": 5, "refine": False}
    result = run(model, **options)
    pruned = apply_edits(model, result.edits)
    forecast = KDP(**options).budget(model).removal(BLOCK)
    assert model.num_parameters() - pruned.num_parameters() == forecast
    assert result.fit[0]["parameters"] == sum(p.numel() for p in result.edits[0].context.parameters())


def test_budget_counts_the_layer_the_context_comes_from(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    layer = decoder_layers(model)[BLOCK.start]
    layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))  # one layer larger than the others
    forecast = KDP(kernel="learned", features=6).budget(model).removal(BLOCK)
    pruned = apply_edits(model, run(model, features=6, refine=False).edits)
    assert model.num_parameters() - pruned.num_parameters() == forecast


@pytest.mark.parametrize("heads", [None, 1])
def test_a_cached_result_knows_layer_and_heads(heads: int | None, tiny_model: Build) -> None:
    model = tiny_model("phi3" if heads else "gemma2")
    stand_in = Shape(32, "fourier", 5, 0, True, True).build(generator())
    result = MethodResult([Substitute(BLOCK, stand_in, context_layer(model, 3, stand_in, heads), 3, heads)])
    codec = ResultCodec(model)
    again = codec.unpack(*codec.pack(result))
    before, after = (apply_edits(model, found.edits) for found in (result, again))
    for name in ("layer_types", "kdp"):
        assert getattr(before.config, name, None) == getattr(after.config, name, None)
    ids = random_tokens().ids[:2]
    assert torch.equal(before(ids).logits, after(ids).logits)
