"""``kdprune eval`` and ``kdprune report``: measure a checkpoint, rebuild a page."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel

from kdprune.data.sources import bundled_heldout, check_source, in_column
from kdprune.data.tokens import load_stream
from kdprune.errors import KDPruneError, shortened
from kdprune.evaluation.models import vocabulary_size
from kdprune.evaluation.perplexity import checked, default_stride, default_window, perplexity
from kdprune.evaluation.speed import speed
from kdprune.evaluation.tasks import check_suite, run_suite
from kdprune.model.loading import checkpoint_errors, load_tokenizer, read_config
from kdprune.model.placement import reads_weights
from kdprune.options import at_home, option, options_of, same_option, taken, typed_options
from kdprune.report.comparison_page import write_comparison
from kdprune.report.comparison_records import Comparison, is_comparison
from kdprune.report.page import write_page
from kdprune.report.results import Results, write_file
from kdprune.report.retention import Retention, retention
from kdprune.report.summary import MISSING, percent
from kdprune.report.task_records import TaskScore
from kdprune.run.inputs import inputs_of
from kdprune.run.option_groups import ModelOptions, SuiteOptions, TextOptions
from kdprune.run.resources import Resources, make_resources
from kdprune.run.session import HELD_OUT_TOKENS
from kdprune.runtime.machine import resolve_device
from kdprune.runtime.stages import Stages
from kdprune.store.directories import check_file
from kdprune.store.files import is_there


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What a checkpoint is measured on."""

    text: str | None = option(
        None, "text file or hub data set for perplexity (the bundled text)", group="data", path=True)
    text_field: str | None = same_option(TextOptions, "text_field")
    window: int | None = option(None, "tokens a window (the model's context, at most 2048)", group="data", least=2)
    stride: int | None = option(None, "tokens between windows (half the window)", group="data", least=1)
    batch_size: int | None = option(
        None, "requests of tasks a forward pass (64; 8 on a CPU)", group="resources", least=1)
    dense: str | None = option(
        None, "with --suite: the model it was pruned from, for retained performance", group="model",
        path=True)
    dtype: str | None = same_option(ModelOptions, "dtype")
    trust_remote_code: bool = same_option(ModelOptions, "trust_remote_code")


# Nothing is kept of an evaluation, so that there is no work directory.
EVAL = {name: item for name, item in options_of(EvalOptions, SuiteOptions, Resources).items() if name != "work_dir"}
EVAL["load_in"] = dataclasses.replace(EVAL["load_in"], help="measure the model in so many bits")


def eval_command(
    checkpoint: Annotated[str, typer.Argument(
        help="any causal LM: hub id, stock or pruned directory", metavar="CHECKPOINT", rich_help_panel="Model")],
    json_file: Annotated[str | None, typer.Option(
        "--json", help="write the figures to this file", metavar="FILE", rich_help_panel="Output")] = None,
    **options: Any,
) -> None:
    """Perplexity and speed of a checkpoint, and its scores on tasks."""
    checkpoint = at_home(checkpoint)
    chosen = typed_options(options, EVAL)
    wanted, suite, resources = taken(EvalOptions, chosen), taken(SuiteOptions, chosen), make_resources(chosen)
    _check(wanted, suite)
    json_file = at_home(json_file)
    if json_file == "":
        raise KDPruneError("got an empty --json, expected a file, or - for standard output")
    if json_file not in (None, "-"):
        for read in (checkpoint, wanted.dense):
            check_file(json_file, inputs_of(read, texts=[wanted.text], folders=_folders(suite)), "perplexity")
    text = in_column(wanted.text, wanted.text_field)
    check_source(text)
    checked(_config(checkpoint, wanted), wanted.window, wanted.stride)
    if wanted.dense is not None:
        _config(wanted.dense, wanted)
    with contextlib.redirect_stdout(sys.stderr) if json_file == "-" else contextlib.nullcontext():
        record = json.dumps(_measured(checkpoint, text or bundled_heldout(), wanted, suite, resources), indent=1)
    if json_file == "-":
        typer.echo(record)
    elif json_file:
        write_file(json_file, record + "\n")


def _config(checkpoint: str, wanted: EvalOptions) -> PreTrainedConfig:
    """A checkpoint's config. Raises KDPruneError for what is no causal LM."""
    with checkpoint_errors(checkpoint, wanted.trust_remote_code):
        return read_config(checkpoint, wanted.trust_remote_code)


def _measured(
    checkpoint: str, text: Any, wanted: EvalOptions, suite: SuiteOptions, resources: Resources
) -> dict[str, Any]:
    """Measures, prints and returns the figures."""
    with opened(checkpoint, wanted, resources) as (model, tokenizer):
        tokens = load_stream(text, tokenizer, limit=HELD_OUT_TOKENS, vocabulary=vocabulary_size(model))
        found = perplexity(model, tokens, wanted.window, wanted.stride)
        typer.echo(
            f"perplexity {found.value:.3f} on {tokens.source} ({found.tokens} tokens, window {found.window}, "
            f"stride {found.stride})")
        record: dict[str, Any] = {
            "model": checkpoint, "perplexity": {**dataclasses.asdict(found), "dataset": tokens.source,
                                                 "skipped": tokens.skipped},
            "speed": _speed(model), "parameters": model.num_parameters()}
        scores = None if suite.suite is None else _scores(model, tokenizer, suite, wanted)
        window = default_window(model)
    del model, tokenizer  # before another is opened
    if scores is None:
        return record
    dense = None
    if wanted.dense is not None:
        with opened(wanted.dense, wanted, resources) as (other, reader):
            dense = _scores(other, reader, suite, wanted)
    return record | _tasks(scores, dense, window, suite.limit)


@contextlib.contextmanager
def opened(name: str, wanted: EvalOptions, resources: Resources) -> Iterator[tuple[PreTrainedModel, Any]]:
    """A checkpoint of any family with its tokenizer, within the budgets; in fewer bits where they are asked for."""
    memory, place = resources.memory(resources.device), resolve_device(resources.device)
    memory.enforce(place)
    options: dict[str, Any] = {
        "device": resources.device, "dtype": wanted.dtype, "trust_remote_code": wanted.trust_remote_code}
    try:
        if resources.widens(name, memory, **options) is not None:
            options["dtype"] = "float32"
        model = resources.states_model(name, **options) or resources.load(name, memory, known_family=False, **options)
        yield model, load_tokenizer(name, trust_remote_code=wanted.trust_remote_code)
    finally:
        memory.lift(place)


def _speed(model: PreTrainedModel) -> dict[str, Any] | None:
    """Prints and returns the pace of a model that is in memory whole."""
    if reads_weights(model):
        typer.echo("speed: not measured, layers are read from disk")
        return None
    pace = speed(model)
    typer.echo(f"speed on {model.device}: prefill {pace.prefill:.0f} tokens/s, decode {pace.decode:.1f} tokens/s")
    return dataclasses.asdict(pace)


def _scores(
    model: PreTrainedModel, tokenizer: Any, suite: SuiteOptions, wanted: EvalOptions
) -> list[TaskScore]:
    assert suite.suite is not None
    return run_suite(model, tokenizer, suite.suite, data=_folders(suite), limit=suite.limit,
                     batch_size=wanted.batch_size, stages=Stages(show=True))


def _folders(suite: SuiteOptions) -> list[Path]:
    return [Path(folder) for folder in suite.suite_data]


def _check(wanted: EvalOptions, suite: SuiteOptions) -> None:
    """Refuses, before a model is loaded, tasks that cannot be had and options that say nothing without others."""
    if wanted.text_field is not None and wanted.text is None:
        raise KDPruneError("got --text-field without --text, expected both: the bundled text has no columns")
    if suite.suite is not None:
        check_suite(suite.suite, _folders(suite))
        return
    for name, given in (("--suite-data", suite.suite_data), ("--limit", suite.limit), ("--dense", wanted.dense),
                        ("--batch-size", wanted.batch_size)):
        if given:
            raise KDPruneError(f"got {name} without --suite, expected both; add --suite small")


def _tasks(
    scores: Sequence[TaskScore], dense: Sequence[TaskScore] | None, window: int, limit: int | None
) -> dict[str, Any]:
    """Prints the table and what is kept of the dense model's scores; returns both for the JSON record."""
    console = Console()
    console.print(_table(scores, dense))
    console.print(Text(
        f"items: {'all' if limit is None else f'the first {limit} of each task'}; ± one standard error; "
        f"perplexity of texts: window {window}, stride {default_stride(window)}", style="dim"))
    record: dict[str, Any] = {"limit": limit, "tasks": [score.model_dump() for score in scores]}
    if dense is not None:
        record["dense_tasks"] = [score.model_dump() for score in dense]
        try:
            kept = retention(dense, scores)
        except KDPruneError as error:  # of texts alone there is nothing to retain: no reason to lose the scores
            console.print(Text(f"retained performance: {error}"))
        else:
            _print_retention(kept, console)
            record["retention"] = dataclasses.asdict(kept)
    return record


def _table(scores: Sequence[TaskScore], dense: Sequence[TaskScore] | None) -> Table:
    """One line a score; the dense model's beside it where there is one."""
    table = Table(title="tasks", title_justify="left", title_style="bold")
    for name in ("task", "", "metric"):
        table.add_column(name)
    columns = ["value", *(["dense"] if dense else []), "chance", "items"]
    for name in columns:
        table.add_column(name, justify="right")
    for index, score in enumerate(scores):
        group = "" if score.group == score.task else score.group
        other = [_shown(dense[index])] if dense else []
        chance = MISSING if score.chance is None else f"{score.chance:.3f}"
        table.add_row(score.task, group, score.metric, _shown(score), *other, chance, f"{score.items:,}")
    return table


def _shown(score: TaskScore) -> str:
    """0.755 ± 0.014; perplexities with two decimals."""
    digits = 2 if "perplexity" in score.metric else 3
    if score.value is None:
        return MISSING
    return f"{score.value:,.{digits}f}" + ("" if score.stderr is None else f" ± {score.stderr:.{digits}f}")


def _print_retention(kept: Retention, console: Console) -> None:
    """The two shares, and which rows enter the second."""
    console.print(Text(f"retained: {percent(kept.mean, 1)} of the mean score"
                       + ("" if kept.mean_stderr is None else f" ± {percent(kept.mean_stderr, 1)}")))
    above = percent(kept.above_chance, 1)
    error = "" if kept.above_chance_stderr is None else f" ± {percent(kept.above_chance_stderr, 1)}"
    console.print(Text(f"retained above chance: {above}{error}, over {', '.join(kept.signal) or 'no task'}"))
    if kept.left_out:
        console.print(Text(f"without signal in the dense model: {', '.join(kept.left_out)}", style="dim"))


def check_page(page: Path) -> None:
    """Refuses, before any work, to write a page where something else lies: results, weights, a directory."""
    check_file(page, {})
    if page.exists() and page.suffix.lower() not in (".html", ".htm"):
        raise KDPruneError(f"got {page} for the page, where something else lies; choose a name that ends in .html")


def report_command(
    results: Annotated[str, typer.Argument(
        help="results.json, or the directory that holds it", metavar="RESULTS", rich_help_panel="Data")],
    output: Annotated[str | None, typer.Option(
        "--output", "-o", help="HTML file (report.html beside it)", metavar="FILE", rich_help_panel="Output")] = None,
) -> None:
    """Rebuild the HTML page, and the table of a comparison, from results.json alone."""
    results = at_home(results)
    if not is_there(results):
        raise KDPruneError(f"got {shortened(results)}, which does not exist; expected the results.json of a run, or "
                           "its directory")
    folder = Path(results) if Path(results).is_dir() else Path(results).parent
    page = Path(at_home(output)) if output else folder / "report.html"
    check_page(page)
    if is_comparison(results):
        for written in write_comparison(Comparison.load(results), folder, page):
            typer.echo(f"wrote {written}")
        return
    typer.echo(f"wrote {write_page(Results.load(results), page)}")
