"""What a run hands to everything that computes: seed, stages, cache and sizes, as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from kdprune.runtime.machine import BATCH, generator
from kdprune.runtime.stages import Advance, Stages
from kdprune.store.cache import Cache, Codec
from kdprune.store.checkpoints import Checkpoint
from kdprune.store.hashing import digest

Value = TypeVar("Value")


@dataclass(frozen=True)
class Run:
    """One run of one method on one model.

    ``Run()`` is a run in memory, with seed 0 and no cache.

    Attributes:
        seed: of every random draw.
        batch_size: calibration rows a forward pass.
        stages: names, times and shows the stages.
        cache: finished stages, spilled states and checkpoints, of this run and of earlier ones.
        about: hash of what every stage follows from beside what it says itself: code, model, tokens, seed.
        scores: the similarity analysis of the layers by name, where it has been made.
        states_model: the model in fewer bits whose hidden states are taken for the dense model's; None: that itself.
    """

    seed: int = 0
    batch_size: int = BATCH
    stages: Stages = field(default_factory=Stages)
    cache: Cache = field(default_factory=lambda: Cache(None))
    about: str = ""
    scores: Mapping[str, Any] | None = None
    states_model: Any = None

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """``with run.stage("analyse", total=10) as progress: progress(1)``: times a stage and shows its bar."""
        return self.stages.stage(name, total)

    def generator(self, purpose: int = 0) -> torch.Generator:
        """A generator for one purpose; draws of different purposes do not disturb each other."""
        return generator(self.seed, purpose)

    def running(self, model: Any) -> Any:
        """The model that is run for the hidden states of ``model``."""
        return model if self.states_model is None else self.states_model

    def key(self, *follows_from: Any) -> str:
        """The key of something that follows from these plain data beside what the run is about."""
        return digest([self.about, *follows_from])

    def cached(
        self, name: str, follows_from: Any, compute: Callable[[], Value], codec: Codec[Value], shown: str | None = "",
    ) -> Value:
        """The result of a stage: from the cache, which is said, or computed and cached.

        Args:
            name: of the stage; a folder is named so.
            follows_from: plain data which, with what the run is about, decide the result.
            compute: what computes it.
            codec: how it lies in the cache.
            shown: the stage's name as progress shows it, if it is another; None: nothing is said.
        """
        key = self.key(name, follows_from)
        found = self.cache.load(name, key)
        if found is not None:
            try:
                value = codec.unpack(*found)
            except (ValueError, LookupError):
                pass  # of another layout
            else:
                if shown is not None:
                    self.stages.found(shown or name)
                return value
        value = compute()
        self.cache.save(name, key, *codec.pack(value))
        return value

    def checkpoint(self, name: str, *follows_from: Any) -> Checkpoint:
        """Where the fit of this name stands."""
        return self.cache.checkpoint(name, self.key(name, *follows_from))

    def spill_directory(self, boundary: int, *follows_from: Any) -> Path | None:
        """Where the hidden states at a boundary are spilled to; None: they stay in memory.

        Args:
            boundary: index of the layer that they enter.
            follows_from: what they follow from beside the dense model: edits in front of the boundary.
        """
        return self.cache.spill_directory(f"boundary-{boundary}", self.key("states", boundary, *follows_from))
