"""Pruning what was pruned before: edits compose, the record names the chain, and what cannot be is refused at once."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, WIRINGS
from methods import quick
from pruned import in_context, stand_in
from tiny_checkpoint import Bench, Outcome, command, no_drawing
from transformers import AutoModelForCausalLM, PreTrainedModel

import kdprune
from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.methods.peers.llm_pruner import LLMPruner, _evenly, _Structures
from kdprune.methods.peers.replaceme import folded_weights, interface
from kdprune.model.activations import recorded
from kdprune.model.edits import Drop, Edit, Resize, Rewrite, Substitute
from kdprune.model.families import decoder_layers, family_of, holds_stand_ins, layer_widths
from kdprune.model.layerwise import logits_behind, states_by_ways
from kdprune.model.modeling_kdp import FoldedLayer, StandIn, groups_of, key_value_heads
from kdprune.model.passes import run_layers
from kdprune.model.structures import attention_parts, mlp_channels, mlp_parts
from kdprune.model.surgery import apply_edits, context_layer, layers_replaced, ordinary_layer
from kdprune.report.results import Results
from kdprune.testing import IDS, edits_of
from kdprune.testing import logits_of as logits
from kdprune.testing.method import run_method
from kdprune.testing.models import CALIBRATION, close, saved_and_loaded

Build = Callable[..., PreTrainedModel]

pytestmark = pytest.mark.usefixtures("one_thread")

# What the model given holds, by kind of edit; and methods that go over it, each with another way to change a model.
HELD = ("before", "mlp", "heads", "layer", "channels")
OVER = ("kdp", "kdp-folded", "linear", "streamline", "replaceme", "llm-pruner")
PAIRS = [(name, HELD[(place + number) % len(HELD)], form)
         for place, name in enumerate(WIRINGS) for number, form in enumerate(OVER)
         if not (form == "replaceme" and name in ("gemma3", "opt-350m"))]  # refused by how they are wired


def pruned_by(form: str, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """What a method makes of a model."""
    return apply_edits(model, run_method(quick(form, **options), model).edits)


@pytest.mark.parametrize(("name", "held", "form"), PAIRS)
def test_a_method_prunes_what_was_pruned(tiny_model: Build, name: str, held: str, form: str, tmp_path: Path) -> None:
    given = apply_edits(tiny_model(name), edits_of(tiny_model(name), held))
    before = {key: value.clone() for key, value in given.state_dict().items()}
    record, found = json.dumps(given.config.kdp), pruned_by(form, given, ratio=0.15)
    assert found.num_parameters() <= 0.85 * given.num_parameters()
    assert logits(found).isfinite().all()
    saved_and_loaded(found, tmp_path)
    assert json.dumps(given.config.kdp) == record
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items())


@pytest.mark.parametrize("first", ["linear", "kdp-folded"])
@pytest.mark.parametrize("form", [
    "laco", "flattengpt", "replaceme-closed", "linearpatch", "streamline-ffn", "kdp-learned", "kdp-paper"])
def test_others_prune_folded_stand_ins(tiny_model: Build, first: str, form: str, tmp_path: Path) -> None:
    given = pruned_by(first, tiny_model("llama3.1"), blocks=((1, 3),))
    found = pruned_by(form, given, ratio=0.15)
    assert found.num_parameters() <= 0.85 * given.num_parameters()
    saved_and_loaded(found, tmp_path)


@pytest.mark.parametrize("name", WIRINGS)
def test_two_steps_are_one(tiny_model: Build, name: str) -> None:
    """Stand-ins, contexts and drops side by side, given at once and one after the other."""
    model = tiny_model(name)
    first: list[Edit] = [Substitute(range(1, 2), stand_in(1))]
    for later in ([Substitute(range(3, 5), stand_in(2))], [in_context(model, range(3, 5))], [Drop(range(3, 5))]):
        whole, step = apply_edits(model, [*first, *later]), apply_edits(model, first)
        shifted = [dataclasses.replace(edit, block=range(edit.block.start - 1, edit.block.stop - 1)) for edit in later]
        assert torch.equal(logits(apply_edits(step, shifted)), logits(whole))
        two, one = (json.dumps(found.config.kdp["stand_ins"]) for found in (apply_edits(step, shifted), whole))
        assert two == one
    at_once = apply_edits(model, [Drop(range(1, 2)), Drop(range(3, 5))])
    one_by_one = apply_edits(apply_edits(model, [Drop(range(3, 5))]), [Drop(range(1, 2))])
    assert torch.equal(logits(one_by_one), logits(at_once))
    assert one_by_one.config.to_dict() == at_once.config.to_dict()


@pytest.mark.parametrize("name", ["llama3.1", "bloom", "gpt2"])
def test_stand_ins_meet_in_one_layer(tiny_model: Build, name: str, tmp_path: Path) -> None:
    """Blocks between layers that hold a stand-in each, until one layer holds three: they run one after the other."""
    model = tiny_model(name)
    first, maps = decoder_layers(model)[0], [stand_in(number) for number in range(4)]
    given = model  # stand-ins behind 0; behind 4, the last one then; behind 0 again, for 3 in between; and for that 4
    for block, own in zip((range(1, 3), range(3, 4), range(1, 2), range(1, 2)), maps, strict=True):
        given = apply_edits(given, [Substitute(block, own)])
    (only,) = decoder_layers(given)
    assert isinstance(only, FoldedLayer)
    assert [place for _, place in only.kdp_folded()] == ["after"] * 3

    def behind(_: Any, __: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        for number in (0, 2, 3):
            state = maps[number](state)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    hook = first.register_forward_hook(behind)
    with layers_replaced(model, [first]):
        expected = logits(model)
    hook.remove()
    assert torch.equal(logits(given), expected)
    saved_and_loaded(given, tmp_path)


def test_what_is_folded_leaves_with_its_layer(tiny_model: Build) -> None:
    model = tiny_model("llama3.1")
    given = apply_edits(model, [Substitute(range(1, 3), stand_in(1))])  # behind layer 0
    for edit, kept in ((Drop(range(1)), 0), (Drop(range(1, 2)), 1)):
        assert len(apply_edits(given, [edit]).config.kdp["stand_ins"]) == kept
    for made in (context_layer(given, 0, stand_in(2, residual=False, normalize=False)), ordinary_layer(given, 0)):
        assert type(made) is type(decoder_layers(model)[0])
        assert not any(isinstance(part, FoldedLayer) for part in made.modules())
    assert len(given.config.kdp["stand_ins"]) == 1


def test_an_ordinary_layer_has_an_mlp_where_a_stand_in_has_its_place(tiny_model: Build) -> None:
    for name in ("llama3.1", "gemma3", "opt", "gpt2"):
        given = apply_edits(tiny_model(name), [in_context(tiny_model(name), range(2, 4))])
        layer = ordinary_layer(given, 2, channels=40)
        assert {key: value.shape[0] for key, value in layer.named_parameters() if key.startswith("self_attn.q")} == {
            key: value.shape[0] for key, value in decoder_layers(given)[2].named_parameters()
            if key.startswith("self_attn.q")}
        assert len(mlp_parts(given, layer)[-1].members) == 40
        assert not any(isinstance(part, StandIn) for part in layer.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_are_counted_in_the_layer_itself(tiny_model: Build, name: str) -> None:
    model = tiny_model(name)
    family, whole = family_of(model), key_value_heads(model.config)
    assert {groups_of(layer, family, model.config) for layer in decoder_layers(model)} == {whole}
    if whole > 1 and not family.has_joined_heads(model.config):
        assert groups_of(ordinary_layer(model, 1, 1), family, model.config) == 1


@pytest.mark.parametrize("name", ["llama3", "phi3", "gpt_neox", "gpt2", "falcon"])
def test_narrowing_twice_is_narrowing_once(tiny_model: Build, name: str, tmp_path: Path) -> None:
    """Heads 0, 1 of four and then 0 of these; channels likewise: what is selected in two steps and in one."""
    model = tiny_model(name)

    def narrowed(given: PreTrainedModel, heads: int, channels: int) -> PreTrainedModel:
        layer = decoder_layers(given)[2]
        weights = {}
        for part in attention_parts(given, layer):
            weights |= part.select(layer, torch.arange(heads))
        for part in mlp_parts(given, layer):
            weights |= part.select(layer, torch.arange(channels))
        return apply_edits(given, [Resize(2, {"groups": heads, "channels": channels}, weights)])

    whole = key_value_heads(model.config)
    twice = narrowed(narrowed(model, max(whole // 2, 1), 32), 1, 16)
    once = narrowed(model, 1, 16)
    assert torch.equal(logits(twice), logits(once))
    assert layer_widths(twice) == layer_widths(once) == [{"groups": 1, "channels": 16} if index == 2 else {}
                                                         for index in range(6)]
    saved_and_loaded(twice, tmp_path)


def test_streams_and_heads_are_narrowed_in_either_order(tiny_model: Build, tmp_path: Path) -> None:
    for name, forms in itertools.product(("llama3.1", "gpt_neox", "gpt2"), (("llm-pruner", "slicegpt"),
                                                                           ("slicegpt", "llm-pruner"))):
        given = pruned_by(forms[0], tiny_model(name))
        found = pruned_by(forms[1], given)
        widths = layer_widths(found)
        assert all("states" in width for width in widths)
        assert sum("channels" in width for width in widths) > 1
        saved_and_loaded(found, tmp_path / name / forms[0])


@pytest.mark.parametrize("held", ["after", "mlp"])
def test_replaceme_maps_what_a_stand_in_adds(tiny_model: Build, held: str) -> None:
    """The layer in front of the block ends with a stand-in: the state behind the cut is r + T M, M of its read-out."""
    model = tiny_model("llama3.1")
    first = Substitute(range(1, 3), stand_in(1)) if held == "after" else in_context(model, range(1, 3))
    given = apply_edits(model, [first])
    block = range(1, 3) if held == "after" else range(2, 4)
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    batch = CALIBRATION.select(slice(0, 4))
    with interface(given, block) as states:
        output, rest, _ = states(batch)
    edits = [Rewrite(block.start - 1, folded_weights(given, block.start - 1, matrix)), Drop(block)]
    cut = apply_edits(given, edits)
    with recorded(cut, [block.start]) as seen, torch.no_grad():
        run_layers(cut, batch)
    close(seen[block.start][batch.mask], rest + output @ matrix.T)
    assert output.std() > 0.01


def test_channels_of_a_stand_in_are_landmarks_too(tiny_model: Build) -> None:
    """ψ of a stand-in in the MLP place, as functions of the normalised state, is what its read-out sees."""
    model = tiny_model("gemma3")
    edit = in_context(model, range(2, 4), kind="linear+data", channels=6, activation="gelu_pytorch_tanh")
    given = apply_edits(model, [edit])
    layer: Any = decoder_layers(given)[2]
    found = mlp_channels(given, 2)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = layer.mlp.mapped("data", layer.pre_feedforward_layernorm(x))
        close(found.of(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), layer.mlp.act), seen)
    close(found.outgoing, layer.mlp.readout.weight[:, -6:].detach().norm(dim=0))
    assert len(mlp_channels(apply_edits(model, [in_context(model, range(2, 4))]), 2).lines) == 0


def test_channels_go_evenly_from_layers_that_differ() -> None:
    """Against trying every number: the fewest channels, alike up to one where a layer has as many."""
    for counts, wanted in itertools.product(((8, 8, 8), (8, 3, 0), (2, 8, 5), (1, 1, 9)), range(0, 80, 7)):
        has = [_Structures(2, 10, count, 5 if count else 0, 1) for count in counts]
        cut = _evenly(has, wanted)
        most = [max(count - 1, 0) for count in counts]
        assert all(number <= limit for number, limit in zip(cut, most, strict=True))
        assert sum(cut) == min(-(-wanted // 5), sum(most))
        open_ = [number for number, limit in zip(cut, most, strict=True) if number < limit]
        assert not open_ or max(cut) - min(open_) <= 1


@torch.no_grad()
def test_damage_of_a_block_behind_a_stand_in_is_that_of_the_edit(tiny_model: Build) -> None:
    given = apply_edits(tiny_model("bloom"), [Substitute(range(1, 3), stand_in(1))])
    batch = TokenSet(IDS, torch.ones_like(IDS, dtype=torch.bool), "test")
    for block in (range(1, 3), range(2)):
        edit = Substitute(block, stand_in(2))
        with recorded(given, [block.start]) as seen:
            run_layers(given, batch)
        [[final]] = states_by_ways(
            given, [batch], [{block.start: lambda edit=edit: edit}], lambda index, _, seen=seen: seen[index])
        assert torch.equal(logits(apply_edits(given, [edit])), logits_behind(given, batch, final))


# ------------------------------------------------------------------------------------------------ what cannot be

CANNOT = [
    ("stream", "shortgpt", "take layers out first|Take layers out first"), ("stream", "kdp", "slicegpt made narrower"),
    ("stream", "laco", "slicegpt made narrower"), ("stream", "slicegpt", "turned and cut already"),
    ("after", "slicegpt", "stand-ins, which are functions of the stream"),
    ("stream", "flattengpt", "slicegpt made narrower"),
    ("mlp", "laco", "layers 0 and 2 with parameters of different shapes"),
    ("channels", "kdp-stock", "no stock checkpoint"),
]


@pytest.mark.parametrize(("held", "form", "message"), CANNOT)
def test_pairs_that_cannot_be_are_refused_before_any_work(
    tiny_model: Build, held: str, form: str, message: str
) -> None:
    given = apply_edits(tiny_model("llama3.1"), edits_of(tiny_model("llama3.1"), held))
    method = METHODS["kdp"](form="stock", protect=0.0) if form == "kdp-stock" else quick(form)
    with pytest.raises(KDPruneError, match=message) as caught:
        method.check(given, CALIBRATION)
    assert "\n" not in str(caught.value)


def test_states_of_different_widths_are_not_compared(tiny_model: Build) -> None:
    given = apply_edits(tiny_model("llama3.1"), edits_of(tiny_model("llama3.1"), "stream"))
    with pytest.raises(KDPruneError, match="states are of another width"):
        kdprune.analyze(given, CALIBRATION.ids)


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(KDPruneError, match="got seed 1"):
        kdprune.analyze("nowhere", seed=10**30)


def test_llm_pruner_over_stand_ins_alone_takes_heads(tiny_model: Build) -> None:
    model = tiny_model("llama3.1")
    given = apply_edits(model, [in_context(model, range(start, start + 2)) for start in (0, 3)])
    plan = LLMPruner(ratio=0.05, keep_first=0, keep_last=0).plan(given)
    assert [kept.channels is None for kept in plan.values()] == [True, False, True, False]


# ------------------------------------------------------------------------------------------------ the record


def again(bench: Bench, given: Path, out: Path, *flags: object) -> Outcome:
    """``kdprune prune`` of a checkpoint, a result or not, where it has to succeed."""
    texts = ("--calibration", bench.calibration, "--heldout", bench.heldout, "--samples", 12, "--length", 32)
    with no_drawing():
        outcome = command("prune", given, "-o", out, "--work-dir", "none", *texts, *flags)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.mark.parametrize("first", ["shortgpt", "linear"])
def test_the_record_names_the_chain(bench: Bench, first: str, tmp_path: Path) -> None:
    """A stock result and one with stand-ins, pruned again twice on the command line."""
    outs = [tmp_path / f"out{number}" for number in range(3)]
    again(bench, bench.model, outs[0], "--method", first, "--blocks", "1-3")
    again(bench, outs[0], outs[1], "--method", "linear", "--blocks", "2-4")
    again(bench, outs[1], outs[2], "--method", "llm-pruner", "--ratio", 0.1)
    records = [Results.load(out) for out in outs]
    assert [[(step.method, step.blocks) for step in found.chain] for found in records] == [
        [], [(first, [(1, 3)])], [(first, [(1, 3)]), ("linear", [(2, 4)])]]
    sizes = [AutoModelForCausalLM.from_pretrained(place).num_parameters() for place in (bench.model, *outs)]
    for number, found in enumerate(records):
        counts = found.parameters
        assert (counts.dense, counts.pruned) == (sizes[number], sizes[number + 1])
        assert counts.net_ratio == pytest.approx(1 - sizes[number + 1] / sizes[number])
        assert counts.first == (sizes[0] if number else None)
        if number:
            assert counts.net_ratio_first == pytest.approx(1 - sizes[number + 1] / sizes[0])
            assert counts.net_ratio_first_layers == pytest.approx(
                1 - counts.pruned_layers / records[0].parameters.dense_layers)
            assert found.layers.first == 6
    assert [found.layers.dense for found in records] == [6, 4, 2]
    chain = json.loads((outs[2] / "config.json").read_text())["kdp"]["chain"]
    assert [step["method"] for step in chain] == [first, "linear", "llm-pruner"]
    card = (outs[2] / "README.md").read_text()
    assert f"1. model: layers 1–2 by {first}, 6 → 4 layers" in card
    assert "2. out0: layers 2–3 by linear, 4 → 2 layers" in card
    assert "than the first, dense one" in card
    reread = Results.parse(json.loads(records[2].to_json()))
    assert reread == records[2]


def test_a_loaded_result_is_pruned_in_python_and_older_records_are_read(bench: Bench, tmp_path: Path) -> None:
    with no_drawing():
        first = kdprune.prune(
            bench.model, tmp_path / "out", method="shortgpt", blocks=((1, 3),), calibration=bench.calibration,
            heldout=bench.heldout, samples=12, length=32, work_dir="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    second = kdprune.prune(
        model, tokenizer=str(bench.model), method="linear", blocks=((1, 3),), calibration=bench.calibration,
        heldout=bench.heldout, samples=12, length=32, work_dir="none")
    assert [step.method for step in second.results.chain] == ["shortgpt"]
    assert holds_stand_ins(second.model.config)
    old = json.loads(first.results.to_json())
    del old["chain"]
    assert [step.blocks for step in Results.parse({**old, "earlier": [[[1, 2]]]}).chain] == [[(1, 2)]]
