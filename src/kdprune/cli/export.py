"""``kdprune export-gguf``: a result as a file for llama.cpp."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from kdprune.errors import KDPruneError
from kdprune.model.llama_cpp import Weights, export_gguf, is_gguf
from kdprune.options import option, options_of, taken, typed_options
from kdprune.run.inputs import inputs_of
from kdprune.store.directories import check_file
from kdprune.store.files import readable_bytes


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What becomes a GGUF file, and how."""

    directory: str | None = option(
        None, "directory of a result, or of any stock checkpoint, with its tokenizer", group="model", positional=True,
        path=True)
    output: str | None = option(None, "GGUF file to write", group="output", short="-o", path=True)
    weights: Weights = option(
        "auto", "how matrices are stored; auto: as in the checkpoint. For fewer bits than 8 llama.cpp has "
        "llama-quantize", group="output")
    overwrite: bool = option(False, "replace an earlier GGUF file there", group="output")


def export_command(**options: Any) -> None:
    """Write a result as a GGUF file for llama.cpp: stock ones, and layers of different widths of a Llama."""
    wanted = taken(ExportOptions, typed_options(options, options_of(ExportOptions)))
    for name, given in (("directory", wanted.directory), ("output", wanted.output)):
        if given is None:
            raise KDPruneError(f"got no {name}, expected both: kdprune export-gguf DIRECTORY --output FILE")
    directory, output = Path(str(wanted.directory)), Path(str(wanted.output))
    check_file(output, inputs_of(directory))
    if output.exists() and not (wanted.overwrite and is_gguf(output)):
        raise KDPruneError(f"got {output} to write, which is there already; " + (
            "choose another name, or add --overwrite" if is_gguf(output) else
            "only an earlier GGUF file is replaced: choose another name"))
    for note in export_gguf(directory, output, weights=wanted.weights):
        typer.echo(f"note: {note}")
    typer.echo(f"wrote {output} ({readable_bytes(output.stat().st_size)})")
