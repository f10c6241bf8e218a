"""Real faults for tests: disks that are full, files that are corrupted, processes that are killed at any moment."""

import contextlib
import functools
import os
import random
import resource
import signal
import socket
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from kdprune.runtime.distributed import start_world


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of this size at `folder`; skips the test where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, kilobytes: int) -> None:
    """More room on a :func:`small_disk`."""
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(path: Path, offset: int) -> None:
    """One bit of a file changes; negative offsets count from its end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def killed(work: Callable[[Path], None], folder: Path, draws: int, longest: float) -> Iterator[int]:
    """Starts ``work(folder)`` in a process and kills that at a random moment after its first sign of life, and again.

    ``work`` makes the file ``folder/alive`` when it starts and never ends by itself.
    """
    moments, alive = random.Random(0), folder / "alive"
    for draw in range(draws):
        alive.unlink(missing_ok=True)
        child = forked(lambda: work(folder))
        deadline = time.monotonic() + 60
        while not alive.exists():
            assert time.monotonic() < deadline, "the process shows no sign of life"
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the process ended by itself"
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, longest))
        assert killed_with(child) == signal.SIGKILL, "it was to be at work until it was killed"
        yield draw


def forked(work: Callable[[], None]) -> int:
    """The number of a new process that does this work and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads: the child starts none and waits for none
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def in_two_processes(work: Callable[[], None]) -> None:
    """Does this work in two processes that are launched as ``torchrun`` does it, and have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def one(rank: str) -> None:
        torch.set_num_threads(1)
        PartialState._reset_state()  # of a test before this one
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                          OMP_NUM_THREADS="1")  # accelerate warns where it is not set
        try:
            start_world("cpu")
            work()
            torch.distributed.destroy_process_group()
        except BaseException:
            traceback.print_exc()
            raise
        os._exit(0)

    children = [forked(functools.partial(one, rank)) for rank in "01"]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def killed_with(child: int) -> int:
    """The signal that ended a process which is killed now."""
    os.kill(child, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(child, 0)[1])
