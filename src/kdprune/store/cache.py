"""The cache of a run: finished stages, found again by a hash of everything they follow from.

    work.json           the run's identity: what it is about, in named parts
    lock                held by the process at work; vanishes with it
    stages/NAME-KEY/    a finished stage: what JSON holds, tensors by name, and the checksums of both files
    checkpoints/        where a fit stands
    states/             spilled hidden states (see `states`)
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter
from torch import Tensor

from kdprune.errors import DiskError, KDPruneError
from kdprune.store.checkpoints import Checkpoint
from kdprune.store.directories import staged_directory
from kdprune.store.files import PARTIAL, crc32, tell, whole_file
from kdprune.store.hashing import IdentityPart, as_part, differences, digest
from kdprune.store.tensors import read_parts, write_parts

FORMAT = 1
MANIFEST, LOCK, INDEX = "work.json", "lock", "files.json"
BULKY = ("states", "checkpoints")
LEFT = re.compile(r"\.(partial|old|probe)-|^\.tmp")  # half-written: by `files`, by `output`, by safetensors
ELSEWHERE = "choose another --work-dir, or remove it"
Value = TypeVar("Value")


class Codec(Protocol[Value]):
    """How a stage's value lies in the cache: as what JSON holds and tensors by name."""

    def pack(self, value: Value) -> tuple[Any, Mapping[str, Tensor]]:
        """The two parts of a value."""

    def unpack(self, plain: Any, tensors: dict[str, Tensor]) -> Value:
        """The value again. Raises ValueError or LookupError for parts of another layout, which count as none."""


class JsonCodec:
    """Values of a type that pydantic understands: a model, a dataclass, ``list[float]``."""

    def __init__(self, kind: Any):
        self.adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def pack(self, value: Any) -> tuple[Any, Mapping[str, Tensor]]:
        """No tensors."""
        return self.adapter.dump_python(value, mode="json"), {}

    def unpack(self, plain: Any, tensors: dict[str, Tensor]) -> Any:
        """Raises pydantic's ValidationError, a ValueError, for another layout."""
        return self.adapter.validate_json(json.dumps(plain))


class TensorCodec:
    """Tensors by name; they come back contiguous and on the CPU."""

    def pack(self, value: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Tensor]]:
        """Nothing beside them."""
        return None, value

    def unpack(self, plain: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As they were."""
        return tensors


def default_work_dir(identity: Mapping[str, str | IdentityPart]) -> Path:
    """A directory named by the hash of the identity, in :func:`cache_dir`."""
    hashes = {name: as_part(value).hash for name, value in identity.items()}
    return cache_dir() / digest([FORMAT, version("kdprune"), hashes])[:16]


def cache_dir() -> Path:
    """$KDPRUNE_CACHE, else $XDG_CACHE_HOME/kdprune, else ~/.cache/kdprune.

    Raises:
        KDPruneError: there is no home either.
    """
    own, user = (os.environ.get(name) for name in ("KDPRUNE_CACHE", "XDG_CACHE_HOME"))
    try:
        return Path(own).expanduser() if own else (Path(user) if user else Path.home() / ".cache") / "kdprune"
    except RuntimeError as error:
        raise KDPruneError("found no home directory for the cache; set KDPRUNE_CACHE to a directory, or give "
                           "--work-dir") from error


class CacheInUse(KDPruneError):
    """Another process holds the work directory ``directory``."""

    def __init__(self, directory: Path, owner: str):
        super().__init__(f"got work directory {directory}, which {owner} is using; wait for it, or choose another "
                         "--work-dir")
        self.directory = directory


class Cache:
    """The work directory of one run, or of several with the same identity after each other.

    ``Cache(None)`` finds nothing and writes nothing, so that callers need no ifs. With several processes all of them
    make the same calls in the same order: a stage counts as found only if every process finds it whole, the first
    process writes it, and all wait until it is there.

    Args:
        directory: made if it is not there.
        identity: what the run is about, name → text (which decides by itself) or :class:`IdentityPart`.
        first: whether this process writes.
        agree: True only if every process says True (all wait for each other in it).
        notify: told what was found broken, one line each.

    Raises:
        KDPruneError: the directory is of another run or version (names the parts that differ), in use by another
            process, not a work directory, cannot be read or written, or not seen by every process.
    """

    def __init__(
        self, directory: str | Path | None, identity: Mapping[str, str | IdentityPart] | None = None, *,
        first: bool = True, agree: Callable[[bool], bool] = bool, notify: Callable[[str], None] = tell,
    ):
        self.directory = None if directory is None else Path(directory).absolute()
        self.identity = {name: as_part(value) for name, value in (identity or {}).items()}
        self.first, self.agree, self.notify = first, agree, notify
        self._lock: int | None = None
        self._whole: set[Path] = set()  # stages whose checksums this process has looked at
        if self.directory is not None:
            self._together(self._open if first else lambda: None, "could not open the work directory")
            self._together(self._check_seen, "does not see the work directory")

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process have the directory; the end of this one does as much."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------------------------------------ stages

    def find(self, stage: str, key: str) -> Path | None:
        """The folder of a finished stage, or None; one whose checksums do not hold does not count, which is said."""
        if self.directory is None:
            return None
        folder = self._folder("stages", stage, key)
        found = folder in self._whole or self._check_stage(folder, stage, key)
        if found:
            self._whole.add(folder)
        return folder if self.agree(found) else None

    @contextlib.contextmanager
    def finish(self, stage: str, key: str) -> Iterator[Path]:
        """A folder for the files of a stage; after the body they are found under this key, whole or not at all.

        Compute before, write inside: what processes other than the first write is thrown away.

        Raises:
            KDPruneError: the disk is full or refuses to be written, here or in the first process.
        """
        if self.directory is None or not self.first:
            with tempfile.TemporaryDirectory(prefix="kdprune-") as scratch:
                yield Path(scratch)
            if self.directory is not None and not self.agree(True):
                raise KDPruneError(f"the first process could not keep stage {stage}; see its message")
            return
        folder = self._folder("stages", stage, key)
        try:
            with staged_directory(folder, overwrite=True) as staging:
                yield staging
                files = sorted(path for path in staging.rglob("*") if path.is_file())
                sums = {str(path.relative_to(staging)): [path.stat().st_size, crc32(path)] for path in files}
                index = {"stage": stage, "key": key, "files": sums}
                (staging / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
            self._whole.add(folder)
        except Exception:
            self.agree(False)
            raise
        self.agree(True)

    def load(self, stage: str, key: str) -> tuple[Any, dict[str, Tensor]] | None:
        """What JSON holds of a finished stage, and its tensors by name; None where there is none that is whole."""
        folder = self.find(stage, key)
        return None if folder is None else read_parts(folder)

    def save(self, stage: str, key: str, plain: Any, tensors: Mapping[str, Tensor]) -> None:
        """Caches a finished stage. Raises KDPruneError where the disk is full or refuses to be written."""
        with self.finish(stage, key) as folder:
            if self.first:
                write_parts(folder, plain, tensors)

    def checkpoint(self, stage: str, key: str, seconds: float = 30.0) -> Checkpoint:
        """Where a stage that is not finished stands; kept at most every ``seconds`` and removed by :meth:`clean`."""
        path = None if self.directory is None else self._folder("checkpoints", stage, key)
        return Checkpoint(path, stage, seconds, writes=self.first, agree=self.agree, notify=self.notify)

    def spill_directory(self, stage: str, key: str) -> Path | None:
        """A folder for spilled states, which look after their chunks themselves; None without a directory."""
        return None if self.directory is None else self._folder("states", stage, key)

    def clean(self, *stages: str) -> None:
        """Removes what is bulky and only of use to a run that is not done: states and checkpoints.

        Args:
            stages: beginnings of the names of finished stages that go with them.
        """
        if self.directory is not None and self.agree(True) and self.first:
            for name in BULKY:
                shutil.rmtree(self.directory / name, ignore_errors=True)
            for folder in [path for stage in stages for path in (self.directory / "stages").glob(f"{stage}*")]:
                self._whole.discard(folder)
                shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ inside

    def _folder(self, kind: str, stage: str, key: str) -> Path:
        assert self.directory is not None
        assert re.fullmatch(r"[\w.-]+", stage), f"{stage!r} is no name of a folder"
        return self.directory / kind / f"{stage}-{key[:16]}"

    def _check_stage(self, folder: Path, stage: str, key: str) -> bool:
        if not folder.is_dir():
            return False
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if index["key"] != key:
                return False
            for name, (size, checksum) in index["files"].items():
                if (folder / name).stat().st_size != size or crc32(folder / name) != checksum:
                    raise ValueError(f"{name} is corrupted (checksum)")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.notify(f"stage {stage} in {self.directory} is not whole ({reason}); computed again")
            return False
        return True

    def _together(self, action: Callable[[], None], failure: str) -> None:
        """The action everywhere, and an error everywhere where it failed anywhere."""
        problem: KDPruneError | None = None
        try:
            action()
        except KDPruneError as error:
            problem = error
        if not self.agree(problem is None):
            self.close()
            raise problem or KDPruneError(f"another process {failure} {self.directory}; see its message")

    def _check_seen(self) -> None:
        assert self.directory is not None
        if not (self.directory / MANIFEST).is_file():
            raise KDPruneError(
                f"got work directory {self.directory}, which {socket.gethostname()} does not see; "
                "give a --work-dir on a file system that all hosts share")

    def _open(self) -> None:
        """Makes or checks the directory, takes its lock and removes what killed processes left."""
        folder = self.directory
        assert folder is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            strange = sorted(path.name for path in folder.iterdir() if path.name != LOCK and PARTIAL not in path.name)
            if strange and not (folder / MANIFEST).exists():
                raise KDPruneError(
                    f"got {folder} as work directory, which holds {strange[0]} and no {MANIFEST}; "
                    "give a new directory, or one that kdprune made")
            self._take_lock(folder)
            if (folder / MANIFEST).exists():  # only now: another process may have made it meanwhile
                self._check_manifest(folder / MANIFEST)
            else:
                self._write_manifest(folder / MANIFEST)
            for left in [path for path in folder.rglob(".*") if LEFT.search(path.name)]:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)  # gone with its folder
        except OSError as error:
            raise DiskError(
                f"cannot use work directory {folder}: {error.strerror or error}; choose another --work-dir") from error

    def _take_lock(self, folder: Path) -> None:
        """A lock on an open file: the kernel drops it with the process, however that ends."""
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            self.close()
            raise CacheInUse(folder, owner or "another process") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _write_manifest(self, path: Path) -> None:
        content = {
            "format": FORMAT, "kdprune": version("kdprune"),
            "identity": {name: value._asdict() for name, value in self.identity.items()},
        }
        with whole_file(path, advice="choose another --work-dir") as partial:
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _check_manifest(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            there = {"format": str(content["format"]), "kdprune": str(content["kdprune"])}
            parts = {name: IdentityPart(**value) for name, value in content["identity"].items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise KDPruneError(
                f"got work directory {path.parent}, whose {MANIFEST} cannot be read ({error}); {ELSEWHERE}") from error
        here = {"format": str(FORMAT), "kdprune": version("kdprune")}
        wrong = [f"{name} {there[name]} there, {here[name]} here" for name in here if here[name] != there[name]]
        wrong += differences(parts, self.identity)
        if wrong:
            raise KDPruneError(f"got work directory {path.parent} of another run ({'; '.join(wrong)}); {ELSEWHERE}")
