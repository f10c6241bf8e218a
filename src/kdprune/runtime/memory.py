"""Memory budgets: what is held in memory, what is streamed or spilled, and whether that was enough."""

import os
from dataclasses import dataclass

import psutil
import torch
from accelerate.utils import convert_file_size_to_int

from kdprune.errors import KDPruneError
from kdprune.store.files import readable_bytes

SHARE = 0.8  # of the memory that is free at the start, where no budget is given
MODEL_SHARE = 0.5  # of a budget that a whole model may take; fits and states need the rest
STATES_SHARE = 0.5  # of what is left of the host's budget that states may take
SCRATCH_SHARE = 0.25  # of the same: states between two layers of a streamed model


def parse_bytes(text: str | int) -> int:
    """``"6GiB"`` → 6 · 2³⁰, ``"500MB"`` → 5 · 10⁸, a number → itself; in any case of letters: no memory is meant in
    bits.

    Raises:
        KDPruneError: it is no amount of memory.
    """
    try:
        found = convert_file_size_to_int(int(text) if str(text).isdigit() else str(text).upper())
    except ValueError:
        found = 0
    if found <= 0:
        raise KDPruneError(f"got memory {str(text)!r}, expected an amount such as 6GiB or 500MB")
    return found


@dataclass(frozen=True)
class Memory:
    """What a run may take, in bytes.

    Attributes:
        host: resident set of this process.
        device: allocations on the accelerator; None without one.
        given: which of the two a person named; the others are most of what was free.
    """

    host: int
    device: int | None
    given: frozenset[str] = frozenset()

    @staticmethod
    def of(host: str | int | None, device: str | int | None, place: torch.device) -> "Memory":
        """The budgets as given; else most of what is free now. ``place`` is where the run computes.

        Raises:
            KDPruneError: no amount of memory, or less than the libraries alone take.
        """
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of the run that share this host
        free = psutil.virtual_memory().available // beside + resident_bytes()
        most = int(SHARE * free) if host is None else parse_bytes(host)
        if host is not None and most <= resident_bytes():
            raise KDPruneError(
                f"got host memory {host}, expected more than {readable_bytes(resident_bytes())}, which the libraries "
                "alone take")
        on_device = None if device is None else parse_bytes(device)
        if place.type == "cpu" and device is not None:
            raise KDPruneError(f"got device memory {device} where the run computes on a CPU, expected an accelerator: "
                               "leave it out, give --host-memory, or check --device")
        if on_device is None and place.type == "cuda":
            on_device = int(SHARE * torch.cuda.mem_get_info(place)[0])
        given = {name for name, value in (("host", host), ("device", device)) if value is not None}
        return Memory(most, on_device, frozenset(given))

    def enforce(self, place: torch.device) -> None:
        """Makes the accelerator refuse more than was given, so that batches halve there; the host cannot."""
        if "device" in self.given and self.device is not None and place.type == "cuda":
            total = torch.cuda.mem_get_info(place)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.device / total), _index(place))

    def lift(self, place: torch.device) -> None:
        """Undoes :meth:`enforce`: the process goes on after the run."""
        if "device" in self.given and place.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, _index(place))

    def room(self) -> int:
        """What is left of the host's budget now."""
        return max(0, self.host - resident_bytes())

    def streams(self, model_bytes: int) -> bool:
        """Whether a model of this size is read layer by layer: it takes more than its share of what is left."""
        tightest = min(self.room(), self.device or self.room())
        return model_bytes > MODEL_SHARE * tightest

    def holds(self, states_bytes: int) -> bool:
        """Whether states of this size stay in memory; else they are spilled to the work directory."""
        return states_bytes <= STATES_SHARE * self.room()

    def remark(self, host_peak: int, device_peak: int) -> str | None:
        """What is to be said of peaks, in bytes, that are above a budget that was given."""
        for name, peak, budget in (("host", host_peak, self.host), ("device", device_peak, self.device or 0)):
            if name in self.given and peak > budget:
                return f"{readable_bytes(peak)} of {name} memory in use, more than the {readable_bytes(budget)} allowed"
        return None


def total_memory(place: torch.device) -> int:
    """Bytes of memory that the device has, taken or free."""
    return int(torch.cuda.mem_get_info(place)[1] if place.type == "cuda" else psutil.virtual_memory().total)


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def _index(place: torch.device) -> int:
    """The accelerator's number: torch sets no limit for "cuda" alone, which is the current one."""
    return torch.cuda.current_device() if place.index is None else place.index
