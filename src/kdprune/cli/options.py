"""What the commands have in common: their shared options, and those that a method's fields spell out."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, get_args

import typer

from kdprune.heal import Heal, argument
from kdprune.methods.method import Method
from kdprune.options import choices
from kdprune.resources import Resources

Model = Annotated[str | None, typer.Argument(help="hub id or directory; left out: the bundled reference model")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(help="text file (.txt, .jsonl, .parquet), directory or hub data set name[:config]; repeat with "
                      "=weight to mix; left out: the bundled text")]
Heldout = Annotated[str | None, typer.Option(help="text for perplexity; left out: the bundled text")]
Samples = Annotated[int | None, typer.Option(help="rows of calibration text (4000; all of the bundled text)")]
Length = Annotated[int | None, typer.Option(help="tokens a row (the model's context, at most 512)")]
Seed = Annotated[int | None, typer.Option(help="of every random draw (0)")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 (auto)")]
Dtype = Annotated[str | None, typer.Option(help="of the loaded model: float32, bfloat16, … (the checkpoint's)")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a directory that is not empty")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the checkpoint")]


def method_parameters(method: type[Method]) -> list[inspect.Parameter]:
    """One option for every field of the method's dataclass, all None until given."""
    panel = f"Options of {method.title}"
    return [_parameter(field, field.name, method(), panel) for field in dataclasses.fields(method)]


def heal_parameters() -> list[inspect.Parameter]:
    """The same for healing: ``--heal``, ``--heal-what``, …."""
    fields = dataclasses.fields(Heal)
    return [_parameter(field, argument(field.name), None if field.name == "loss" else Heal(), "Healing")
            for field in fields]


def resource_parameters() -> list[inspect.Parameter]:
    """The same for what a run may use: ``--work-dir``, ``--host-memory``, …."""
    return [_parameter(field, field.name, None, "Resources") for field in dataclasses.fields(Resources)]


def spelled_out(command: Callable[..., None], *groups: list[inspect.Parameter]) -> Callable[..., None]:
    """``command``, which takes ``**options``, with a signature that spells these out for typer to read."""
    signature = inspect.signature(command)
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own]
    parameters += [item for group in groups for item in group]

    @functools.wraps(command)
    def spelled(**options: Any) -> None:
        command(**options)

    spelled.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    spelled.__annotations__ = {item.name: item.annotation for item in parameters}
    return spelled


def _parameter(field: dataclasses.Field[Any], name: str, filled: Any, panel: str) -> inspect.Parameter:
    """An option for a field, called ``name``; its default shown as ``filled`` has it where the field says None."""
    default = getattr(filled, field.name, None) if field.default is None or filled is None else field.default
    shown = "" if default is None else f" ({default})"
    if allowed := choices(field.type):
        shown = f" [{'|'.join(allowed)}]{shown}"
    flag = "--" + name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if _plain_type(field.type) is bool else [flag]
    option = typer.Option(*names, help=field.metadata["help"] + shown, show_default=False, rich_help_panel=panel)
    kind: Any = Annotated[_plain_type(field.type) | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _plain_type(annotation: Any) -> type:
    """The command line's type of a field: bool, int, float, or str for choices and blocks."""
    if choices(annotation):
        return str
    parts = [part for part in get_args(annotation) if part is not NoneType] or [annotation]
    return parts[0] if parts[0] in (bool, int, float) else str
