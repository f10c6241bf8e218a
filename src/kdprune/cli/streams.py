"""Standard output and error on which no finished run fails: characters that they lack, readers that have gone."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

# How characters of the tables are spelled where the encoding lacks them; others become question marks.
SPELLED = str.maketrans({
    "−": "-", "–": "-", "…": "...", "±": "+-", "→": "->", "×": "x", "≥": ">=", "≤": "<=", "·": ".", "\u202f": " ",
    "\u2009": " ", "√": "sqrt "})  # fmt: skip


class Steady:
    """A text stream that spells what its encoding lacks, and after a closed pipe writes to nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError as error:  # nothing of the text was written
            known = text.translate(SPELLED).encode(error.encoding, "replace").decode(error.encoding)
            return int(self._stream.write(known))
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """What is left in the buffer goes nowhere, also when Python flushes it at the end. A full disk is an error."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere, own = os.open(os.devnull, os.O_WRONLY), self._stream.fileno()
            os.dup2(nowhere, own)
            os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise error


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Both streams are such for a while; where a process has none, there is one that goes nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (Steady(nowhere if stream is None else stream) for stream in (sys.stdout, sys.stderr))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
