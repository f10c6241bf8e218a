"""The processes of a run, as ``accelerate launch`` and ``torchrun`` start them.

Every one runs the same program on its share of the calibration rows (SPMD); sums over rows are added up over processes
before anything is decided.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import LongTensor, Tensor, distributed

from kdprune.errors import ProcessLost, one_line

PATIENCE = timedelta(minutes=30)  # a process may wait for the others this long: rank 0 evaluates and saves alone
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class World:
    """This process among those of the run: ``rank`` from 0 to ``size`` − 1."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, prints and measures speed."""
        return self.rank == 0

    def owner(self, number: Any) -> Any:
        """The rank of the process that a part of the work goes to by its number: in turn."""
        return number % self.size

    def share(self, count: int, batch: int = 1) -> LongTensor:
        """Which of the numbers 0 … count − 1 are this process's: runs of ``batch`` of them are dealt out in turn."""
        numbers = torch.arange(count)
        return numbers[self.owner(numbers // batch) == self.rank]  # type: ignore[return-value]

    def sum(self, *tensors: Tensor) -> None:
        """Adds every tensor up over all processes, in place: all of one dtype go in one message.

        Raises:
            ProcessLost: another process of the run is gone.
        """
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().flatten().to(_channel()) for tensor in alike])  # from any device
            self._guarded(distributed.all_reduce, flat)
            for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                with torch.no_grad():
                    tensor.copy_(part.view_as(tensor))

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums of plain numbers over all processes, in float64."""
        sums = torch.tensor(values, dtype=torch.float64)
        self.sum(sums)
        return sums.tolist()

    def broadcast(self, value: Kept) -> Kept:
        """What the first process gives, everywhere (any object that pickles; only for data of this very run)."""
        if self.size == 1:
            return value
        box = [value]
        self._guarded(distributed.broadcast_object_list, box, 0)
        return box[0]

    def gather(self, value: Kept) -> list[Kept]:
        """What every process gives, by rank."""
        if self.size == 1:
            return [value]
        boxes: list[Kept | None] = [None] * self.size
        self._guarded(distributed.all_gather_object, boxes, value)
        return boxes  # type: ignore[return-value]

    def agree(self, flag: bool) -> bool:
        """Whether every process says so."""
        return all(self.gather(flag))

    def barrier(self) -> None:
        """Waits for all processes."""
        self.gather(None)

    def _guarded(self, call: object, *arguments: object) -> None:
        try:
            call(*arguments)  # type: ignore[operator]
        except RuntimeError as error:
            raise ProcessLost(
                f"process {self.rank} of {self.size} lost another one ({one_line(error)[:120]}); look for that one's "
                "message, then run the same command again: with a work directory, finished stages are found there"
            ) from error


def _channel() -> torch.device:
    """Where tensors must be to be sent: NCCL knows GPU memory alone."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def start_world(device: str = "auto") -> World:
    """Joins the processes that ``accelerate launch`` or ``torchrun`` started, if they did; harmless when called again.

    Args:
        device: as of :func:`kdprune.prune`; with "cpu" the processes talk by gloo, else by what accelerate chooses.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not distributed.is_initialized():
        cpu = device == "cpu" or not torch.accelerator.is_available()
        PartialState(cpu=cpu, timeout=PATIENCE, **({"backend": "gloo"} if cpu else {}))
    return world()


def world() -> World:
    """The processes of this run: one, unless a process group was started."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World()
