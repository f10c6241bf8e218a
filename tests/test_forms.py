"""Checkpoints that are no plain causal LM in full precision: what becomes of each, before any work."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_file import near, write_gguf
from safetensors.torch import load_file, save_file
from test_command_line import refused
from tiny_checkpoint import WORDS, Bench, command, no_drawing, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
)

import kdprune
from kdprune.errors import KDPruneError
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.model.streaming import load_streamed
from kdprune.planning.plan import plan

pytestmark = pytest.mark.usefixtures("one_thread")
PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # newer releases of transformers
IDS = torch.arange(3, 40)[None]
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": WORDS, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0}
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8}


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose linear maps have 64 inputs or more."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**TEXT, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
                         initializer_range=0.15)
    folder = tmp_path_factory.mktemp("wide") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits.float()


# ------------------------------------------------------------------------------------------ quantised


def in_8_bit_floats(model: Path, folder: Path) -> Path:
    """The checkpoint with its projections in float8, one scale for 128 × 128 weights."""
    shutil.copytree(model, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        tensors[name] = weight.bfloat16()
        if "_proj" in name:
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in weight.shape]
            tensors[f"{name}_scale_inv"] = scale.expand(blocks).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantised(folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128], fmt="e4m3")
    return folder


def quantised(folder: Path, **about: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": about}))


def check_turned_back(stored: Path, wide: Path, folder: Path, error: float, told: str) -> None:
    """What is loaded is near the model that was quantised, plain, and saved as such."""
    found = load_model(stored, device="cpu")
    assert type(found) is LlamaForCausalLM
    assert 0 < near(logits(found), logits(load_model(wide, device="cpu"))) < error
    assert {type(parameter.data) for parameter in found.parameters()} == {torch.Tensor}
    assert all(parameter.dtype == found.dtype and found.dtype.itemsize > 1 for parameter in found.parameters())
    save_model(found, folder)
    verify(folder, found, IDS)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert plan(stored, ratio=0.15).stored == told


def test_8_bit_floats_are_turned_back(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = in_8_bit_floats(wide, tmp_path / "fp8")
    check_turned_back(stored, wide, tmp_path / "out", 0.2, "fp8")
    assert f"kdprune: {stored} is quantised with fp8: turned back into full precision" in capsys.readouterr().err
    with pytest.raises(KDPruneError, match=r"quantised; expected full-precision weights to stream"):
        load_streamed(stored, device="cpu")


@pytest.mark.parametrize(("bits", "error"), [(4, 0.6), (8, 0.1)])
def test_bitsandbytes_is_turned_back(bits: int, error: float, wide: Path, tmp_path: Path) -> None:
    needs("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "stored")
    with pytest.raises(KDPruneError, match="got a loaded model that is quantised with bitsandbytes"):
        load_model(model)
    check_turned_back(tmp_path / "stored", wide, tmp_path / "out", error, "bitsandbytes")


def test_attention_without_float32_is_refused() -> None:
    model = tiny_llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(KDPruneError, match="attention by flash_attention_2, which has no float32"):
        load_model(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "something new"])
def test_what_cannot_be_turned_back_is_refused_by_plan_too(method: str, bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    quantised(tmp_path / "model", quant_method=method, bits=4)
    message = f"quantised with {method} and cannot be turned back; .*give the model it was made from"
    refused(message, "prune", tmp_path / "model", "-o", tmp_path / "out", *bench.flags, folder=tmp_path)
    refused(message, "plan", tmp_path / "model", folder=tmp_path)


def test_a_package_that_is_missing_is_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    quantised(tmp_path / "model", load_in_4bit=True)
    monkeypatch.setattr("kdprune.model.forms.importlib.util.find_spec", lambda name: None)
    refused("to turn it back: pip install bitsandbytes", "prune", tmp_path / "model", "-o", tmp_path / "out",
            *bench.flags, folder=tmp_path)
    assert command("plan", tmp_path / "model", "--ratio", 0.2).status == 0


# ------------------------------------------------------------------------------------------ adapters, wrappers


def with_adapter(bench: Bench) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))


@pytest.mark.filterwarnings(PEFT)
def test_an_adapter_in_the_directory_or_alone(bench: Bench, tmp_path: Path) -> None:
    with_adapter(bench).save_pretrained(tmp_path / "adapter")
    shutil.copytree(bench.model, tmp_path / "model")
    for file in (tmp_path / "adapter").glob("adapter*"):
        shutil.copy(file, tmp_path / "model")
    for name in ("adapter", "model"):
        for run in (("prune", tmp_path / name, "-o", tmp_path / "out", *bench.flags), ("plan", tmp_path / name)):
            refused("which holds an adapter .LoRA.; merge it first", *run, folder=tmp_path)


@pytest.mark.filterwarnings(PEFT, "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("wrap", "message"), [
    (lambda bench: with_adapter(bench), r"type PeftModelForCausalLM.*merge it: model.merge_and_unload"),
    (lambda bench: with_adapter(bench).base_model.model, r"holds an adapter .*merge_and_unload"),
    (lambda bench: torch.compile(tiny_llama()), r"type OptimizedModule.*give model._orig_mod"),
    (lambda bench: torch.nn.DataParallel(tiny_llama()), r"type DataParallel.*give model.module"),
    (lambda bench: tiny_llama().model.layers[0], r"type LlamaDecoderLayer, expected a directory, a hub id"),
])
def test_wrappers_have_to_be_taken_off(wrap: Callable[[Bench], Any], message: str, bench: Bench) -> None:
    with pytest.raises(KDPruneError, match=message) as caught:
        kdprune.prune(wrap(bench), calibration=IDS.expand(12, -1))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ multimodal


def gemma() -> Any:
    text = {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3}
    return Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=WORDS - 1,
        boi_token_index=WORDS - 2, eoi_token_index=WORDS - 3))


def llava() -> Any:
    return LlavaForConditionalGeneration(LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=WORDS - 1))


@pytest.mark.parametrize(("make", "kind"), [(gemma, "Gemma3ForCausalLM"), (llava, "LlamaForCausalLM")])
def test_the_text_part_of_a_multimodal_model(
    make: Callable[[], Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "whole")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    found = load_model(tmp_path / "whole", device="cpu")
    assert type(found).__name__ == kind
    assert torch.equal(logits(found), logits(whole))
    assert f"its text part is taken, a {kind}" in capsys.readouterr().err
    save_model(found, tmp_path / "out")
    verify(tmp_path / "out", found, IDS)
    expected = plan(tmp_path / "whole", ratio=0.15)
    assert (expected.dense.parameters, expected.dense.layers) == (found.num_parameters(), 4)
    with pytest.raises(KDPruneError, match="a multimodal model, which is not read layer by layer"):
        load_streamed(tmp_path / "whole", device="cpu")


@no_drawing()
def test_pruning_a_multimodal_model(bench: Bench, tmp_path: Path) -> None:
    gemma().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(bench.model).save_pretrained(tmp_path / "whole")
    outcome = command(
        "prune", tmp_path / "whole", "-o", tmp_path / "out", "--method", "shortgpt", "--ratio", 0.1, "--protect", 0,
        "--calibration", bench.calibration, "--heldout", bench.heldout, "--samples", 12, "--length", 32, "--work-dir",
        "none")
    assert outcome.status == 0, outcome.err
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "Gemma3ForCausalLM"


def test_a_text_part_of_no_known_family(tmp_path: Path) -> None:
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    config = Qwen2VLConfig(text_config=text)
    config.save_pretrained(tmp_path)
    refused("qwen2_vl whose text part is a qwen2_vl_text, of no known family", "plan", tmp_path, folder=tmp_path)


# ------------------------------------------------------------------------------------------ GGUF


@pytest.fixture(scope="module")
def file(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf"
    write_gguf(bench.model, path)
    return path


def test_a_gguf_file_is_read_into_full_precision(file: Path, bench: Bench) -> None:
    found, dense = load_model(file, device="cpu"), load_model(bench.model, device="cpu")
    assert 0 < near(logits(found), logits(dense)) < 0.1
    own, expected = load_tokenizer(file.parent), load_tokenizer(bench.model)
    assert own("The quick fox.")["input_ids"] == expected("The quick fox.")["input_ids"]
    with pytest.raises(KDPruneError, match="GGUF weights are not read layer by layer"):
        load_streamed(file, device="cpu")


@no_drawing()
def test_pruning_a_gguf_file_or_its_directory(file: Path, bench: Bench, tmp_path: Path) -> None:
    run = ("--method", "shortgpt", "--ratio", 0.1, "--protect", 0, "--calibration", bench.calibration, "--heldout",
           bench.heldout, "--samples", 12, "--length", 32, "--work-dir", tmp_path / "work")
    for model in (file, file.parent):
        outcome = command("prune", model, "-o", tmp_path / "out", "--overwrite", *run)
        assert outcome.status == 0, outcome.err
        assert "is a GGUF file: its weights are read into full precision" in outcome.err
        assert command("plan", model, "--ratio", 0.2).status == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], "quantization_config" in config) == (["LlamaForCausalLM"], False)
    refused("is the model", "prune", file, "-o", file, "--overwrite", *run, folder=file.parent)


def test_several_gguf_files_and_damaged_ones(tmp_path: Path, bench: Bench) -> None:
    needs("gguf")
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF not really")
    run = ("-o", tmp_path.with_name("elsewhere"), *bench.flags)
    refused("with 2 GGUF files, expected one; give one of them, as .*a.gguf", "prune", tmp_path, *run, folder=tmp_path)
    refused("cannot load the model in .*a.gguf", "prune", tmp_path / "a.gguf", *run, folder=tmp_path)
    refused("cannot read the config", "plan", tmp_path / "a.gguf", folder=tmp_path)
