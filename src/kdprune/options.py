"""Options said once: what a field of an option group says of itself, read by commands, recipes, Python and the docs."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import torch
from pydantic import TypeAdapter, ValidationError

from kdprune.errors import KDPruneError, shortened

FEW = 20  # names that are all told to whom gives another one
HEADINGS = ("model", "data", "size", "training", "resources", "output")
Place = Literal["shell", "python", "recipe"]
EVERYWHERE: tuple[Place, ...] = ("shell", "python", "recipe")
Group = TypeVar("Group")


def option(
    default: Any, text: str, *, least: float | None = None, above: float | None = None, most: float | None = None,
    group: str = "training", rare: bool = False, name: str | None = None, flag: str | None = None,
    short: str | None = None, positional: bool = False, several: bool = False, opt_in: bool = False,
    takes: Any = None, parse: Callable[[Any], Any] | None = None, places: tuple[Place, ...] = EVERYWHERE,
    recorded: bool = True, path: bool = False, in_python: str = "",
) -> Any:
    """A dataclass field that is an option on the command line, in recipes, in Python and in the record.

    Args:
        default: the field's default.
        text: its help; what follows from a default of None stands in brackets at the end.
        least: least value of a number.
        above: bound that a number must exceed.
        most: greatest value of a number.
        group: heading in the help, one of ``HEADINGS``.
        rare: whether only ``--help-all`` shows it, because the default suits nearly everybody.
        name: what it is called outside, if not like the field.
        flag: what it is called on the command line, if not ``--name``.
        short: a short flag beside it, "-o".
        positional: whether the command line takes it as its argument.
        several: whether it is given repeatedly on the command line.
        opt_in: whether its group is used only where this one is given.
        takes: type of what may be given, if more than the field's own.
        parse: makes the value of a string; of a list of them, as written in a shell or a file, where ``several``.
        places: where it may be given.
        recorded: whether it is part of the record of a run, which repeats it elsewhere.
        path: whether it names files, so that ``~`` is the user's home; of a mixture, every part.
        in_python: what there is to say beside the help in Python.
    """
    assert group in HEADINGS, group
    return field(default=default, metadata={
        "help": text, "least": least, "above": above, "most": most, "group": group, "rare": rare, "name": name,
        "flag": flag, "short": short, "positional": positional, "several": several, "opt_in": opt_in, "takes": takes,
        "parse": parse, "places": places, "recorded": recorded, "path": path, "in_python": in_python})


def same_option(owner: type, name: str) -> Any:
    """The field of another group again: default, help and all."""
    found = next(item for item in fields(owner) if item.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field of a group as it is known outside; the other attributes are those of :func:`option`.

    Attributes:
        field: its name in the group.
        kind: type of what may be given.
        default: what holds where nothing is given, as Python's signature has it.
        filled: the same as help and docs show it, where the group fills a None in.
    """

    name: str
    field: str
    kind: Any
    default: Any
    filled: Any
    help: str
    group: str
    rare: bool
    flag: str
    short: str | None
    positional: bool
    several: bool
    parse: Callable[[Any], Any] | None
    places: tuple[Place, ...]
    recorded: bool
    path: bool
    in_python: str

    @property
    def text(self) -> str:
        """Its help with the default."""
        if self.filled is None or self.filled is False or self.filled == ():
            return self.help
        return f"{self.help} ({'yes' if self.filled is True else self.filled})"

    @property
    def python_text(self) -> str:
        """The same for Python."""
        return f"{self.text}; {self.in_python}" if self.in_python else self.text


def options_of(*groups: type) -> dict[str, Option]:
    """The options of these groups by the names that they have outside."""
    found: dict[str, Option] = {}
    for group in groups:
        filled = group()
        for item in fields(group):
            about: Mapping[str, Any] = item.metadata
            name = about["name"] or item.name
            default = None if about["opt_in"] else item.default
            kind: Any = item.type if about["takes"] is None else about["takes"]
            found[name] = Option(
                name=name, field=item.name, kind=kind | None if about["opt_in"] else kind, default=default,
                filled=None if about["opt_in"] else getattr(filled, item.name), help=about["help"],
                flag=about["flag"] or "--" + name.replace("_", "-"),
                **{key: about[key] for key in (
                    "group", "rare", "short", "positional", "several", "parse", "places", "recorded", "path",
                    "in_python")})
    return found


def taken(group: type[Group], chosen: Mapping[str, Any]) -> Group:
    """The group with its part of what was chosen, by outside names; None is as if not given.

    Raises:
        KDPruneError: a value is outside its choices or its range.
    """
    names = {name: item.field for name, item in options_of(group).items()}
    found = group(**{names[name]: value for name, value in chosen.items() if name in names and value is not None})
    check_values(found)
    return found


def recorded(*groups: Any) -> dict[str, Any]:
    """What the record keeps of filled groups, by outside names."""
    return {name: getattr(group, item.field) for group in groups for name, item in options_of(type(group)).items()
            if item.recorded}


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal annotation, optional, in a tuple or alone; empty for any other annotation."""
    parts = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return tuple(choice for part in parts for choice in get_args(part))


def takes_several(annotation: Any) -> bool:
    """Whether the annotation is a tuple of choices."""
    return get_origin(annotation) is tuple and bool(choices(annotation))


def parse_blocks(value: str) -> tuple[tuple[int, int], ...]:
    """``"4-7,9-12"`` → ((4, 7), (9, 12)), half-open. Raises KDPruneError for anything else."""
    try:
        pairs = [tuple(int(number) for number in part.split("-")) for part in value.split(",")]
        return tuple((start, end) for start, end in pairs)
    except ValueError as error:
        raise KDPruneError(f"got blocks {value!r}, expected half-open layer ranges such as 4-7,9-12") from error


def parse_seeds(text: str) -> int | list[int]:
    """``"3"`` → three seeds; ``"0,4,7"`` → these. Raises KDPruneError for anything else."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise KDPruneError(f"got seeds {text!r}, expected a number, or numbers with commas") from error
    return found if "," in text or not found else found[0]


def parse_numbers(text: str) -> tuple[int, ...]:
    """``"512,2048"`` → these. Raises KDPruneError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise KDPruneError(f"got {text!r}, expected whole numbers with commas") from error


def check_values(options: Any) -> None:
    """Raises KDPruneError for a field of ``options``, a dataclass, outside its choices or its range; None passes."""
    for item in fields(options):
        value, allowed, name = getattr(options, item.name), choices(item.type), item.metadata.get("name") or item.name
        least, above, most = (item.metadata.get(bound) for bound in ("least", "above", "most"))
        if value is None:
            continue
        for one in (value if takes_several(item.type) else [value]) if allowed else []:
            if one not in allowed:
                raise KDPruneError(f"got {name} {one!r}, expected one of {', '.join(map(str, allowed))}")
        if least is not None and not value >= least:
            kind = "number" if isinstance(value, float) else "whole number"
            raise KDPruneError(f"got {name} {value}, expected a {kind} of at least {least}")
        if above is not None and not value > above:
            raise KDPruneError(f"got {name} {value}, expected a number above {above}")
        if most is not None and not value <= most:
            raise KDPruneError(f"got {name} {value}, expected a number of at most {most:g}")


def reject_unknown(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises KDPruneError for the first of ``names`` that is not in ``known``, with the nearest valid name.

    Args:
        names: what was given.
        known: what there is.
        what: what a name is, for the message: "option of kdp", "recipe key".
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else ""
            if not near or len(known) <= FEW:
                hint = f"{hint} expected one of {', '.join(sorted(known))}".strip()
            raise KDPruneError(f"got unknown {what} {str(name)!r}; {hint}")


def typed_options(given: Mapping[str, Any], known: Mapping[str, Option], what: str = "option") -> dict[str, Any]:
    """Options, each of its type; those at None are as if not given.

    Args:
        given: options by name.
        known: those there are.
        what: what a name is, for the message.

    Raises:
        KDPruneError: a name that there is not, or a value that cannot be what it should.
    """
    reject_unknown(given, known, what)
    return {name: _typed(known[name], value) for name, value in given.items() if value is not None}


def at_home(value: Any, each: bool = False) -> Any:
    """A path with ``~`` replaced by the user's home, as a shell does it; of a mixture every part.

    What does not begin with the home of a user there is, and what is no path, stays as it is.

    Args:
        value: what was given.
        each: whether a list holds paths; its strings may be texts else.
    """
    if isinstance(value, str | Path):
        text = str(value)
        expanded = os.path.expanduser(text) if text.startswith("~") else text
        return value if expanded == text else type(value)(expanded)
    if type(value) is dict and "input_ids" not in value:
        return {at_home(name): at_home(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_part_at_home(part, each) for part in value)
    return value


def _part_at_home(part: Any, each: bool) -> Any:
    if isinstance(part, list | tuple) and len(part) == 2:
        pair = at_home(part[0]), part[1]
        return list(pair) if isinstance(part, list) else pair
    return at_home(part) if each or isinstance(part, Path) else part


def _typed(item: Option, value: Any) -> Any:
    """A value as its type, "1e-3" → 0.001; YAML reads some numbers as strings."""
    if item.path:
        value = at_home(value, each=get_origin(item.kind) is tuple)
        if isinstance(value, str | Path) and "\0" in str(value):
            raise KDPruneError(f"got {item.name} {shortened(value)} with a NUL, which no name holds; give a path")
        if (isinstance(value, str) and not value) or (isinstance(value, list | tuple) and "" in list(value)):
            raise KDPruneError(f"got an empty {item.name}, expected a name; leave it out for the default")
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if item.parse is not None and not item.several and isinstance(value, str):
        return item.parse(value)
    if takes_several(item.kind) and isinstance(value, str):
        value = [part.strip() for part in re.split(r"[,+]", value) if part.strip()]
    if takes_several(item.kind) and not isinstance(value, list | tuple):
        raise KDPruneError(f"got {item.name} of type {type(value).__name__}, expected names, with commas or in a list")
    if allowed := choices(item.kind):
        reject_unknown(value if takes_several(item.kind) else [value], allowed, item.name)
    try:
        return TypeAdapter(item.kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= 200 else f"{shown[:199]}…"
        raise KDPruneError(f"got {item.name} {shown}: {problem[:1].lower()}{problem[1:]}") from error
