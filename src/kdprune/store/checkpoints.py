"""Where a stage that is not finished stands, so that a killed run goes on from there."""

import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdprune.store.files import Notify, crc32, tell, whole_file


class Checkpoint:
    """One checkpoint file, written over again and again; its checksum stands in its name.

    With several processes the first writes, and it counts as there only if every process can read it.

    Args:
        path: its place and the first part of its name; None keeps nothing.
        stage: for messages.
        seconds: least time between two saves.
    """

    def __init__(
        self, path: Path | None, stage: str = "", seconds: float = 30.0, *, writes: bool = True,
        agree: Callable[[bool], bool] = bool, notify: Notify = tell,
    ):
        self.path, self.stage, self.seconds = path, stage, seconds
        self.writes, self.agree, self.notify = writes, agree, notify
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to save (never where nothing is kept): spares putting the state together."""
        return self.path is not None and self.writes and time.monotonic() - self._saved >= self.seconds

    def load(self) -> dict[str, Any] | None:
        """The latest state that is whole, on the CPU; None where there is none (one that is corrupted is said)."""
        if self.path is None:
            return None
        found = None
        for file in sorted(self._files(), key=_age, reverse=True):
            if (found := self._read(file)) is not None:
                break
        return found if self.agree(found is not None) else None

    def save(self, state: Mapping[str, Any], force: bool = False) -> bool:
        """Keeps the state (tensors, plain data) if it is time, or ``force`` says that it has to be.

        Returns:
            Whether it did.

        Raises:
            KDPruneError: the disk is full or refuses to be written; an earlier state is still there.
        """
        if self.path is None or not self.writes or not (force or self.due):
            return False
        what = f"the checkpoint of {self.stage} to {self.path.parent}"
        with whole_file(self.path, what, "give another --work-dir", self._name) as draft, draft.open("wb") as file:
            torch.save(dict(state), file)
        latest = max(self._files(), key=_age)
        for old in self._files():
            if old != latest:
                old.unlink(missing_ok=True)
        self._saved = time.monotonic()
        return True

    def _files(self) -> list[Path]:
        assert self.path is not None
        return list(self.path.parent.glob(f"{self.path.name}.*.pt"))

    def _name(self, written: Path) -> Path:
        """The checksum stands in the name, so that one renaming brings both."""
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.{crc32(written):08x}.pt")

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            if int(file.suffixes[-2][1:], 16) != crc32(file):
                raise ValueError("checksum")
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, ValueError, IndexError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            self.notify(f"the checkpoint of {self.stage} is corrupted ({error}); it does not count")
            return None


def _age(file: Path) -> int:
    return file.stat().st_mtime_ns
