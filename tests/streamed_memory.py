"""Memory that a piece of work takes, for tests of what a streamed model may hold."""

import ctypes
import gc
import sys
from collections.abc import Callable

import psutil
import pytest

from kdprune.runtime.machine import metered, reset_peak_memory


def added(work: Callable[[], object]) -> float:
    """MiB of memory that the process had at most while at work, beyond what it had before."""
    gc.collect()
    if sys.platform == "linux":  # else work would find room in what the process has freed but not given back
        ctypes.CDLL(None).malloc_trim(0)
    if not reset_peak_memory():
        pytest.skip("the system cannot reset the high-water mark")
    before = psutil.Process().memory_info().rss
    with metered() as cost:
        work()
    return (cost.peak_memory_bytes - before) / 2**20
