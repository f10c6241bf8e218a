"""The command line: prune, analyze, eval, report.

Bad input is one line on stderr and exit status 2, never a traceback.
"""

import dataclasses
import difflib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

import torch
import typer
from huggingface_hub import HfApi
from rich.console import Console

import kdprune
from kdprune.data import load_stream
from kdprune.errors import KDPruneError, one_line
from kdprune.evaluation.models import vocabulary_size
from kdprune.evaluation.perplexity import perplexity
from kdprune.evaluation.speed import speed
from kdprune.methods import METHODS
from kdprune.methods.options import choices
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.pipeline import HELD_OUT_TOKENS, analyze, prune
from kdprune.recipe import check_options, dump_recipe, load_recipe
from kdprune.report.page import write_page
from kdprune.report.results import Results, write_file
from kdprune.report.table import print_summary
from kdprune.runtime import quiet_libraries
from kdprune.text import bundled_heldout, parse_weighted

app = typer.Typer(
    name="kdprune", help="Replace runs of transformer layers with one small trained module.",
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

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
DEFAULT_OUTPUT = "kdprune-out"


def _method_parameters() -> list[inspect.Parameter]:
    """One option for every field of every method's dataclass, all None until given."""
    found: dict[str, inspect.Parameter] = {}
    for method in METHODS.values():
        for field in dataclasses.fields(method):
            default = getattr(method(), field.name) if field.default is None else field.default
            shown = "" if default is None else f" ({default})"
            if allowed := choices(field.type):
                shown = f" [{'|'.join(allowed)}]{shown}"
            flag = "--" + field.name.replace("_", "-")
            names = [f"{flag}/--no-{flag[2:]}"] if _plain_type(field.type) is bool else [flag]
            option = typer.Option(*names, help=field.metadata["help"] + shown, show_default=False)
            found[field.name] = inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None,
                annotation=Annotated[_plain_type(field.type) | None, option])
    return list(found.values())


def _plain_type(annotation: Any) -> type:
    """The command line's type of a field: bool, int, float, or str for choices and blocks."""
    if choices(annotation):
        return str
    parts = [part for part in get_args(annotation) if part is not NoneType] or [annotation]
    return parts[0] if parts[0] in (bool, int, float) else str


def _with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that takes ``**method_options`` a signature that spells them out, for typer to read."""
    signature = inspect.signature(command)
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own] + _method_parameters()
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


@app.command("prune")
@_with_method_options
def prune_command(
    model: Model = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help=f"directory to write ({DEFAULT_OUTPUT})")] = None,
    method: Annotated[str | None, typer.Option(help=f"one of {', '.join(METHODS)} (kdp)")] = None,
    calibration: Calibration = None,
    heldout: Heldout = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    recipe: Annotated[str | None, typer.Option(help="YAML file of these options; those given here win")] = None,
    dump_recipe_: Annotated[bool, typer.Option("--dump-recipe", help="print the recipe and stop")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="upload the result to this hub repository")] = None,
    **method_options: Any,
) -> None:
    """Prune MODEL to a net-parameter ratio, measure what it cost, and save a Hugging Face checkpoint."""
    given = {
        "model": model, "output_dir": output, "method": method, "heldout": heldout, "samples": samples,
        "length": length, "seed": seed, "device": device, "dtype": dtype, "overwrite": overwrite or None,
        "trust_remote_code": trust_remote_code or None,
        "calibration": parse_weighted(calibration) if calibration else None, **method_options,
    }
    options = load_recipe(recipe) if recipe else {}
    options |= {name: value for name, value in given.items() if value is not None}
    options = check_options(options)
    if dump_recipe_:
        # What the run would use, presets filled in; the command line's own switches are not part of a recipe.
        chosen = METHODS[options.get("method", "kdp")]
        names = {field.name for field in dataclasses.fields(chosen)}
        filled = dataclasses.asdict(chosen(**{name: value for name, value in options.items() if name in names}))
        kept = {name: value for name, value in options.items() if name not in ("overwrite", "output_dir")}
        typer.echo(dump_recipe({**kept, **filled}), nl=False)
        return
    options.setdefault("output_dir", DEFAULT_OUTPUT)
    client = _hub(push_to_hub) if push_to_hub else None
    result = prune(**options, progress=True)
    directory = Path(options["output_dir"])
    print_summary(result.results, Console(), [directory, directory / "results.json", directory / "report.html"])
    if options.get("model") and not options.get("calibration"):
        typer.echo("note: calibrated on the bundled 400 kB of English; give --calibration with text of your own")
    if client is not None and push_to_hub:
        _push(client, directory, push_to_hub)


def _hub(repository: str) -> HfApi:
    """A logged-in client with the repository there, found out before any work."""
    try:
        client = HfApi()
        client.create_repo(repository, exist_ok=True)
        return client
    except Exception as error:  # network, authentication and naming errors of several libraries
        raise KDPruneError(
            f"cannot write to hub repository {repository!r} ({one_line(error)}); log in with 'hf auth login'"
        ) from error


def _push(client: HfApi, directory: Path, repository: str) -> None:
    """Uploads everything the run wrote."""
    try:
        client.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:
        raise KDPruneError(
            f"cannot upload to {repository!r} ({one_line(error)}); everything is saved in {str(directory)!r}"
        ) from error


@app.command("analyze")
def analyze_command(
    model: Model = None,
    output: Annotated[str, typer.Option("--output", "-o", help="directory to write")] = "kdprune-analysis",
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure how similar the layers' states are; write results.json and report.html, prune nothing."""
    analyze(
        model, parse_weighted(calibration) if calibration else None, output_dir=output, seed=seed or 0,
        device=device or "auto", samples=samples, length=length, dtype=dtype, overwrite=overwrite,
        trust_remote_code=trust_remote_code, progress=True)
    typer.echo(f"wrote {Path(output) / 'results.json'} and {Path(output) / 'report.html'}")


@app.command("eval")
def eval_command(
    checkpoint: Annotated[str, typer.Argument(help="any causal LM: hub id, stock or pruned directory")],
    text: Annotated[str | None, typer.Option(help="text file or hub data set; left out: the bundled text")] = None,
    window: Annotated[int | None, typer.Option(help="tokens a window (the model's context, at most 2048)")] = None,
    stride: Annotated[int | None, typer.Option(help="tokens between windows (half the window)")] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json_file: Annotated[str | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Perplexity and speed of a checkpoint."""
    model = load_model(
        checkpoint, device=device or "auto", dtype=dtype, trust_remote_code=trust_remote_code, known_family=False)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    tokens = load_stream(
        text or bundled_heldout(), tokenizer, limit=HELD_OUT_TOKENS, vocabulary=vocabulary_size(model))
    found, pace = perplexity(model, tokens, window, stride), speed(model)
    typer.echo(
        f"perplexity {found.value:.3f} on {tokens.source} ({found.tokens} tokens, window {found.window}, "
        f"stride {found.stride})")
    typer.echo(f"speed on {model.device}: prefill {pace.prefill:.0f} tokens/s, decode {pace.decode:.1f} tokens/s")
    if json_file:
        record = {"model": checkpoint, "perplexity": {**dataclasses.asdict(found), "dataset": tokens.source},
                  "speed": dataclasses.asdict(pace), "parameters": model.num_parameters()}
        write_file(json_file, json.dumps(record, indent=1) + "\n")


@app.command("report")
def report_command(
    results: Annotated[str, typer.Argument(help="results.json, or the directory that holds it")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="HTML file (report.html beside it)")] = None,
) -> None:
    """Rebuild the HTML page from results.json alone."""
    found = Results.load(results)
    folder = Path(results) if Path(results).is_dir() else Path(results).parent
    typer.echo(f"wrote {write_page(found, output or folder / 'report.html')}")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"kdprune {kdprune.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Options of the program itself."""


# typer carries click along under changing names; its usage errors share this base.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        with quiet_libraries():
            given = list(sys.argv[1:] if arguments is None else arguments)
            status = app(args=given or ["--help"], standalone_mode=False)
    except KDPruneError as error:
        return _fail(str(error))
    except _UsageError as error:
        return _fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except torch.OutOfMemoryError as error:
        return _fail(f"out of memory on the device ({one_line(error)}); lower --batch, --samples or --length")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}")
    return status if isinstance(status, int) else 0


def _usage(error: Any) -> str:
    """The message of a usage error; of an unknown option's alternatives the nearest alone."""
    near = difflib.get_close_matches(
        getattr(error, "option_name", ""), getattr(error, "possibilities", None) or [], n=1, cutoff=0.0)
    return f"{error.message}; did you mean {near[0]}?" if near else str(error.format_message())


def _fail(message: str, status: int = 2) -> int:
    print(f"kdprune: error: {' '.join(message.split())}", file=sys.stderr)
    return status
