"""Text sources → documents: files, directories, data sets on the Hugging Face hub and lists of strings.

Every source is read as a stream of pieces ``(text, ends)``: ``ends`` says that a document ends with this
piece, so one long document can be read within a bounded memory.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow
import pyarrow.parquet
from torch import Tensor

from kdprune.errors import KDPruneError, one_line
from kdprune.runtime.machine import quiet_libraries

Piece = tuple[str, bool]

SEPARATOR = "<|endoftext|>"  # alone on a line, it ends a document of a .txt file
PIECE_CHARACTERS = 2**18  # a longer document is read in pieces of about this size
FIELD = "text"  # the field of .jsonl, column of .parquet and of hub data sets that holds the text
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SHUFFLE_BUFFER = 1000  # documents of a hub data set that are shuffled among each other


BUNDLED_MODEL = Path(str(files("kdprune").joinpath("bundled", "model")))  # the reference model of the package


def bundled_calibration() -> Path:
    """Path of the calibration text that travels with the package."""
    return Path(str(files("kdprune").joinpath("bundled", "calibration.txt")))


def bundled_heldout() -> Path:
    """Path of the held-out text that travels with the package."""
    return Path(str(files("kdprune").joinpath("bundled", "heldout.txt")))


def parse_weighted(values: Sequence[str]) -> str | list[tuple[str, float]]:
    """``["a.txt=0.7", "b.jsonl=0.3"]`` → weighted sources; a single value without a weight stays a string.

    A value without ``=number`` has weight 1; a file whose own name ends in ``=number`` is taken as that file.
    """
    pairs: list[tuple[str, float]] = []
    for value in values:
        name, sign, weight = value.rpartition("=")
        try:
            given = sign == "=" and not Path(value).exists()
            pairs.append((name, float(weight)) if given else (value, 1.0))
        except ValueError:
            pairs.append((value, 1.0))
    return pairs[0][0] if len(pairs) == 1 else pairs


def parse_named(values: Sequence[str]) -> str | dict[str, str]:
    """``["a.txt", "chat=b.jsonl"]`` → {"a.txt": "a.txt", "chat": "b.jsonl"}; a single value stays a string.

    A file whose own name holds ``=`` is taken as that file.
    """
    if len(values) == 1:
        return values[0]
    pairs = [(value, "", value) if Path(value).exists() else value.partition("=") for value in values]
    return {name: source or name for name, _, source in pairs}


def is_named(source: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether these are several texts by name, not one text, token ids or a mixture by weight."""
    return isinstance(source, Mapping) and "input_ids" not in source and not any(
        isinstance(weight, int | float) for weight in source.values())


def weighted_sources(source: Any) -> list[tuple[Any, float]]:
    """Any text source as a list of (source, share) whose shares sum to one.

    A mapping {source: weight} or a list of pairs (source, weight) is a mixture; anything else is one source.
    Raises KDPruneError for a weight that is not a positive finite number, and for an empty mixture.
    """
    if isinstance(source, Mapping):
        pairs = list(source.items())
    elif isinstance(source, list | tuple) and source and all(_is_pair(entry) for entry in source):
        pairs = [(entry[0], entry[1]) for entry in source]
    else:
        return [(source, 1.0)]
    if not pairs:
        raise KDPruneError(
            "got no text source, expected one or more; give a file, a directory or a hub data set"
        )
    for name, weight in pairs:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight > 0):
            raise KDPruneError(f"got weight {weight!r} for {name}, expected a positive number such as 0.5")
    total = sum(weight for _, weight in pairs)
    return [(name, weight / total) for name, weight in pairs]


def describe(source: Any) -> str:
    """A short name of one text source, for tables and reports."""
    if isinstance(source, Path):
        return source.name
    if isinstance(source, str):
        return Path(source).name if Path(source).exists() else source
    return f"{len(source)} texts"


def read_pieces(source: Any, seed: int) -> Iterator[Piece]:
    """Stream one source (path, hub data set ``org/name[:config]``, sequence of strings) as pieces.

    ``seed`` shuffles the documents of a hub data set; files are read in order.
    Raises KDPruneError when the source does not exist, cannot be reached, or is not what its name says.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return _read_directory(path)
        if path.exists():
            return _read_file(path)
        if isinstance(source, str) and HUB_NAME.fullmatch(source) and path.suffix not in READERS:
            return _read_hub(source, seed)
        raise KDPruneError(
            f"got {str(source)!r}, which does not exist; expected a .txt, .jsonl or .parquet file, "
            "a directory of them, or a hub data set org/name[:config]"
        )
    if isinstance(source, Sequence):
        return _read_strings(source)
    raise KDPruneError(
        f"got {type(source).__name__}, expected a file, a directory, a hub data set, a list of strings "
        "or token ids"
    )


def check_source(source: Any) -> None:
    """Opens what a text source names, so that it is refused before any work; token ids and None pass.

    Of every part the first piece is read, of a hub data set nothing: only its name has to be one.
    Raises KDPruneError as :func:`read_pieces` does.
    """
    if source is None or isinstance(source, Tensor) or (isinstance(source, Mapping) and "input_ids" in source):
        return
    for part, _ in weighted_sources(source):
        pieces = read_pieces(part, seed=0)
        if not isinstance(part, str) or Path(part).exists():
            next(pieces, None)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str | Path)


def _read_strings(texts: Sequence[Any]) -> Iterator[Piece]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise KDPruneError(
                f"got {type(text).__name__} at index {index} of the texts, expected a string; "
                "give token ids as one LongTensor (N, T)"
            )
        yield text, True


def _read_directory(path: Path) -> Iterator[Piece]:
    found = [file for file in sorted(path.rglob("*")) if file.suffix in READERS and file.is_file()]
    found = [file for file in found if not any(s.startswith(".") for s in file.relative_to(path).parts)]
    if not found:
        raise KDPruneError(f"got directory {path} without text, expected {', '.join(READERS)} files in it")
    for file in found:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[Piece]:
    if path.suffix not in READERS:
        raise KDPruneError(f"got file {path}, expected one of {', '.join(READERS)}; rename or convert it")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise KDPruneError(f"got {path} with {error.reason}, expected UTF-8; save it as UTF-8") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise KDPruneError(f"cannot read {path}: {one_line(error)}") from error


def _read_txt(path: Path) -> Iterator[Piece]:
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            ends = line.strip() == SEPARATOR
            if not ends:
                lines.append(line)
                size += len(line)
            if ends or size > PIECE_CHARACTERS:
                yield "".join(lines), ends
                lines, size = [], 0
    yield "".join(lines), True


def _read_jsonl(path: Path) -> Iterator[Piece]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise KDPruneError(f"got invalid JSON in {path} line {number}, expected an object") from error
            yield _field(row, f"{path} line {number}"), True


def _read_parquet(path: Path) -> Iterator[Piece]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if FIELD not in names:
            raise KDPruneError(f"got columns {', '.join(names)} in {path}, expected {FIELD!r}; rename one")
        for batch in file.iter_batches(batch_size=256, columns=[FIELD]):
            for row in batch.to_pylist():
                yield _field(row, str(path)), True


READERS: dict[str, Callable[[Path], Iterator[Piece]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, seed: int) -> Iterator[Piece]:
    import datasets  # two seconds to import: only where a hub data set is asked for

    repository, _, config = name.partition(":")
    try:
        with quiet_libraries():
            splits = datasets.load_dataset(repository, config or None, streaming=True)
            split = splits["train"] if "train" in splits else next(iter(splits.values()))
            rows: Iterator[Any] = iter(split.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
        while True:
            with quiet_libraries():
                row = next(rows, None)
            if row is None:
                return
            yield _field(row, name), True
    except KDPruneError:
        raise
    except Exception as error:  # the hub, its client and the loaders raise many kinds
        raise KDPruneError(
            f"cannot stream {name!r} from the Hugging Face hub ({one_line(error)}); "
            "check the name and the network, or give a local .txt, .jsonl or .parquet file"
        ) from error


def _field(row: Any, where: str) -> str:
    if isinstance(row, dict) and isinstance(row.get(FIELD), str):
        return str(row[FIELD])
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise KDPruneError(f"got {found or 'nothing'} in {where}, expected a field {FIELD!r} that is a string")
