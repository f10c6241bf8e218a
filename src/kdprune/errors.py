"""The one exception users meet."""


class KDPruneError(ValueError):
    """A mistake in what the user gave, said in one line: got X, expected Y, do Z.

    The command line prints the message after ``kdprune: error:`` and exits with status 2.
    """
