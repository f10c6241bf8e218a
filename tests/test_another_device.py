"""What runs on an accelerator, on ones that are none (other_device.py): no tensor meets one of another device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration
from methods import FORMS
from tiny_checkpoint import Bench

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="torch has no such devices")
@pytest.mark.parametrize("families", [
    ["llama3"], pytest.param(["gpt2", "gemma3", "falcon", "opt", "bloom", "mixtral"], marks=pytest.mark.slow)])
def test_all_that_runs_there_stays_there(families: list[str], bench: Bench, tmp_path: Path) -> None:
    rows = [{"question": f"what is {number}", "support": "" if number % 2 else "a number", "correct_answer": "four",
             **{f"distractor{other}": word for other, word in enumerate(("one", "two", "three"), 1)}}
            for number in range(9)]
    (tmp_path / "sciq.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    script = HERE / "on_another_device.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(bench.model), str(tmp_path), *families],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    if families == ["llama3"]:
        runs = {"run kdp", "run lora", "run kdp, spread", "tasks", "sums", "kdp of llama3, spread"}
        assert {f"{form} of llama3, moved" for form in FORMS} | runs <= found.keys()
    off = {name: value for name, value in found.items() if not value[0].isdigit() or float(value) > 1e-3}
    assert not off
