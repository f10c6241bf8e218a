"""Two processes give the result of one, whatever the method. The default's own test is in test_resume.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import Bench

HERE = Path(__file__).parent


def start(bench: Bench, file: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "every_method.py"), str(bench.model), str(file)],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_every_method_gives_the_same_in_two_processes(bench: Bench, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [start(bench, tmp_path / "one"),
                 *(start(bench, tmp_path / "two", RANK=rank, LOCAL_RANK=rank, **address) for rank in "01")]
    ends = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    alone = sorted(tmp_path.glob("one-*.safetensors"))
    assert len(alone) > 10
    for file in alone:
        one, two = load_file(file), load_file(file.with_name(file.name.replace("one-", "two-")))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)
