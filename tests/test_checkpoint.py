"""Saving, loading back, and what verify refuses."""

import contextlib
import json
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WIRINGS
from pruned import prune
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.model import modeling_kdp
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.serving import BACKEND, register_vllm
from kdprune.model.surgery import Drop, Substitute, apply_edits

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 27).reshape(2, 12)
Build = Callable[..., PreTrainedModel]


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the checkpoint's weights with ``change`` applied to the dict of tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pruned_model_is_verified(tiny_model: Build, tmp_path: Path, dtype: torch.dtype) -> None:
    model = prune(tiny_model("gemma3").to(dtype), "mixed")  # this cast rounds the rotary frequencies too
    save_model(model, tmp_path)
    verify(tmp_path, model, IDS)
    source = Path(modeling_kdp.__file__).read_bytes()
    assert (tmp_path / "modeling_kdp.py").read_bytes() == source
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_kdp.KDPGemma3TextConfig",
        "AutoModel": "modeling_kdp.KDPGemma3TextModel",
        "AutoModelForCausalLM": "modeling_kdp.KDPGemma3TextForCausalLM",
        "AutoModelForSequenceClassification": "modeling_kdp.KDPGemma3TextForSequenceClassification",
    }
    assert config["model_type"] == "kdp_gemma3_text"
    assert config["architectures"] == ["KDPGemma3TextForCausalLM"]
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("name", WIRINGS)
def test_models_cast_to_half_precision_are_verified(tiny_model: Build, tmp_path: Path, name: str) -> None:
    dense = tiny_model(name).bfloat16()
    before = [buffer.clone() for buffer in dense.buffers()]
    model = prune(dense, "before")
    save_model(model, tmp_path)
    verify(tmp_path, model, IDS)
    assert all(torch.equal(*pair) for pair in zip(before, dense.buffers(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama3", "opt", "phi3"])  # heads are counted in as many ways
def test_a_context_with_fewer_heads_is_verified(tiny_model: Build, tmp_path: Path, name: str) -> None:
    model = prune(tiny_model(name).bfloat16(), "heads")
    save_model(model, tmp_path)
    verify(tmp_path, model, IDS)
    record = json.loads((tmp_path / "config.json").read_text())["kdp"]
    assert record["version"] == 2
    heads = modeling_kdp.key_value_heads(model.config)
    assert record["widths"] == [{}, {}, {"groups": heads // 2}, {}, {}]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    save_model(loaded, tmp_path / "again")
    verify(tmp_path / "again", model, IDS)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-window", "opt", "gpt2"])
def test_dropped_layers_leave_a_stock_checkpoint(tiny_model: Build, tmp_path: Path, name: str) -> None:
    dense = tiny_model(name)
    model = apply_edits(dense, [Drop(range(1)), Drop(range(2, 4))])
    save_model(model, tmp_path)
    verify(tmp_path, model, IDS)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(dense)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == dense.config.model_type
    assert not {"kdp", "auto_map"} & set(config)
    assert not (tmp_path / "modeling_kdp.py").exists()


def test_a_loaded_model_can_be_saved_again(tiny_model: Build, tmp_path: Path) -> None:
    model = prune(tiny_model("llama3.1"), "mixed")
    save_model(model, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    save_model(loaded, tmp_path / "two")
    verify(tmp_path / "two", model, IDS)
    first, second = ((tmp_path / name / "config.json").read_text() for name in ("one", "two"))
    assert first == second


def test_a_config_alone_ships_its_code(tiny_model: Build, tmp_path: Path) -> None:
    prune(tiny_model("llama3"), "after").config.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "modeling_kdp.py"}


def test_the_tokenizer_travels_along(bundled: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.name_or_path)
    stand_in = modeling_kdp.StandIn(128, features=8)
    model = apply_edits(bundled, [Substitute(range(2, 14), stand_in)])
    save_model(model, tmp_path, tokenizer)
    verify(tmp_path, model, IDS)
    text = "Once upon a time"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_a_published_generation_config_is_kept_as_it_is(tiny_model: Build, tmp_path: Path) -> None:
    tiny_model("llama3").save_pretrained(tmp_path / "dense")
    odd = {"do_sample": False, "temperature": 0.6, "max_new_tokens": 7}  # refused by transformers if it were new
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(odd))
    model = prune(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), "after")
    save_model(model, tmp_path / "pruned")
    written = json.loads((tmp_path / "pruned" / "generation_config.json").read_text())
    assert odd.items() <= written.items()


def saved(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    save_model(model, directory)
    return model


def test_verify_names_the_largest_difference(tiny_model: Build, tmp_path: Path) -> None:
    model = saved(prune(tiny_model("llama3"), "after"), tmp_path)

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.kdp.readout.bias"][0] += 1e-3

    change_weights(tmp_path, nudge)
    with pytest.raises(KDPruneError, match=r"logits differ by up to \d"):
        verify(tmp_path, model, IDS)


def test_verify_names_missing_and_unexpected_weights(tiny_model: Build, tmp_path: Path) -> None:
    model = saved(prune(tiny_model("llama3"), "after"), tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop("model.layers.1.kdp.phase.weight"))
    with pytest.raises(KDPruneError, match=r"missing keys: model\.layers\.1\.kdp\.phase\.weight"):
        verify(tmp_path, model, IDS)
    saved(model, tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(KDPruneError, match="unexpected keys: stray"):
        verify(tmp_path, model, IDS)


def test_verify_refuses_another_class(tiny_model: Build, tmp_path: Path) -> None:
    dense = saved(tiny_model("llama3"), tmp_path)
    with pytest.raises(KDPruneError, match="loads as LlamaForCausalLM, not as KDPLlamaForCausalLM"):
        verify(tmp_path, prune(dense, "after"), IDS)


def test_verify_refuses_logits_that_are_not_finite(tiny_model: Build, tmp_path: Path) -> None:
    model = prune(tiny_model("llama3"), "after")
    with torch.no_grad():
        model.model.layers[1].kdp.readout.bias[0] = float("nan")
    with pytest.raises(KDPruneError, match="not finite"):
        verify(tmp_path, saved(model, tmp_path), IDS)


def test_verify_puts_the_mode_back(tiny_model: Build, tmp_path: Path) -> None:
    model = saved(prune(tiny_model("gpt2"), "after"), tmp_path).train()
    verify(tmp_path, model, IDS)
    assert model.training


def test_a_place_that_cannot_be_written_is_one_error(tiny_model: Build, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(KDPruneError, match="cannot write the checkpoint"):
            save_model(tiny_model("llama3"), directory)


def test_a_record_of_another_version_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    saved(prune(tiny_model("llama3"), "after"), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.kdp["version"] = 99
    with pytest.raises(ValueError, match="version 99"):
        AutoModelForCausalLM.from_config(config)
    config.kdp = {"version": 1, "stand_ins": [{"layer": 9, "place": "after", "features": 4}]}
    with pytest.raises(ValueError, match="layer 9 of 3"):
        AutoModelForCausalLM.from_config(config)


def test_a_config_without_a_record_builds_the_plain_model() -> None:
    config = modeling_kdp.KDPLlamaConfig(  # type: ignore[attr-defined]
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, intermediate_size=48
    )
    model = AutoModelForCausalLM.from_config(config)
    assert torch.isfinite(model(IDS).logits).all()


def test_vllm_is_told_every_class_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, str]] = []
    registry = types.SimpleNamespace(
        get_supported_archs=lambda: {name for name, _ in registered},
        register_model=lambda name, path: registered.append((name, path)),
    )
    asked: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setitem(
        sys.modules, "vllm.model_executor.models.config", types.SimpleNamespace(MODELS_CONFIG_MAP=asked))
    register_vllm()
    register_vllm()
    assert len(registered) == len(modeling_kdp.FAMILIES)
    assert ("KDPLlamaForCausalLM", BACKEND) in registered
    config = types.SimpleNamespace(kdp={"widths": [{"without": "mlp"}, {}, {"groups": 1, "channels": 8}]})
    given = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=config))
    refused = set()
    for name, hooks in asked.items():
        with contextlib.suppress(ValueError):
            hooks.verify_and_update_config(given)
            continue
        refused.add(name)
    assert refused == {"KDPBloomForCausalLM", "KDPFalconForCausalLM", "KDPGPT2ForCausalLM", "KDPGPTJForCausalLM"}
    config.kdp["widths"] += [{"without": "attention"}]
    with pytest.raises(ValueError, match=r"got a pruned gpt2 model.*serve it with transformers"):
        asked["KDPGPT2ForCausalLM"].verify_and_update_model_config(given.model_config)
    with pytest.raises(ValueError, match=r"without attention in layers 3.*serve it with transformers"):
        asked["KDPLlamaForCausalLM"].verify_and_update_model_config(given.model_config)
