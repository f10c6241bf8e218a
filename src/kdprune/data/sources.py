"""Text sources → documents: files, directories, data sets in memory or on the Hugging Face hub, lists of strings.

Every source is read as a stream of pieces ``(text, ends)``: ``ends`` says that a document ends with this
piece, so one long document can be read within a bounded memory.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from kdprune.data.columns import Columns
from kdprune.data.readers import READERS, Piece, first_split, is_plain_text, named_as_text, read_path, read_rows
from kdprune.errors import KDPruneError, one_line, shortened
from kdprune.runtime.machine import quiet_libraries
from kdprune.store.files import is_there

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SHUFFLE_BUFFER = 1000  # documents of a hub data set that are shuffled among each other


BUNDLED_MODEL = Path(str(files("kdprune").joinpath("bundled", "model")))  # the reference model of the package


def bundled_calibration() -> Path:
    """Path of the calibration text that travels with the package."""
    return Path(str(files("kdprune").joinpath("bundled", "calibration.txt")))


def bundled_heldout() -> Path:
    """Path of the held-out text that travels with the package."""
    return Path(str(files("kdprune").joinpath("bundled", "heldout.txt")))


@dataclass(frozen=True)
class InColumn:
    """A source whose rows hold their text in the column ``field``; a mixture holds it there in every part."""

    source: Any
    field: str


def in_column(source: Any, field: str | None) -> Any:
    """The source with the column of its text, where one is named; of several texts each."""
    if is_named(source):
        return {name: in_column(text, field) for name, text in source.items()}
    return source if source is None or field is None or isinstance(source, InColumn) else InColumn(source, field)


def has_columns(source: Any) -> bool:
    """Whether any part of a source may have columns, which token ids and files of plain text have not."""
    if is_named(source):
        return any(map(has_columns, source.values()))
    if source is None or gives_ids(source):
        return False
    return not all(isinstance(part, str | Path) and is_plain_text(Path(part)) for part, _ in weighted_sources(source))


def as_given(source: Any) -> Any:
    """The source without what is said of its columns."""
    return source.source if isinstance(source, InColumn) else source


def gives_ids(source: Any) -> bool:
    """Whether a source is token ids: a tensor, or a mapping with input_ids."""
    return isinstance(source, Tensor) or (isinstance(source, Mapping) and "input_ids" in source)


def parse_weighted(values: Sequence[str]) -> str | list[tuple[str, float]]:
    """``["a.txt=0.7", "b.jsonl=0.3"]`` → weighted sources; a single value without a weight stays a string.

    A value without ``=number`` has weight 1; a file whose own name ends in ``=number`` is taken as that file.
    """
    pairs: list[tuple[str, float]] = []
    for value in values:
        name, sign, weight = value.rpartition("=")
        try:
            given = sign == "=" and not is_there(value)
            pairs.append((name, float(weight)) if given else (value, 1.0))
        except ValueError:
            pairs.append((value, 1.0))
    weighted_sources(pairs)  # a weight that is none, of a single text too
    return pairs[0][0] if len(pairs) == 1 else pairs


def parse_named(values: Sequence[str]) -> str | dict[str, str]:
    """``["a.txt", "chat=b.jsonl"]`` → {"a.txt": "a.txt", "chat": "b.jsonl"}; one value without a name stays a string.

    A file whose own name holds ``=`` is taken as that file.
    """
    if len(values) == 1 and (is_there(values[0]) or "=" not in values[0]):
        return values[0]
    pairs = [(value, "", value) if is_there(value) else value.partition("=") for value in values]
    names = [name for name, _, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise KDPruneError(f"got two texts by the name {twice[0]}, expected a name for each: NAME=TEXT")
    return {name: source or name for name, _, source in pairs}


def is_named(source: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether these are several texts by name, not one text, token ids or a mixture by weight."""
    return isinstance(source, Mapping) and not gives_ids(source) and not _is_data_set(source) and not any(
        isinstance(weight, int | float) for weight in source.values())


def weighted_sources(source: Any) -> list[tuple[Any, float]]:
    """Any text source as a list of (source, share) whose shares sum to one.

    A mapping {source: weight} or a list of pairs (source, weight) is a mixture; anything else is one source.
    Raises KDPruneError for a weight that is not a positive finite number, and for an empty mixture.
    """
    if isinstance(source, InColumn):
        return [(InColumn(part, source.field), share) for part, share in weighted_sources(source.source)]
    if _is_data_set(source):  # several splits are a mapping too
        return [(source, 1.0)]
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


def local_paths(source: Any) -> list[Path]:
    """The files and directories that a text source names, as far as they are there."""
    if source is None or gives_ids(as_given(source)):
        return []
    if is_named(source):
        return [path for text in source.values() for path in local_paths(text)]
    parts = [as_given(part) for part, _ in weighted_sources(source)]
    return [Path(part) for part in parts if isinstance(part, str | Path) and is_there(part)]


def describe(source: Any) -> str:
    """A short name of one text source, for tables and reports."""
    source = as_given(source)
    if isinstance(source, Path):
        return source.name
    if isinstance(source, str):
        return Path(source).name if is_there(source) else source
    return "data set" if _is_data_set(source) else f"{len(source)} texts"


def read_pieces(source: Any, seed: int, columns: Columns | None = None) -> Iterator[Piece]:
    """Stream one source as pieces: a path, a hub data set ``org/name[:config]``, a data set of ``datasets``, a sequence
    of strings or of rows.

    ``seed`` shuffles the documents of a hub data set; files are read in order. ``columns`` takes the text out of rows.
    Raises KDPruneError when the source does not exist, cannot be reached, or is not what its name says.
    """
    columns = columns or Columns()
    if isinstance(source, InColumn):
        source, columns.field = source.source, source.field
    if isinstance(source, str | Path):
        if is_there(source):
            return read_path(Path(source), columns)
        if isinstance(source, str) and HUB_NAME.fullmatch(source) and not named_as_text(source):
            return _read_hub(source, seed, columns)
        raise KDPruneError(
            f"got {shortened(source)}, which does not exist; expected a file ({', '.join(READERS)}), "
            "a directory of them, or a hub data set org/name[:config]; texts themselves go into a list"
        )
    if _is_data_set(source):
        return read_rows(first_split(source), columns, "the data set")
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        return _read_strings(source, columns)
    raise KDPruneError(
        f"got {type(source).__name__}, expected a file, a directory, a hub data set, a list of strings "
        "or token ids"
    )


def check_source(source: Any) -> None:
    """Opens what a text source names, so that it is refused before any work; token ids and None pass.

    Of every part the first piece is read, of a hub data set nothing: only its name has to be one.
    Raises KDPruneError as :func:`read_pieces` does.
    """
    if source is None or gives_ids(as_given(source)):
        return
    for part, _ in weighted_sources(source):
        pieces, named = read_pieces(part, seed=0), as_given(part)
        if not isinstance(named, str) or is_there(named):
            next(pieces, None)


def _is_data_set(source: Any) -> bool:
    """Whether it is a data set of ``datasets``, which is imported where somebody has one."""
    found = sys.modules.get("datasets")
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return found is not None and isinstance(source, tuple(getattr(found, kind) for kind in kinds))


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str | Path)


def _read_strings(texts: Sequence[Any], columns: Columns) -> Iterator[Piece]:
    for index, text in enumerate(texts):
        if text is not None and not isinstance(text, str | Mapping):
            raise KDPruneError(
                f"got {type(text).__name__} at index {index} of the texts, expected a string; "
                "give token ids as one LongTensor (N, T)"
            )
        found = columns.text(text, f"the texts at index {index}")
        if found is not None:
            yield found, True


def _read_hub(name: str, seed: int, columns: Columns) -> Iterator[Piece]:
    import datasets  # two seconds to import: only where a hub data set is asked for

    repository, _, config = name.partition(":")
    try:
        with quiet_libraries():
            splits = datasets.load_dataset(repository, config or None, streaming=True)
            rows: Iterator[Any] = iter(first_split(splits).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
        while True:
            with quiet_libraries():
                row = next(rows, None)
            if row is None:
                return
            if (text := columns.text(row, name)) is not None:
                yield text, True
    except KDPruneError:
        raise
    except Exception as error:  # the hub, its client and the loaders raise many kinds
        raise KDPruneError(
            f"cannot stream {name!r} from the Hugging Face hub ({one_line(error)}); "
            f"check the name and the network, or give a local file ({', '.join(READERS)})"
        ) from error
