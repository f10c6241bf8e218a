"""``kdprune plan``: what pruning a model would give and take, from its config alone."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdprune.methods import METHODS
from kdprune.options import at_home, option, options_of, same_option, typed_options
from kdprune.planning.forecast import DEVICES
from kdprune.planning.plan import PruningPlan, Side, plan
from kdprune.report import summary
from kdprune.report.results import write_file
from kdprune.run.inputs import inputs_of
from kdprune.run.option_groups import ModelOptions, TextOptions
from kdprune.store.directories import check_file


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the forecast goes by; the device is one of a table, because nothing runs."""

    model: Any = option(
        None, "directory with config.json, that file, or hub id (the bundled reference model)", group="model",
        positional=True, path=True)
    dtype: str | None = same_option(ModelOptions, "dtype")
    samples: int | None = option(None, "rows of calibration text (4000)", group="data")
    length: int | None = same_option(TextOptions, "length")
    host_memory: str | None = option(None, "memory that prune may take, 64GiB (not known)", group="resources")
    device: str = option(
        "h100", f"machine that the forecast is for, of a table, since nothing runs here: {', '.join(DEVICES)}",
        group="resources")
    tflops: float | None = option(None, "instead of a device: its bfloat16 peak, in TFLOP/s", group="resources")
    utilisation: float | None = option(None, "share of its peaks (0.4; cpu: as measured)", group="resources")


def plan_command(
    json_file: Annotated[str | None, typer.Option(
        "--json", help="write the figures to this file; -: stdout", metavar="FILE", rich_help_panel="Output")] = None,
    **options: Any,
) -> None:
    """Say what pruning MODEL with KDP would give and take; reads only its config, no weights and no text."""
    if json_file not in (None, "-"):
        json_file = at_home(json_file)
        check_file(json_file, inputs_of(at_home(options.get("model"))), "net_ratio")
    found = plan(**typed_options(options, options_of(PlanOptions, METHODS["kdp"])))
    if json_file == "-":
        sys.stdout.write(as_json(found))
        return
    print_plan(found, Console())
    if json_file:
        write_file(json_file, as_json(found))


def as_json(found: PruningPlan) -> str:
    """All figures: bytes, operations, seconds, shares."""
    return json.dumps({**dataclasses.asdict(found), "seconds": found.seconds}, indent=1) + "\n"


def print_plan(found: PruningPlan, console: Console) -> None:
    """Blocks, dense against pruned, memory, time."""
    console.print(Text(_headline(found), style="bold"))
    console.print(Text(_layout(found)))
    console.print()
    for table in (_sides(found), _memory(found), _time(found)):
        console.print(table)
    for note in _notes(found):
        console.print(Text(note, style="dim"))


def _headline(found: PruningPlan) -> str:
    reached = found.net_ratio if found.of == "all" else found.net_ratio_layers
    asked = f"{summary.percent(found.ratio)}{summary.OUTSIDE[found.of]}"
    below = "" if reached >= found.ratio else f", below the {asked} asked for"
    both = f"{summary.percent(found.net_ratio, 1)} net, {summary.percent(found.net_ratio_layers, 1)} of the layers'"
    return f"{found.model}: {both}{below}"


def _layout(found: PruningPlan) -> str:
    """Blocks and stand-ins in words."""
    spans = ", ".join(f"[{start}, {end})" for start, end in found.blocks)
    replaced, count = sum(end - start for start, end in found.blocks), len(found.blocks)
    size = summary.count(max(found.added))
    context = "attention and " if found.context else ""
    sizes = ", ".join(
        f"{name} {size}" for name, size in (("m =", found.features), ("c =", found.channels), ("hidden", found.hidden))
        if size)
    module = "an ordinary decoder layer" if found.ordinary else f"{context}{found.kind} features"
    words = (f"{replaced} of {found.dense.layers} layers in {count} block{'s' * (count > 1)}, {spans}; each gets "
             f"{module}{sizes and ', ' + sizes} ({size} parameters)")
    return words if found.given else (
        f"{words}. Laid out as for a similarity that falls evenly; how many blocks, and which, the data will say.")


def _sides(found: PruningPlan) -> Table:
    table = Table(title_justify="left")
    table.add_column("")
    for name in ("dense", "pruned", ""):
        table.add_column(name, justify="right", style="bold" if name == "pruned" else None)

    def row(name: str, shown: Any, value: Any) -> None:
        before, after = value(found.dense), value(found.pruned)
        change = 100 * (after / before - 1)
        table.add_row(name, shown(before), shown(after), f"{change:+.1f}{summary.SPACE}%".replace("-", "−"))

    def whole(number: float) -> str:
        return f"{number:,.0f}"

    def operations(number: float) -> str:
        return f"{number / 1e9:,.3g} GFLOP"

    row("layers", whole, lambda side: side.layers)
    row("parameters", whole, lambda side: side.parameters)
    row("layers' parameters", whole, lambda side: side.parameters_layers)
    if found.dense.active < found.dense.parameters:
        row("parameters active at a token", whole, lambda side: side.active)
    row(f"on disk, {found.dtype}", summary.size, lambda side: side.disk_bytes)
    row("KV cache a token", summary.size, lambda side: side.kv_bytes)
    row(f"a token, reading {found.length}", operations, lambda side: side.prefill_flops)
    row(f"a token, writing behind {found.length}", operations, lambda side: side.decode_flops)
    if found.device.bandwidth is not None:
        row("writing, at most", lambda pace: f"{pace:,.0f} tokens/s", lambda side: _pace(found, side))
    return table


def _pace(found: PruningPlan, side: Side) -> float:
    """Tokens a second at batch 1 if every weight is read once a token and nothing else takes time."""
    assert found.device.bandwidth is not None
    return found.device.bandwidth / (side.disk_bytes + found.length * side.kv_bytes)


def _memory(found: PruningPlan) -> Table:
    table = Table(title="peak memory while pruning", title_justify="left")
    table.add_column("model")
    table.add_column("host", justify="right")
    table.add_column("device", justify="right")
    table.add_column("")
    for need in found.memory:
        where = summary.MISSING if need.device_bytes is None else summary.size(need.device_bytes)
        too_much = need.device_bytes and found.device.memory and need.device_bytes > found.device.memory
        remark = "does not fit the device" if too_much else "what prune does here" if need.taken else ""
        table.add_row("layer by layer" if need.streamed else "whole", summary.size(need.host_bytes), where, remark)
    return table


def _time(found: PruningPlan) -> Table:
    table = Table(title=f"time on {found.device.title}, {found.samples * found.length:,} tokens", title_justify="left")
    table.add_column("stage")
    table.add_column("forward passes", justify="right")
    table.add_column("", justify="right")
    for stage in found.stages:
        table.add_row(stage.name, f"{stage.passes:,.2f}", summary.duration(stage.seconds))
    table.add_section()
    table.add_row("all", f"{found.seconds / found.forward_seconds:,.2f}", summary.duration(found.seconds))
    return table


# What the stages do that takes their time, for the one that takes most of it.
_DOING = {
    "analyse": "passes through the layers, and kernels of tokens with each other",
    "damage": "passes through the layers behind candidate blocks",
    "layer states": "passes through the layers",
    "corrected states": "passes through the layers between blocks, with the earlier stand-ins in place",
    "kernel": "solves for the operators, in float64",
    "inverse": "gradient steps, in float32",
    "refine": "gradient steps on the stand-ins, in bfloat16 without Fourier features",
    "rest": "solves for the read-outs: the stand-ins' passes in float32, moments in float64",
}


def _longest(found: PruningPlan) -> str:
    """The stage that takes most of the time, its share, and what it does."""
    stage = max(found.stages, key=lambda stage: stage.seconds)
    doing = _DOING[stage.name]
    return f"{stage.name}, {summary.percent(stage.seconds / found.seconds)}, {doing}"


def _notes(found: PruningPlan) -> list[str]:
    """How figures were come by."""
    device = found.device
    share = "the rates measured" if device.utilisation == 1 else (
        f"{summary.percent(device.utilisation)} of the device's peaks, which is assumed")
    stored = [] if found.stored is None else [
        f"weights: quantised with {found.stored}; they are turned back into {found.dtype}, in which they are counted "
        "here and saved"]
    return [
        *stored,
        f"states: {summary.size(found.states_bytes)} in the work directory (in memory with --work-dir none); layer by "
        f"layer {summary.size(found.scratch_bytes)} more there, or in a quarter of --host-memory, while layers are "
        "scored",
        f"most of the time: {_longest(found)}",
        f"time: counted operations at {share}: {device.half / 1e12:.3g} TFLOP/s in bfloat16, "
        f"{device.single / 1e12:.3g} in float32, in which stand-ins are fitted ({device.source}); reading and saving "
        "weights is left out",
        f"one forward pass of the layers over the calibration set: {summary.duration(found.forward_seconds)}; "
        "docs/real-models.md compares such figures with measured runs",
    ]
