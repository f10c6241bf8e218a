"""YAML recipes: the options of a run as a file, checked against the names that exist."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdprune.errors import KDPruneError, one_line


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
    """The options in a YAML file, a mapping of option names to values; dashes in names count as underscores.

    Raises:
        KDPruneError: the file is missing, is not YAML, or holds something else than a mapping.
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
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def dump_recipe(options: Mapping[str, Any]) -> str:
    """The YAML of a run's options, those left at None omitted; ``load_recipe`` reads it back."""
    return yaml.safe_dump(
        {name: _plain(value) for name, value in options.items() if value is not None}, sort_keys=False,
        allow_unicode=True)


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, which is what YAML has."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value
