"""Files that are there whole or not at all, and whose accidents show: what `output`, `states` and `work` write with."""

import contextlib
import errno
import itertools
import os
import re
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from safetensors import SafetensorError

from kdprune.errors import DiskError, KDPruneError

# What the file system says when it cannot take more, or may not: told in one line. Other errors are bugs.
REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
PARTIAL = ".partial-"  # in the name of everything that is still being written
PIECE = 2**20  # bytes read at once: a checksum needs no more memory than that
Notify = Callable[[str], None]  # is told in one line what went wrong and was mended


def is_there(path: str | Path) -> bool:
    """Whether something has this name; a text that is empty, too long for one, or holds a NUL, is none.

    Raises:
        KDPruneError: where that may not be known.
    """
    try:
        return str(path) != "" and Path(path).exists()
    except PermissionError as error:
        raise KDPruneError(f"cannot read {path}: {error.strerror}; ask its owner, or give a copy") from error
    except (OSError, ValueError):
        return False


def refusal(error: BaseException) -> str | None:
    """Why the file system refused, "No space left on device"; None for an error that is something else."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return error.strerror or str(error)
    if isinstance(error, RuntimeError) and error.__context__ is not None:
        return refusal(error.__context__)  # torch.save fails once more while it closes what could not be written
    if isinstance(error, SafetensorError) and "os error" in str(error):
        # "… I/O error: No space left on device (os error 28)"
        return str(error).rpartition(": ")[2].partition(" (os error")[0]
    return None


def crc32(path: str | Path, start: int = 0) -> int:
    """CRC-32 of a file's bytes from `start` on.

    It is there for accidents, not for attackers, and fast: 4.0 GB/s on one core (BLAKE2b .83, SHA-256 1.7).
    """
    value = 0
    for piece in pieces(path, start):
        value = zlib.crc32(piece, value)
    return value


def pieces(path: str | Path, start: int = 0) -> Iterator[memoryview]:
    """A file's bytes from `start` on, a few at a time; each piece is overwritten by the next."""
    piece = bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while got := file.readinto(piece):
            yield memoryview(piece)[:got]


@contextlib.contextmanager
def whole_file(
    path: str | Path, what: str = "", advice: str = "choose another directory",
    rename: Callable[[Path], Path] | None = None,
) -> Iterator[Path]:
    """The name of a new file beside `path` to write to; renamed over `path` when the body ends well, removed when not.

    Nothing is forced to the disk: a process that is killed loses nothing the kernel has, and forcing would make every
    write wait for the disk. What a power cut may leave is found by a checksum, which whoever reads has to look at.
    With ``rename`` the last name is the one it gives for the written file (a checksum can stand in it).

    Raises:
        DiskError: the disk is full or refuses to be written; names `what` (the path without it) and gives `advice`.
    """
    path = Path(path)
    partial = partial_name(path)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path if rename is None else rename(partial))
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if (reason := refusal(error)) is not None:
            raise DiskError(f"cannot write {what or path}: {reason}; {advice}") from error
        raise


def remove_partials(path: str | Path) -> None:
    """Removes what killed processes of this machine left of `path`."""
    path = Path(path)
    for sibling in path.parent.iterdir() if path.parent.is_dir() else ():
        found = re.fullmatch(rf"{re.escape(f'.{path.name}{PARTIAL}')}(.+)-(\d+)-\d+", sibling.name)
        if found is not None and is_gone(found[1], int(found[2])):
            sibling.unlink(missing_ok=True)


def is_gone(host: str, process: int) -> bool:
    """Whether a process was one of this machine's and has ended; one whose number is in use again may wait."""
    return host == socket.gethostname() and not psutil.pid_exists(process)


_numbers = itertools.count()


def partial_name(path: Path) -> Path:
    """A hidden sibling of `path` that no other process and no other call uses."""
    return path.with_name(f".{path.name}{PARTIAL}{socket.gethostname()}-{os.getpid()}-{next(_numbers)}")


def readable_bytes(count: float) -> str:
    """Three digits in binary units: "1.22 GiB", "32 MiB", "96 bytes"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} bytes"


def tell(line: str) -> None:
    """The default of every :data:`Notify`: a line among the messages."""
    print(f"kdprune: {line}", file=sys.stderr)
