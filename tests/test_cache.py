"""The work directory: what is found is whole and of this very run, whatever happened before."""

import itertools
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import flip, forked, killed, killed_with, resize, small_disk
from torch import Tensor

from kdprune.errors import KDPruneError
from kdprune.runtime.run import Run
from kdprune.store.cache import Cache, JsonCodec, TensorCodec, default_work_dir
from kdprune.store.hashing import PACKAGE, IdentityPart, class_identity, code_identity, digest, files_identity, part
from kdprune.store.states import SpilledStates

IDENTITY = {"model": part("models/tiny", "weights"), "seed": "0"}
KEY, OTHER = digest("one recipe"), digest("another")
pytestmark = pytest.mark.usefixtures("one_thread")


def stage(cache: Cache, name: str, about: str, compute: Callable[[], Any], codec: Any) -> Any:
    """A stage of a run about something: found, or computed and cached."""
    return Run(cache=cache, about=about).cached(name, None, compute, codec)


def key_of(name: str, about: str) -> str:
    """The key of that stage."""
    return Run(about=about).key(name, None)


def never() -> Any:
    pytest.fail("this was to be found, not computed")


@dataclass
class Scores:
    """A record as stages keep them."""

    values: list[float]
    name: str


# ---------------------------------------------------------------------------------------------- whose directory it is


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "work"


def test_the_same_run_opens_it_again(place: Path) -> None:
    for _ in range(2):
        with Cache(place, IDENTITY):
            pass
    with Cache(place, {"seed": "0", "model": IdentityPart("moved/tiny", IDENTITY["model"].hash)}):
        pass  # a model is its contents, wherever it stands


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({**IDENTITY, "seed": "1"}, r"another run \(seed 0 there, 1 here\); choose another --work-dir, or remove it$"),
        ({**IDENTITY, "model": part("models/big", 2)}, r"\(model models/tiny there, models/big here\)"),
        ({**IDENTITY, "model": part("models/tiny", 2)}, r"models/tiny there, models/tiny here with other contents"),
        ({"seed": "0"}, "model models/tiny there, not given here"),
        ({**IDENTITY, "dtype": "bfloat16"}, "dtype not given there, bfloat16 here"),
    ],
)
def test_another_run_is_refused_with_the_difference(place: Path, identity: dict[str, str], message: str) -> None:
    with Cache(place, IDENTITY):
        pass
    with pytest.raises(KDPruneError, match=message) as caught:
        Cache(place, identity)
    assert str(place) in str(caught.value)
    with Cache(place, IDENTITY):
        pass  # and nothing was changed, nor is it still locked


def test_another_version_is_refused(place: Path) -> None:
    with Cache(place, IDENTITY):
        pass
    content = json.loads((place / "work.json").read_text())
    (place / "work.json").write_text(json.dumps({**content, "kdprune": "0.0.7", "format": 9}))
    with pytest.raises(KDPruneError, match=r"format 9 there, 1 here; kdprune 0\.0\.7 there, .* here\); choose another"):
        Cache(place, IDENTITY)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "kdprune": "1", "identity": {"a": 1}}'])
def test_a_corrupted_manifest_is_refused(place: Path, content: str) -> None:
    with Cache(place, IDENTITY):
        pass
    (place / "work.json").write_text(content)
    with pytest.raises(KDPruneError, match=r"whose work\.json cannot be read .*another --work-dir, or remove it"):
        Cache(place, IDENTITY)


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(KDPruneError, match=r"holds thesis\.txt and no work\.json; give a new directory"):
        Cache(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(KDPruneError, match=r"cannot use work directory .*choose another --work-dir"):
        Cache(tmp_path / "thesis.txt", IDENTITY)
    with pytest.raises(KDPruneError, match=r"cannot use work directory /proc/1/work"):
        Cache("/proc/1/work", IDENTITY)


def test_one_process_at_a_time(place: Path) -> None:
    def hold() -> None:
        with Cache(place, IDENTITY):
            (place / "alive").touch()
            time.sleep(60)

    child = forked(hold)
    while not (place / "alive").exists():
        time.sleep(0.001)
    with pytest.raises(KDPruneError, match=rf"which process {child} on .* is using; wait for it, or choose another"):
        Cache(place, IDENTITY)
    killed_with(child)
    with Cache(place, IDENTITY):
        pass


# ---------------------------------------------------------------------------------------------- stages


def test_records_are_found_again(place: Path) -> None:
    made = Scores([1.0, 0.1 + 0.2, 1e-300, math.pi, math.inf], "RBF CKA, α = ½")
    with Cache(place, IDENTITY) as work:
        assert stage(work, "analysis", KEY, lambda: made, JsonCodec(Scores)) == made
    with Cache(place, IDENTITY) as work:
        assert stage(work, "analysis", KEY, never, JsonCodec(Scores)) == made
        assert stage(work, "analysis", OTHER, lambda: Scores([], "other"), JsonCodec(Scores)).name == "other"
        assert stage(work, "selection", KEY, lambda: [(1, 3)], JsonCodec(list[tuple[int, int]])) == [(1, 3)]
        assert stage(work, "analysis", KEY, never, JsonCodec(Scores)) == made
        assert stage(work, "selection", KEY, never, JsonCodec(list[tuple[int, int]])) == [(1, 3)]


def test_a_record_of_another_layout_is_computed_again(place: Path) -> None:
    with Cache(place, IDENTITY) as work:
        stage(work, "analysis", KEY, lambda: [1.0], JsonCodec(list[float]))
        assert stage(work, "analysis", KEY, lambda: Scores([], "new"), JsonCodec(Scores)).name == "new"
        assert stage(work, "analysis", KEY, never, JsonCodec(Scores)).name == "new"


def test_tensors_are_found_again_bit_for_bit(place: Path) -> None:
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    made = {"t": whole.T, "row": whole[1], "same": whole[1], "half": whole.bfloat16(), "count": torch.tensor(3)}
    with Cache(place, IDENTITY) as work:
        first = stage(work, "fit", KEY, lambda: made, TensorCodec())
    with Cache(place, IDENTITY) as work:
        again = stage(work, "fit", KEY, never, TensorCodec())
    for found in (first, again):
        assert found.keys() == made.keys()
        for name, value in made.items():
            assert torch.equal(found[name], value)
            assert found[name].dtype == value.dtype
    assert all(value.is_contiguous() for value in again.values())


def test_a_stage_that_fails_leaves_nothing(place: Path) -> None:
    with Cache(place, IDENTITY) as work:
        def fail() -> None:
            with work.finish("fit", KEY) as folder:
                (folder / "file").write_text("half")
                raise RuntimeError("halfway")

        with pytest.raises(RuntimeError, match="halfway"):
            fail()
        assert work.find("fit", KEY) is None
        assert not list(place.rglob("*half*"))
        assert not list(place.rglob(".*"))
        with work.finish("fit", KEY) as folder:
            (folder / "part").mkdir()
            (folder / "part" / "file").write_text("all")
        found = work.find("fit", KEY)
        assert found is not None
        assert (found / "part" / "file").read_text() == "all"


HARMS: dict[str, Callable[[Path], object]] = {
    "changed": lambda stage: flip(stage / "tensors.safetensors", -3),
    "cut short": lambda stage: (stage / "tensors.safetensors").write_bytes(b"half"),
    "gone": lambda stage: (stage / "tensors.safetensors").unlink(),
    "no index": lambda stage: (stage / "files.json").unlink(),
    "index cut short": lambda stage: (stage / "files.json").write_text('{"key": '),
    "index of another kind": lambda stage: (stage / "files.json").write_text("[1]"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_corrupted_stage_is_computed_again_and_says_so(place: Path, harm: str) -> None:
    with Cache(place, IDENTITY) as work:
        stage(work, "fit", KEY, lambda: {"x": torch.ones(4)}, TensorCodec())
    HARMS[harm](next((place / "stages").iterdir()))
    said: list[str] = []
    with Cache(place, IDENTITY, notify=said.append) as work:
        assert torch.equal(stage(work, "fit", KEY, lambda: {"x": torch.ones(4)}, TensorCodec())["x"], torch.ones(4))
        assert len(said) == 1
        assert said[0].startswith(f"stage fit in {place} is not whole (")
        assert said[0].endswith("computed again")
        assert torch.equal(stage(work, "fit", KEY, never, TensorCodec())["x"], torch.ones(4))


def test_clean_keeps_what_other_runs_can_use(place: Path) -> None:
    with Cache(place, IDENTITY) as work:
        stage(work, "analysis", KEY, lambda: [1.0], JsonCodec(list[float]))
        folder = work.spill_directory("states-5", KEY)
        assert folder is not None
        SpilledStates((2, 3, 4), torch.float32, "the states", folder).put(slice(0, 2), torch.ones(2, 3, 4))
        work.checkpoint("fit", KEY).save({"step": 1}, force=True)
        work.clean()
        assert not folder.exists()
        assert work.checkpoint("fit", KEY).load() is None
        assert stage(work, "analysis", KEY, never, JsonCodec(list[float])) == [1.0]


def test_without_a_directory_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Cache(None, IDENTITY) as work:
        for _ in range(2):
            assert stage(work, "analysis", KEY, lambda: [1.0], JsonCodec(list[float])) == [1.0]
            assert torch.equal(stage(work, "fit", KEY, lambda: {"x": torch.ones(2)}, TensorCodec())["x"], torch.ones(2))
            with work.finish("fit", KEY) as folder:
                (folder / "file").write_text("")
            assert not folder.exists()
            assert work.find("fit", KEY) is None
            assert work.spill_directory("states", KEY) is None
            checkpoint = work.checkpoint("fit", KEY, seconds=0)
            assert (checkpoint.due, checkpoint.save({"a": 1}, force=True), checkpoint.load()) == (False, False, None)
        work.clean()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- checkpoints


def steps(checkpoint_at: int | None, work: Cache) -> Tensor:
    """Ten steps of AdamW; stops short after `checkpoint_at` of them, or goes on from where it stands."""
    weight = torch.nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    checkpoint = work.checkpoint("fit", KEY)
    first = 0
    if (state := checkpoint.load()) is not None:
        first = state["step"]
        weight.data.copy_(state["weight"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    for step in range(first, 10):
        if step == checkpoint_at:
            assert checkpoint.save({"step": step, "weight": weight.detach(), "optimizer": optimizer.state_dict(),
                                    "generator": generator.get_state()}, force=True)
            break
        weight.grad = weight.detach() - torch.randn(4, generator=generator)
        optimizer.step()
    return weight.detach()


def test_a_fit_goes_on_from_its_checkpoint(place: Path) -> None:
    with Cache(None) as nowhere:
        expected = steps(None, nowhere)
    for stop in (3, 7, None):
        with Cache(place, IDENTITY) as work:
            found = steps(stop, work)
    assert torch.equal(found, expected)
    assert len(list((place / "checkpoints").iterdir())) == 1


def test_checkpoints_are_not_saved_too_often(place: Path) -> None:
    with Cache(place, IDENTITY) as work:
        checkpoint = work.checkpoint("fit", KEY, seconds=0.2)
        assert not checkpoint.due
        assert not checkpoint.save({"step": 1})
        time.sleep(0.21)
        assert checkpoint.due
        assert checkpoint.save({"step": 2})
        assert not checkpoint.save({"step": 3})
        assert checkpoint.load() == {"step": 2}
        assert checkpoint.save({"step": 4}, force=True)
        assert checkpoint.load() == {"step": 4}
        assert work.checkpoint("fit", OTHER).load() is None


@pytest.mark.parametrize("offset", [4, -4, 200])
def test_a_corrupted_checkpoint_counts_as_none_and_says_so(place: Path, offset: int) -> None:
    said: list[str] = []
    with Cache(place, IDENTITY, notify=said.append) as work:
        work.checkpoint("fit", KEY).save({"weight": torch.zeros(100)}, force=True)
        flip(next((place / "checkpoints").iterdir()), offset)
        assert work.checkpoint("fit", KEY).load() is None
    assert said == ["the checkpoint of fit is corrupted (checksum); it does not count"]


# ---------------------------------------------------------------------------------------------- several processes


class Votes:
    """`agree` of threads that stand for processes: all wait for each other."""

    def __init__(self, count: int):
        self._barrier, self._votes = threading.Barrier(count, timeout=20), [True] * count

    def of(self, rank: int) -> Callable[[bool], bool]:
        def agree(vote: bool) -> bool:
            self._votes[rank] = vote
            self._barrier.wait()
            found = all(self._votes)
            self._barrier.wait()
            return found
        return agree


def together(action: Callable[[int, Callable[[bool], bool]], object], count: int = 2) -> list[object]:
    """What the action gives, or raises, in each of the processes."""
    votes, found = Votes(count), [None] * count

    def run(rank: int) -> None:
        try:
            found[rank] = action(rank, votes.of(rank))  # type: ignore[call-overload]
        except Exception as error:
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_share_a_directory(place: Path) -> None:
    computed: list[int] = []

    def run(rank: int, agree: Callable[[bool], bool]) -> object:
        def compute() -> list[float]:
            computed.append(rank)
            return [1.0]

        with Cache(place, IDENTITY, first=rank == 0, agree=agree) as work:
            record = stage(work, "analysis", KEY, compute, JsonCodec(list[float]))
            tensors = stage(work, "fit", KEY, lambda: {"x": torch.ones(2)}, TensorCodec())
            found = work.load("fit", key_of("fit", KEY))
            work.checkpoint("fit", KEY).save({"step": rank}, force=True)
            agree(True)
            return record, tensors["x"].tolist(), found is not None, work.checkpoint("fit", KEY).load()

    for _ in range(2):
        assert together(run) == [([1.0], [1.0, 1.0], True, {"step": 0})] * 2
    assert sorted(computed) == [0, 1]  # each its part of the work, in the first run alone


def test_a_stage_counts_only_if_every_process_finds_it(place: Path) -> None:
    with Cache(place, IDENTITY) as work:
        stage(work, "analysis", KEY, lambda: [1.0], JsonCodec(list[float]))

    def lonely(rank: int, agree: Callable[[bool], bool]) -> object:
        with Cache(place, IDENTITY, first=rank == 0, agree=agree) as work:
            return work.find("analysis", KEY if rank == 0 else OTHER)

    assert together(lonely) == [None, None]


def test_an_error_in_the_first_process_ends_the_others(place: Path) -> None:
    with Cache(place, IDENTITY):
        pass

    def other_run(rank: int, agree: Callable[[bool], bool]) -> object:
        return Cache(place, {"seed": "3"}, first=rank == 0, agree=agree)

    first, second = together(other_run)
    assert "seed 0 there, 3 here" in str(first)
    assert isinstance(second, KDPruneError)
    assert "another process could not open the work directory" in str(second)

    def failing(rank: int, agree: Callable[[bool], bool]) -> object:
        with Cache(place, IDENTITY, first=rank == 0, agree=agree) as work, work.finish("fit", KEY):
            if rank == 0:
                raise OSError(28, "No space left on device")

    first, second = together(failing)
    assert "No space left on device" in str(first)
    assert "the first process could not keep stage fit" in str(second)


# ---------------------------------------------------------------------------------------------- faults


def test_a_full_disk(tmp_path: Path) -> None:
    values, few = {"x": torch.arange(64 * 256.0)}, torch.arange(100.0)  # 64 KiB
    with small_disk(tmp_path / "disk", 128) as disk:
        with Cache(disk / "work", IDENTITY) as work:
            stage(work, "small", KEY, lambda: {"x": few}, TensorCodec())
            checkpoint = work.checkpoint("fit", KEY)
            checkpoint.save({"x": few}, force=True)
            (disk / "filler").write_bytes(bytes(56 * 1024))
            for action in (
                lambda: stage(work, "fit", KEY, lambda: values, TensorCodec()),
                lambda: stage(work, "list", KEY, values["x"].tolist, JsonCodec(list[float])),
                lambda: checkpoint.save(values, force=True),
            ):
                with pytest.raises(KDPruneError, match=r"cannot write .*No space left on device.*another") as caught:
                    action()
                assert str(disk) in str(caught.value)
                assert "\n" not in str(caught.value)
            assert not list(disk.rglob(".*"))
            assert torch.equal(stage(work, "small", KEY, never, TensorCodec())["x"], few)
            assert torch.equal((checkpoint.load() or {})["x"], few)
        resize(disk, 1000)
        with Cache(disk / "work", IDENTITY) as work:
            assert torch.equal(stage(work, "fit", KEY, lambda: values, TensorCodec())["x"], values["x"])


def work_for_ever(folder: Path) -> None:
    """Stage i holds i everywhere, the checkpoint the same number everywhere; both are written over again and again."""
    torch.set_num_threads(1)
    for number in itertools.count():
        with Cache(folder / "work", IDENTITY, notify=lambda line: os._exit(3)) as work:
            (folder / "alive").touch()
            states = SpilledStates(
                (4, 64, 1024), torch.float32, "the states", work.spill_directory("states", KEY) or folder)
            for part in sorted(range(4), key=lambda part: (part + os.getpid()) % 4):
                with work.finish(f"stage-{part}", KEY) as place:
                    for part_name in ("a", "b"):
                        (place / part_name).write_text(str(part) * 300_000)
                        work.checkpoint("fit", KEY).save({"x": torch.full((75_000,), float(number))}, force=True)
                states.put(slice(0, 4), torch.full(states.shape, float(number)))
                stage_key = digest([part, number])
                stage(work, "tensors", stage_key,
                      lambda value=part: {"x": torch.full((9,), float(value))}, TensorCodec())


def test_killed_at_any_moment(tmp_path: Path) -> None:
    seen: set[str] = set()
    for _ in killed(work_for_ever, tmp_path, draws=20, longest=0.1):
        with Cache(tmp_path / "work", IDENTITY, notify=pytest.fail) as work:  # a kill corrupts nothing
            assert not list((tmp_path / "work").rglob(".*"))
            for part in range(4):
                if (folder := work.find(f"stage-{part}", KEY)) is not None:
                    seen.add(folder.name)
                    assert {file.name for file in folder.iterdir()} == {"a", "b", "files.json"}
                    assert [(folder / name).read_text() for name in "ab"] == [str(part) * 300_000] * 2
                if work.find("tensors", key_of("tensors", digest([part, 0]))) is not None:
                    seen.add("tensors")
                    found = stage(work, "tensors", digest([part, 0]), never, TensorCodec())["x"]
                    assert torch.equal(found, torch.full((9,), float(part)))
            if (state := work.checkpoint("fit", KEY).load()) is not None:
                seen.add("checkpoint")
                assert torch.equal(state["x"], state["x"][:1].expand(75_000))
    assert len(seen) >= 2  # how far it comes in that time is the machine's affair


# ---------------------------------------------------------------------------------------------- identities


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "README.md").write_text("about")
    return folder


def test_a_model_is_its_files_contents(model: Path, tmp_path: Path) -> None:
    before = files_identity(model)
    (model / "README.md").write_text("other words")
    os.utime(model / "config.json", (0, 0))
    assert files_identity(model) == before
    model.rename(tmp_path / "moved")
    assert files_identity(tmp_path / "moved") == before
    flip(tmp_path / "moved" / "model.safetensors", 500)
    assert files_identity(tmp_path / "moved") != before
    with pytest.raises(KDPruneError, match=r"expected a directory with a model's config and weights"):
        files_identity(tmp_path / "nowhere")


def test_a_second_look_at_a_model_reads_nothing(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "files.json"
    before = files_identity(model, cache)
    assert before == files_identity(model)
    weights = model / "model.safetensors"
    about = weights.stat()
    flip(weights, 500)
    assert files_identity(model, cache) != before  # the time of change is another
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    weights.write_bytes(bytes(1000))
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert files_identity(model, cache) == before
    flip(weights, 500)
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert files_identity(model, cache) == before  # a change that hides: not read, which is the point
    cache.write_text("{")
    assert files_identity(model, cache) == files_identity(model) != before
    assert files_identity(model, tmp_path / "model" / "config.json" / "cache") == files_identity(model)


def test_the_default_place_follows_the_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KDPRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = default_work_dir(IDENTITY)
    assert place.parent == tmp_path / "kdprune"
    assert place == default_work_dir(dict(reversed(IDENTITY.items())))
    assert place != default_work_dir({**IDENTITY, "seed": "1"})
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_work_dir(IDENTITY).parent == Path.home() / ".cache" / "kdprune"
    monkeypatch.setenv("KDPRUNE_CACHE", str(tmp_path / "own"))
    assert default_work_dir(IDENTITY) == tmp_path / "own" / place.name


def test_what_only_shows_figures_keeps_the_cache_and_a_changed_solve_does_not(tmp_path: Path) -> None:
    root = tmp_path / "kdprune"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("bundled", "__pycache__"))
    before = code_identity(root)
    assert before == code_identity()
    for shown in ("report/plots.py", "cli/prune.py", "planning/forecast.py", "testing/method.py", "__init__.py"):
        with (root / shown).open("a", encoding="utf-8") as file:
            file.write("# another colour\n")
        assert code_identity(root) == before, shown
    for computed in ("kernel/operators.py", "methods/kdp/kdp.py", "evaluation/perplexity.py", "options.py"):
        with (root / computed).open("a", encoding="utf-8") as file:
            file.write("# another solve\n")
        assert code_identity(root) != before, computed
        before = code_identity(root)


def test_a_class_that_is_typed_in_again_is_another_one() -> None:
    first, again = (type("Own", (), {"__module__": "typed_in"}) for _ in range(2))
    assert class_identity(first) == class_identity(first) != class_identity(again)
    assert class_identity(Path) == []  # of the standard library, as of kdprune
    assert len(class_identity(CacheTypes)) == 1


class CacheTypes:
    """A class of this file."""
