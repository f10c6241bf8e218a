"""What the pages of the results book share: a record kept unit by unit, the command line, the model a page is about."""

import argparse
import fcntl
import json
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedModel

from kdprune.data import TokenSet, bundled_calibration, bundled_heldout, load_stream, load_tokens
from kdprune.evaluation.models import longest_context
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.session import BUNDLED_MODEL, LONGEST_ROW

RESULTS = Path(__file__).parent.parent / "docs" / "results"
BUNDLED = "bundled"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Record = dict[str, Any]
Key = Callable[[Record], Hashable]


def load(file: Path, key: Key) -> dict[Hashable, Record]:
    """The records of a file by unit, in the file's order; none if there is no file yet."""
    return {key(record): record for record in json.loads(file.read_text())} if file.is_file() else {}


def keep(record: Record, file: Path, key: Key, order: Callable[[Record], Any] | None = None) -> None:
    """Adds a record to the file, which another run may be writing too; one of the same unit is replaced.

    Args:
        order: what the file's records are sorted by; None: as they came.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)  # the lock leaves no file behind
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = list((load(file, key) | {key(record): record}).values())
        part = file.with_suffix(".part")
        part.write_text(json.dumps(sorted(records, key=order) if order else records, indent=1) + "\n")
        part.replace(file)
    finally:
        os.close(folder)


def compact(value: Any, digits: int = 5) -> Any:
    """Numbers rounded to so many significant digits, in lists and dicts too: a record is for reading."""
    if isinstance(value, dict):
        return {name: compact(entry, digits) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [compact(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def arguments(about: str | None, stem: str) -> argparse.ArgumentParser:
    """The command line all these pages have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="directory of the model (the bundled one)")
    parser.add_argument("--name", help=f"what the page calls it ({BUNDLED}, or the directory's name)")
    parser.add_argument("--text", type=Path, default=bundled_calibration(), help="calibration text (the bundled one)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, into another file, to try it")
    parser.add_argument("--render", action="store_true", help="only rewrite the page from the recorded results")
    parser.add_argument("--file", type=Path, help=f"the record (docs/results/{stem}.json)")
    return parser


def make_page(
    parser: argparse.ArgumentParser, stem: str, run: Callable[[argparse.Namespace], None],
    render: Callable[[Path], None],
) -> None:
    """Measures what is missing and writes the page: the program behind every page; fills in ``name`` and ``file``."""
    options = parser.parse_args()
    if options.name is None:
        options.name = BUNDLED if options.model == BUNDLED_MODEL else options.model.resolve().name
    if options.file is None:
        options.file = Path(f"{stem}-quick.json") if options.quick else RESULTS / f"{stem}.json"
    if not options.render:
        run(options)
    render(options.file)


class Subject:
    """A model with its tokenizer, opened as stored; texts become tokens on demand.

    Args:
        path: directory of the model. text: calibration text.
    """

    def __init__(self, path: Path, text: Path):
        self.path, self.text = path, text
        self.model: PreTrainedModel = load_model(path, device="cpu")
        self.tokenizer = load_tokenizer(path)

    def rows(self, tokens: int, seed: int) -> TokenSet:
        """Shuffled calibration rows of about so many tokens (fewer where the text has fewer), 512 in a row or fewer."""
        length = min(LONGEST_ROW, longest_context(self.model) or LONGEST_ROW)
        return load_tokens(
            self.text, self.tokenizer, samples=max(1, tokens // length), length=length, seed=seed,
            vocabulary=self.model.config.vocab_size)

    def held_out(self, tokens: int) -> TokenSet:
        """The first so many tokens of the bundled held-out text, as one row."""
        return load_stream(
            bundled_heldout(), self.tokenizer, limit=tokens, vocabulary=self.model.config.vocab_size)


def by_model(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by the model's name, in the file's order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["model"], []).append(record)
    return found


def table(titles: str, rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; titles separated by " | "."""
    head = [f"| {titles} |", "|---" * len(titles.split(" | ")) + "|"]
    return "\n".join([*head, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def write_page(file: Path, page: str, figure: Figure) -> None:
    """Page and plot beside the record; a file of notes beside it is appended."""
    notes = file.with_name(f"{file.stem}-notes.md")
    file.with_suffix(".md").write_text(page + ("\n" + notes.read_text() if notes.is_file() else ""))
    figure.savefig(file.with_suffix(".svg"))
