"""Models that device_map has spread or offloaded: states, edits, checkpoints and whole runs equal those of plain ones.

There is one device here, so that maps mix host memory and disk; the hooks and the files are accelerate's own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from device_maps import device_map
from families import LAYERS, WIDTH, WIRINGS, build
from methods import FORMS, quick
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kdprune
from kdprune.errors import KDPruneError
from kdprune.evaluation.perplexity import perplexity
from kdprune.methods.common.analysis import score_layers
from kdprune.model.activations import layer_states
from kdprune.model.block_states import boundary_states
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.edits import Drop, Edit, Rewrite, Substitute
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.loading import load_model
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.placement import check_states_model, device_of, input_device, is_dispatched
from kdprune.model.streaming import is_streamed
from kdprune.model.surgery import apply_edits, context_layer
from kdprune.runtime.run import Run
from kdprune.testing import CALIBRATION
from kdprune.testing import logits_of as logits

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("drop", "after", "before", "context", "heads", "rewrite")
SPREAD = [form for form in FORMS if quick(form).spreads]


def mixed(model: PreTrainedModel, disk: bool) -> dict[str, Any]:
    """A device_map: every second layer on disk; or all of the model, embeddings and head too."""
    return device_map(model, lambda index: "disk" if disk or index % 2 else "cpu", "disk" if disk else "cpu")


def placed(folder: Path, model: PreTrainedModel, disk: bool) -> PreTrainedModel:
    """The model as loaded from ``folder`` with such a map."""
    if not folder.exists():
        model.save_pretrained(folder)
    return load_model(folder, device_map=mixed(model, disk), offload_folder=folder / "offloaded")


def edits_of(model: PreTrainedModel, kind: str) -> list[Edit]:
    """One edit of each kind, the same for every copy of a model."""
    draw = torch.Generator().manual_seed(3)

    def stand_in(**options: Any) -> StandIn:
        made = StandIn(WIDTH, features=8, **options)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.2, generator=draw)
        return made

    if kind == "drop":
        return [Drop(range(1, 3))]
    if kind == "rewrite":
        name, weight = next((n, p) for n, p in decoder_layers(model)[3].named_parameters() if p.dim() > 1)
        return [Rewrite(3, {name: torch.randn(weight.shape, generator=draw)}), Drop(range(4, 5))]
    if kind in ("context", "heads"):
        made, groups = stand_in(residual=False, normalize=False), {"heads": 1}.get(kind)
        return [Substitute(range(3, 5), made, context_layer(model, 4, made, groups), 4, groups)]
    return [Substitute(range(2) if kind == "before" else range(2, 4), stand_in())]


@pytest.mark.parametrize(
    ("name", "disk"),
    [*((name, False) for name in (*WIRINGS, "mixtral")), *((name, True) for name in ("llama3.1", "opt-350m"))])
def test_placed_model_is_edited_and_saved_as_a_plain_one(name: str, disk: bool, tmp_path: Path) -> None:
    plain = build(name)
    model = placed(tmp_path / "dense", plain, disk)
    assert is_dispatched(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not is_streamed(model)
    tokens = CALIBRATION
    for (_, expected), (_, found) in zip(
            *(layer_states(m, tokens, range(LAYERS + 1), 4) for m in (plain, model)), strict=True):
        assert all(torch.equal(expected[index], found[index]) for index in expected)
    kinds = KINDS if name == "llama3.1" and not disk else ("heads", "after", "rewrite")
    for kind in kinds:
        expected_model, pruned = (apply_edits(m, edits_of(m, kind)) for m in (plain, model))
        assert is_dispatched(pruned)
        assert torch.equal(logits(pruned), logits(expected_model)), kind
        assert {int(key[len(family_of(model).layers) + 1 :].split(".")[0]) for key in pruned.hf_device_map
                if key.startswith(family_of(model).layers + ".")} == set(range(pruned.config.num_hidden_layers))
    save_model(expected_model, tmp_path / "expected")
    save_model(pruned, tmp_path / "found")
    verify(tmp_path / "found", pruned, tokens.ids[:1])
    files = [load_file(tmp_path / kind / "model.safetensors") for kind in ("expected", "found")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert torch.equal(logits(model), logits(plain))  # which is as it was


@pytest.mark.parametrize("kind", ["after", "context", "heads"])
def test_pruned_placed_model_saves_under_the_names_it_loads_by(kind: str, tmp_path: Path) -> None:
    """GPT-NeoX's head has another name in published checkpoints than in memory, and in its pruned class."""
    model = placed(tmp_path / "dense", build("gpt_neox"), disk=True)
    pruned = apply_edits(model, edits_of(model, kind))
    save_model(pruned, tmp_path / "pruned")
    verify(tmp_path / "pruned", pruned, torch.arange(3, 12)[None])
    whole = load_model(tmp_path / "dense")
    pruned = apply_edits(whole, edits_of(whole, kind))
    save_model(pruned, tmp_path / "again")
    verify(tmp_path / "again", pruned, torch.arange(3, 12)[None])


def test_a_model_under_several_hooks_is_copied_without_its_weights(tmp_path: Path) -> None:
    """Hooks that a user adds in front of those of a map; the pruned model shares what they hold."""
    hooks: Any = pytest.importorskip("accelerate.hooks")
    plain = build("llama3")
    model = placed(tmp_path / "dense", plain, disk=True)
    layer = decoder_layers(model)[4]
    for part in (layer, layer.mlp.up_proj):
        hooks.add_hook_to_module(part, hooks.ModelHook(), append=True)
    new = {"mlp.up_proj.weight": torch.ones(48, WIDTH)}
    pruned = apply_edits(model, [Rewrite(4, new), *edits_of(model, "drop")])
    held = layer.mlp.down_proj._hf_hook.weights_map
    assert decoder_layers(pruned)[2].mlp.down_proj._hf_hook.weights_map is held
    expected = apply_edits(plain, [Rewrite(4, new), *edits_of(plain, "drop")])
    assert torch.equal(logits(pruned), logits(expected))
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("form", SPREAD)
def test_methods_fit_on_a_placed_model_as_on_a_plain_one(form: str, tmp_path: Path) -> None:
    plain = build("llama3")
    pruned = []
    for model in (plain, placed(tmp_path / "dense", plain, disk=False)):
        method, tokens = quick(form), CALIBRATION
        pruned.append(apply_edits(model, method(model, CALIBRATION, Run()).edits))
    assert torch.equal(logits(pruned[0]), logits(pruned[1]))
    assert perplexity(pruned[0], tokens) == perplexity(pruned[1], tokens)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in SPREAD])
def test_other_methods_say_that_they_cannot(form: str, tmp_path: Path) -> None:
    model = placed(tmp_path / "dense", build("llama3"), disk=False)
    with pytest.raises(KDPruneError, match="load it without device_map"):
        quick(form).check(model, CALIBRATION)


def test_whole_run_on_a_model_the_user_placed(bench: Any, tmp_path: Path) -> None:
    plain = load_model(bench.model)
    model = AutoModelForCausalLM.from_pretrained(
        bench.model, device_map=mixed(plain, disk=False), offload_folder=tmp_path / "offloaded")
    runs = [kdprune.prune(m, tokenizer=bench.model, **{**bench.options, "ranking": "damage"}) for m in (plain, model)]
    assert runs[0].blocks == runs[1].blocks
    assert runs[0].results.perplexity == runs[1].results.perplexity
    save_model(runs[1].model, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in runs[0].model.state_dict().items())
    with pytest.raises(KDPruneError, match="got heal for a model whose layers are read from disk or spread"):
        kdprune.prune(model, tokenizer=bench.model, heal="lm", **bench.options)


def test_a_copy_does_not_move_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = placed(tmp_path / "dense", build("llama3"), disk=False)
    pruned = apply_edits(model, [Drop(range(1, 3))])
    assert "to" in model.__dict__
    assert "to" not in pruned.__dict__
    hooks = [{id(part._hf_hook) for part in m.modules() if hasattr(part, "_hf_hook")} for m in (model, pruned)]
    assert all(hooks)
    assert not hooks[0] & hooks[1]


def test_load_model_says_what_cannot_be_placed(tmp_path: Path) -> None:
    plain = build("llama3")
    plain.save_pretrained(tmp_path)
    with pytest.raises(KDPruneError, match="got device_map with a loaded model, expected it alone"):
        load_model(plain, device_map="auto")
    with pytest.raises(KDPruneError, match="got device_map with device 'cpu', expected it alone"):
        load_model(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(KDPruneError, match="with a model placed by device_map, expected neither"):
        load_model(placed(tmp_path, plain, disk=False), dtype="bfloat16")
    assert not is_dispatched(load_model(tmp_path, device_map="auto", max_memory={"cpu": "1GiB"}))


def test_states_come_from_the_collector_and_edits_from_the_model() -> None:
    model, other = build("llama3"), build("llama3", seed=1)
    tokens = CALIBRATION
    run = Run(states_model=other, batch_size=4)
    found = boundary_states(run.running(model), tokens, [3], run, stage="states")[3]
    scores = score_layers(model, tokens, run, protect=0.0)
    for form in ("slicegpt", "laco", "llm-pruner", "sleb"):
        with pytest.raises(KDPruneError, match="needs more of the running model than states"):
            quick(form).check_states_model()
    kept = apply_edits(model, quick("shortgpt")(model, tokens, run).edits)
    expected = torch.cat([states[3] for _, states in layer_states(other, tokens, [3], 4)])
    assert torch.equal(found[slice(0, len(tokens))], expected)
    again = score_layers(other, tokens, Run(batch_size=4), protect=0.0)
    assert all((scores[name] == again[name]).all() for name in scores)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in kept.parameters())
    mine, fresh = (next(layer_states(m, tokens, [0], 4))[1][0] for m in (model, build("llama3")))
    assert torch.equal(mine, fresh)
    with pytest.raises(KDPruneError, match="got a model to collect states from with model_type opt, expected llama"):
        check_states_model(model, build("opt-350m", seed=1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_an_accelerator_and_offloaded(kind: str, tmp_path: Path) -> None:
    """Devices 0, host and disk in one map (and device 1 where there is one)."""
    plain = build("llama3")
    plain.save_pretrained(tmp_path / "dense")
    second = 1 if torch.accelerator.device_count() > 1 else "cpu"
    places = [0, "cpu", second, "disk", second, 0]
    where = device_map(plain, places.__getitem__, 0) | {"model.norm": second}
    model = load_model(tmp_path / "dense", device_map=where, offload_folder=tmp_path / "offloaded")
    assert input_device(model) == device_of(decoder_layers(model)[0]) == torch.device(0)
    tokens = CALIBRATION
    for (_, expected), (_, found) in zip(
            *(layer_states(m, tokens, range(LAYERS + 1), 4) for m in (plain, model)), strict=True):
        assert all(torch.allclose(expected[index], found[index].cpu(), atol=1e-4) for index in expected)
    expected_model, pruned = (apply_edits(m, edits_of(m, kind)) for m in (plain, model))
    assert torch.allclose(logits(pruned).cpu(), logits(expected_model), atol=1e-3)
    save_model(pruned, tmp_path / "pruned")
    verify(tmp_path / "pruned", pruned, tokens.ids[:1])
