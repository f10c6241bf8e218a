"""Models larger than memory and full disks: streamed and spilled runs against one that has room."""

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TRIED, build
from faults import flip, largest_file
from methods import FORMS, quick
from safetensors.torch import load_file
from tiny_checkpoint import QUICK, Bench, command, prune, pruned_well, random_ids, same_bits

import kdprune
from kdprune.data.tokens import load_tokens
from kdprune.errors import KDPruneError
from kdprune.methods.kdp import fit_blocks as blockwise
from kdprune.model.checkpoint import save_model
from kdprune.model.loading import load_model
from kdprune.model.streaming import is_streamed, load_streamed
from kdprune.model.surgery import apply_edits
from kdprune.report.results import Results
from kdprune.runtime import memory
from kdprune.testing import run_method


@pytest.fixture(autouse=True)
def _quick(one_thread: None, no_pictures: None) -> None:
    """Tiny matrices, many runs."""


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model and no states are small enough to be held."""
    monkeypatch.setattr(memory, "MODEL_SHARE", 0.0)
    monkeypatch.setattr(memory, "STATES_SHARE", 0.0)


def tensors(result: kdprune.PruneResult, folder: Path) -> dict[str, torch.Tensor]:
    """The saved weights of a result."""
    result.save(folder)
    return load_file(folder / "model.safetensors")


FEW = ("llama3.1", "opt-350m", "gpt2")  # every run; tests/test_streaming.py has every family's states


@pytest.mark.parametrize(("name", "context"), [
    pytest.param(name, ("attention", "none")[number % 2], marks=() if name in FEW else pytest.mark.slow)
    for number, name in enumerate(TRIED)])
def test_a_streamed_run_gives_the_same_bits(
    name: str, context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(name).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {
        **QUICK, "context": context, "calibration": random_ids() % 60 + 1, "ratio": 0.1, "block_length": 2}
    whole = tensors(kdprune.prune(tmp_path / "model", **options), tmp_path / "whole")
    monkeypatch.setattr(memory, "MODEL_SHARE", 0.0)
    result = kdprune.prune(tmp_path / "model", **options)
    assert result.results.streamed
    assert any(parameter.is_meta for parameter in result.model.parameters())
    streamed = tensors(result, tmp_path / "streamed")
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[key], streamed[key]) for key in whole)


@pytest.mark.parametrize("form", FORMS)
def test_every_method_streams_or_says_that_it_cannot(bench: Bench, form: str, tmp_path: Path) -> None:
    whole, streamed = load_model(bench.model, device="cpu"), load_streamed(bench.model, device="cpu")
    rows = load_tokens(random_ids(), None, samples=None, length=32, seed=0)
    if not quick(form).streams:
        with pytest.raises(KDPruneError, match="whose layers are read from disk one at a time"):
            quick(form).check(streamed, rows)
        return
    for model, name in ((whole, "whole"), (streamed, "streamed")):
        pruned = apply_edits(model, run_method(quick(form), model, rows).edits)
        assert is_streamed(pruned) == (model is streamed)
        save_model(pruned, tmp_path / name)
    assert same_bits(tmp_path / "whole", tmp_path / "streamed")


@pytest.mark.parametrize(("method", "refused"), [("linear", False), ("laco", True)])
def test_a_streamed_run_by_command(
    bench: Bench, method: str, refused: bool, tmp_path: Path, small_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--calibration", bench.calibration, "--heldout", bench.heldout, "--samples", 12, "--length", 32,
             "--method", method]
    outcome = command("prune", bench.model, "-o", tmp_path / "streamed", "--work-dir", "none", *flags)
    if refused:
        assert outcome.status == 2
        assert "whose layers are read from disk one at a time" in outcome.err
        return
    assert outcome.status == 0, outcome.err
    assert "not measured: the model was streamed from disk" in outcome.out
    monkeypatch.undo()
    assert command("prune", bench.model, "-o", tmp_path / "whole", "--work-dir", "none", *flags).status == 0
    assert same_bits(tmp_path / "whole", tmp_path / "streamed")
    one, two = (Results.load(tmp_path / folder) for folder in ("whole", "streamed"))
    assert one.perplexity == two.perplexity


def test_later_blocks_may_see_the_pruned_models_states(bench: Bench, tmp_path: Path) -> None:
    flags = ("--blocks", "1-3,4-6")
    results = {}
    for mode in ("sequential", "no-sequential"):
        outcome = prune(bench, tmp_path / "work", tmp_path / mode, f"--{mode}", *flags)
        assert outcome.status == 0, outcome.err
        results[mode] = Results.load(tmp_path / mode)
    first, second = (results[mode].fit for mode in ("sequential", "no-sequential"))
    assert first[0] == second[0]  # nothing stands in front of the first block
    assert first[1].dropped_error != second[1].dropped_error


def test_memory_above_the_budget_is_said() -> None:
    budget = memory.resident_bytes() + 2**30
    found = memory.Memory.of(budget, None, torch.device("cpu"))
    assert found.remark(budget, 0) is None
    assert "of host memory in use, more than the" in str(found.remark(budget + 1, 0))


# --------------------------------------------------------------------------------------------- faults


def states_left(bench: Bench, work: Path, out: Path) -> list[Path]:
    """State chunks of a run that was stopped in its first fit."""

    def stop(*_: object, **__: object) -> None:
        raise InterruptedError(0, "stopped here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "fit_block", stop)
        assert "stopped here" in prune(bench, work, out).err
    return sorted((work / "states").rglob("*.safetensors"))


def test_a_corrupted_chunk_of_states_is_computed_again(bench: Bench, alone: Path, tmp_path: Path) -> None:
    chunks = states_left(bench, tmp_path / "work", tmp_path / "out")
    assert chunks
    flip(chunks[0], -5)
    outcome = prune(bench, tmp_path / "work", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "corrupted (checksum)" in outcome.err
    assert "computed again" in outcome.err
    assert same_bits(alone, tmp_path / "out")


@pytest.mark.parametrize("size", [4_000, pytest.param(40_000, marks=pytest.mark.slow), 120_000])
def test_a_full_disk_is_said_and_the_run_goes_on_later(bench: Bench, alone: Path, tmp_path: Path, size: int) -> None:
    with largest_file(size):
        outcome = prune(bench, tmp_path / "work", tmp_path / "out")
    assert outcome.status == 2
    assert "cannot write" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    pruned_well(bench, tmp_path / "work", tmp_path / "out")
    assert same_bits(alone, tmp_path / "out")


def test_a_model_in_use_elsewhere_keeps_nothing(
    bench: Bench, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDPRUNE_CACHE", str(tmp_path / "cache"))
    assert command("prune", bench.model, "-o", tmp_path / "one", *bench.flags).status == 0
    work, = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    lock = os.open(work / "lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = prune(bench, work, tmp_path / "two")
        outcome = command("prune", bench.model, "-o", tmp_path / "two", *bench.flags)
    finally:
        os.close(lock)
    assert refused.status == 2
    assert "is using" in refused.err
    assert outcome.status == 0, outcome.err
    assert "in use by another run" in outcome.err
    assert same_bits(alone, tmp_path / "two")
