"""What a method's fields say of themselves: help texts, choices and ranges."""

from dataclasses import field, fields
from typing import Any, Literal, get_args, get_origin

from kdprune.errors import KDPruneError


def option(
    default: Any, text: str, *, least: float | None = None, above: float | None = None, most: float | None = None,
) -> Any:
    """A dataclass field with its help text and, for numbers, its least value or the bound it must exceed, and its
    greatest value."""
    return field(default=default, metadata={"help": text, "least": least, "above": above, "most": most})


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal annotation, optional or not; empty for any other annotation."""
    parts = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return tuple(choice for part in parts for choice in get_args(part))


def check_values(options: Any) -> None:
    """Raises KDPruneError for a field of ``options``, a dataclass, outside its choices or its range; None passes."""
    for item in fields(options):
        value, allowed = getattr(options, item.name), choices(item.type)
        least, above, most = (item.metadata.get(bound) for bound in ("least", "above", "most"))
        if value is None:
            continue
        if allowed and value not in allowed:
            raise KDPruneError(f"got {item.name} {value!r}, expected one of {', '.join(map(str, allowed))}")
        if least is not None and not value >= least:
            kind = "number" if isinstance(value, float) else "whole number"
            raise KDPruneError(f"got {item.name} {value}, expected a {kind} of at least {least}")
        if above is not None and not value > above:
            raise KDPruneError(f"got {item.name} {value}, expected a number above {above}")
        if most is not None and not value <= most:
            raise KDPruneError(f"got {item.name} {value}, expected a number of at most {most:g}")
