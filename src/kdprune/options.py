"""What the fields of an option group say of themselves: help texts, groups, choices and ranges."""

from dataclasses import field, fields
from typing import Any, Literal, get_args, get_origin

from kdprune.errors import KDPruneError


def option(
    default: Any, text: str, *, least: float | None = None, above: float | None = None, most: float | None = None,
    group: str = "training", rare: bool = False,
) -> Any:
    """A dataclass field that is an option on the command line, in recipes, in Python and in the record.

    Args:
        text: its help.
        least: least value of a number.
        above: bound that a number must exceed.
        most: greatest value of a number.
        group: heading in the help: "model", "data", "size", "training", "resources" or "output".
        rare: whether only ``--help-all`` shows it, because the default suits nearly everybody.
    """
    return field(default=default, metadata={
        "help": text, "least": least, "above": above, "most": most, "group": group, "rare": rare})


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal annotation, optional, in a tuple or alone; empty for any other annotation."""
    parts = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return tuple(choice for part in parts for choice in get_args(part))


def takes_several(annotation: Any) -> bool:
    """Whether the annotation is a tuple of choices."""
    return get_origin(annotation) is tuple and bool(choices(annotation))


def check_values(options: Any) -> None:
    """Raises KDPruneError for a field of ``options``, a dataclass, outside its choices or its range; None passes."""
    for item in fields(options):
        value, allowed = getattr(options, item.name), choices(item.type)
        least, above, most = (item.metadata.get(bound) for bound in ("least", "above", "most"))
        if value is None:
            continue
        for one in (value if takes_several(item.type) else [value]) if allowed else []:
            if one not in allowed:
                raise KDPruneError(f"got {item.name} {one!r}, expected one of {', '.join(map(str, allowed))}")
        if least is not None and not value >= least:
            kind = "number" if isinstance(value, float) else "whole number"
            raise KDPruneError(f"got {item.name} {value}, expected a {kind} of at least {least}")
        if above is not None and not value > above:
            raise KDPruneError(f"got {item.name} {value}, expected a number above {above}")
        if most is not None and not value <= most:
            raise KDPruneError(f"got {item.name} {value}, expected a number of at most {most:g}")
