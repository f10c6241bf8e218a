"""Runs that are stopped and go on, and runs in several processes, against one that is left alone."""

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from faults import forked, killed_with
from safetensors.torch import load_file
from test_comparison import KDP_FAST, LINEAR, figures, options
from tiny_checkpoint import DAMAGE, Bench, command, prune, pruned_well, same_bits, tree

import kdprune
from kdprune.cli import main
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
    outcome = pruned_well(bench, work, tmp_path / "out", "--ratio", 0.3)
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

    def child() -> None:
        status = 99
        try:
            os.dup2(errors.fileno(), 1), os.dup2(errors.fileno(), 2)
            run()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    return forked(child)


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
def test_prune_survives_kill_9(bench: Bench, tmp_path: Path, kills: int) -> None:
    draw = random.Random(kills)
    start = time.monotonic()
    pruned_well(bench, tmp_path / "measured", tmp_path / "whole", *DAMAGE)
    whole = time.monotonic() - start
    count, rounds = 0, 0
    while count < kills:
        rounds += 1
        work, out = tmp_path / f"work{rounds}", tmp_path / f"out{rounds}"
        run = functools.partial(pruned_well, bench, work, out, *DAMAGE)
        while count < kills and killed(run, draw.uniform(.05, 1) * whole):
            count += 1
            if out.exists():  # killed after the last rename: it is whole, and not written over unasked
                break
        if not out.exists():
            pruned_well(bench, work, out, *DAMAGE)
        assert same_bits(out, tmp_path / "whole")
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


def arguments(bench: Bench, out: Path, work: Path, *flags: object) -> list[str]:
    """What ``kdprune`` is asked for; batches hold 16 rows: with 40 rows both processes have some."""
    return [str(argument) for argument in (
        "prune", bench.model, "-o", out, "--work-dir", work, "--device", "cpu", *bench.flags, *DAMAGE,
        "--samples", 40, *flags)]


Start = Callable[[list[str], dict[str, str], Any, Any], int]  # arguments, variables, two files; the process's number


def launch(said: Path, port: int, start: Start, run: list[str]) -> list[int]:
    """Starts the command in two processes with the variables of ``torchrun``; what they say goes to ``said``."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = []
    for rank in "01":
        with (said / f"out{rank}").open("w") as out, (said / f"err{rank}").open("w") as err:
            children.append(start(run, {**common, "RANK": rank, "LOCAL_RANK": rank}, out, err))
    return children


def fork_command(arguments: list[str], variables: dict[str, str], out: Any, err: Any) -> int:
    """The command in a copy of this process, which has everything imported already."""

    def child() -> None:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        os.environ.update(variables)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 (until the process ends)
        PartialState._reset_state()  # of a test before this one
        status = main(arguments)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

    return forked(child)


def start_command(arguments: list[str], variables: dict[str, str], out: Any, err: Any) -> int:
    """The command in a new process."""
    files = [(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number, file in ((1, out), (2, err))]
    line = [sys.executable, "-m", "kdprune", *arguments]
    return os.posix_spawn(sys.executable, line, {**os.environ, **variables}, file_actions=files)


def exit_of(child: int, within: float = 240) -> int:
    """The status with which a process ends; one that has not ended within so many seconds is killed."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return -killed_with(child)


@pytest.mark.parametrize("start", [fork_command, pytest.param(start_command, marks=pytest.mark.slow)])
def test_two_processes_give_the_result_of_one(bench: Bench, tmp_path: Path, ports: int, start: Start) -> None:
    one = tmp_path / "one"
    assert command(*arguments(bench, one, "none")).status == 0
    children = launch(tmp_path, ports, start, arguments(bench, tmp_path / "two", tmp_path / "work"))
    assert [exit_of(child) for child in children] == [0, 0], (tmp_path / "err0").read_text()
    first, second = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5)
    found, single = Results.load(tmp_path / "two"), Results.load(one)
    assert found.perplexity.pruned == pytest.approx(single.perplexity.pruned, rel=1e-5)
    assert len(found.calibration.shares) == 2
    damages = [[value for row in one.analysis.pair_damage for value in row if value is not None]
               for one in (found, single)]
    assert damages[0] == pytest.approx(damages[1], rel=1e-4)  # measured by both on their rows; the same blocks follow
    assert found.blocks == single.blocks
    assert len(damages[0]) > 1
    assert sum(found.calibration.shares) == found.calibration.tokens == single.calibration.tokens
    assert min(found.calibration.shares) > 0
    assert ["wrote" in (tmp_path / f"out{rank}").read_text() for rank in "01"] == [True, False]  # one speaks for all


def test_one_process_dies_and_the_other_says_so(bench: Bench, tmp_path: Path, ports: int) -> None:
    work = tmp_path / "work"
    run = arguments(bench, tmp_path / "out", work)
    first, second = launch(tmp_path, ports, fork_command, [*run, "--refine-epochs", "4000"])
    deadline = time.monotonic() + 240
    while not list(work.glob("stages/analysis-*/tensors.safetensors")):
        assert time.monotonic() < deadline
        assert [os.waitpid(child, os.WNOHANG)[0] for child in (first, second)] == [0, 0], "they ended by themselves"
        time.sleep(0.02)
    assert killed_with(second) == signal.SIGKILL
    assert exit_of(first) == 2
    message = (tmp_path / "err0").read_text()
    assert "process 0 of 2 lost another one" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
    again = command(*run)
    assert again.status == 0, again.err
    assert "analyse                  found in the work directory" in again.out


def test_without_an_accelerator_memory_budgets_are_the_hosts(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(KDPruneError, match="got memory 'much', expected an amount such as 6GiB"):
        kdprune.prune(bench.model, host_memory="much")
    with pytest.raises(KDPruneError, match=r"got host memory 1MiB, expected more than [\d.]+ [MG]iB"):
        kdprune.prune(bench.model, host_memory="1MiB")
