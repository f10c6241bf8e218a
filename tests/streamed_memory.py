"""Memory that a piece of work takes, for tests of what a streamed model may hold."""

from collections.abc import Callable

import psutil
import pytest

from kdprune.runtime.machine import metered, reset_peak_memory


def added(work: Callable[[], object]) -> float:
    """MiB of memory that the process had at most while at work, beyond what it had before."""
    if not reset_peak_memory():  # it hands back what is free, else work would find room there
        pytest.skip("the system cannot reset the high-water mark")
    before = psutil.Process().memory_info().rss
    with metered() as cost:
        work()
    return (cost.peak_memory_bytes - before) / 2**20
