"""What follows the fit of a streamed model: it is saved, verified and measured within memory, to the same bits."""

import contextlib
import functools
import io
import json
import os
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import CONFIGS, build
from pruned import PLACES, edits
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_checkpoint import Bench, largest_file, tree
from transformers import AutoTokenizer, PreTrainedModel

from kdprune.assemble import analysis_results, evaluate, pruning_results
from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.perplexity import perplexity
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods.result import MethodResult
from kdprune.model.checkpoint import _write_tensors, save_model, verify
from kdprune.model.loading import load_model
from kdprune.model.streaming import Scratch, Source, is_streamed, layer_bytes, load_streamed, set_scratch
from kdprune.model.surgery import Drop, apply_edits
from kdprune.output import staged_directory
from kdprune.pipeline import PruneResult
from kdprune.report import summary
from kdprune.report.card import render_card
from kdprune.report.page import render_page
from kdprune.report.results import Results
from kdprune.report.table import print_summary
from kdprune.runtime import Stages

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 27).reshape(2, 12)
Pair = tuple[PreTrainedModel, PreTrainedModel]  # resident, streamed
Both = Callable[..., Pair]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """``both(name, place, dtype)``: a tiny model resident and streamed, pruned in this place or not at all."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def load(name: str, dtype: str) -> Pair:
        place = root / name / dtype
        build(name).save_pretrained(place, max_shard_size="20KB")
        return load_model(place, device="cpu", dtype=dtype), load_streamed(place, device="cpu", dtype=dtype)

    def make(name: str, place: str = "dense", dtype: str = "float32") -> Pair:
        whole, streamed = load(name, dtype)
        if place == "dense":
            return whole, streamed
        made = [Drop(range(1)), Drop(range(2, 4))] if place == "dropped" else edits(whole, place)
        pair = apply_edits(whole, made), apply_edits(streamed, made)
        assert [is_streamed(model) for model in pair] == [False, True]
        return pair

    return make


@contextlib.contextmanager
def within_a_layer(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, beside: int = 0) -> Iterator[None]:
    """Fails if weights read from a checkpoint ever take more memory than the largest layer of ``model`` and this."""
    held, most, read = 0, 0, Source.read

    def counted(source: Source) -> torch.Tensor:
        nonlocal held, most
        tensor = read(source)
        held, most = held + tensor.nbytes, max(most, held + tensor.nbytes)
        weakref.finalize(tensor.untyped_storage(), let_go, tensor.nbytes)
        return tensor

    def let_go(size: int) -> None:
        nonlocal held
        held -= size

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", counted)
        yield
    assert 0 < most <= layer_bytes(model) + beside


# --------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bytes_are_written(both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dtype = "bfloat16" if name in ("llama3.1", "gpt2") else "float32"
    for place in ("dense", "dropped", *PLACES):
        size = "20KB" if place in ("dropped", "mixed") else "5GB"
        whole, streamed = both(name, place, dtype)
        save_model(whole, tmp_path / place / "whole", max_shard_size=size)
        with within_a_layer(streamed, monkeypatch):
            save_model(streamed, tmp_path / place / "streamed", max_shard_size=size)
        written, expected = tree(tmp_path / place / "streamed"), tree(tmp_path / place / "whole")
        assert written == expected
        assert ("model.safetensors.index.json" in written) == (size == "20KB")
        assert is_streamed(streamed)


def test_weights_of_every_dtype_are_laid_out_as_by_the_library(tmp_path: Path) -> None:
    """Mixed dtypes, scalars, no elements, names that JSON escapes."""
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool]
    tensors = {f"{number}.é\"\\": torch.arange(number + 1).to(kind) for number, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    _write_tensors(tensors, tmp_path / "own")
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


# ------------------------------------------------------------------------------------- verifying


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_saved_is_verified(both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for place in ("dense", "mixed"):
        _, model = both(name, place)
        save_model(model, tmp_path / place, max_shard_size="20KB")
        around = sum(p.nbytes for p in model.parameters() if not p.is_meta)  # embeddings and head are loaded for good
        with within_a_layer(model, monkeypatch, around):
            verify(tmp_path / place, model, IDS)
        assert is_streamed(model)


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "nudged": (lambda t: t["model.layers.1.kdp.readout.bias"].add_(1e-3), r"logits differ by up to \d"),
    "missing": (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), r"missing keys: model\.layers\.0\.mlp\.up_proj"),
    "stray": (lambda t: t.update(stray=torch.zeros(1)), "unexpected keys: stray"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), "mismatched keys: model.norm"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_damage_is_refused(both: Both, tmp_path: Path, wrong: str) -> None:
    _, model = both("llama3", "after")
    save_model(model, tmp_path)
    change, message = WRONG[wrong]
    change_weights(tmp_path, change)
    with pytest.raises(KDPruneError, match=message) as caught:
        verify(tmp_path, model, IDS)
    assert "\n" not in str(caught.value)


def test_another_class_and_logits_that_are_not_finite_are_refused(both: Both, tmp_path: Path) -> None:
    _, dense = both("llama3")
    _, pruned = both("llama3", "after")
    save_model(dense, tmp_path / "dense")
    with torch.no_grad():
        pruned.get_submodule("model.layers.1.kdp.readout").bias[0] = float("nan")
    save_model(pruned, tmp_path / "pruned")
    with pytest.raises(KDPruneError, match="not finite"):
        verify(tmp_path / "pruned", pruned, IDS)
    with pytest.raises(KDPruneError, match="has missing keys"):
        verify(tmp_path / "dense", pruned, IDS)


# --------------------------------------------------------------------------------- a disk that is full


def test_a_weight_file_that_cannot_grow_leaves_nothing(both: Both, tmp_path: Path) -> None:
    _, model = both("llama3.1", "mixed")
    with largest_file(30_000), pytest.raises(KDPruneError, match="File too large") as caught, \
            staged_directory(tmp_path / "a" / "out") as staging:
        save_model(model, staging)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_runs_full_leaves_nothing(both: Both, full_disk: Path) -> None:
    _, model = both("llama3.1", "mixed")
    with pytest.raises(KDPruneError, match="No space left on device") as caught, \
            staged_directory(full_disk / "out") as staging:
        save_model(model, staging, max_shard_size="20KB")
    assert "\n" not in str(caught.value)
    assert tree(full_disk) == {}


# ----------------------------------------------------------------------------------------- measuring


def held_out(rows: int = 5, length: int = 90, padded: bool = False) -> TokenSet:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, :20], mask[3, 50:] = False, False
    return TokenSet(ids, mask, "test")


@pytest.mark.parametrize("name", CONFIGS)
def test_perplexity_is_the_resident_models(both: Both, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for place in ("dense", "mixed"):
        whole, streamed = both(name, place)
        expected = perplexity(whole, held_out(padded=True), batch_size=2)
        for scratch in (Scratch(), Scratch(host_bytes=1)):  # all batches in one group; a group for every batch
            set_scratch(streamed, scratch)
            with within_a_layer(streamed, monkeypatch):
                assert perplexity(streamed, held_out(padded=True), batch_size=2) == expected
        set_scratch(streamed, Scratch())


def test_a_loss_that_is_not_finite_names_its_batch(both: Both) -> None:
    for model in both("llama3.1", "after"):
        with torch.no_grad():
            model.get_submodule("model.layers.1.kdp.readout").bias[0] = float("nan")
        with pytest.raises(KDPruneError, match="got a loss of nan in batch 0 of test"):
            perplexity(model, held_out())


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_size_is_the_resident_models(both: Both, name: str) -> None:
    for place in ("dense", "dropped", "mixed"):
        whole, streamed = both(name, place)
        before = {key: (id(p), p.device) for key, p in streamed.named_parameters()}
        assert kv_cache_bytes_per_token(streamed) == kv_cache_bytes_per_token(whole)
        assert {key: (id(p), p.device) for key, p in streamed.named_parameters()} == before


def test_speed_and_samples_of_a_streamed_model_are_not_measured(both: Both, bench: Bench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    for model, pruned in (both("llama3", "dense")[:1] + both("llama3", "after")[:1],
                          both("llama3", "dense")[1:] + both("llama3", "after")[1:]):
        found = evaluate(model, pruned, None if not is_streamed(model) else tokenizer, held_out(), Stages())
        assert (found.speed is None) == found.streamed == is_streamed(model)
        assert found.samples == []
        base = analysis_results("tiny", model, {"seed": 0}, held_out(), None, Stages(), "kdp")
        assert summary.speed_setting(base) == ""  # nobody asked yet
        results = pruning_results(base, model, pruned, MethodResult([]), found)
        assert results.streamed == is_streamed(model)
        again = Results.parse(json.loads(results.to_json()))
        text = io.StringIO()
        print_summary(again, Console(file=text, width=200))
        for shown in (text.getvalue(), render_card(again), render_page(again)):
            assert ("not measured: the model was streamed from disk" in shown) == again.streamed
        prune_result = PruneResult(pruned, again, None, IDS)
        assert (prune_result.metrics["speed"] is None) == again.streamed
