"""The exceptions that users meet: one, and what lies below it for whoever wants to tell them apart."""


class KDPruneError(ValueError):
    """A mistake in what the user gave, said in one line: got X, expected Y, do Z.

    The command line prints the message after ``kdprune: error:`` and exits with status 2.
    """


class DiskError(KDPruneError):
    """The disk is full, or refuses to be written or read; nothing half-written is left behind."""


class Diverged(KDPruneError):
    """A fit's loss or gradient stayed NaN or infinite at every rate that was tried."""


class ProcessLost(KDPruneError):
    """Another process of the run is gone; the same command goes on from the finished stages."""


def shortened(name: object, most: int = 200, quoted: bool = True) -> str:
    """A name as a message shows it, quoted or not; a text that was taken for one is cut."""
    text = str(name)
    if len(text) > most:
        return f"{text[:40]!r}… ({len(text):,} characters)"
    return repr(text) if quoted else text


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an exception as one line of at most `most` characters; its kind where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"
