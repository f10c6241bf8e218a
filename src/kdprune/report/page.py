"""``report.html``: one self-contained page, made from `Results` alone."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kdprune.report import gallery, summary
from kdprune.report.findings import stand_in
from kdprune.report.results import Results, write_file


@dataclass(frozen=True)
class Cell:
    """A stretch of the layer strip: `start`, `span` in layers, what became of it, and its label."""

    start: int
    span: int
    kind: str
    label: str


def environment() -> Environment:
    """Templates beside this file; HTML is escaped, Markdown is not, unknown names are errors."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        count=summary.count,
        duration=summary.duration,
        percent=summary.percent,
        size=summary.size,
        layers=summary.layer_range,
        decimals=summary.decimals,
        recipe=recipe_yaml,
        symbols=symbols,
    )
    return made


def symbols(text: str) -> Markup:
    """B_A and R_φ with their subscripts, no line break inside 4–9; everything else escaped."""
    text = re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", text)
    return Markup(str(escape(text)).replace("B_A", "B<sub>A</sub>").replace("R_φ", "R<sub>φ</sub>"))


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """The recipe as it can be given to ``--recipe``."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()


def render_page(results: Results) -> str:
    """The whole page as a string; parts the run lacks are left out."""
    blocks = [
        {
            "fit": fit,
            "stand_in": stand_in(fit),
            "solved": gallery.solved_steps(fit),
            "training": gallery.training_pictures(fit),
            "theory": gallery.theory_pictures(fit),
        }
        for fit in results.fit
    ]
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            results=results,
            headline=summary.headline(results),
            tiles=summary.tiles(results),
            strip=layer_strip(results),
            rows=summary.comparison(results),
            perplexity_setting=summary.perplexity_setting(results),
            speed_setting=summary.speed_setting(results),
            healing=summary.healing(results),
            analysis=gallery.analysis_pictures(results),
            overview=gallery.overview_pictures(results),
            blocks=blocks,
            slowest=max((value or 0.0 for value in results.seconds.values()), default=0.0),
        )
    )


def write_page(results: Results, path: str | Path) -> Path:
    """Write the page atomically."""
    return write_file(path, render_page(results))


def write_analysis(results: Results, path: str | Path) -> Path:
    """Write the similarity report alone, whatever else the run holds."""
    left_out: dict[str, Any] = {"fit": [], "samples": [], "perplexity": None, "speed": None, "heal": None}
    return write_page(results.model_copy(update=left_out), path)


def layer_strip(results: Results) -> list[Cell]:
    """The pruned model layer by layer: kept and narrowed ones, and a wide cell for every block."""
    stand_ins = {fit.block: summary.count(fit.parameters) for fit in results.fit}
    pruned = results.layers.pruned is not None
    first, last = results.analysis.protected if results.analysis else (0, 0)
    narrowed = {width.layer for width in results.widths}
    cells, layer, starts = [], 0, dict(results.blocks)
    while layer < results.layers.dense:
        if layer in starts:
            block = (layer, starts[layer])
            kind = "replaced" if block in stand_ins else "dropped" if pruned else "chosen"
            label = f"stand-in, {stand_ins[block]} parameters" if block in stand_ins else kind
            cells.append(Cell(layer, block[1] - layer, kind, label))
            layer = block[1]
        else:
            kind = "kept" if first <= layer < results.layers.dense - last else "protected"
            cells.append(Cell(layer, 1, "narrowed" if layer in narrowed else kind, str(layer)))
            layer += 1
    return cells
