"""What is printed never makes a finished run fail; an interrupt is one line, also while libraries are imported."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import forked
from tiny_checkpoint import Bench, no_drawing

from kdprune.cli import main
from kdprune.runtime.interrupts import is_command, raise_again, stop_in_one_line

pytestmark = pytest.mark.usefixtures("one_thread")


def printed(arguments: list[object], stream: Any) -> int:
    with contextlib.redirect_stdout(stream):
        return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_characters_that_an_encoding_lacks_are_spelled(encoding: str, bench: Bench) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert printed(["plan", bench.model, "--ratio", 0.2], stream) == 0
    text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert re.search(r"parameters .*[−-]\d" if encoding == "utf-8" else r"parameters .* -\d", text)
    assert ("−" in text) is (encoding == "utf-8")


@no_drawing()
def test_a_run_in_another_encoding_succeeds(bench: Bench, tmp_path: Path) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    run = ["prune", bench.model, "-o", tmp_path / "out", "--work-dir", "none", "--method", "shortgpt", "--ratio", 0.1,
           "--protect", 0, "--calibration", bench.calibration, "--heldout", bench.heldout, "--samples", 12, "--length",
           32]
    assert printed(run, stream) == 0
    assert b"wrote" in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def broken() -> Iterator[Any]:
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream


@pytest.mark.parametrize("arguments", [["--version"], ["prune", "--help"], ["plan", "--ratio", "0.2"]])
def test_a_closed_pipe_is_no_failure(arguments: list[object], broken: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(arguments, broken) == 0
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_told_and_a_missing_stream_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    if Path("/dev/full").exists():
        with open("/dev/full", "w", encoding="utf-8") as full:
            assert printed(["--version"], full) == 2
        assert capsys.readouterr().err == "kdprune: error: No space left on device\n"
    assert printed(["--version"], None) == 0


@pytest.mark.parametrize(("name", "started", "expected"), [
    ("/usr/bin/kdprune", ["python", "/usr/bin/kdprune"], True), ("-m", ["python", "-m", "kdprune", "plan"], True),
    ("-m", ["python", "-W", "error", "-m", "pytest"], False), ("", ["python"], False), ("-c", ["python", "-c"], False),
])
def test_who_is_the_command(name: str, started: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(sys, "orig_argv", started)
    assert is_command() is expected


def ended(work: Callable[[], None]) -> tuple[int, bytes]:
    """Exit status and standard error of a process that does this work."""
    reader, writer = os.pipe()

    def run() -> None:
        os.dup2(writer, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["kdprune"]
        work()

    child = forked(run)
    os.close(writer)
    with open(reader, "rb") as stream:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stream.read()


def test_an_interrupt_while_libraries_are_imported() -> None:
    def work() -> None:
        stop_in_one_line()
        with contextlib.suppress(BaseException):  # as libraries do
            os.kill(os.getpid(), signal.SIGINT)

    assert ended(work) == (130, b"kdprune: error: interrupted\n")


def test_main_takes_over() -> None:
    def work() -> None:
        stop_in_one_line()
        raise_again()
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            os._exit(7)

    assert ended(work) == (7, b"")
