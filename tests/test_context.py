"""What stands before a stand-in: which layer's attention it is."""

from collections.abc import Callable

import pytest
import torch
from families import CONFIGS
from test_methods import QUICK, generator, random_tokens
from transformers import PreTrainedModel

from kdprune.methods.blocks import Budget
from kdprune.methods.fitting import Shape
from kdprune.methods.kdp import KDP
from kdprune.methods.keeping import pack, unpack
from kdprune.methods.result import MethodResult
from kdprune.methods.site import Site
from kdprune.model.activations import layer_states
from kdprune.model.block_states import PathRows, collect_block_states
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.surgery import apply_edits

pytestmark = pytest.mark.usefixtures("one_thread")
Build = Callable[..., PreTrainedModel]
BLOCK, SOURCES = range(1, 4), {"first": 1, "middle": 2, "last": 3}


def site_of(model: PreTrainedModel, source: int) -> Site:
    """An unfitted stand-in for BLOCK behind the attention of layer ``source``."""
    states = collect_block_states(model, random_tokens(rows=4), [BLOCK], held=1, path=PathRows(1, 1), batch_size=4)[0]
    return Site(model, states, Shape(32, "fourier", 5, 0, True, True).build(generator()), source, torch.device("cpu"))


def in_the_model(model: PreTrainedModel, site: Site) -> torch.Tensor:
    """What leaves the site's slot in the pruned model, (N, T, d)."""
    pruned = apply_edits(model, [site.edit()])
    found = layer_states(pruned, site.states.tokens, [BLOCK.start + 1], batch_size=4)
    return torch.cat([states[BLOCK.start + 1] for _, states in found])


def run(model: PreTrainedModel, **options: object) -> MethodResult:
    return KDP(blocks=((1, 4),), **{**QUICK, **options})(model, random_tokens(), None, batch_size=4)


@pytest.mark.parametrize("place", SOURCES)
def test_the_layer_a_context_is_started_from(place: str) -> None:
    shape = Shape(32, "fourier", 5, 0, residual=True, context=True, context_from=place)
    assert shape.source(BLOCK) == SOURCES[place]
    assert shape.source(range(4, 6)) == {"first": 4, "middle": 5, "last": 5}[place]
    assert Shape(32, "fourier", 5, 0, residual=True, context=False, context_from=place).source(BLOCK) is None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", ["middle", "last"])
def test_a_fit_sees_what_the_pruned_model_computes(place: str, name: str, tiny_model: Build) -> None:
    """Masks, rotations and attention type of the layer that the context comes from, in the fit as in the model."""
    model = tiny_model(name)
    site = site_of(model, SOURCES[place])
    with torch.no_grad():
        torch.testing.assert_close(site.predict(torch.arange(4)), in_the_model(model, site), rtol=1e-4, atol=1e-4)
    source = decoder_layers(model)[SOURCES[place]]
    norm = getattr(source, family_of(model).mlp_norm)
    states = torch.randn(3, 32, generator=generator())
    assert torch.equal(site.to_kernel(states), norm(states))


def test_first_is_what_it_was_and_the_others_differ(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    results = {place: run(model, context_from=place, refine=False) for place in SOURCES}
    weights = {place: result.edits[0].context.state_dict() for place, result in results.items()}
    plain = run(model, refine=False).edits[0].context.state_dict()
    assert all(torch.equal(plain[key], value) for key, value in weights["first"].items())
    for place, source in SOURCES.items():
        assert torch.equal(
            weights[place]["self_attn.q_proj.weight"], decoder_layers(model)[source].self_attn.q_proj.weight)
        assert results[place].fit[0]["context_layer"] == source


def test_budget_counts_the_layer_the_context_comes_from(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    layer = decoder_layers(model)[3]
    layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))  # one layer larger than the others
    for place in SOURCES:
        method = KDP(context_from=place, features=6)
        shape = method.shape(32)
        forecast = Budget(model, shape, 0.25).removal(BLOCK)
        result = run(model, context_from=place, features=6, refine=False)
        pruned = apply_edits(model, result.edits)
        assert model.num_parameters() - pruned.num_parameters() == forecast


def test_a_kept_result_knows_the_layer(tiny_model: Build) -> None:
    model = tiny_model("gemma2")
    result = run(model, context_from="last")
    again = unpack(model, *pack(result))
    before, after = (apply_edits(model, found.edits) for found in (result, again))
    assert before.config.layer_types == after.config.layer_types
    ids = random_tokens().ids[:2]
    assert torch.equal(before(ids).logits, after(ids).logits)
