"""``kdprune prune`` and ``kdprune analyze``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from kdprune.errors import KDPruneError, one_line
from kdprune.methods import METHODS, make_method
from kdprune.methods.common.analysis import massive_line
from kdprune.options import at_home, options_of
from kdprune.report.table import print_summary
from kdprune.run.heal import make_heal
from kdprune.run.pipeline import analyze, prune
from kdprune.run.recipe import dump_recipe, run_options
from kdprune.run.resources import AUTO
from kdprune.runtime.distributed import world

OUTPUT, ANALYSIS = "kdprune-out", "kdprune-analysis"  # where the commands write


def prune_command(
    recipe: Annotated[str | None, typer.Option(
        help="YAML file of these options; those given here win", metavar="FILE", rich_help_panel="Output")] = None,
    dump_recipe_: Annotated[bool, typer.Option(
        "--dump-recipe", help="print the recipe and stop", rich_help_panel="Output")] = False,
    push_to_hub: Annotated[str | None, typer.Option(
        help="upload the result to this hub repository", metavar="TEXT", rich_help_panel="Output")] = None,
    **options: Any,
) -> None:
    """Prune MODEL to a net-parameter ratio, measure what it cost, and save a Hugging Face checkpoint."""
    recipe = at_home(recipe)
    options = run_options(recipe, options)
    if dump_recipe_:
        typer.echo(dump_recipe(_whole(options)), nl=False)
        return
    options = {"output_dir": OUTPUT, "work_dir": AUTO, **options}
    client = _hub(push_to_hub) if push_to_hub else None
    result = prune(recipe=recipe, **options, progress=True)
    if not world().first:
        return
    directory = Path(options["output_dir"])
    print_summary(result.results, Console(), [directory, directory / "results.json", directory / "report.html"])
    if options.get("model") and not options.get("calibration"):
        typer.echo("note: calibrated on the bundled 400 kB of English; give --calibration with text of your own")
    if client is not None and push_to_hub:
        _push(client, directory, push_to_hub)


def _whole(options: dict[str, Any]) -> dict[str, Any]:
    """What the run would use, presets filled in; where it writes is not part of a recipe."""
    name = options.get("method", "kdp")
    settings = make_method(name, {key: options[key] for key in options_of(METHODS[name]) if key in options})
    healing = make_heal(options, settings)
    kept = {key: value for key, value in options.items() if key not in ("overwrite", "output_dir", "work_dir")}
    return {**kept, **({} if healing is None else healing.options()), **dataclasses.asdict(settings)}


def _hub(repository: str) -> HfApi:
    """A logged-in client that may write to a repository of this name, found out before any work; nothing is made."""
    try:
        validate_repo_id(repository)
        client = HfApi()
        user = client.whoami()
    except Exception as error:  # network, authentication and naming errors of several libraries
        raise KDPruneError(
            f"cannot write to hub repository {repository!r} ({one_line(error)}); log in with 'hf auth login'"
        ) from error
    owners = [user["name"], *(one["name"] for one in user.get("orgs", []))]
    if "/" in repository and (owner := repository.split("/")[0]) not in owners:
        raise KDPruneError(f"got hub repository {repository!r}, expected one of {', '.join(owners)}: {owner} is "
                           "neither this login nor an organisation of it")
    return client


def _push(client: HfApi, directory: Path, repository: str) -> None:
    """Uploads everything the run wrote, to a new repository where there is none."""
    try:
        made = client.create_repo(repository, exist_ok=True)
        client.upload_folder(repo_id=made.repo_id, folder_path=directory)
    except Exception as error:
        raise KDPruneError(
            f"cannot upload to {repository!r} ({one_line(error)}); everything is saved in {str(directory)!r}"
        ) from error


def analyze_command(**options: Any) -> None:
    """Measure how similar the layers' states are; write results.json and report.html, prune nothing."""
    options = {"output_dir": ANALYSIS, "work_dir": AUTO, **options}
    scores = analyze(**options, progress=True)
    if world().first:
        output = Path(options["output_dir"])
        if line := massive_line(scores):
            typer.echo(line)
        typer.echo(f"wrote {output / 'results.json'} and {output / 'report.html'}")
