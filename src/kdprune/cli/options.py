"""How option groups become a command's parameters, and how its help shows them."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from kdprune.options import HEADINGS, Option, choices
from kdprune.run.recipe import written

WIDTH = 110     # of help, where the terminal is as wide
_SHORT = 24     # characters of choices that stand beside the flag; longer ones stand in the text


class Command(TyperCommand):
    """A command whose help has its options under ``HEADINGS``, the rarer ones only with ``--help-all``."""

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``, at the end of what is shown last."""
        found = super().get_help_option(ctx)
        if found is not None:
            found.help = "show this and stop"
        return found

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then every heading with its options."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in sorted(self.get_params(ctx), key=lambda item: item.param_type_name != "argument"):
            found = parameter.get_help_record(ctx)  # None for those that are hidden
            if found is not None:
                heading = getattr(parameter, "rich_help_panel", None) or HEADINGS[-1].capitalize()
                # --refine / --no-refine → --[no-]refine, which stays in its column
                rows.setdefault(heading, []).append((re.sub(r"--(\S+) / --no-\S+", r"--[no-]\1", found[0]), found[1]))
        for heading in sorted(rows, key=lambda name: HEADINGS.index(name.lower())):
            with formatter.section(heading):
                formatter.write_dl(rows[heading])


def _show_all(ctx: typer.Context, show: bool) -> None:
    """Prints the help with the options that it leaves out otherwise."""
    if show:
        for parameter in ctx.command.params:
            if hasattr(parameter, "hidden"):
                parameter.hidden = False
        typer.echo(ctx.get_help())
        raise typer.Exit


_HELP_ALL = Annotated[bool, typer.Option(
    "--help-all", callback=_show_all, is_eager=True, help="show the rarer options too", rich_help_panel="Output")]


def command(
    app: typer.Typer, name: str, function: Callable[..., None], options: Mapping[str, Option],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Adds a command to the program.

    Args:
        app: the program.
        name: of the command.
        function: what it does; it takes parameters of its own and ``**options``, those that were given.
        options: what its other parameters are.
        defaults: what the command takes where nothing is given, as the help says it.
    """
    own = inspect.signature(function).parameters.values()
    kept = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own
            if item.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [
        _parameter(item, (defaults or {}).get(item.name)) for item in options.values() if "shell" in item.places]
    parameters += kept
    if any(item.rare for item in options.values()):
        parameters.append(inspect.Parameter(
            "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_HELP_ALL))

    @functools.wraps(function)
    def spelled(help_all: bool = False, **values: Any) -> None:
        mine = {item.name: values.pop(item.name) for item in kept}
        chosen = {key: value for key, value in values.items() if value is not None and value != []}
        function(**mine, **written(chosen, options))

    spelled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spelled.__annotations__ = {item.name: item.annotation for item in parameters}
    app.command(name, cls=Command, context_settings={"max_content_width": WIDTH})(spelled)


def _parameter(item: Option, default: Any) -> inspect.Parameter:
    """A typer parameter for an option, None until given."""
    text = item.text if default is None else f"{item.text} ({default})"
    kind = _plain_type(item.kind)
    if item.positional:
        about: Any = typer.Argument(
            help=text, metavar=item.name.upper(), show_default=False, rich_help_panel=item.group.capitalize())
    else:
        allowed = "|".join(choices(item.kind))
        short = 0 < len(allowed) <= _SHORT
        if allowed and not short:
            text = f"{text} [{allowed}]"
        flags = [f"{item.flag}/--no-{item.flag[2:]}"] if kind is bool else [item.flag]
        about = typer.Option(
            *flags, *([item.short] if item.short else []), help=text, hidden=item.rare, show_default=False,
            rich_help_panel=item.group.capitalize(), metavar=f"[{allowed}]" if short else _METAVARS.get(kind))
    annotation: Any = Annotated[(list[str] if item.several else kind) | None, about]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_METAVARS = {str: "TEXT", int: "N", float: "X"}


def _plain_type(annotation: Any) -> type:
    """The command line's type of a field: bool, int, float, or str for everything that is parsed later."""
    if choices(annotation):
        return str
    parts = [part for part in get_args(annotation) if part is not NoneType] or [annotation]
    return parts[0] if len(parts) == 1 and parts[0] in (bool, int, float) else str
