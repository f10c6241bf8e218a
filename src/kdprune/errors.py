"""The one exception users meet."""


class KDPruneError(ValueError):
    """A mistake in what the user gave, said in one line: got X, expected Y, do Z.

    The command line prints the message after ``kdprune: error:`` and exits with status 2.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an exception as one line of at most `most` characters; its kind where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"
