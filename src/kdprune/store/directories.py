"""Writing a directory whole or not at all: it grows beside its place and is renamed over at the end."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil

from kdprune.errors import DiskError, KDPruneError, shortened
from kdprune.store.files import is_gone, refusal

RECORD = "results.json"  # of a result; its "files" name all that the run wrote
Inputs = Mapping[str, Iterable[Path]]  # what is read, by what a message calls it
_SIBLING = re.compile(r"\.(?P<name>.+)\.(?P<kind>\w+)-(?P<process>\d+)-\d+@(?P<host>.+)")  # as _new_sibling names them
FILLED = ("cache", "work directory", "package")  # by programs: many files, and no user's links
DEEP = ("text",)  # read with all folders below; of others what lies in them


def check_apart(output: str | Path, inputs: Inputs) -> None:
    """Refuses an output that is, holds or lies in what is read: it would be replaced, or be read the next time.

    Links are followed, those in directories that are read too. Raises KDPruneError.
    """
    target = _real(output)
    for what, paths in inputs.items():
        for path in paths:
            for place in _places(path, what):
                relation = ("is" if _same(place, target) else "holds" if _within(place, target)
                            else "lies in" if _within(target, place) else None)
                if relation is not None:
                    raise KDPruneError(f"got output {output}, which {relation} the {what} ({path}); expected a "
                                       "directory apart from all that is read, choose another")


def check_file(path: str | Path, inputs: Inputs, key: str | None = None) -> None:
    """Refuses a file to write, before any work, that cannot be written or would replace a part of what is read.

    A JSON file with this key is an earlier one of the same command and may be replaced wherever it lies; without a key
    what is there is not read. Raises KDPruneError.
    """
    target = _real(path)
    try:
        if target.is_dir():
            raise KDPruneError(f"got {path} to write, which is a directory; expected the name of a file")
        parent = next(folder for folder in target.parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise DiskError(f"cannot write {path}: {parent} is {'read-only' if parent.is_dir() else 'a file'}; choose "
                            "another name")
        if not target.exists() or (key is not None and key in _json(target)):
            return
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}; choose another name") from error
    for what, paths in inputs.items():
        for read in paths:
            if any(_same(place, target) or _within(target, place) for place in _places(read, what)):
                raise KDPruneError(f"got {path} to write, which is a part of the {what} ({read}); choose another name")


def _real(path: str | Path) -> Path:
    """The place that a name leads to. Raises KDPruneError for what can be no name."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise KDPruneError(f"got output {str(path)!r}, which can be no name ({error}); choose another") from error


def _same(one: Path, other: Path) -> bool:
    """Whether two names are of one place; a mount, or a file system without upper case, can give it several."""
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _within(inner: Path, outer: Path) -> bool:
    return any(_same(folder, outer) for folder in inner.parents)


def _places(path: Path, what: str) -> Iterator[Path]:
    """Where what is read lies: the path itself, and what links in it lead to."""
    start = _real(path)
    yield start
    if what not in FILLED:
        for folder, folders, names in itertools.islice(os.walk(start), None if what in DEEP else 1):
            yield from (_real(Path(folder, name)) for name in (*folders, *names) if Path(folder, name).is_symlink())


def _json(path: Path) -> dict[str, object]:
    """What a JSON file holds, if it is an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_output(path: str | Path, overwrite: bool = False, result: bool = False) -> None:
    """Refuses a directory that could not be written, before any work is spent on it.

    With ``result`` only what an earlier run wrote is ever replaced: every file there has to be named in its record.
    Raises KDPruneError for a file in the way, a directory that is not empty (unless `overwrite`), one that
    must not be replaced (a mount point, the working directory, home), a parent that cannot be written, and a name that
    is not UTF-8, as one given in a locale of another encoding: safetensors writes no such file.
    """
    target = _real(path)
    try:
        os.fspath(target).encode()
    except UnicodeEncodeError as error:
        raise KDPruneError(f"got output {os.fspath(path)!r}, whose characters this locale's encoding lacks; expected "
                           "others, or set LC_ALL=C.UTF-8") from error
    try:
        if target.exists() and not target.is_dir():
            raise KDPruneError(
                f"got output {path}, which is a file; expected a directory, choose another name"
            )
        if target.is_dir():
            _check_existing(target, path, overwrite)
            if result:
                _check_ours(target, path)
        parent = next(folder for folder in target.parents if folder.exists())
        if not parent.is_dir():
            raise KDPruneError(f"got output {path} below {parent}, which is a file; choose another directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise KDPruneError(f"got output {path}, but {parent} is read-only; choose another directory")
        _new_sibling(parent / target.name, "probe").rmdir()  # access() says nothing of /proc, or of root's NFS
    except OSError as error:
        raise _refusal(path, error) from error


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Tells other runs on this machine that `path` is to be written, from the first check on: of two the later one is
    refused before its work, not after it.

    Raises KDPruneError where a process that is alive said so before, and as :func:`check_output` does.
    """
    target = _real(path)
    made = [folder for folder in target.parents if not folder.exists()]  # deepest first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        claim = _new_sibling(target, "claim")
        earlier = [process for began, process in _claims(target)
                   if process != os.getpid() and (began, process) < (claim.stat().st_mtime_ns, os.getpid())]
    except OSError as error:
        raise _refusal(path, error) from error
    try:
        if earlier:
            raise KDPruneError(
                f"got output {path}, which process {earlier[0]} is making; wait for it, or choose another directory")
        yield
    finally:
        for folder in (claim, *made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _claims(target: Path) -> list[tuple[int, int]]:
    """Time, in ns, and process of every claim beside `target` whose process is alive on this machine and not younger
    than it: a number may have come to another."""
    found = []
    for sibling in target.parent.iterdir():
        one = _SIBLING.fullmatch(sibling.name)
        if one and one["name"] == target.name and one["kind"] == "claim" and one["host"] == socket.gethostname():
            with contextlib.suppress(psutil.Error, OSError):  # it has ended meanwhile
                began = sibling.stat().st_mtime_ns
                if psutil.Process(int(one["process"])).create_time() <= began / 1e9:
                    found.append((began, int(one["process"])))
    return found


@contextlib.contextmanager
def staged_directory(path: str | Path, overwrite: bool = False, result: bool = False) -> Iterator[Path]:
    """A new directory beside `path` to write into; renamed to `path` when the body ends well, removed when not.

    With `overwrite` an earlier directory gives way only then, and comes back if the last step fails. What a killed
    process of this machine left beside `path` is removed, or put back if it is what stood there.
    Raises KDPruneError as :func:`check_output` does, and when the disk is full or refuses to be written.
    """
    target = _real(path)
    _tidy(target)
    check_output(path, overwrite, result)
    made = [folder for folder in target.parents if not folder.exists()]  # deepest first
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _new_sibling(target, "partial")
        yield staging
        _swap(staging, target, overwrite, result)
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
    kept = [Path(os.path.expanduser("~"))]
    with contextlib.suppress(FileNotFoundError):  # the working directory can be gone
        kept += [Path.cwd(), *Path.cwd().parents]
    if target.is_mount() or target in kept:
        raise KDPruneError(f"got output {path}, which cannot be replaced; give a directory inside it")


def written_files(folder: Path) -> list[str]:
    """The names of all files in a directory, as the record of a result keeps them."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _check_ours(target: Path, path: str | Path) -> None:
    """Every file in the directory is one that an earlier run wrote there."""
    listed = _json(target / RECORD).get("files")
    foreign = [name for name in written_files(target) if name not in (listed if isinstance(listed, list) else ())]
    empty = [folder.name for folder in target.rglob("*") if folder.is_dir() and not any(folder.iterdir())]
    if foreign or empty:
        raise KDPruneError(
            f"got output {path}, which holds {(foreign or empty)[0]} ({len(foreign or empty)} such) that no run wrote; "
            "only an earlier result is replaced: move that away, or choose another directory")


def _refusal(path: str | Path, error: OSError) -> DiskError:
    where = shortened(path, quoted=False)
    return DiskError(f"cannot write {where}: {error.strerror or error}; choose another directory")


def _new_sibling(target: Path, kind: str) -> Path:
    """An empty directory beside `target`, hidden, with a name of its own."""
    for number in itertools.count():
        sibling = target.with_name(f".{target.name}.{kind}-{os.getpid()}-{number}@{socket.gethostname()}")
        with contextlib.suppress(FileExistsError):
            sibling.mkdir()
            return sibling
    raise AssertionError("unreachable: the count has no end")


def _tidy(target: Path) -> None:
    """Clears up after killed processes of this machine."""
    if not target.parent.is_dir():
        return
    for sibling in target.parent.iterdir():
        found = _SIBLING.fullmatch(sibling.name)
        if found is None or found["name"] != target.name or not is_gone(found["host"], int(found["process"])):
            continue
        if found["kind"] == "old" and not target.exists():
            sibling.replace(target)
        else:
            shutil.rmtree(sibling, ignore_errors=True)


def _swap(staging: Path, target: Path, overwrite: bool, result: bool) -> None:
    """Puts `staging` in the place of `target`; what stood there is removed last, or put back."""
    check_output(target, overwrite, result)  # again: the work may have taken hours
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
