"""What stands before a stand-in: which layer's attention it is, and how many of its heads."""

from collections.abc import Callable

import pytest
import torch
from families import CONFIGS, LAYERS
from kdprune.methods.heads import group_energies, keep_heads
from test_methods import QUICK, generator, random_tokens
from transformers import PreTrainedModel

from kdprune.data.tokens import load_tokens
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods.common.budget import Budget
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.result_files import pack, unpack
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import Site
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.peers.saliency import attention_parts
from kdprune.model.activations import layer_states
from kdprune.model.block_states import PathRows, collect_block_states
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import key_value_heads
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


# ------------------------------------------------------------------------------------------------ heads


def zeroed(model: PreTrainedModel, layer: torch.nn.Module, groups: list[int]) -> None:
    """Takes what these key-value groups add out of a layer: their columns of the output projection."""
    out = attention_parts(model, layer)[-1]
    module = layer.get_submodule(out.path)
    with torch.no_grad():
        (module.weight.T if isinstance(module, torch.nn.Linear) else module.weight)[out.members[groups].flatten()] = 0.0


def added(site: Site) -> torch.Tensor:
    """What leaves the output projection of the context at the real tokens of the fitted rows, (n, d)."""
    seen: list[torch.Tensor] = []
    module = site.module.get_submodule(family_of(site.model).attention_out)
    hook = module.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        site.predict(torch.arange(site.fit_rows))
    hook.remove()
    mask = site.states.tokens.mask[: site.fit_rows]
    return seen[0].reshape(*mask.shape, -1)[mask]


@pytest.mark.parametrize("name", CONFIGS)
def test_fewer_heads_are_all_with_the_others_silent(name: str, tiny_model: Build) -> None:
    """Those stay that add most, and what is left computes what the whole layer does with the others' columns zero."""
    model = tiny_model(name)
    narrow, whole = site_of(model, 3), site_of(model, 3)
    heads, rows = key_value_heads(model.config), torch.arange(4)
    full = added(whole)
    energies = []
    for group in range(heads):
        alone = site_of(model, 3)
        zeroed(model, alone.module, [group])
        energies.append(float((full - added(alone)).double().square().sum()))
    found = group_energies(whole, attention_parts(model, whole.module)[-1])
    assert found.tolist() == pytest.approx(energies, rel=1e-4)
    gone = sorted(range(heads), key=energies.__getitem__)[: heads - heads // 2]
    zeroed(model, whole.module, gone)
    keep_heads(narrow, heads // 2)
    with torch.no_grad():
        expected = whole.predict(rows)
        torch.testing.assert_close(narrow.predict(rows), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(in_the_model(model, narrow), expected, rtol=1e-4, atol=1e-4)


def test_padding_and_held_out_rows_say_nothing_of_heads(tiny_model: Build) -> None:
    model, found = tiny_model("llama3"), []
    for other in (5, 6):
        plain, noise = random_tokens(rows=4), random_tokens(rows=4, seed=other)
        ids, mask = torch.cat((plain.ids, noise.ids[:, :3]), 1), torch.ones(4, 15)
        ids[-1], mask[:, 12:] = noise.ids[-1].repeat(2)[:15], 0
        tokens = load_tokens({"input_ids": ids, "attention_mask": mask}, None, samples=None, length=15, seed=0)
        states = collect_block_states(model, tokens, [BLOCK], held=1, path=PathRows(1, 1), batch_size=4)[0]
        site = Site(model, states, Shape(32, "fourier", 5, 0, True, True).build(generator()), 1, torch.device("cpu"))
        found.append(group_energies(site, attention_parts(model, site.module)[-1]))
    assert torch.equal(*found)


def test_all_heads_is_what_it_was(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    plain, whole, nearly = (run(model, **options) for options in ({}, {"context_heads": 1.0}, {"context_heads": 0.9}))
    for result in (whole, nearly):  # two groups: .9 of them are two
        assert result.fit == plain.fit
        weights = [found.edits[0].context.state_dict() for found in (plain, result)]
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
        assert apply_edits(model, result.edits).config.kdp["version"] == 1
    assert [Shape(32, "fourier", 5, 0, True, True, context_heads=0.01).groups(heads) for heads in (1, 2, 8)] == [
        None, 1, 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_freed_parameters_are_counted_and_spent(name: str, tiny_model: Build) -> None:
    model = tiny_model(name)
    half, whole = ({"features": 6, "refine": False, "context_heads": share} for share in (0.5, 1.0))
    left = {}
    for options in (half, whole):
        forecast = Budget(model, KDP(**options).shape(32), 0.25).removal(BLOCK)
        result = run(model, **options)
        pruned = apply_edits(model, result.edits)
        assert model.num_parameters() - pruned.num_parameters() == forecast
        context = result.edits[0].context
        assert result.fit[0]["parameters"] == sum(p.numel() for p in context.parameters())
        left[options["context_heads"]] = kv_cache_bytes_per_token(pruned)
    heads = key_value_heads(model.config)
    assert result.fit[0]["context_groups"] is None
    assert left[1.0] - left[0.5] == left[1.0] // (LAYERS - 2) // 2
    # At one ratio a narrower context buys more features.
    ratio = Budget(model, KDP().shape(32), 0.25).removal(BLOCK, features=40) / model.num_parameters()
    spent = [run(model, ratio=ratio, features=None, refine=False, context_heads=share).fit[0] for share in (0.5, 1.0)]
    assert spent[0]["features"] > spent[1]["features"] == 40
    assert spent[0]["context_groups"] == heads // 2


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


@pytest.mark.parametrize("heads", [1.0, 0.5])
def test_a_kept_result_knows_layer_and_heads(heads: float, tiny_model: Build) -> None:
    model = tiny_model("phi3" if heads < 1 else "gemma2")
    result = run(model, context_from="last", context_heads=heads)
    again = unpack(model, *pack(result))
    before, after = (apply_edits(model, found.edits) for found in (result, again))
    for name in ("layer_types", "kdp"):
        assert getattr(before.config, name, None) == getattr(after.config, name, None)
    ids = random_tokens().ids[:2]
    assert torch.equal(before(ids).logits, after(ids).logits)
