"""``kdprune eval`` and ``kdprune report``: measure a checkpoint, rebuild a page."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from kdprune.cli.options import Device, Dtype, Trust
from kdprune.data import load_stream
from kdprune.evaluation.models import vocabulary_size
from kdprune.evaluation.perplexity import perplexity
from kdprune.evaluation.speed import speed
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.report.page import write_page
from kdprune.report.results import Results, write_file
from kdprune.session import HELD_OUT_TOKENS
from kdprune.text import bundled_heldout


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


def report_command(
    results: Annotated[str, typer.Argument(help="results.json, or the directory that holds it")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="HTML file (report.html beside it)")] = None,
) -> None:
    """Rebuild the HTML page from results.json alone."""
    found = Results.load(results)
    folder = Path(results) if Path(results).is_dir() else Path(results).parent
    typer.echo(f"wrote {write_page(found, output or folder / 'report.html')}")
