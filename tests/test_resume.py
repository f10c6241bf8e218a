"""Runs that are stopped and go on, and runs in several processes, against one that is left alone."""

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_comparison import KDP_FAST, LINEAR, figures, options
from tiny_checkpoint import Bench, command, prune, pruned_well, same_bits, tree

import kdprune
from kdprune.comparison.compare import Comparison
from kdprune.errors import KDPruneError
from kdprune.report.results import Results


@pytest.fixture(autouse=True)
def _quick(one_thread: None, no_pictures: None) -> None:
    """Tiny matrices, many runs."""


@pytest.fixture(scope="module")
def finished(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run left behind: "work" and "out". Shared: do not change it."""
    folder = tmp_path_factory.mktemp("finished")
    pruned_well(bench, folder / "work", folder / "out")
    return folder


def test_a_second_run_finds_everything(bench: Bench, alone: Path, finished: Path, tmp_path: Path) -> None:
    second = pruned_well(bench, finished / "work", tmp_path / "two")
    assert second.out.count("found in the work directory") >= 3  # analysis, a block's fit, evaluation
    assert same_bits(finished / "out", tmp_path / "two")
    assert same_bits(finished / "out", alone)
    assert not (finished / "work" / "states").exists()  # bulky, and of no use once the model is written
    one, two = Results.load(finished / "out"), Results.load(tmp_path / "two")
    assert one.perplexity == two.perplexity
    assert one.fit == two.fit


def test_scores_serve_another_ratio(bench: Bench, tmp_path: Path) -> None:
    work, flags = tmp_path / "work", ("--calibration", bench.calibration, "--samples", 12, "--length", 32)
    assert command("analyze", bench.model, "-o", tmp_path / "scores", "--work-dir", work, *flags).status == 0
    for ratio in (0.2, 0.3):
        outcome = prune(bench, work, tmp_path / f"out{ratio}", "--ratio", ratio)
        assert outcome.status == 0, outcome.err
        assert "analyse                  found in the work directory" in outcome.out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(("--seed", 3), "seed 0 there, 3 here"), (("--samples", 10), "calibration .*12 rows of 32 there, .*10 rows"),
     (("--dtype", "bfloat16"), "dtype float32 there, bfloat16 here")],
)
def test_a_work_directory_of_another_run_is_refused(
    bench: Bench, finished: Path, tmp_path: Path, flags: tuple[object, ...], reason: str
) -> None:
    before = tree(finished / "work" / "stages")
    outcome = prune(bench, finished / "work", tmp_path / "two", *flags)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "of another run" in outcome.err
    assert re.search(reason, outcome.err), outcome.err
    assert tree(finished / "work" / "stages") == before


def test_a_work_directory_of_another_version_is_refused(bench: Bench, finished: Path, tmp_path: Path) -> None:
    work = shutil.copytree(finished / "work", tmp_path / "work")
    manifest = json.loads((work / "work.json").read_text())
    (work / "work.json").write_text(json.dumps({**manifest, "kdprune": "0.0.1"}))
    outcome = prune(bench, work, tmp_path / "two")
    assert outcome.status == 2
    assert f"kdprune 0.0.1 there, {kdprune.__version__} here" in outcome.err


@pytest.mark.parametrize(  # each kind of edit once: Drop, Substitute, Rewrite, Resize
    "method", ["shortgpt", "streamline", "laco", "slicegpt",
               *(pytest.param(name, marks=pytest.mark.slow) for name in ("llm-pruner", "replaceme"))])
def test_every_methods_result_is_kept(bench: Bench, tmp_path: Path, method: str) -> None:
    flags = ("--calibration", bench.calibration, "--heldout", bench.heldout, "--samples", 12, "--length", 32,
             "--method", method, *(("--epochs", 1) if method in ("streamline",) else ()))
    outcomes = [command("prune", bench.model, "-o", tmp_path / name, "--work-dir", tmp_path / "work", *flags)
                for name in ("one", "two")]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    assert "method                   found in the work directory" in outcomes[1].out
    assert same_bits(tmp_path / "one", tmp_path / "two")


def test_healing_is_kept(bench: Bench, tmp_path: Path) -> None:
    flags = ("--heal", "lm", "--heal-tokens", 200)
    outcomes = [prune(bench, tmp_path / "work", tmp_path / name, *flags) for name in ("one", "two")]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    assert "heal                     found in the work directory" in outcomes[1].out
    assert same_bits(tmp_path / "one", tmp_path / "two")


# --------------------------------------------------------------------------------------------- kill -9


def attempt(run: Callable[[], Any], errors: Any) -> int:
    """Starts a forked child; what it says goes into the file."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(errors.fileno(), 1), os.dup2(errors.fileno(), 2)
            run()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return child


def killed(run: Callable[[], Any], after: float) -> bool:
    """Runs in a child that is killed after so many seconds; whether it was still running."""
    with tempfile.TemporaryFile() as errors:
        child, deadline = attempt(run, errors), time.monotonic() + after
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                errors.seek(0)
                assert os.waitstatus_to_exitcode(status) == 0, errors.read().decode()
                return False
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return True


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_prune_survives_kill_9(bench: Bench, alone: Path, tmp_path: Path, kills: int) -> None:
    draw = random.Random(kills)
    start = time.monotonic()
    pruned_well(bench, tmp_path / "measured", tmp_path / "whole")
    whole = time.monotonic() - start
    count, rounds = 0, 0
    while count < kills:
        rounds += 1
        work, out = tmp_path / f"work{rounds}", tmp_path / f"out{rounds}"
        run = functools.partial(pruned_well, bench, work, out)
        while count < kills and killed(run, draw.uniform(.05, 1) * whole):
            count += 1
            if out.exists():  # killed after the last rename: it is whole, and not written over unasked
                break
        if not out.exists():
            pruned_well(bench, work, out)
        assert same_bits(out, alone)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_compare_survives_kill_9(bench: Bench, tmp_path: Path, kills: int) -> None:
    def compare(out: Path) -> Comparison:
        return kdprune.compare(str(bench.model), [LINEAR, KDP_FAST], seeds=2, output_dir=out, **options(bench))

    start, draw = time.monotonic(), random.Random(kills)
    expected, whole = figures(compare(tmp_path / "alone")), time.monotonic() - start
    count, rounds = 0, 0
    while count < kills:
        rounds += 1
        out = tmp_path / f"out{rounds}"
        while count < kills and killed(functools.partial(compare, out), draw.uniform(.05, 1) * whole):
            count += 1
        assert figures(compare(out)) == expected


# ----------------------------------------------------------------------------------- several processes


@pytest.fixture
def ports() -> int:
    """A free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(bench: Bench, out: Path, work: Path, port: int, *flags: object) -> list[subprocess.Popen[str]]:
    """The command in two processes, as ``torchrun`` starts them."""
    arguments = [sys.executable, "-m", "kdprune", "prune", bench.model, "-o", out, "--work-dir", work,
                 "--device", "cpu", *bench.flags, *flags]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [str(argument) for argument in arguments], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def test_two_processes_give_the_result_of_one(bench: Bench, alone: Path, tmp_path: Path, ports: int) -> None:
    # Batches hold 16 rows: with 40 rows both processes have some.
    flags = ("--samples", 40)
    one = tmp_path / "one"
    assert command("prune", bench.model, "-o", one, "--work-dir", "none", *bench.flags, *flags).status == 0
    processes = launch(bench, tmp_path / "two", tmp_path / "work", ports, *flags)
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    first, second = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5)
    found, single = Results.load(tmp_path / "two"), Results.load(one)
    assert found.perplexity.pruned == pytest.approx(single.perplexity.pruned, rel=1e-5)
    assert len(found.calibration.shares) == 2
    assert sum(found.calibration.shares) == found.calibration.tokens == single.calibration.tokens
    assert min(found.calibration.shares) > 0
    assert "wrote" not in ends[1][0]  # the first process speaks for all


def test_one_process_dies_and_the_other_says_so(bench: Bench, tmp_path: Path, ports: int) -> None:
    flags = ("--samples", 40, "--refine-epochs", 4000)
    work = tmp_path / "work"
    processes = launch(bench, tmp_path / "out", work, ports, *flags)
    deadline = time.monotonic() + 240
    while not list(work.glob("stages/analysis-*/tensors.safetensors")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.1)
    processes[1].kill()
    _, message = processes[0].communicate(timeout=240)
    processes[1].communicate()
    assert processes[0].returncode == 2
    assert "process 0 of 2 lost another one" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
    again = command("prune", bench.model, "-o", tmp_path / "out", "--work-dir", work, "--device", "cpu", *bench.flags,
                    "--samples", 40)
    assert again.status == 0, again.err
    assert "analyse                  found in the work directory" in again.out


def test_without_an_accelerator_memory_budgets_are_the_hosts(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(KDPruneError, match="got memory 'much', expected an amount such as 6GiB"):
        kdprune.prune(bench.model, host_memory="much")
    with pytest.raises(KDPruneError, match=r"got host memory 1MiB, expected more than [\d.]+ [MG]iB"):
        kdprune.prune(bench.model, host_memory="1MiB")
