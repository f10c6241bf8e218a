"""``kdprune prune`` and ``kdprune analyze``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import HfApi
from rich.console import Console

from kdprune.cli.options import Calibration, Device, Dtype, Heldout, Length, Model, Overwrite, Samples, Seed, Trust
from kdprune.errors import KDPruneError, one_line
from kdprune.heal import HEAL_OPTIONS, make_heal
from kdprune.methods import METHODS
from kdprune.pipeline import analyze, prune
from kdprune.recipe import check_options, dump_recipe, load_recipe
from kdprune.report.table import print_summary
from kdprune.resources import AUTO
from kdprune.text import parse_weighted
from kdprune.world import world

DEFAULT_OUTPUT = "kdprune-out"


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
        kept = {name: value for name, value in options.items() if name not in ("overwrite", "output_dir", "work_dir")}
        healing = make_heal({name: value for name, value in options.items() if name in HEAL_OPTIONS})
        healed = {} if healing is None else healing.options()
        typer.echo(dump_recipe({**kept, **healed, **filled}), nl=False)
        return
    options = {"output_dir": DEFAULT_OUTPUT, "work_dir": AUTO, **options}
    client = _hub(push_to_hub) if push_to_hub else None
    result = prune(**options, progress=True)
    if not world().first:
        return
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
    **resources: Any,
) -> None:
    """Measure how similar the layers' states are; write results.json and report.html, prune nothing."""
    analyze(
        model, parse_weighted(calibration) if calibration else None, output_dir=output, seed=seed or 0,
        device=device or "auto", samples=samples, length=length, dtype=dtype, overwrite=overwrite,
        trust_remote_code=trust_remote_code, progress=True, **{**resources, "work_dir": resources["work_dir"] or AUTO})
    if world().first:
        typer.echo(f"wrote {Path(output) / 'results.json'} and {Path(output) / 'report.html'}")
