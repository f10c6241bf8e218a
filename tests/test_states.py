"""States of calibration rows: what was written is read, wherever it is kept and whatever happens to it."""

import itertools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import flip, forked, killed, largest_file, resize, small_disk
from safetensors.torch import load_file
from torch import Tensor

from kdprune.errors import KDPruneError
from kdprune.runtime.machine import peak_memory_bytes, reset_peak_memory
from kdprune.store.states import MemoryStates, SpilledStates, States, open_states

NAME = "the states entering layer 5"
SHAPE = (20, 5, 6)
pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., States]


def oracle(dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(params=["memory", "spilled"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    folder = tmp_path / "states" if request.param == "spilled" else None
    return lambda dtype=torch.float32, **rest: open_states(SHAPE, dtype, NAME, folder, **rest)


def filled(folder: Path, **rest: object) -> SpilledStates:
    """Chunks of rows 0–7, 8–15, 16–19."""
    states = SpilledStates(SHAPE, torch.float32, NAME, folder, **rest)  # type: ignore[arg-type]
    for start in (0, 8, 16):
        states.put(slice(start, start + 8), oracle()[start : start + 8])
    return states


def replace(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_come_back_in_any_order(make: Make, dtype: torch.dtype) -> None:
    values, states = oracle(dtype), make(dtype)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for rows in order.split(7):
        states.put(rows, values[rows])
    assert not len(states.missing)
    assert (states.shape, states.dtype, len(states), states.nbytes) == (SHAPE, dtype, 20, values.nbytes)
    wanted = torch.randint(20, (50,), generator=torch.Generator().manual_seed(2))
    for rows in (wanted, slice(3, 17), slice(None), order[:0]):
        assert torch.equal(states[rows], values[rows])
        assert states[rows].dtype == dtype


def test_what_is_there_and_what_is_missing(make: Make) -> None:
    states = make()
    assert states.missing.tolist() == list(range(20))
    states.put(torch.tensor([7, 3]), oracle()[[7, 3]])
    states.put(slice(10, 20), oracle()[10:])
    assert states.rows.tolist() == [3, 7, *range(10, 20)]
    assert len(states.missing)
    states.put(states.missing, oracle()[states.missing])
    assert len(states.missing) == 0
    states.forget()
    assert len(states.rows) == 0
    states.put(slice(0, 4), oracle()[:4])
    assert torch.equal(states[slice(0, 4)], oracle()[:4])


def test_what_is_read_is_a_copy(make: Make) -> None:
    states = make()
    given = oracle()
    states.put(slice(0, 20), given)
    states[slice(0, 20)].zero_()
    given.zero_()
    assert torch.equal(states[slice(0, 20)], oracle())


def test_rows_are_written_over(make: Make) -> None:
    states, later = make(), oracle() + 1
    states.put(slice(0, 8), oracle()[:8])
    states.put(slice(8, 20), oracle()[8:])
    states.put(torch.arange(4, 12), later[4:12])  # parts of two batches
    states.put(slice(0, 8), later[:8])  # exactly a batch
    expected = torch.cat([later[:12], oracle()[12:]])
    assert torch.equal(states[slice(None)], expected)
    if isinstance(states, SpilledStates):
        again = SpilledStates(SHAPE, torch.float32, NAME, states.folder)
        assert torch.equal(again[slice(None)], expected)
        assert len(chunks(states.folder)) == 3  # the first has no row left and is gone


@pytest.mark.parametrize("rows", [torch.tensor([20]), torch.tensor([-1]), torch.tensor([1.0])], ids=str)
def test_row_numbers_are_checked(make: Make, rows: Tensor) -> None:
    with pytest.raises(AssertionError, match="row numbers"):
        make()[rows]


def test_rows_never_written_are_asked_for(make: Make) -> None:
    said: list[str] = []
    asked: list[list[int]] = []

    def recompute(rows: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return oracle()[rows]

    states = make(notify=said.append)
    states.put(slice(0, 8), oracle()[:8])
    with pytest.raises(KDPruneError, match=r"rows 9,11 of the states entering layer 5 are missing.*run the command ag"):
        states[torch.tensor([11, 2, 9, 11])]
    states.recompute = recompute
    assert torch.equal(states[torch.tensor([11, 2, 9, 11])], oracle()[[11, 2, 9, 11]])
    assert asked == [[9, 11]]
    assert said == [f"rows 9,11 of {NAME} are missing; computed again"]


# ---------------------------------------------------------------------------------------------- spilled


def test_a_chunk_is_a_safetensors_file(tmp_path: Path) -> None:
    filled(tmp_path)
    assert torch.equal(torch.cat([load_file(path)["states"] for path in chunks(tmp_path)]), oracle())


def test_opened_again_after_a_stop(tmp_path: Path) -> None:
    filled(tmp_path)
    chunks(tmp_path)[1].unlink()
    said: list[str] = []
    states = SpilledStates(SHAPE, torch.float32, NAME, tmp_path, notify=said.append)
    assert states.missing.tolist() == list(range(8, 16))
    states.put(states.missing, oracle()[8:16])
    assert torch.equal(states[slice(None)], oracle())
    assert not said


def test_two_processes_write_their_own_rows(tmp_path: Path) -> None:
    one, two = (SpilledStates(SHAPE, torch.float32, NAME, tmp_path) for _ in range(2))
    one.put(torch.arange(0, 20, 2), oracle()[0::2])
    two.put(torch.arange(1, 20, 2), oracle()[1::2])
    assert one.rows.tolist() == list(range(0, 20, 2))
    one.refresh()
    assert torch.equal(one[slice(None)], oracle())


ACCIDENTS = {
    "states changed": (lambda path: flip(path, -100), r"chunk 1 of .* is corrupted \(checksum\); computed again"),
    "checksum changed": (lambda path: replace(path, b'"crc32":"', b'"crc32":"9'), "no whole chunk"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "no whole chunk"),
    "empty": (lambda path: path.write_bytes(b""), "no whole chunk"),
    "header changed": (lambda path: flip(path, 9), "no whole chunk"),
    "rows changed": (lambda path: replace(path, b"8:16", b"7:15"), "checksum"),
    "gone": (Path.unlink, "rows 8:16 of the states entering layer 5 are missing"),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_between_two_runs(tmp_path: Path, accident: str) -> None:
    harm, message = ACCIDENTS[accident]
    filled(tmp_path)
    harm(chunks(tmp_path)[1])
    said: list[str] = []
    states = SpilledStates(
        SHAPE, torch.float32, NAME, tmp_path, recompute=lambda rows: oracle()[rows], notify=said.append)
    everything = torch.arange(19, -1, -1)
    assert torch.equal(states[everything], oracle()[everything])
    assert any(re.search(message, line) for line in said), said
    again = SpilledStates(SHAPE, torch.float32, NAME, tmp_path, notify=pytest.fail)
    assert not len(again.missing)
    assert torch.equal(again[everything], oracle()[everything])


def test_an_accident_under_way(tmp_path: Path) -> None:
    said: list[str] = []
    states = filled(tmp_path, recompute=lambda rows: oracle()[rows], notify=said.append)
    assert torch.equal(states[slice(None)], oracle())  # verified by now
    first, second, _ = chunks(tmp_path)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-300])
    assert torch.equal(states[slice(None)], oracle())
    assert said == [f"chunk 0 of {NAME} is missing; computed again",
                    f"chunk 1 of {NAME} is corrupted (too short); computed again"]


def test_an_accident_nobody_can_mend(tmp_path: Path) -> None:
    filled(tmp_path)
    flip(chunks(tmp_path)[1], -100)
    states = SpilledStates(SHAPE, torch.float32, NAME, tmp_path)
    assert torch.equal(states[slice(0, 8)], oracle()[:8])
    with pytest.raises(KDPruneError, match=r"chunk 1 of .* is corrupted \(checksum\).*run the command again"):
        states[torch.tensor([9])]
    assert SpilledStates(SHAPE, torch.float32, NAME, tmp_path).missing.tolist() == list(range(8, 16))


def test_states_of_another_shape_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    for shape, dtype in (((20, 5, 7), torch.float32), (SHAPE, torch.bfloat16), ((19, 5, 6), torch.float32)):
        with pytest.raises(KDPruneError, match=r"expected \(5, .\) in .*give another --work-dir"):
            SpilledStates(shape, dtype, NAME, tmp_path)
    assert len(chunks(tmp_path)) == 3


def test_random_rows_of_thousands_are_quick(tmp_path: Path) -> None:
    states = SpilledStates((4000, 16, 64), torch.float32, NAME, tmp_path)
    for start in range(0, 4000, 8):
        states.put(slice(start, start + 8), torch.full((8, 16, 64), float(start)))
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(4000, (8,), generator=generator) for _ in range(100)]
    for rows in draws:
        states[rows]
    start = time.perf_counter()
    for rows in draws:
        assert torch.equal(states[rows][:, 0, 0], (rows // 8 * 8).float())
    assert (time.perf_counter() - start) / len(draws) < 0.02  # .5 ms on a quiet machine


def measure_memory(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    stores = (("warm", 200, "w"), ("spilled", 200, "a"), ("spilled x10", 2000, "b"), ("memory x10", 2000, None))
    for name, rows, place in stores:
        reset_peak_memory()
        states = open_states((rows, 64, 256), torch.float32, name, place and folder / place)  # 64 KiB a row
        for start in range(0, rows, 10):
            states.put(slice(start, start + 10), torch.full((10, 64, 256), float(start)))
        for chosen in torch.randperm(rows, generator=torch.Generator().manual_seed(0)).split(8):
            assert torch.equal(states[chosen][:, 0, 0], (chosen // 10 * 10).float())
        found[name] = peak_memory_bytes()
    (folder / "found.json").write_text(json.dumps(found))


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    os.waitpid(forked(lambda: measure_memory(tmp_path)), 0)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["spilled x10"] < 1.10 * found["spilled"]
    assert found["spilled x10"] - found["spilled"] < 20 * 2**20
    assert found["memory x10"] - found["spilled x10"] > 90 * 2**20  # 125 MiB of rows: the above can fail


# ---------------------------------------------------------------------------------------------- faults


def test_a_full_disk_while_spilling(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        shape = (20, 16, 64)
        values = oracle(shape=shape)  # 4 KiB a row, 80 KiB in all
        states = SpilledStates(shape, torch.float32, NAME, disk / "states")
        states.put(slice(0, 8), values[:8])
        with pytest.raises(KDPruneError) as caught:
            states.put(slice(8, 16), values[8:16])
        message = str(caught.value)
        for part in (NAME, str(disk), "No space left", "32 KiB of 80 KiB", "8 of 20 rows", "--work-dir", "fewer rows"):
            assert part in message
        assert "\n" not in message
        assert len(list((disk / "states").iterdir())) == 1  # no half chunk
        assert torch.equal(states[slice(0, 8)], values[:8])
        resize(disk, 1000)
        again = SpilledStates(shape, torch.float32, NAME, disk / "states")
        assert again.rows.tolist() == list(range(8))
        again.put(again.missing, values[again.missing])
        assert torch.equal(again[slice(None)], values)


def test_a_limit_of_file_size_while_spilling(tmp_path: Path) -> None:
    states = SpilledStates(SHAPE, torch.float32, NAME, tmp_path / "states")
    with largest_file(500), pytest.raises(KDPruneError, match=r"File too large.*--work-dir"):
        states.put(slice(0, 8), oracle()[:8])
    assert list((tmp_path / "states").iterdir()) == []
    states.put(slice(0, 8), oracle()[:8])
    assert torch.equal(states[slice(0, 8)], oracle()[:8])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KDPruneError, match=r"cannot write the states entering layer 5 to .*give another --work-dir"):
        SpilledStates(SHAPE, torch.float32, NAME, tmp_path / "file" / "states")


def write_for_ever(folder: Path) -> None:
    """Row r of round n is 100 n + r everywhere; a chunk is 2 MiB, so that most of the time goes into writing."""
    torch.set_num_threads(1)
    (folder / "alive").touch()
    for number in itertools.count():
        states = SpilledStates((30, 128, 1024), torch.float32, NAME, folder / "states")
        for turn in range(5):  # each process starts with another chunk; rows from 20 on are never written
            start = 4 * ((turn + os.getpid()) % 5)
            rows = torch.arange(start, start + 4) if start < 16 else torch.tensor([19, 2, 17])
            states.put(rows, (100.0 * number + rows)[:, None, None].expand(-1, 128, 1024))


def test_killed_at_any_moment(tmp_path: Path) -> None:
    most = 0
    for _ in killed(write_for_ever, tmp_path, draws=20, longest=0.05):
        states = SpilledStates((30, 128, 1024), torch.float32, NAME, tmp_path / "states", notify=pytest.fail)
        values = states[states.rows]
        most = max(most, len(states.rows))
        assert torch.equal(values, values[:, :1, :1].expand_as(values))
        assert torch.equal(values[:, 0, 0] % 100, states.rows.float())
    assert most > 0


def test_memory_states_take_no_memory_before_they_are_written() -> None:
    reset_peak_memory()
    before = peak_memory_bytes()
    states = MemoryStates((10**5, 64, 128), torch.float32, NAME)  # 3 GiB
    states.put(slice(0, 2), torch.ones(2, 64, 128))
    assert torch.equal(states[torch.tensor([1])], torch.ones(1, 64, 128))
    assert peak_memory_bytes() - before < 100 * 2**20


def test_more_than_memory_holds_is_refused() -> None:
    with pytest.raises(KDPruneError, match=r"cannot hold the states .* in memory \(1024 TiB\).*spill"):
        MemoryStates((2**30, 2**10, 2**8), torch.float32, NAME)
