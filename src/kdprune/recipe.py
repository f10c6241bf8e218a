"""YAML recipes: the options of a run as a file, checked against the names that exist."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from kdprune.errors import KDPruneError, one_line
from kdprune.methods import METHODS
from kdprune.options import choices, takes_several
from kdprune.resources import Resources
from kdprune.text import parse_weighted

# What a recipe may hold beside the fields of its method: the arguments of kdprune.prune and their types.
RUN_OPTIONS: Mapping[str, Any] = {
    "model": Any, "output_dir": str | Path, "method": str, "calibration": Any, "tokenizer": Any, "seed": int,
    "device": str, "heldout": Any, "samples": int, "length": int, "dtype": str, "overwrite": bool,
    "trust_remote_code": bool, "heal": Literal["lm", "kl"], "heal_what": Literal["stand-ins", "lora"],
    "heal_tokens": int, "heal_rate": float, "heal_batch": int, "heal_rank": int, "heal_alpha": float,
    **{field.name: field.type for field in dataclasses.fields(Resources)},
    "work_dir": str | Path, "host_memory": str | int, "device_memory": str | int,
}


def reject_unknown(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises KDPruneError for the first of ``names`` that is not in ``known``, with the nearest valid name.

    Args:
        what: what a name is, for the message: "option of kdp", "recipe key".
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(known))}"
            raise KDPruneError(f"got unknown {what} {str(name)!r}; {hint}")


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, checked: names that exist, values of their types.

    Dashes in names count as underscores; a list of texts for calibration is read as on the command line,
    ``[a.txt=0.7, b.jsonl=0.3]``; blocks may be written ``4-7,9-12``.

    Raises:
        KDPruneError: the file is missing, is not YAML, or holds something else than a mapping of options.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KDPruneError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KDPruneError(f"the recipe {str(path)!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(found, Mapping):
        raise KDPruneError(
            f"got a {type(found).__name__} in the recipe {str(path)!r}, expected a mapping such as 'ratio: 0.25'")
    options = {str(name).replace("-", "_"): value for name, value in found.items()}
    texts = options.get("calibration")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        options["calibration"] = parse_weighted(texts)
    return check_options(options)


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run or a recipe, each of its type; those at None are as if not given.

    Raises:
        KDPruneError: a name that neither a run nor its method knows, or a value that cannot be what it should.
    """
    name = options.get("method") or "kdp"
    reject_unknown([name], METHODS, "method")
    types = {**RUN_OPTIONS} | {field.name: field.type for field in dataclasses.fields(METHODS[name])}
    reject_unknown(options, types, "option")
    return {name: _typed(name, value, types[name]) for name, value in options.items() if value is not None}


def parse_blocks(value: str) -> tuple[tuple[int, int], ...]:
    """``"4-7,9-12"`` → ((4, 7), (9, 12)), half-open. Raises KDPruneError for anything else."""
    try:
        pairs = [tuple(int(number) for number in part.split("-")) for part in value.split(",")]
        return tuple((start, end) for start, end in pairs)
    except ValueError as error:
        raise KDPruneError(f"got blocks {value!r}, expected half-open layer ranges such as 4-7,9-12") from error


def dump_recipe(options: Mapping[str, Any]) -> str:
    """The YAML of a run's options, those left at None omitted; ``load_recipe`` reads it back."""
    return yaml.safe_dump(
        {name: _plain(value) for name, value in options.items() if value is not None}, sort_keys=False,
        allow_unicode=True)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value as its type, "1e-3" → 0.001; YAML reads some numbers as strings."""
    if name == "blocks" and isinstance(value, str):
        return parse_blocks(value)
    if takes_several(kind) and isinstance(value, str):
        value = [part.strip() for part in re.split(r"[,+]", value) if part.strip()]
    if allowed := choices(kind):
        reject_unknown(value if takes_several(kind) else [value], allowed, name)
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise KDPruneError(f"got {name} {value!r}: {problem[:1].lower()}{problem[1:]}") from error


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, which is what YAML has."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value
