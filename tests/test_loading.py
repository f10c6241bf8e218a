"""Loading: a good checkpoint comes back as it was, and each kind of damage has its own line."""

import io
import json
import logging
from pathlib import Path
from shutil import copy, copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from kdprune.errors import KDPruneError, one_line
from kdprune.model.loading import load_model, load_tokenizer, resolve_dtype
from kdprune.model.surgery import check_model
from kdprune.runtime.machine import quiet_libraries

BUNDLED = Path(__file__).parent.parent / "src" / "kdprune" / "bundled" / "model"


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several shards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config()).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path, max_shard_size="4KB")
    return path


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return copytree(saved, tmp_path / "broken")


def refused(model: object, message: str, **options: object) -> None:
    with pytest.raises(KDPruneError, match=message) as caught:
        load_model(model, **{"device": "cpu"} | options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def rewrite(path: Path, **entries: object) -> None:
    config = json.loads((path / "config.json").read_text()) | entries
    (path / "config.json").write_text(json.dumps(config))


def test_model_comes_back_in_its_own_dtype_and_eval_mode(saved: Path) -> None:
    model = load_model(saved, device="cpu")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_model(str(saved), device="cpu", dtype="float32").dtype == torch.float32


def test_loaded_model_is_returned_itself(saved: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved).train()
    assert load_model(model) is model
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert load_model(model, device="cpu", dtype=torch.float32).dtype == torch.float32


def test_nothing_is_printed(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(saved, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_missing_and_empty_directories(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    refused(tmp_path / "missing", "which is no such directory")
    refused(tmp_path / "empty", "without config.json")
    refused(tmp_path / "file", "which is a file")
    refused(7, "got a model of type int")


def test_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("no-such-org/no-such-model", "no such directory here, and the hub did not give it")


def test_truncated_shard(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(broken, f"{shard.name}, which is truncated or damaged")
    shard.write_bytes(b"")
    refused(broken, f"{shard.name}, which is truncated or damaged")


def test_missing_shard(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    refused(broken, f"without {shard.name}")


def test_no_weights(broken: Path) -> None:
    for file in [*broken.glob("*.safetensors"), broken / "model.safetensors.index.json"]:
        file.unlink()
    refused(broken, "without weights")


def test_missing_weights_are_never_initialised_at_random(broken: Path) -> None:
    tensors = {name: t for f in broken.glob("*.safetensors") for name, t in load_file(f).items()}
    for file in [*broken.glob("*.safetensors"), broken / "model.safetensors.index.json"]:
        file.unlink()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(broken, "without the weight model.layers.1.mlp.up_proj.weight")


def test_config_of_another_shape(broken: Path) -> None:
    rewrite(broken, num_hidden_layers=4)
    refused(broken, "without the weight model.layers.3")
    rewrite(broken, num_hidden_layers=3, intermediate_size=48)
    refused(broken, "cannot load the model")


def test_stand_in_under_a_stock_type(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(shard) | {"model.layers.0.kdp.readout.weight": torch.zeros(2, 2)}
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(broken, "stand-in model.layers.0.kdp.readout.weight under a stock model_type")


def test_unused_weights_are_told(broken: Path) -> None:
    rewrite(broken, num_hidden_layers=2)
    told = io.StringIO()
    handler, logger = logging.StreamHandler(told), logging.getLogger("kdprune")
    logger.addHandler(handler)
    try:
        load_model(broken, device="cpu")
    finally:
        logger.removeHandler(handler)
    assert "weights the architecture does not use" in told.getvalue()


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": []}'])
def test_damaged_config(broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    refused(broken, "config.json")


def test_damaged_index(broken: Path) -> None:
    (broken / "model.safetensors.index.json").write_text("{}")
    refused(broken, "without weight_map")


def test_not_a_causal_lm(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=64, **sizes))
    t5_config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    t5 = T5ForConditionalGeneration(t5_config)
    judge = LlamaForSequenceClassification(tiny_config())
    for name, model in {"bert": bert, "t5": t5, "judge": judge}.items():
        model.save_pretrained(tmp_path / name)
    refused(tmp_path / "bert", "BertForMaskedLM, which has no causal")
    refused(tmp_path / "t5", "an encoder-decoder")
    refused(tmp_path / "judge", "LlamaForSequenceClassification, which has no causal")


def test_unknown_architectures(broken: Path) -> None:
    rewrite(broken, model_type="never-heard-of")
    refused(broken, "never-heard-of")
    rewrite(broken, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    refused(broken, "needs code of its own")


def test_family_without_a_row(tmp_path: Path) -> None:
    config = GPTBigCodeConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = GPTBigCodeForCausalLM(config)
    model.save_pretrained(tmp_path / "code")
    found = load_model(tmp_path / "code", device="cpu")  # its list of layers is all that is known
    with pytest.raises(KDPruneError, match="unknown model family 'gpt_bigcode'"):
        check_model(found, substitutes=True)
    assert load_model(tmp_path / "code", device="cpu", known_family=False).config.model_type == "gpt_bigcode"


def test_devices_and_dtypes(saved: Path) -> None:
    refused(saved, "got device 'warp'", device="warp")
    refused(saved, "got dtype 'int8'", dtype="int8")
    refused(saved, "got dtype 'float33'", dtype="float33")
    assert resolve_dtype("auto") is None
    assert resolve_dtype("bfloat16") is torch.bfloat16


def test_tokenizers(saved: Path, tmp_path: Path) -> None:
    own = load_tokenizer(BUNDLED)
    assert own is not None
    assert load_tokenizer(saved) is None
    assert load_tokenizer(saved, own) is own
    assert load_tokenizer(LlamaForCausalLM(tiny_config())) is None
    beside = LlamaForCausalLM.from_pretrained(BUNDLED)
    found, named = load_tokenizer(beside), load_tokenizer(saved, BUNDLED)
    assert found is not None
    assert named is not None
    assert len(found) == len(named) == len(own)


def test_damaged_tokenizers(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    for model, tokenizer in [(tmp_path, None), (saved, tmp_path), (saved, saved)]:
        with pytest.raises(KDPruneError, match="cannot load the tokenizer") as caught:
            load_tokenizer(model, tokenizer)
        assert "\n" not in str(caught.value)
    with pytest.raises(KDPruneError, match="tokenizer of type int"):
        load_tokenizer(saved, 7)  # type: ignore[arg-type]


def test_one_line_and_silence() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 999))) == 200
    logger = logging.getLogger("transformers")
    before = logger.level
    with quiet_libraries():
        assert logger.level == logging.CRITICAL
    assert logger.level == before


def test_a_hub_tokenizer_that_is_there_but_damaged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one in a directory is; only where the repository has none is there none."""
    folder = tmp_path / "hub" / "models--someone--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    copy(BUNDLED / "config.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_tokenizer("someone/small") is None
    (snapshot / "tokenizer.json").write_text("{")
    with pytest.raises(KDPruneError, match=r"cannot load the tokenizer of .someone/small"):
        load_tokenizer("someone/small")
