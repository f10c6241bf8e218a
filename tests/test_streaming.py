"""Streamed models: what a model computes whose layers stay in the checkpoint equals the resident one's, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from families import CONFIGS, build
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.model.families import decoder_layers
from kdprune.model.loading import load_model
from kdprune.model.streaming import checkpoint_bytes, is_streamed, layer_bytes, load_streamed, resident

Saved = dict[str, Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Every tiny model in several shards."""
    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        build(name).save_pretrained(root / name, max_shard_size="20KB")
    return {name: root / name for name in CONFIGS}


def both(path: Path, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model resident and streamed."""
    return load_model(path, device="cpu", dtype=dtype), load_streamed(path, device="cpu", dtype=dtype)


def only_layers_on_meta(model: PreTrainedModel) -> bool:
    layers = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
    return all(p.is_meta == (id(p) in layers) for p in model.parameters()) and not any(
        b.is_meta for b in model.buffers())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_buffers_are_those_of_the_resident_model(saved: Saved, name: str, dtype: str) -> None:
    whole, streamed = both(saved[name], dtype)
    assert is_streamed(streamed)
    assert not is_streamed(whole)
    assert only_layers_on_meta(streamed)
    assert type(streamed) is type(whole)
    assert streamed.config.to_dict() == whole.config.to_dict()
    assert (streamed.name_or_path, streamed.device, streamed.dtype) == (whole.name_or_path, whole.device, whole.dtype)
    before = {key: id(p) for key, p in streamed.named_parameters()}
    with resident(streamed):
        assert not is_streamed(streamed)
        for get in (lambda m: m.named_parameters(), lambda m: m.named_buffers()):
            one, other = dict(get(whole)), dict(get(streamed))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
        ids = torch.arange(12).view(2, 6)
        assert torch.equal(streamed(ids).logits, whole(ids).logits)
    assert {key: id(p) for key, p in streamed.named_parameters()} == before
    assert only_layers_on_meta(streamed)


@pytest.mark.parametrize("name", ["llama3.1", "gpt2"])
def test_everything_goes_back_after_an_error(saved: Saved, name: str) -> None:
    model = load_streamed(saved[name], device="cpu")
    layers = decoder_layers(model)

    def work() -> None:
        with resident(layers[0]), resident(layers[0], layers[1]):
            assert [is_streamed(layer) for layer in layers[:3]] == [False, False, True]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert only_layers_on_meta(model)


def test_nothing_happens_to_a_resident_model() -> None:
    model = build("llama2")
    before = {key: id(p) for key, p in model.named_parameters()}
    with resident(model):
        assert {key: id(p) for key, p in model.named_parameters()} == before


@pytest.mark.parametrize("name", ["llama2", "gemma3"])
def test_sizes_are_read_from_the_headers(saved: Saved, name: str) -> None:
    model = load_model(saved[name], device="cpu")
    assert checkpoint_bytes(saved[name]) == sum(p.numel() * 4 for p in model.parameters())
    assert checkpoint_bytes(saved[name], "bfloat16") * 2 == checkpoint_bytes(saved[name])
    largest = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in decoder_layers(model))
    assert layer_bytes(model) == layer_bytes(load_streamed(saved[name], device="cpu")) == largest


def test_names_without_the_prefix_of_the_base_model(saved: Saved, tmp_path: Path) -> None:
    """GPT-2 as it lies on the hub: transformers renames while it loads, and the sources follow."""
    path = whole_file(saved["gpt2"], tmp_path / "bare", lambda key: key.removeprefix("transformer."))
    whole, streamed = both(path)
    with resident(streamed):
        assert all(torch.equal(p, whole.get_parameter(key)) for key, p in streamed.named_parameters())


def whole_file(path: Path, target: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of a checkpoint in one file, its keys renamed; None leaves the tensor out."""
    copytree(path, target)
    tensors = {key: tensor for file in target.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for file in [*target.glob("*.safetensors"), *target.glob("*.index.json")]:
        file.unlink()
    kept = {name: tensor for key, tensor in tensors.items() if (name := rename(key)) is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_damage_has_the_lines_of_loading(saved: Saved, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    path = whole_file(saved["llama2"], tmp_path / "lost", lambda key: None if key == lost else key)
    binary = copytree(path, tmp_path / "binary")
    (binary / "model.safetensors").unlink()
    torch.save({}, binary / "pytorch_model.bin")
    quantised = copytree(saved["llama2"], tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    for name, message in (
        (path, f"without the weight {lost}"), (tmp_path / "none", "which is no such directory"),
        (binary, "no other can be streamed"), (quantised, "which is quantised"),
    ):
        with pytest.raises(KDPruneError, match=message) as caught:
            load_streamed(name, device="cpu")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_goes_away_is_told(saved: Saved, tmp_path: Path) -> None:
    path = copytree(saved["llama2"], tmp_path / "model")
    model = load_streamed(path, device="cpu")
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(KDPruneError, match="put it back"), resident(decoder_layers(model)[0]):
        pass
    assert only_layers_on_meta(model)
