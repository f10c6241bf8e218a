"""Ctrl-C while the libraries are imported, which takes seconds: one line, as at any other moment.

Knows no library, so that it is there before they are.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

INTERRUPTED = 130  # exit status, as a shell has it


def stop_in_one_line() -> None:
    """Where this process is the command line, an interrupt ends it at once and without a traceback.

    Libraries turn the exception into errors of their own, or swallow it, and nothing is open yet that has to be closed.
    """
    if (is_command() and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        signal.signal(signal.SIGINT, _stop)


def raise_again() -> None:
    """From here on an interrupt is the exception that it is elsewhere."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_command() -> bool:
    """Whether this process was started as ``kdprune`` or ``python -m kdprune``."""
    name = Path(sys.argv[0]).name.removesuffix(".exe") if sys.argv else ""
    started = sys.orig_argv
    return name == "kdprune" or (name == "-m" and started[started.index("-m") + 1:][:1] == ["kdprune"])


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"kdprune: error: interrupted\n")
    os._exit(INTERRUPTED)
