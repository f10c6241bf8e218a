"""Files and directories → documents. What a name ends in says how a file is read, in any case, compressed or not.

Every reader is a stream of pieces ``(text, ends)``: ``ends`` says that a document ends with this piece, so that one
long document can be read within a bounded memory.
"""

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from kdprune.data.columns import Columns
from kdprune.errors import KDPruneError, one_line

Piece = tuple[str, bool]

SEPARATOR = "<|endoftext|>"  # alone on a line, it ends a document of a .txt file
PIECE_CHARACTERS = 2**18  # a longer document is read in pieces of about this size
LONGEST_CELL = 2**31 - 1  # of a .csv file; by default Python's reader takes 128 KiB
ENCODING = "utf-8-sig"  # UTF-8, with the mark that Windows tools put in front of it or without
OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What a data set that was written by ``save_to_disk`` has in its folder.
SAVED = ("state.json", "dataset_dict.json")


def read_path(path: Path, columns: Columns) -> Iterator[Piece]:
    """The documents of a file, a directory of files, or a data set saved to disk.

    Raises:
        KDPruneError: no text is found there, or it cannot be read.
    """
    if not path.is_dir():
        return _read_file(path, columns)
    return _read_saved(path, columns) if any((path / name).is_file() for name in SAVED) else _read_folder(path, columns)


def named_as_text(name: str) -> bool:
    """Whether a file of this name can be read."""
    return _kind(Path(name)) in READERS


def is_plain_text(path: Path) -> bool:
    """Whether it is a file without columns."""
    return path.is_file() and _kind(path) == ".txt"


def read_rows(rows: Iterable[Any], columns: Columns, name: str) -> Iterator[Piece]:
    """The documents of rows: texts, or mappings of columns; nulls are left out and counted."""
    for number, row in enumerate(rows, 1):
        if (text := columns.text(row, f"{name} row {number}")) is not None:
            yield text, True


def first_split(found: Any) -> Any:
    """The data set itself, or of several splits the training one, else the first."""
    if not isinstance(found, dict):
        return found
    if not found:
        raise KDPruneError("got a data set without splits, expected rows in it")
    return found["train"] if "train" in found else next(iter(found.values()))


def _read_folder(path: Path, columns: Columns) -> Iterator[Piece]:
    found = [file for file in sorted(path.rglob("*")) if named_as_text(file.name) and file.is_file()]
    found = [file for file in found if not any(s.startswith(".") for s in file.relative_to(path).parts)]
    # Data sets come with their description beside them: tables and JSON count where there is nothing else.
    found = [file for file in found if _kind(file) in PLAIN] or found
    if not found:
        raise KDPruneError(f"got directory {path} without text, expected {', '.join(READERS)} files in it")
    for file in found:
        yield from _read_file(file, columns)


def _read_saved(path: Path, columns: Columns) -> Iterator[Piece]:
    import datasets  # two seconds to import: only where such a data set is there

    try:
        rows = first_split(datasets.load_from_disk(str(path)))
    except KDPruneError:
        raise
    except Exception as error:  # Arrow, JSON and file errors, by kind of damage
        raise KDPruneError(f"cannot read the data set in {path} ({one_line(error)}); save it again") from error
    yield from read_rows(rows, columns, str(path))


def _read_file(path: Path, columns: Columns) -> Iterator[Piece]:
    kind = _kind(path)
    if kind not in READERS:
        raise KDPruneError(f"got file {path}, expected one of {', '.join(READERS)}; rename or convert it")
    try:
        yield from READERS[kind](path, columns)
    except UnicodeDecodeError as error:
        raise KDPruneError(f"got {path} with {error.reason}, expected UTF-8; save it as UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, pyarrow.ArrowException) as error:
        raise KDPruneError(f"cannot read {path}: {one_line(error)}") from error


def _kind(path: Path) -> str:
    """What a file is by its name: ".jsonl" of "ROWS.JSONL.GZ"."""
    if path.suffix.lower() in OPENERS:
        path = path.with_suffix("")
        return "" if path.suffix.lower() == ".parquet" else path.suffix.lower()  # is compressed within, and seeks
    return path.suffix.lower()


def _opened(path: Path, newline: str | None = None) -> IO[str]:
    return OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding=ENCODING, newline=newline)


def _read_txt(path: Path, columns: Columns) -> Iterator[Piece]:
    lines: list[str] = []
    size = 0
    with _opened(path) as file:
        for line in iter(lambda: file.readline(PIECE_CHARACTERS), ""):  # some texts are one line
            ends = line.strip() == SEPARATOR
            if not ends:
                lines.append(line)
                size += len(line)
            if ends or size > PIECE_CHARACTERS:
                yield "".join(lines), ends
                lines, size = [], 0
    yield "".join(lines), True


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Piece]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: of a number of thousands of digits, too
                raise KDPruneError(f"got invalid JSON in {where}, expected an object") from error
            if (text := columns.text(row, where)) is not None:
                yield text, True


def _read_json(path: Path, columns: Columns) -> Iterator[Piece]:
    """One array of rows, or one row; many files of this name hold a row a line."""
    with _opened(path) as file:
        content = file.read()
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise KDPruneError(f"got invalid JSON in {path} line {error.lineno}, expected an array of rows") from error
        yield from _read_jsonl(path, columns)
        return
    except RecursionError as error:
        raise KDPruneError(f"got JSON nested too deeply in {path}, expected an array of rows") from error
    except ValueError as error:
        raise KDPruneError(f"got JSON in {path} that cannot be read ({one_line(error)}), expected an array of rows"
                           ) from error
    yield from read_rows(rows if isinstance(rows, list) else [rows], columns, str(path))


def _read_table(path: Path, columns: Columns) -> Iterator[Piece]:
    """A table with the names of its columns in the first line; an empty cell is a null."""
    csv.field_size_limit(LONGEST_CELL)
    with _opened(path, newline="") as file:
        table = csv.DictReader(file, delimiter="\t" if _kind(path) == ".tsv" else ",")
        names = columns.names(table.fieldnames or (), str(path))
        for row in table:
            text = columns.text({name: row[name] or None for name in names}, f"{path} line {table.line_num}")
            if text is not None:
                yield text, True


def _read_parquet(path: Path, columns: Columns) -> Iterator[Piece]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = list(columns.names(file.schema_arrow.names, str(path)))
        rows = (row for batch in file.iter_batches(batch_size=256, columns=names) for row in batch.to_pylist())
        yield from read_rows(rows, columns, str(path))


READERS: dict[str, Callable[[Path, Columns], Iterator[Piece]]] = {
    ".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet, ".json": _read_json, ".csv": _read_table,
    ".tsv": _read_table,
}
PLAIN = (".txt", ".jsonl", ".parquet")
