"""What a run may use: amounts, places and identities, told apart before any work."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import QUICK, Bench, command, random_ids, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdprune
from kdprune.errors import KDPruneError
from kdprune.model.loading import load_model
from kdprune.run.inputs import inputs_of
from kdprune.run.recipe import check_options
from kdprune.run.resources import Resources
from kdprune.runtime import memory
from kdprune.runtime.memory import Memory, parse_bytes
from kdprune.store.directories import check_apart
from kdprune.store.hashing import model_identity

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize(("text", "found"), [
    ("6GiB", 6 * 2**30), ("6gib", 6 * 2**30), ("500MB", 500_000_000), ("500mb", 500_000_000), ("1024", 1024)])
def test_memory_is_given_in_bytes(text: str, found: int) -> None:
    assert parse_bytes(text) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_memory": "much"}, "got memory 'much', expected an amount such as 6GiB"),
        ({"work_dir": ""}, "got an empty work_dir, expected a name"),
        ({"work_dir": "out"}, "got output out, which is the work directory .out."),
        ({"work_dir": "out/work"}, "got output out, which holds the work directory .out/work."),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KDPruneError, match=message):
        kdprune.prune(bench.model, "out", device="cpu", **options, **bench.options)
    assert not list(tmp_path.iterdir())


def test_a_work_directory_does_not_hold_the_output(tmp_path: Path) -> None:
    with pytest.raises(KDPruneError, match="which lies in the work directory"):
        check_apart(tmp_path / "out", inputs_of(resources=Resources(work_dir=str(tmp_path))))


def test_recipes_take_what_python_takes(tmp_path: Path) -> None:
    options = {"work_dir": tmp_path, "host_memory": 6 * 10**9, "device_memory": "3GiB"}
    assert check_options(options) == options


def test_budgets_of_a_spread_model_leave_the_other_devices_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 100, 1: 200, "cpu": 300}  # as accelerate finds them
    monkeypatch.setattr("kdprune.run.resources.get_max_memory", lambda: dict(free))
    assert Resources()._max_memory() is None
    assert Resources(host_memory="6000")._max_memory() == {**free, "cpu": 6000}
    assert Resources(device_memory="1KiB")._max_memory() == {0: 1024, 1: 1024, "cpu": 300}


def test_what_two_models_offload_never_meets(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def loaded(*given: Any, offload_folder: str, **options: Any) -> Any:
        folders.append(Path(offload_folder))
        assert not list(folders[-1].iterdir())
        return load_model(*given, offload_folder=offload_folder, **options)

    monkeypatch.setattr("kdprune.run.resources.load_model", loaded)
    for _ in range(2):
        kdprune.prune(bench.model, device_map="auto", **bench.options)
    gc.collect()
    assert folders[0] != folders[1]
    assert not any(folder.exists() for folder in folders)


def test_an_amount_without_a_unit_serves_a_spread_model(bench: Bench) -> None:
    result = kdprune.prune(bench.model, device_map="auto", host_memory=str(2**40), **bench.options)
    assert result.results.recipe["host_memory"] == str(2**40)


def test_processes_of_one_host_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Memory.of(None, None, torch.device("cpu")).room()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Memory.of(None, None, torch.device("cpu")).room() == pytest.approx(alone / 4, rel=0.2)


def test_a_peak_before_the_run_is_not_its_own(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    torch.ones(2**27)  # 512 MiB, gone at once
    kdprune.prune(bench.model, device="cpu", host_memory=str(memory.resident_bytes() + 2**28), **bench.options)
    assert "more than the" not in capsys.readouterr().err


def test_the_kind_of_attention_is_part_of_a_models_identity(bench: Bench) -> None:
    kinds = ("eager", "sdpa", "eager")
    first, second, again = (
        model_identity(AutoModelForCausalLM.from_pretrained(bench.model, attn_implementation=kind)) for kind in kinds)
    assert first == again != second


def test_samples_of_another_tokenizer_are_not_found_again(bench: Bench, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **QUICK, "calibration": random_ids(), "heldout": random_ids(4, seed=2), "work_dir": tmp_path / "work"}
    model = tiny_llama()
    assert not kdprune.prune(model, **options).results.samples
    assert kdprune.prune(model, tokenizer=AutoTokenizer.from_pretrained(bench.model), **options).results.samples


@pytest.mark.parametrize("streamed", [False, True])
def test_a_comparison_of_a_streamed_model(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    if streamed:
        monkeypatch.setattr(memory, "MODEL_SHARE", 0.0)
    flags = ["--methods", "shortgpt,sleb", "--seeds", 1, "--calibration", bench.calibration, "--heldout", bench.heldout,
             "--samples", 12, "--length", 32]
    for _ in range(2):
        outcome = command("compare", bench.model, "-o", tmp_path / "out", *flags)
        assert outcome.status == 0, outcome.err
    assert ("read from disk one at a time" in outcome.out) == streamed
    kept = {path.name.rpartition("-")[0] for path in (tmp_path / "out" / "runs" / "stages").iterdir()}
    units = {"dense", "shortgpt-seed0"} | (set() if streamed else {"sleb-seed0"})
    assert {name for name in kept if name == "dense" or "-seed" in name} == units


def test_what_was_enforced_on_the_device_is_lifted_whatever_happens(
    bench: Bench, monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(memory.Memory, "enforce", lambda self, place: seen.append("enforced"))
    monkeypatch.setattr(memory.Memory, "lift", lambda self, place: seen.append("lifted"))
    with pytest.raises(KDPruneError, match="expected at least"):  # read after the model, before any stage
        kdprune.prune(str(bench.model), calibration=random_ids(), heldout=torch.zeros(1, 4, dtype=torch.long))
    assert seen == ["enforced", "lifted"]


def test_a_limit_for_the_accelerator_names_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes "cuda" without a number where memory is asked for, and refuses it where a limit is set."""
    from torch.cuda._utils import _get_device_index

    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (2**29, 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction",
                        lambda share, place: limits.append((share, _get_device_index(place))))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = Memory(2**40, 2**28, frozenset({"device"}))
    for place in (torch.device("cuda"), torch.device("cuda", 3)):
        found.enforce(place)
        found.lift(place)
    assert limits == [(0.25, 1), (1.0, 1), (0.25, 3), (1.0, 3)]


@pytest.mark.gpu
def test_a_limit_holds_on_an_accelerator() -> None:
    place, found = torch.device("cuda"), Memory.of(None, "1GiB", torch.device("cuda"))
    found.enforce(place)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**31, dtype=torch.uint8, device=place)
    finally:
        found.lift(place)
    assert torch.empty(2**31, dtype=torch.uint8, device=place).numel() == 2**31
