"""What a method's fields say of themselves: help texts and choices, for the command line, recipes and checks."""

from dataclasses import field
from typing import Any, Literal, get_args, get_origin


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal annotation, optional or not; empty for any other annotation."""
    parts = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return tuple(choice for part in parts for choice in get_args(part))
