"""What a run keeps so that it can go on: the work directory, and the key of everything its stages follow from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdprune.checkpoints import Checkpoint
from kdprune.identity import digest
from kdprune.work import Work


@dataclass(frozen=True)
class Keeper:
    """A work directory together with what the run is about.

    ``Keeper()`` keeps nothing. Stages are found again under a hash of ``about`` and of what a stage says of itself.

    Attributes:
        work: the directory. about: hash of source, weights, tokens and seed, of which every stage is a function.
    """

    work: Work = field(default_factory=lambda: Work(None))
    about: str = ""

    def key(self, *parts: Any) -> str:
        """The key of a stage that follows from these plain data beside the run's own."""
        return digest([self.about, *parts])

    def checkpoints(self, *parts: Any) -> Callable[[str], Checkpoint]:
        """Checkpoints of fits by name, "kernel-4-8", of a stage that follows from ``parts``."""
        return lambda name: self.work.checkpoint(name, self.key(*parts, name))

    def home(self, corrected: str = "") -> Callable[[int], Path | None]:
        """Where the states of a boundary live, by its index; ``corrected``: hash of edits in front of it, if any."""
        return lambda index: self.work.folder(f"boundary-{index}", digest([self.about, index, corrected]))
