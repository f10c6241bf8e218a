"""Device, seeds and cost: what there is to know about the machine."""

import contextlib
import ctypes
import gc
import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from kdprune.errors import KDPruneError

BATCH = 16  # calibration rows a forward pass
LOGGERS = ("transformers", "huggingface_hub", "datasets", "accelerate")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``"auto"`` → the accelerator torch reports, else the CPU; anything else as torch reads it.

    Moments and solves need float64, which Apple's GPUs lack: there "auto" is the CPU and "mps" is refused.

    Raises:
        KDPruneError: the name is unknown, or the device is not on this machine.
    """
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None and found.type != "mps" else torch.device("cpu")
    try:
        if str(device).startswith("mps"):
            raise NotImplementedError
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KDPruneError(
            f"got device {device!r}, which this machine does not offer (or not with float64); "
            "expected 'auto', 'cpu' or 'cuda'"
        ) from error


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has arithmetic of this dtype; a CPU without it is some six times slower than in float32."""
    if device.type != "cpu" or dtype.itemsize > 2:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_fp16_supported() if dtype == torch.float16 else mkldnn._is_mkldnn_bf16_supported())


def mixed_precision(place: torch.device, wanted: bool = True) -> torch.autocast:
    """Matrix products in bfloat16 (autocast), if they are wanted so and the device computes in it."""
    return torch.autocast(place.type, torch.bfloat16, enabled=wanted and computes_in(torch.bfloat16, place))


def generator(seed: int, purpose: int = 0) -> torch.Generator:
    """A CPU generator for one purpose of one run; draws of different purposes do not disturb each other."""
    return torch.Generator().manual_seed((seed * 1_000_003 + purpose) % 2**63)


def peak_memory_bytes() -> int:
    """High-water mark of this process: resident set on the host plus allocations on the accelerator."""
    return host_peak_bytes() + device_peak_bytes()


def device_peak_bytes() -> int:
    """Most that was allocated on each accelerator, added up, in bytes; 0 without one."""
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


def host_peak_bytes() -> int:
    """Largest resident set, in bytes; Linux's own mark can be reset, which the one of getrusage may survive."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_memory() -> None:
    """Hands freed memory back to the system, which glibc keeps in pieces unless asked."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> bool:
    """Starts the high-water mark anew; False where the system cannot, and the mark stays the process's.

    What earlier work no longer needs is handed back first, so that it does not count.
    """
    gc.collect()
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@dataclass
class Meter:
    """Cost of a stretch of work: wall seconds, peak memory in bytes, and whether that peak is the stretch's own."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    own_peak: bool = False


@contextlib.contextmanager
def metered(beside: int = 0) -> Iterator[Meter]:
    """``with metered() as cost: …``; the work queued on an accelerator is waited for. Stretches do not nest.

    beside: bytes on the host that are there for other work, and do not count.
    """
    meter = Meter(own_peak=reset_peak_memory())
    start = time.perf_counter()
    yield meter
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    meter.seconds = time.perf_counter() - start
    meter.peak_memory_bytes = peak_memory_bytes() - beside


@contextlib.contextmanager
def quiet_libraries(progress: bool = False, also: Sequence[str] = ()) -> Iterator[None]:
    """Warnings of the Hugging Face libraries and of the loggers ``also``, and bars unless `progress`, are silent."""
    loggers = [logging.getLogger(name) for name in (*LOGGERS, *also)]
    levels = [logger.level for logger in loggers]
    bars = hf_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if bars and not progress:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars and not progress:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """:func:`quiet_libraries`, and warnings and remarks through ``logging`` of all others as well."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_libraries():
            yield
    finally:
        logging.disable(level)
