"""Writing a directory whole or not at all: it grows beside its place and is renamed over at the end."""

import contextlib
import itertools
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from kdprune.errors import DiskError, KDPruneError
from kdprune.store.files import refusal


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Refuses a directory that could not be written, before any work is spent on it.

    Raises KDPruneError for a file in the way, a directory that is not empty (unless `overwrite`), one that
    must not be replaced (a mount point, the working directory, home), and a parent that cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_dir():
            raise KDPruneError(
                f"got output {path}, which is a file; expected a directory, choose another name"
            )
        if target.is_dir():
            _check_existing(target, path, overwrite)
        parent = next(folder for folder in target.parents if folder.exists())
        if not parent.is_dir():
            raise KDPruneError(f"got output {path} below {parent}, which is a file; choose another directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise KDPruneError(f"got output {path}, but {parent} is read-only; choose another directory")
        _new_sibling(parent / target.name, "probe").rmdir()  # access() says nothing of /proc, or of root's NFS
    except OSError as error:
        raise _refusal(path, error) from error


@contextlib.contextmanager
def staged_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside `path` to write into; renamed to `path` when the body ends well, removed when not.

    With `overwrite` an earlier directory gives way only then, and comes back if the last step fails. What a killed
    process of this machine left beside `path` is removed, or put back if it is what stood there.
    Raises KDPruneError as :func:`check_output` does, and when the disk is full or refuses to be written.
    """
    target = Path(os.path.realpath(path))
    _tidy(target)
    check_output(path, overwrite)
    made = [folder for folder in target.parents if not folder.exists()]  # deepest first
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _new_sibling(target, "partial")
        yield staging
        _swap(staging, target, overwrite)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if (reason := refusal(error)) is not None:
            raise DiskError(f"cannot write {path}: {reason}; free some space or choose another directory") from error
        raise


def _check_existing(target: Path, path: str | Path, overwrite: bool) -> None:
    if any(target.iterdir()) and not overwrite:
        raise KDPruneError(
            f"got output {path}, which is not empty; choose a new directory or add --overwrite"
        )
    if target.is_mount() or target in (Path.home(), Path.cwd(), *Path.cwd().parents):
        raise KDPruneError(f"got output {path}, which cannot be replaced; give a directory inside it")


def _refusal(path: str | Path, error: OSError) -> DiskError:
    return DiskError(f"cannot write {path}: {error.strerror or error}; choose another directory")


def _new_sibling(target: Path, kind: str) -> Path:
    """An empty directory beside `target`, hidden, with a name of its own."""
    for number in itertools.count():
        sibling = target.with_name(f".{target.name}.{kind}-{os.getpid()}-{number}@{socket.gethostname()}")
        with contextlib.suppress(FileExistsError):
            sibling.mkdir()
            return sibling
    raise AssertionError("unreachable: the count has no end")


def _tidy(target: Path) -> None:
    """Clears up after killed processes of this machine; whose number is in use again may wait for the next time."""
    if not target.parent.is_dir():
        return
    for sibling in target.parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(target.name)}\.(\w+)-(\d+)-\d+@(.+)", sibling.name)
        if found is None or found[3] != socket.gethostname() or psutil.pid_exists(int(found[2])):
            continue
        if found[1] == "old" and not target.exists():
            sibling.replace(target)
        else:
            shutil.rmtree(sibling, ignore_errors=True)


def _swap(staging: Path, target: Path, overwrite: bool) -> None:
    """Puts `staging` in the place of `target`; what stood there is removed last, or put back."""
    check_output(target, overwrite)  # again: the work may have taken hours
    if not target.exists():
        staging.rename(target)
        return
    old = _new_sibling(target, "old")
    target.replace(old)
    try:
        staging.rename(target)
    except BaseException:
        old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
