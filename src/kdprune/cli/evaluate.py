"""``kdprune eval`` and ``kdprune report``: measure a checkpoint, rebuild a page."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from kdprune.cli.options import Device, Dtype, Trust
from kdprune.data import load_stream
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import vocabulary_size
from kdprune.evaluation.perplexity import default_window, perplexity
from kdprune.evaluation.speed import speed
from kdprune.evaluation.tasks import TaskScore, check_suite, run_suite
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.report.comparison_page import write_comparison
from kdprune.report.comparison_records import Comparison, is_comparison
from kdprune.report.page import write_page
from kdprune.report.results import Results, write_file
from kdprune.report.retention import Retention, retention
from kdprune.report.summary import MISSING, percent
from kdprune.runtime import Stages
from kdprune.session import HELD_OUT_TOKENS
from kdprune.text import bundled_heldout

Suite = Annotated[
    str | None, typer.Option(help="tasks through lm-eval: small, paper, or names of its tasks, joined by commas")]
SuiteData = Annotated[
    list[Path] | None,
    typer.Option(help="directory with <task>.jsonl and texts, searched before the hub; repeat for more")]
Limit = Annotated[int | None, typer.Option(help="items a task, the first; 64 tokens a text for each (all)", min=1)]
BatchSize = Annotated[int | None, typer.Option(help="requests of tasks a forward pass (64; 8 on a CPU)", min=1)]


def eval_command(
    checkpoint: Annotated[str, typer.Argument(help="any causal LM: hub id, stock or pruned directory")],
    text: Annotated[str | None, typer.Option(help="text file or hub data set; left out: the bundled text")] = None,
    window: Annotated[int | None, typer.Option(help="tokens a window (the model's context, at most 2048)")] = None,
    stride: Annotated[int | None, typer.Option(help="tokens between windows (half the window)")] = None,
    suite: Suite = None,
    suite_data: SuiteData = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    dense: Annotated[
        str | None, typer.Option(help="with --suite: the model it was pruned from, for retained performance")] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json_file: Annotated[str | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Perplexity and speed of a checkpoint, and its scores on tasks."""
    data = suite_data or []
    _check(suite, data, limit, dense)

    def load(name: str) -> tuple[PreTrainedModel, Any]:
        return (
            load_model(name, device=device or "auto", dtype=dtype, trust_remote_code=trust_remote_code,
                       known_family=False),
            load_tokenizer(name, trust_remote_code=trust_remote_code))

    model, tokenizer = load(checkpoint)
    tokens = load_stream(
        text or bundled_heldout(), tokenizer, limit=HELD_OUT_TOKENS, vocabulary=vocabulary_size(model))
    found, pace = perplexity(model, tokens, window, stride), speed(model)
    typer.echo(
        f"perplexity {found.value:.3f} on {tokens.source} ({found.tokens} tokens, window {found.window}, "
        f"stride {found.stride})")
    typer.echo(f"speed on {model.device}: prefill {pace.prefill:.0f} tokens/s, decode {pace.decode:.1f} tokens/s")
    record = {"model": checkpoint, "perplexity": {**dataclasses.asdict(found), "dataset": tokens.source},
              "speed": dataclasses.asdict(pace), "parameters": model.num_parameters()}
    if suite is not None:
        def score(model: PreTrainedModel, tokenizer: Any) -> list[TaskScore]:
            return run_suite(model, tokenizer, suite or "", data=data, limit=limit, batch_size=batch_size,
                             stages=Stages(show=True))

        record |= _tasks(score(model, tokenizer), score(*load(dense)) if dense else None, model, limit)
    if json_file:
        write_file(json_file, json.dumps(record, indent=1) + "\n")


def _check(suite: str | None, data: Sequence[Path], limit: int | None, dense: str | None) -> None:
    """Refuses, before a model is loaded, tasks that cannot be had and options that say nothing without them."""
    if suite is not None:
        check_suite(suite, data)
        return
    for name, given in (("--suite-data", data), ("--limit", limit), ("--dense", dense)):
        if given:
            raise KDPruneError(f"got {name} without --suite, expected both; add --suite small")


def _tasks(
    scores: Sequence[TaskScore], dense: Sequence[TaskScore] | None, model: PreTrainedModel, limit: int | None
) -> dict[str, Any]:
    """Prints the table and what is kept of the dense model's scores; returns both for the JSON record."""
    console = Console()
    console.print(_table(scores, dense))
    window = default_window(model)
    console.print(Text(
        f"items: {'all' if limit is None else f'the first {limit} of each task'}; ± one standard error; "
        f"perplexity of texts: window {window}, stride {max(1, window // 2)}", style="dim"))
    record: dict[str, Any] = {"limit": limit, "tasks": [dataclasses.asdict(score) for score in scores]}
    if dense is not None:
        record["dense_tasks"] = [dataclasses.asdict(score) for score in dense]
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


def report_command(
    results: Annotated[str, typer.Argument(help="results.json, or the directory that holds it")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="HTML file (report.html beside it)")] = None,
) -> None:
    """Rebuild the HTML page, and the table of a comparison, from results.json alone."""
    folder = Path(results) if Path(results).is_dir() else Path(results).parent
    page = Path(output) if output else folder / "report.html"
    if is_comparison(results):
        for written in write_comparison(Comparison.load(results), folder, page):
            typer.echo(f"wrote {written}")
        return
    typer.echo(f"wrote {write_page(Results.load(results), page)}")
