"""What follows the fit of a streamed model: it is saved, verified and measured within memory, to the same bits."""

import contextlib
import functools
import io
import json
import os
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WIRINGS, build
from faults import largest_file
from pruned import PLACES, edits
from rich.console import Console
from safetensors.torch import load_file, save_file
from streamed_memory import added
from tiny_checkpoint import Bench, tree
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.fidelity import HeldOut
from kdprune.evaluation.perplexity import default_window, perplexity
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods.common.result import MethodResult
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.families import decoder_layers
from kdprune.model.loading import load_model
from kdprune.model.streaming import Scratch, Source, is_streamed, load_streamed, set_scratch
from kdprune.model.surgery import Drop, apply_edits
from kdprune.model.weights import write_tensors
from kdprune.report import summary
from kdprune.report.card import render_card
from kdprune.report.comparison_page import render_comparison
from kdprune.report.comparison_records import Comparison
from kdprune.report.comparison_table import render_markdown
from kdprune.report.page import render_page
from kdprune.report.results import Results
from kdprune.report.table import print_summary
from kdprune.run.pipeline import PruneResult
from kdprune.run.record import analysis_results, evaluate, pruning_results
from kdprune.runtime.distributed import start_world
from kdprune.runtime.run import Run
from kdprune.store.directories import staged_directory

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
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
    assert 0 < most <= beside + max(sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model))


# --------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", WIRINGS)
def test_the_same_bytes_are_written(both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    every = name in ("llama3.1", "gpt2")
    dtype = "bfloat16" if every else "float32"
    for place in ("dense", "dropped", *(PLACES if every else ("heads", "mixed"))):
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
    write_tensors(tensors, tmp_path / "own", torch.Tensor.cpu)
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


# ------------------------------------------------------------------------------------- verifying


@pytest.mark.parametrize("name", WIRINGS)
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


@pytest.mark.parametrize("name", WIRINGS)
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


@pytest.mark.parametrize("name", WIRINGS)
def test_cache_size_is_the_resident_models(both: Both, name: str) -> None:
    for place in ("dropped", "mixed"):
        whole, streamed = both(name, place)
        before = {key: (id(p), p.device) for key, p in streamed.named_parameters()}
        assert kv_cache_bytes_per_token(streamed) == kv_cache_bytes_per_token(whole)
        assert {key: (id(p), p.device) for key, p in streamed.named_parameters()} == before


def test_speed_and_samples_of_a_streamed_model_are_not_measured(both: Both, bench: Bench) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    for model, pruned in (both("llama3", "dense")[:1] + both("llama3", "after")[:1],
                          both("llama3", "dense")[1:] + both("llama3", "after")[1:]):
        heldout = HeldOut((held_out(),), (default_window(model),))
        found = evaluate(model, pruned, None if not is_streamed(model) else tokenizer, heldout, Run())
        assert (found.speed is None) == found.streamed == is_streamed(model)
        assert found.samples == []
        base = analysis_results("tiny", model, {"seed": 0}, held_out(), Run(), "kdp")
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


def test_a_comparison_without_speeds_says_so() -> None:
    whole = Comparison.load(ROOT / "research" / "small-models" / "peers.json")
    units = [unit.model_copy(update={"speed": None}) for unit in whole.units]
    found = Comparison.model_validate({**dict(whole), "units": units})
    assert {row.decode for row in found.rows} == {None}
    for text in (render_markdown(found), render_comparison(found)):
        assert "Speed not measured: the model was streamed from disk." in text
        assert "Quality against speed" not in text
    assert "not measured" not in render_markdown(whole)


# ------------------------------------------------------------------------------------- two processes


def measured(checkpoint: str) -> dict[str, Any]:
    """What a process of the run finds, and on how many batches it worked."""
    seen: list[int] = []
    whole, streamed = load_model(checkpoint, device="cpu"), load_streamed(checkpoint, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.model_max_length = 32
    hook = whole.register_forward_hook(lambda *_: seen.append(1))
    found: dict[str, Any] = {"whole": perplexity(whole, held_out(), batch_size=2), "batches": sum(seen)}
    hook.remove()
    found["streamed"] = perplexity(streamed, held_out(), batch_size=2)
    evaluation = evaluate(whole, whole, tokenizer, HeldOut((held_out(),), (default_window(whole),)), Run())
    found["speed"], found["samples"] = evaluation.speed, evaluation.samples
    with torch.no_grad():
        whole.get_submodule("model.norm").weight[0] = float("nan")  # type: ignore[index]
    with pytest.raises(KDPruneError, match="got a loss of nan in batch 0"):
        perplexity(whole, held_out(), batch_size=2)
    return found


def one_of_two(rank: int, port: int, folder: Path, checkpoint: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start_world("cpu")
    torch.save(measured(checkpoint), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # three processes that import everything
def test_two_processes_measure_what_one_does(bench: Bench, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, tmp_path, str(bench.model)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = measured(str(bench.model))
    assert [alone["batches"], first["batches"], second["batches"]] == [5, 3, 2]
    assert first["speed"] == second["speed"] is not None
    assert first["samples"] == second["samples"] == alone["samples"] != []
    assert alone["streamed"] == alone["whole"]
    for found in (first, second):
        assert found["streamed"] == found["whole"] == first["whole"]
        assert found["whole"].loss == pytest.approx(alone["whole"].loss, rel=1e-12)
        assert found["whole"].tokens == alone["whole"].tokens == 5 * 89


# ---------------------------------------------------------------------------------------- memory


def test_saving_and_verifying_take_less_than_the_model(tmp_path: Path) -> None:
    """76 MiB in 12 layers of 6 MiB, tensors of 1 MiB."""
    config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=12,
                         num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    model = load_streamed(tmp_path / "model", device="cpu")
    save_model(model, tmp_path / "first")  # libraries make room for themselves at their first use
    verify(tmp_path / "first", model, IDS)
    peaks = [added(lambda: save_model(model, tmp_path / "saved")),
             added(lambda: verify(tmp_path / "saved", model, IDS))]
    assert peaks[0] < 8, peaks
    assert peaks[1] < 24, peaks


def test_memory_does_not_follow_the_held_out_tokens() -> None:
    """States of 4,000 and 40,000 tokens take 4 and 40 MiB; 1 is allowed. Twice each: the allocator's share varies."""
    config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        model = load_streamed(folder, device="cpu")
        set_scratch(model, Scratch(host_bytes=2**20))
        few, many = (held_out(rows, 100) for rows in (40, 400))
        perplexity(model, few, 100, 100, batch_size=8)
        peaks = [[added(lambda text=text: perplexity(model, text, 100, 100, batch_size=8)) for _ in range(2)]
                 for text in (few, many)]
    assert min(peaks[1]) < max(peaks[0]) + 6, peaks
