"""Attention and MLP sublayers that are left out: against hooks, zeros and a search that copies."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, LAYERS, build
from methods import FORMS, quick
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.flops import forward_flops
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods.common.result_files import ResultCodec
from kdprune.methods.peers.sublayers import (
    Sizes,
    Stack,
    Sublayer,
    Sublayers,
    left_out,
    sublayer_changes,
    sublayer_edits,
)
from kdprune.model.families import decoder_layers, family_of, norms_from, widest
from kdprune.model.llama_cpp import check_export
from kdprune.model.losses import mean_loss
from kdprune.model.modeling_kdp import FoldedLayer
from kdprune.model.surgery import Drop, Resize, Substitute, apply_edits, ordinary_layer
from kdprune.report.results import Layers, LayerWidth, Parameters, Results
from kdprune.report.summary import headline
from kdprune.runtime.run import Run
from kdprune.testing import CALIBRATION, edits_of, logits_of
from kdprune.testing.method import run_method
from kdprune.testing.models import saved_and_loaded

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = tuple(itertools.product(range(LAYERS), ("attention", "mlp")))
ROWS = CALIBRATION.select(slice(0, 4))


def silenced(model: PreTrainedModel, gone: tuple[Sublayer, ...]) -> PreTrainedModel:
    """The oracle of a Llama: the weights of the last projection of a sublayer are zero."""
    result = copy.deepcopy(model)
    for index, kind in gone:
        layer: Any = decoder_layers(result)[index]
        (layer.self_attn.o_proj if kind == "attention" else layer.mlp.down_proj).weight.data.zero_()
    return result


@pytest.mark.parametrize("name", ["llama3.1", "phi", "gpt_neox", "olmo2", "gemma3"])
def test_what_was_left_out_has_no_norm_that_reads_the_stream(name: str) -> None:
    model, gone = build(name), {(3, "attention"), (4, "mlp")}
    norms = norms_from(model, 2)
    pruned = apply_edits(model, sublayer_edits(gone))
    places = itertools.product(range(2, LAYERS), ("attention", "mlp"))
    left = [norm for place, norm in zip(places, norms, strict=True) if place not in gone]
    found = norms_from(pruned, 2)
    assert [type(norm) for norm in found] == [type(norm) for norm in left]
    assert [[*norm.parameters()] for norm in found] == [[*norm.parameters()] for norm in left]  # the tensors themselves


# ------------------------------------------------------------------------------------------ by loss


@pytest.mark.parametrize("what", ["both", "attention", "mlp"])
def test_by_loss_it_is_greedy_search_over_silenced_copies(what: str) -> None:
    model = build("llama3", std=0.3)
    kinds = ("attention", "mlp") if what == "both" else (what,)
    gone: tuple[Sublayer, ...] = ()
    sizes = {kind: sum(p.numel() for n, p in decoder_layers(model)[0].named_parameters() if n.startswith(prefixes))
             for kind, prefixes in (("attention", ("self_attn", "input_")), ("mlp", ("mlp", "post_")))}
    assert sum(sizes.values()) == sum(p.numel() for p in decoder_layers(model)[0].parameters())
    for _ in range(4):
        left = [item for item in itertools.product(range(LAYERS), kinds) if item not in gone]
        losses = {item: mean_loss(silenced(model, (*gone, item)), ROWS, 4) for item in left}
        gone = (*gone, min(losses, key=lambda item: losses[item]))
        removed = sum(sizes[kind] for _, kind in gone)
        found = Sublayers(what=what, ratio=(removed - 1) / model.num_parameters(), sequences=4)(  # type: ignore[arg-type]
            model, CALIBRATION, Run(batch_size=2))
        pruned = apply_edits(model, found.edits)
        assert model.num_parameters() - pruned.num_parameters() == removed
        assert torch.equal(logits_of(pruned), logits_of(silenced(model, gone)))
        assert found.tokens == ROWS.tokens


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3", "bloom", "phi", "opt-350m", "mixtral", "qwen3-window"])
def test_losses_from_the_states_in_front_are_those_of_the_pruned_model(name: str) -> None:
    model, stack = build(name), Stack(build(name))
    before: list[Sublayer] = []
    for step in ((1, "attention"), (4, "mlp"), (1, "mlp")):
        left = [item for item in EVERY if item not in before]
        found = stack.losses(ROWS, left, 3)
        assert found == pytest.approx(
            {item: mean_loss(apply_edits(model, sublayer_edits([*before, item])), ROWS, 3) for item in left}, rel=1e-5)
        stack.leave_out(step)
        before.append(step)


# ------------------------------------------------------------------------------------------ by similarity


@torch.no_grad()
def stream(model: PreTrainedModel, tokens: TokenSet) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """The oracle: what enters and what leaves every sublayer of a model with plain residual sums, by hooks on the
    sublayers; parallel ones read the same state."""
    family, found = family_of(model), list[dict[str, tuple[Tensor, Tensor]]]()
    for layer in decoder_layers(model):
        own: dict[str, Tensor] = {}

        def keep(name: str, own: dict[str, Tensor]) -> Any:
            return lambda module, args, output: own.update({name: output[0] if isinstance(output, tuple) else output})

        last = family.post_norms or (family.attention, family.mlp[-1])
        layer.get_submodule(last[0]).register_forward_hook(keep("attention", own))
        layer.get_submodule(last[1]).register_forward_hook(keep("mlp", own))
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, own=own: own.__setitem__("in", args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True)
        found.append(own)  # type: ignore[arg-type]
    model(tokens.ids, attention_mask=tokens.mask.long())
    result = []
    for layer, own in zip(decoder_layers(model), found, strict=True):
        own: Any
        times = family.multiplier(layer)
        given, attended = own["in"], own["in"] + times * own["attention"]
        entering = given if family.is_parallel(layer) else attended
        result.append({"attention": (given, attended), "mlp": (entering, entering + times * own["mlp"].view_as(given))})
    return result


@pytest.mark.parametrize("name", ["llama3", "gpt_neox", "gemma2", "olmo2", "granite", "phi", "opt", "gpt2", "mixtral"])
def test_changes_are_cosines_of_the_stream_around_each_sublayer(name: str) -> None:
    tokens = CALIBRATION
    found = sublayer_changes(build(name), tokens, EVERY, 3)
    states = stream(build(name), tokens)
    for index, kind in EVERY:
        before, behind = (state.double()[tokens.mask] for state in states[index][kind])
        expected = 1 - nn.functional.cosine_similarity(before, behind, dim=-1).mean()
        assert found[index, kind] == pytest.approx(float(expected), abs=1e-5)
    assert len({round(value, 9) for value in found.values()}) == len(EVERY)


def test_by_similarity_the_least_changes_go() -> None:
    model = build("llama3", std=0.3)
    changes, sizes = sublayer_changes(model, CALIBRATION, EVERY, 16), Sizes(model)
    order = sorted(EVERY, key=lambda item: changes[item])
    for count in (1, 3, 6):
        ratio = (sizes.removed(order[:count]) - 1) / model.num_parameters()
        found = Sublayers(ranking="similarity", ratio=ratio)(model, CALIBRATION)
        assert found.edits == sublayer_edits(order[:count])
        assert found.tokens == CALIBRATION.tokens
    inner = Sublayers(ranking="similarity", what="mlp", protect=0.3, ratio=0.05)(model, CALIBRATION)
    assert {edit.layer for edit in inner.edits if isinstance(edit, Resize)} <= {2, 3}


# ------------------------------------------------------------------------------------------ what is left


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_what_the_pruned_model_lacks(name: str) -> None:
    model = build(name)
    sizes = Sizes(model)
    for gone in ([(1, "attention")], [(2, "mlp")], [(0, "attention"), (3, "mlp"), (3, "attention"), (5, "mlp")]):
        pruned = apply_edits(model, sublayer_edits(gone))
        assert model.num_parameters() - pruned.num_parameters() == sizes.removed(gone)


def test_a_layer_that_loses_both_goes_whole() -> None:
    edits = sublayer_edits([(3, "mlp"), (1, "attention"), (3, "attention"), (4, "mlp"), (4, "attention")])
    assert edits == [Drop(range(3, 5)), Resize(1, {"without": "attention"}, {})]
    model = build("llama3")
    pruned: Any = apply_edits(model, edits)
    assert pruned.config.kdp["widths"] == [{}, {"without": "attention"}, {}, {}]
    assert pruned.config.kdp["blocks"] == [[3, 5]]
    stock = apply_edits(model, sublayer_edits([(3, "mlp"), (3, "attention")]))
    assert type(stock) is type(model)


def test_cache_and_operations_are_those_of_what_is_left() -> None:
    model = build("llama3")
    pruned = apply_edits(model, sublayer_edits([(0, "attention"), (2, "mlp")]))
    # A key and a value of one number stand for the attention that is gone, and count tokens.
    number = 4
    assert kv_cache_bytes_per_token(pruned) == kv_cache_bytes_per_token(model) * 5 / 6 + 2 * number
    attention = sum(p.numel() for n, p in decoder_layers(model)[0].named_parameters() if "proj" in n and "attn" in n)
    mlp = sum(p.numel() for n, p in decoder_layers(model)[0].named_parameters() if "proj" in n and "mlp" in n)
    scores = 4 * model.config.num_attention_heads * 8 * (5 + 7)
    assert forward_flops(model, 1, 5, 7) - forward_flops(pruned, 1, 5, 7) == 5 * (2 * (attention + mlp) + scores)


def test_given_blocks_lose_the_sublayers_that_may_go() -> None:
    model = build("llama3")
    found = Sublayers(what="attention", blocks=((4, 5), (1, 3)))(model, CALIBRATION)
    assert found.edits == [Resize(index, {"without": "attention"}, {}) for index in (1, 2, 4)]
    assert found.tokens == 0
    again = ResultCodec(model).unpack(*ResultCodec(model).pack(found))
    assert again.edits == found.edits
    assert Sublayers(blocks=((1, 3),))(model, CALIBRATION).edits == [Drop(range(1, 3))]


def test_what_it_refuses() -> None:
    model = build("llama3")
    with pytest.raises(KDPruneError, match=r"expected at most 0\.\d+, the largest the layers that may be taken out"):
        Sublayers(what="attention", ratio=0.5).check(model, CALIBRATION)
    sizes = Sizes(model)
    most = sizes.removed(EVERY) - max(sizes.own[0].values())
    Sublayers(ratio=(most - 0.5) / model.num_parameters()).check(model, CALIBRATION)
    with pytest.raises(KDPruneError, match="expected at most"):
        Sublayers(ratio=(most + 1.5) / model.num_parameters()).check(model, CALIBRATION)
    short = TokenSet(CALIBRATION.ids[:, :1], CALIBRATION.mask[:, :1], "test")  # type: ignore[arg-type]
    with pytest.raises(KDPruneError, match="two tokens in a row"):
        Sublayers(ratio=0.2).check(model, short)
    sliced = apply_edits(model, edits_of(model, "stream"))
    with pytest.raises(KDPruneError, match="whose stream has coordinates of its own"):
        Sublayers(ratio=0.1).check(sliced, CALIBRATION)
    lacking = apply_edits(model, sublayer_edits([(1, "attention")]))
    with pytest.raises(KDPruneError, match="no attention any more"):
        Sublayers(what="attention", blocks=((1, 2),)).check(lacking, CALIBRATION)


def test_a_loss_that_is_not_a_number_is_infinite() -> None:
    model = build("llama3")
    layer: Any = decoder_layers(model)[3]
    with torch.no_grad():
        layer.mlp.down_proj.weight.fill_(math.nan)
    losses = Stack(model).losses(ROWS, [(1, "mlp"), (3, "attention"), (3, "mlp")], 2)
    assert [math.isfinite(loss) for loss in losses.values()] == [False, False, True]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.fill_(math.nan)
    with pytest.raises(KDPruneError, match="no finite loss"):
        Sublayers(ratio=0.2)(model, CALIBRATION)


def test_edits_that_cannot_be_are_refused() -> None:
    model = build("llama3")
    for edits, message in (
        ([Resize(1, {"without": "norm"}, {})], "expected one of attention, mlp"),
        ([Resize(1, {"without": "mlp"}, {}), Drop(range(1, 2))], "none that is taken out"),
        ([Resize(1, {"without": "mlp"}, {}), Substitute(range(2, 4), None, ordinary_layer(model, 2))],
         "replace layers"),
        ([Resize(index, {"without": "mlp", "states": [8, 8, 8]}, {}) for index in (*range(LAYERS), None)],
         "does not know"),
        ([Resize(1, {"without": "mlp", "channels": 8}, {})], "does not know"),
    ):
        with pytest.raises(KDPruneError, match=message):
            apply_edits(model, edits)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ pruned before


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt_neox", "opt-350m", "bloom", "gpt2", "mixtral"])
def test_left_out_in_two_steps_or_in_one_is_the_same(name: str, tmp_path: Path) -> None:
    model = build(name)
    steps: tuple[list[Sublayer], ...] = ([(0, "attention"), (2, "mlp"), (4, "mlp")], [(2, "attention"), (3, "mlp")])
    first = apply_edits(model, sublayer_edits(steps[0]))
    assert left_out(first) == steps[0]
    edits = sublayer_edits(steps[1], left_out(first))
    assert edits == [Drop(range(2, 3)), Resize(3, {"without": "mlp"}, {})]
    twice, once = apply_edits(first, edits), apply_edits(model, sublayer_edits([*steps[0], *steps[1]]))
    assert torch.equal(logits_of(twice), logits_of(once))
    assert twice.config.kdp["widths"] == once.config.kdp["widths"]
    assert first.num_parameters() - twice.num_parameters() == Sizes(first).removed(steps[1])
    saved_and_loaded(twice, tmp_path)
    for gone, message in (((0, "mlp"), "take it out whole"), ((0, "attention"), "take it out whole")):
        with pytest.raises(KDPruneError, match=message):
            apply_edits(first, sublayer_edits([gone]))
    losses = Stack(first).losses(ROWS, [(0, "mlp"), (1, "mlp"), (4, "attention")], 3)
    assert losses == pytest.approx({item: mean_loss(apply_edits(
        first, sublayer_edits([item], left_out(first))), ROWS, 3) for item in losses}, rel=1e-5)


@pytest.mark.parametrize("held", ["before", "after", "mlp", "heads", "layer", "channels", "sublayers"])
@pytest.mark.parametrize("name", ["llama3.1", "gpt_neox", "gemma3"])
def test_what_was_pruned_loses_sublayers(name: str, held: str, tmp_path: Path) -> None:
    dense = build(name)
    given = apply_edits(dense, edits_of(dense, held))
    for options in ({}, {"ranking": "similarity"}, {"what": "attention"}, {"what": "mlp"}):
        method = Sublayers(ratio=0.08, sequences=4, **options)  # type: ignore[arg-type]
        method.check(given, CALIBRATION)
        found = apply_edits(given, method(given, CALIBRATION, Run(batch_size=16)).edits)
        assert 0.8 * given.num_parameters() < found.num_parameters() <= 0.92 * given.num_parameters()
        saved_and_loaded(found, tmp_path / str(len(list(tmp_path.iterdir()))))


def test_all_but_one_sublayer_may_go_of_what_has_lost_some() -> None:
    model = build("llama3")
    given = apply_edits(model, sublayer_edits([(index, "attention") for index in range(LAYERS)]))
    sizes, each = Sizes(given), Sizes(given).layers[0]
    assert sizes.removed([(index, "mlp") for index in range(LAYERS)]) == LAYERS * each
    ratio = ((LAYERS - 1) * each - 0.5) / given.num_parameters()
    for what in ("both", "mlp"):
        method = Sublayers(what=what, ratio=ratio, sequences=4)  # type: ignore[arg-type]
        method.check(given, CALIBRATION)
        assert len(decoder_layers(apply_edits(given, method(given, CALIBRATION).edits))) == 1
    for wrong in (Sublayers(ratio=ratio + 1 / given.num_parameters()), Sublayers(what="attention", ratio=0.01)):
        with pytest.raises(KDPruneError, match="that may be taken out"):
            wrong.check(given, CALIBRATION)


@pytest.mark.parametrize("place", ["after", "before"])
def test_changes_do_not_count_what_is_folded_around_the_sublayers(place: str) -> None:
    """The state in front of a stand-in that follows the layer, or behind one that precedes it."""
    dense = build("llama3")
    given = apply_edits(dense, edits_of(dense, place))
    index = next(i for i, layer in enumerate(decoder_layers(given)) if isinstance(layer, FoldedLayer))
    layer: Any = decoder_layers(given)[index]
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    hooks = [layer.self_attn.register_forward_hook(keep("attention")), layer.mlp.register_forward_hook(keep("mlp")),
             layer.input_layernorm.register_forward_pre_hook(lambda module, args: seen.update(given=args[0]))]
    with torch.no_grad():
        given(CALIBRATION.ids, attention_mask=CALIBRATION.mask.long())
    for hook in hooks:
        hook.remove()
    attended = seen["given"] + seen["attention"]
    states = {"attention": (seen["given"], attended), "mlp": (attended, attended + seen["mlp"])}
    found = sublayer_changes(given, CALIBRATION, [(index, kind) for kind in states], 3)
    for kind, pair in states.items():
        before, behind = (state.double()[CALIBRATION.mask] for state in pair)
        expected = 1 - nn.functional.cosine_similarity(before, behind, dim=-1).mean()
        assert found[index, kind] == pytest.approx(float(expected), abs=1e-5)


# To these a layer is what it computes; the others read or copy attention and MLPs, and have to refuse.
WHOLE = ("shortgpt", "uidl", "sleb", "evopress", "sublayers", "sublayers-similar", "sublayers-mlp", "linear",
         "linearpatch", "streamline-ffn", "streamline-none", "kdp-paper")


@pytest.mark.parametrize("form", FORMS)
def test_every_method_prunes_what_lacks_sublayers_or_says_no_at_once(form: str, tmp_path: Path) -> None:
    for name in ("llama3.1", "gpt_neox", "bloom"):
        dense = build(name)
        given = apply_edits(dense, edits_of(dense, "sublayers"))
        method = quick(form, ratio=0.15)
        if form not in WHOLE:
            with pytest.raises(KDPruneError, match="have no attention or no MLP any more"):
                method.check(given, CALIBRATION)
            continue
        found = apply_edits(given, run_method(method, given).edits)
        assert found.num_parameters() <= 0.85 * given.num_parameters()
        assert logits_of(found).isfinite().all()
        saved_and_loaded(found, tmp_path / name)


def test_a_layer_that_lacks_a_sublayer_is_no_pattern() -> None:
    dense = build("llama3")
    given = apply_edits(dense, sublayer_edits([(2, "mlp")]))
    with pytest.raises(KDPruneError, match="has no mlp any more, to make another layer of"):
        ordinary_layer(given, 2)
    with pytest.raises(KDPruneError, match="has no mlp any more, to make another layer of"):
        apply_edits(given, [Substitute(range(2, 4), None, ordinary_layer(given, 3), 2)])
    assert widest(given) == 0


def test_the_page_says_what_went_and_gguf_files_are_refused(tmp_path: Path) -> None:
    results = Results(
        created="", model="org/name", method="sublayers", layers=Layers(dense=6, pruned=4), blocks=[(2, 4)],
        parameters=Parameters(dense=100, pruned=60),
        widths=[LayerWidth(layer=index, without=kind) for index, kind in ((0, "attention"), (4, "mlp"), (5, "mlp"))])
    assert headline(results).startswith(
        "The attention of 1 layer, the MLP of 2 layers and 2 whole layers of org/name removed: 40.0")
    assert Results.parse(json.loads(results.to_json())) == results
    pruned = apply_edits(build("llama3"), sublayer_edits([(0, "attention")]))
    pruned.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(KDPruneError, match="no attention or no MLP, which the export cannot express"):
        check_export(tmp_path)
