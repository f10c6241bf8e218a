"""Edits: what they leave, what they keep in step, and what they refuse."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import LAYERS, WIRINGS, build
from pruned import bypassed, edits, in_context, prune, stand_in
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import (
    Drop,
    Edit,
    Rewrite,
    Substitute,
    apply_edits,
    context_layer,
    layers_replaced,
)
from kdprune.testing import edits_of
from kdprune.testing.models import saved_and_loaded

pytestmark = pytest.mark.usefixtures("one_thread")
Build = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def numbers(model: PreTrainedModel) -> list[int]:
    return [m.layer_idx for layer in decoder_layers(model) for m in layer.modules() if "layer_idx" in m.__dict__]


# ------------------------------------------------------------------------------------------------ applying edits


@pytest.mark.parametrize("name", WIRINGS)
def test_an_identity_stand_in_equals_dropping_the_layers(tiny_model: Build, name: str) -> None:
    model, identity = tiny_model(name), stand_in()
    nn.init.zeros_(identity.readout.weight)
    nn.init.zeros_(identity.readout.bias)
    for block in (range(2), range(2, 4), range(4, 6)):
        dropped = apply_edits(model, [Drop(block)])
        assert type(dropped) is type(model)
        assert torch.equal(logits(apply_edits(model, [Substitute(block, identity)])), logits(dropped))
        with bypassed(model, block):
            assert torch.equal(logits(model), logits(dropped))
        assert not torch.equal(logits(model), logits(dropped))


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-window", "opt", "gpt2"])
def test_layers_replaced_computes_what_apply_edits_does(tiny_model: Build, name: str) -> None:
    model = tiny_model(name)
    change = edits(model, "mlp")
    layers: list[nn.Module] = list(decoder_layers(model))
    run = [*layers[:2], change[0].context, *layers[4:]]  # type: ignore[union-attr,list-item]
    expected, before = logits(apply_edits(model, change)), logits(model)
    with layers_replaced(model, run):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
    assert list(decoder_layers(model)) == layers


def test_configs_stay_in_step(tiny_model: Build) -> None:
    qwen = prune(tiny_model("qwen3-window"), "mixed").config
    assert qwen.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert (qwen.num_hidden_layers, qwen.max_window_layers) == (3, 2)
    gemma = apply_edits(tiny_model("gemma3"), [Drop(range(2, 3))])
    assert gemma.config.layer_types == ["sliding_attention"] * 4 + ["full_attention"]
    assert numbers(gemma) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # on the layer and on its attention
    assert {id(m.config) for m in gemma.modules() if hasattr(m, "config")} == {id(gemma.config)}
    context = prune(tiny_model("gemma3"), "mlp")
    assert {id(m.config) for m in context.modules() if hasattr(m, "config")} == {id(context.config)}
    # A context's slot has the attention type of the layer it was made from.
    for name, first, last in (
            ("qwen3-window", "fffss", "ffsss"), ("gemma2", "sfssf", "sffsf"), ("gemma3", "ssfsf", "ssssf")):
        for place, types in (("mlp", first), ("last", last)):
            config = prune(tiny_model(name), place).config
            assert "".join(kind[0] for kind in config.layer_types) == types
            assert getattr(config, "max_window_layers", types.index("s")) == types.index("s")
    gpt2 = prune(tiny_model("gpt2"), "mixed")
    assert gpt2.config.n_layer == 3
    assert gpt2.config.architectures == ["KDPGPT2ForCausalLM"]
    assert {"GPT2Block", "KDPGPT2Layer"} <= set(gpt2._no_split_modules)


def test_the_record_says_where_the_stand_ins_are(tiny_model: Build) -> None:
    record = prune(tiny_model("llama3"), "mixed").config.kdp
    assert record["version"] == 3
    assert record["blocks"] == [[0, 1], [2, 3], [3, 4], [5, 6]]
    assert [(s["layer"], s["place"], s["kind"]) for s in record["stand_ins"]] == [
        (0, "before", "linear+mlp+data"),
        (1, "mlp", "fourier"),
        (2, "after", "fourier"),
    ]


def test_edits_are_data(tiny_model: Build) -> None:
    """Applying does not change them, and what becomes of them later does not change the model."""
    model = tiny_model("llama3").bfloat16()
    change = edits(model, "mixed")
    pruned = apply_edits(model, change)
    before = logits(pruned)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert change[0].stand_in.phase.weight.dtype == torch.float32  # type: ignore[union-attr]
    for edit in change:
        if isinstance(edit, Substitute):
            nn.init.ones_(edit.stand_in.readout.weight)
    assert torch.equal(logits(pruned), before)


def test_new_weights_lie_as_loaded_ones_do(tiny_model: Build) -> None:
    """Row by row, whatever they were read from."""
    model = tiny_model("llama3")
    name, old = "mlp.down_proj.weight", decoder_layers(model)[1].mlp.down_proj.weight
    turned = torch.randn(old.shape[::-1]).T
    new = decoder_layers(apply_edits(model, [Rewrite(1, {name: turned})]))[1].mlp.down_proj.weight
    assert not turned.is_contiguous()
    assert new.is_contiguous()
    assert torch.equal(new, turned)


def test_pruning_twice_is_pruning_once(tiny_model: Build) -> None:
    model = tiny_model("gemma2")
    once = apply_edits(apply_edits(model, [Drop(range(1, 3))]), [Substitute(range(1, 2), stand_in())])
    both = apply_edits(model, [Drop(range(1, 3)), Substitute(range(3, 4), stand_in())])
    assert torch.equal(logits(once), logits(both))
    assert once.config.layer_types == both.config.layer_types


def test_tied_embeddings_stay_tied(tiny_model: Build) -> None:
    for name, tied in (("llama3.1", True), ("llama3", False), ("gpt_neox-sequential", True)):
        pruned = prune(tiny_model(name), "mixed")
        same = pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight
        assert same is tied


def test_a_stand_in_goes_before_the_next_layer_where_the_one_before_is_taken(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    change: list[Edit] = [Substitute(range(2), stand_in(1)), Substitute(range(3, 5), stand_in(2))]
    record = apply_edits(model, change).config.kdp["stand_ins"]
    assert [(s["layer"], s["place"]) for s in record] == [(0, "before"), (1, "before")]
    # Where no other layer is left, around what the one before holds.
    both = apply_edits(model, [change[0], Substitute(range(3, 6), stand_in(2))])
    assert [(s["layer"], s["place"]) for s in both.config.kdp["stand_ins"]] == [(0, "before"), (0, "after")]
    first, second = (edit.stand_in for edit in change if isinstance(edit, Substitute))
    assert first is not None
    assert second is not None
    with layers_replaced(model, [decoder_layers(model)[2]]), torch.no_grad():
        hooks = [decoder_layers(model)[0].register_forward_pre_hook(lambda _, args: (first(args[0]), *args[1:])),
                 decoder_layers(model)[0].register_forward_hook(lambda _, __, output: second(output))]
        expected = logits(model)
        for hook in hooks:
            hook.remove()
    assert torch.equal(logits(both), expected)


def test_a_context_layer_made_before_hidden_states_were_recorded(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    change = edits(model, "mlp")
    model(IDS, output_hidden_states=True)
    assert len(apply_edits(model, change)(IDS, output_hidden_states=True).hidden_states) == 6


# ------------------------------------------------------------------------------------------------ for a while


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_all_is_as_before_after_an_exception(tiny_model: Build, name: str) -> None:
    model = tiny_model(name)
    before, config = logits(model), model.config.to_dict()
    order, keys = list(decoder_layers(model)), list(model.state_dict())

    def fail() -> None:
        with bypassed(model, range(1, 4)), bypassed(model, range(1)):
            assert len(decoder_layers(model)) == model.config.num_hidden_layers == 2
            assert sorted(set(numbers(model))) == [0, 1]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert list(decoder_layers(model)) == order
    assert list(model.state_dict()) == keys
    assert sorted(set(numbers(model))) == list(range(LAYERS))


def test_generation_works_while_layers_are_bypassed(tiny_model: Build) -> None:
    model = tiny_model("gemma2")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    expected = apply_edits(model, [Drop(range(1))]).generate(IDS, **options)
    with bypassed(model, range(1)):
        assert torch.equal(model.generate(IDS, **options), expected)


def test_layers_in_another_order_keep_their_attention_types(tiny_model: Build) -> None:
    model = tiny_model("gemma3")
    other = copy.deepcopy(model)
    other.model.layers = nn.ModuleList(list(other.model.layers)[::-1])
    other.config.layer_types = other.config.layer_types[::-1]
    with layers_replaced(model, list(decoder_layers(model))[::-1]):
        assert model.config.layer_types == other.config.layer_types
        assert model.config.layer_types[0] == "full_attention"
        assert torch.equal(logits(model), logits(other))


def test_layers_replaced_refuses_nonsense(tiny_model: Build) -> None:
    model = tiny_model("gemma3")
    layers = list(decoder_layers(model))
    for wrong in ([], [layers[0]] * 2, [nn.Identity()]):
        with pytest.raises(KDPruneError), layers_replaced(model, wrong):
            pass
    assert len(decoder_layers(model)) == LAYERS


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([range(1, 3), range(2, 4)], "overlaps"),
        ([range(4, 7)], "out of range: the model has 6 layers"),
        ([range(-1, 2)], "out of range"),
        ([range(3, 3)], "non-empty"),
        ([range(0, 6, 2)], "non-empty run"),
        ([range(6)], "keep at least one"),
        ([range(1, 3), range(3, 5)], "touch"),
    ],
)
def test_blocks_that_make_no_model_are_refused(tiny_model: Build, blocks: list[range], message: str) -> None:
    with pytest.raises(KDPruneError, match=message):
        apply_edits(tiny_model("llama3"), [Substitute(block, stand_in()) for block in blocks])


def test_stand_ins_that_meet_over_dropped_layers_are_refused(tiny_model: Build) -> None:
    change = [Substitute(range(1, 2), stand_in()), Drop(range(2, 3)), Substitute(range(3, 4), stand_in())]
    with pytest.raises(KDPruneError, match="touch"):
        apply_edits(tiny_model("llama3"), change)


@pytest.mark.parametrize("place", ["after", "before", "mlp", "last", "mixed"])
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_layers_of_a_pruned_model_are_taken_out_like_others(
    tiny_model: Build, name: str, place: str, tmp_path: Path
) -> None:
    pruned = prune(tiny_model(name), place)
    earlier = pruned.config.kdp["blocks"]
    for index in range(len(decoder_layers(pruned))):
        block = range(index, index + 1)
        again = apply_edits(pruned, [Drop(block)])
        with bypassed(pruned, block):
            expected = logits(pruned)
        assert torch.equal(logits(again), expected)
        assert again.config.kdp["earlier"] == [earlier]
        assert again.config.kdp["blocks"] == [[index, index + 1]]
    third = apply_edits(again, [Drop(range(1))])
    assert third.config.kdp["earlier"] == [earlier, [[index, index + 1]]]
    assert torch.equal(logits(saved_and_loaded(third, tmp_path)), logits(third))
    assert pruned.config.kdp["blocks"] == earlier


def test_models_that_cannot_be_edited_are_refused(tiny_model: Build) -> None:
    model, change = tiny_model("llama3"), [Substitute(range(1, 3), stand_in())]
    class Mine(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Mine
    with pytest.raises(KDPruneError, match="not a subclass"):
        apply_edits(model, change)

    numbered = tiny_model("gpt2")
    numbered.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(KDPruneError, match="scale_attn_by_inverse_layer_idx"):
        apply_edits(numbered, [Drop(range(1, 2))])

    patched = tiny_model("llama3")
    patched.model.layers[0].forward = patched.model.layers[0].forward
    with pytest.raises(KDPruneError, match="forward is patched"):
        apply_edits(patched, change)


def test_a_context_layer_must_be_one(tiny_model: Build) -> None:
    model = tiny_model("llama3")
    for wrong in (decoder_layers(model)[1], nn.Identity(), in_context(tiny_model("opt"), range(1, 2)).context):
        with pytest.raises(KDPruneError, match="context layer"):
            apply_edits(model, [Substitute(range(1, 3), stand_in(), wrong)])
    with pytest.raises(KDPruneError, match="layer index 6"):
        context_layer(model, 6, stand_in())
    with pytest.raises(KDPruneError, match="3/2 heads"):
        in_context(model, range(1, 3), heads=torch.arange(3))
    with pytest.raises(KDPruneError, match="expected 2 key-value heads of 2"):
        apply_edits(model, [dataclasses.replace(in_context(model, range(1, 3), heads=torch.arange(1)), groups=None)])
    with pytest.raises(KDPruneError, match=r"layer 3, expected a layer of its block \[1, 3\)"):
        in_context(model, range(1, 3), 3)


def test_a_context_layer_has_weights_of_its_own(tiny_model: Build) -> None:
    model, inner = tiny_model("opt"), stand_in(residual=False, normalize=False)
    layer = context_layer(model, 3, inner)
    assert layer.fc1 is inner
    assert isinstance(layer.fc2, nn.Identity)
    assert not {id(p) for p in layer.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", ["llama3", "phi3", "gpt_neox", "gpt2", "opt"])
def test_a_context_with_fewer_heads_keeps_a_smaller_cache(tiny_model: Build, name: str) -> None:
    model = tiny_model(name)
    whole, half = (kv_cache_bytes_per_token(prune(model, place)) for place in ("mlp", "heads"))
    assert whole - half == whole // 5 // 2  # one of five layers


def test_a_loaded_models_config_becomes_that_of_the_pruned_class(tiny_model: Build, tmp_path: Path) -> None:
    tiny_model("llama3").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    pruned = prune(model, "mixed")
    assert (model.config.model_type, pruned.config.model_type) == ("llama", "kdp_llama")
    assert apply_edits(pruned, [Substitute(range(1), stand_in())]).config.model_type == "kdp_llama"


def test_a_stock_result_names_no_code_that_is_not_there() -> None:
    """The config of a published checkpoint may; the classes are transformers' own."""
    dense = build("phi3")
    dense.config.auto_map = {"AutoConfig": "configuration_phi3.Phi3Config"}
    assert not hasattr(apply_edits(dense, [Drop(range(2, 3))]).config, "auto_map")
    assert dense.config.auto_map
    assert "modeling_kdp" in str(apply_edits(dense, edits_of(dense, "after")).config.auto_map)
