"""Output directories appear whole or not at all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import largest_file
from safetensors.torch import save_file
from tiny_checkpoint import tree

from kdprune.errors import KDPruneError
from kdprune.store.directories import check_output, claimed, staged_directory


def refused(path: Path | str, message: str, overwrite: bool = False) -> None:
    with pytest.raises(KDPruneError, match=message) as caught:
        check_output(path, overwrite)
    assert "\n" not in str(caught.value)
    with pytest.raises(KDPruneError, match=message), staged_directory(path, overwrite):
        pytest.fail("the body ran")


def write(directory: Path, text: str) -> None:
    (directory / "file").write_text(text)
    (directory / "folder").mkdir()


def test_a_new_directory_and_its_parents_appear_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with staged_directory(target) as staging:
        write(staging, "new")
        assert not target.exists()
        assert staging.parent == target.parent  # a rename, not a copy over file systems
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/file": b"new", "a/b/folder": None}


def test_a_second_run_is_refused_before_its_work(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with claimed(target):
        assert [path.name for path in target.parent.iterdir()] == [f".out.claim-{os.getpid()}-0@{socket.gethostname()}"]
        with claimed(target):  # this process alone writes one after the other
            pass
    assert tree(tmp_path) == {}
    target.parent.mkdir()
    for process, host in ((1, "elsewhere"), (2**22 + 1, socket.gethostname())):  # not known to be alive
        (target.parent / f".out.claim-{process}-0@{host}").mkdir()
        with claimed(target):
            pass
    (target.parent / f".out.claim-1-0@{socket.gethostname()}").mkdir()
    with pytest.raises(KDPruneError, match=r"which process 1 is making; wait for it"), claimed(target):
        pytest.fail("the body ran")
    with claimed(target.parent / "out2"):
        pass
    os.utime(target.parent / f".out.claim-1-0@{socket.gethostname()}", (0, 0))  # of an earlier process of that number
    with claimed(target):
        pass


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "empty") as staging:
        write(staging, "new")
    assert set(tree(tmp_path)) == {"empty", "empty/file", "empty/folder"}


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    assert tree(tmp_path) == {}


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "stale").write_text("old")
    refused(tmp_path / "old", "not empty; choose a new directory or add --overwrite")
    with staged_directory(tmp_path / "old", overwrite=True) as staging:
        write(staging, "new")
        assert (tmp_path / "old" / "stale").read_text() == "old"
    assert tree(tmp_path) == {"old": None, "old/file": b"new", "old/folder": None}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, KDPruneError])
def test_what_fails_leaves_everything_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    def fail(target: Path, overwrite: bool) -> None:
        with staged_directory(target, overwrite) as staging:
            write(staging, "half")
            raise error

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_text("old")
    before = tree(tmp_path)
    for target, overwrite in ((tmp_path / "old", True), (tmp_path / "x" / "y" / "z", False)):
        with pytest.raises(error):
            fail(target, overwrite)
        assert tree(tmp_path) == before


def test_a_directory_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def late() -> None:
        with staged_directory(tmp_path / "new") as staging:
            write(staging, "late")
            write_other()

    def write_other() -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "other").write_text("of another run")

    with pytest.raises(KDPruneError, match="not empty"):
        late()
    assert tree(tmp_path) == {"new": None, "new/other": b"of another run"}


def test_files_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "which is a file")
    refused(tmp_path / "file", "which is a file", overwrite=True)
    refused(tmp_path / "file" / "below", "which is a file")


def test_places_that_must_not_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "..", tmp_path, "/", Path.home()):
        refused(place, "cannot be replaced", overwrite=True)


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged_directory(tmp_path / "link") as staging:
        write(staging, "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    refused(tmp_path / "closed" / "out", "is read-only")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_file_system_that_takes_no_files() -> None:
    refused("/proc/kdprune-out", "/proc")


def test_name_that_is_too_long(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), "File name too long")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("kind", ["text", "weights"])
def test_file_system_that_takes_no_more(kind: str, tmp_path: Path) -> None:
    def grow() -> None:
        with staged_directory(tmp_path / "out") as staging:
            if kind == "text":
                (staging / "file").write_text("x" * 20_000)
            else:
                save_file({"weight": torch.zeros(5000)}, staging / "model.safetensors")

    with largest_file(10_000), pytest.raises(KDPruneError) as caught:
        grow()
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'out'}: File too large")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {}


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "out") as staging:
        (staging / "missing").read_text()
    assert tree(tmp_path) == {}


def test_what_killed_processes_left_is_cleared_up(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = socket.gethostname()
    names = [f".out.partial-{child.pid}-0@{host}", f".out.old-{child.pid}-0@{host}",
             f".out.partial-{os.getpid()}-7@{host}", f".out.partial-{child.pid}-0@elsewhere",
             f".outer.partial-{child.pid}-0@{host}"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    # Killed while it was replacing: what stood there is back, and counts as not empty.
    with pytest.raises(KDPruneError, match="not empty"), staged_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_text() == names[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[2:], "out"])
