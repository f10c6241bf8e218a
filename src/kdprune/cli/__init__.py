"""The command line: prune, plan, compare, ablate, analyze, eval, report, export-gguf.

Bad input is one line on stderr and exit status 2, never a traceback.
"""

import difflib
import functools
import gc
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

import kdprune
from kdprune.cli.compare import ABLATION, COMPARISON, ablate_command, compare_command
from kdprune.cli.evaluate import EVAL, eval_command, report_command
from kdprune.cli.export import ExportOptions, export_command
from kdprune.cli.options import command
from kdprune.cli.plan import PlanOptions, plan_command
from kdprune.cli.prune import ANALYSIS, OUTPUT, analyze_command, prune_command
from kdprune.cli.streams import steady_streams
from kdprune.errors import KDPruneError, one_line
from kdprune.methods import METHODS
from kdprune.options import options_of, reject_unknown
from kdprune.run.option_groups import ABLATE, ANALYZE, COMPARE, PRUNE
from kdprune.run.recipe import load_recipe, owners_of
from kdprune.runtime.interrupts import INTERRUPTED, raise_again
from kdprune.runtime.machine import quiet_libraries


@functools.cache
def build_app(method: str) -> typer.Typer:
    """The program; ``prune`` has the options of this method."""
    app = typer.Typer(
        name="kdprune", help="Replace runs of transformer layers with one small trained module.",
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_common)
    own = options_of(METHODS[method])
    command(app, "prune", prune_command, {**options_of(*PRUNE), **own}, {"output_dir": OUTPUT})
    command(app, "plan", plan_command, {**options_of(PlanOptions), **options_of(METHODS["kdp"])})
    command(app, "compare", compare_command, options_of(*COMPARE), {"output_dir": COMPARISON})
    command(app, "ablate", ablate_command, options_of(*ABLATE), {"output_dir": ABLATION})
    command(app, "analyze", analyze_command, options_of(*ANALYZE), {"output_dir": ANALYSIS})
    command(app, "eval", eval_command, EVAL)
    command(app, "report", report_command, {})
    command(app, "export-gguf", export_command, options_of(ExportOptions))
    return app


def _chosen_method(arguments: Sequence[str]) -> str:
    """The method that the arguments, or the recipe they name, ask for: its options are the ones that exist."""
    given = _value(arguments, "--method")
    if given is None and (recipe := _value(arguments, "--recipe")) is not None:
        given = load_recipe(recipe).get("method")
    given = given or "kdp"
    reject_unknown([given], METHODS, "method")
    return given


def _value(arguments: Sequence[str], name: str) -> str | None:
    """What follows option ``name``, as in ``--method sleb`` or ``--method=sleb``; None if it is absent."""
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _version(show: bool) -> None:
    if show:
        typer.echo(f"kdprune {kdprune.__version__}")
        raise typer.Exit


def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Options of the program itself."""


# typer carries click along under changing names; its usage errors share this base.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 2 for bad input, 130 when interrupted."""
    raise_again()
    if arguments is None:  # a process of its own: what the libraries hold stays, and no collection walks it again
        gc.freeze()
        gc.enable()  # kdprune/__init__.py stops it for the imports
    with steady_streams():
        status = _run(arguments)
        try:
            sys.stdout.flush()
        except OSError as error:
            status = _fail(f"cannot print: {error.strerror or error}")
        return status


def _run(arguments: Sequence[str] | None) -> int:
    try:
        with quiet_libraries():
            given = list(sys.argv[1:] if arguments is None else arguments)
            status = build_app(_chosen_method(given))(args=given or ["--help"], standalone_mode=False)
    except KDPruneError as error:
        return _fail(str(error))
    except _UsageError as error:
        return _fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except (MemoryError, RuntimeError) as error:  # torch's of a host has no class of its own
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return _fail(f"out of memory ({one_line(error) or 'the host'}); give it less at once: shorter or fewer rows, "
                     "or a smaller model")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}")
    if status == INTERRUPTED:  # typer makes this number of an interrupt
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _usage(error: Any) -> str:
    """The message of a usage error; of an unknown option the methods that have it, or the nearest one there is."""
    name = getattr(error, "option_name", "")
    owners = owners_of(name[2:].replace("-", "_"))
    if name and owners:
        command = getattr(getattr(getattr(error, "ctx", None), "command", None), "name", "")
        how = {"prune": "choose that with --method", "compare": f"write it into a variant, {owners[0]}:{name[2:]}=…",
               "ablate": f"write it into --base, {owners[0]}:{name[2:]}=…"}
        return f"got option {name}, which belongs to {', '.join(owners)}; " + how.get(
            command, f"kdprune {command} has none of it")
    near = difflib.get_close_matches(name, getattr(error, "possibilities", None) or [], n=1, cutoff=0.7)
    return f"{error.message}; did you mean {near[0]}?" if near else str(error.format_message())


def _fail(message: str, status: int = 2) -> int:
    print(f"kdprune: error: {' '.join(message.split())}", file=sys.stderr)
    return status
