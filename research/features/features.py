"""The stand-in's operations: ways to make [cos p, sin p] and what is around it, in turns, eager and compiled.

    python benchmarks/features.py --threads 1                            on a CPU
    python benchmarks/features.py --device cuda --dtypes bfloat16        on a GPU

Widths d, m = 5d/6 features, a token-wise stand-in of KDP's default form. "before" is the stand-in step by step: state
to float32, normalised, back; cosines, sines, and both copied together. Seconds as in benchmarks/speed.py; a row's
figures are medians over turns.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hardware
import torch
from speed import clock
from speed_page import table
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from kdprune.model.modeling_kdp import StandIn, cosines_and_sines
from kdprune.runtime import resolve_device

WIDTHS, ROWS = (128, 1024, 4096), (1, 16, 512, 2048, 8192)
MOST = 2048 * 1024  # rows · d that a CPU still measures
Call = Callable[[], Tensor]


def before(module: StandIn, x: Tensor) -> Tensor:
    """The stand-in step by step."""
    p = module.phase(rms_norm(x.float(), (module.width,), eps=module.eps).to(x.dtype))
    return x + module.readout(torch.cat((p.cos(), p.sin()), dim=-1))


def split(module: StandIn, x: Tensor) -> Tensor:
    """The read-out as two products added up, without a vector of features."""
    p = module.phase(rms_norm(x, (module.width,), eps=module.eps))
    first, second = module.readout.weight.chunk(2, dim=1)
    return x + linear(p.cos(), first, module.readout.bias).addmm_(p.sin(), second.t())


def one_buffer(p: Tensor) -> Tensor:
    """Cosines and sines written where they belong: what the stand-in does from ``MANY`` phases on."""
    z = p.new_empty(*p.shape[:-1], 2 * p.shape[-1])
    cosines, sines = z.chunk(2, dim=-1)
    torch.cos(p, out=cosines)
    torch.sin(p, out=sines)
    return z


def ways(module: StandIn, x: Tensor, compiled: bool) -> dict[str, Call]:
    """What takes turns, by name."""
    p = module.phase(x)
    found: dict[str, Call] = {
        "features: cos, sin, cat": lambda: torch.cat((p.cos(), p.sin()), dim=-1),
        "features: one buffer": lambda: one_buffer(p),
        "features: cos of [p, p - π/2]": lambda: torch.cat((p, p - math.pi / 2), dim=-1).cos_(),
        "stand-in: before": lambda: before(module, x),
        "stand-in: two products": lambda: split(module, x),
        "stand-in": lambda: module(x),
    }
    if compiled:
        loop = torch.compile(cosines_and_sines, dynamic=False, fullgraph=True)
        whole = torch.compile(module, dynamic=False, fullgraph=True)
        found |= {"features, compiled": lambda: loop(p), "stand-in, compiled": lambda: whole(x)}
    return found


def medians(calls: dict[str, Call], now: Callable[[], float], seconds: float) -> dict[str, float]:
    """Median seconds of every call, all in turns; at least nine turns, and about ``seconds`` in all."""
    timed: dict[str, list[float]] = {name: [] for name in calls}
    for call in [*calls.values()] * 2:
        call()
    begin = now()
    while len(timed["stand-in"]) < 9 or now() - begin < seconds:
        for name, call in calls.items():
            start = now()
            call()
            timed[name].append(now() - start)
    return {name: statistics.median(values) for name, values in timed.items()}


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """The record."""
    device, rows = resolve_device(options.device), []
    for dtype in options.dtypes.split(","):
        for width in WIDTHS:
            torch.manual_seed(0)
            module = StandIn(width, features=round(5 * width / 6)).to(device, getattr(torch, dtype))
            for count in ROWS:
                if device.type == "cpu" and count * width > MOST:
                    continue
                x = torch.randn(count, width, device=device).to(getattr(torch, dtype))
                torch.compiler.reset()
                found = medians(ways(module, x, options.compiled), clock(device), options.seconds)
                rows.append({"dtype": dtype, "width": width, "rows": count, "seconds": found})
                print(dtype, width, count, {key: f"{value * 1e6:.1f}" for key, value in found.items()}, flush=True)
    return {"command": shlex.join(["python", "benchmarks/features.py", *sys.argv[1:]]), "rows": rows,
            **hardware.facts(device)}


def page(record: dict[str, Any]) -> str:
    """Markdown from the record."""
    names = list(record["rows"][0]["seconds"])
    lines = [[row["dtype"], str(row["width"]), str(row["rows"]),
              *(f"{row['seconds'][key] * 1e6:,.1f}" for key in names)] for row in record["rows"]]
    return f"""# The stand-in's operations, {record['hardware']}, {record['month']}

    {record['command']}

{record['hardware']}, {record['threads']} thread{'s' * (record['threads'] > 1)}, torch {record['torch']}. Microseconds,
medians over turns; m = 5d/6 features.

{table(['dtype', 'd', 'rows', *names], lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of turns for every row")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--render", type=Path, help="a record: only write its page")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    file = options.render
    if file is None:
        record = run(options)
        name = hardware.name(resolve_device(options.device))
        file = Path(__file__).parent / f"features_{name}_{record['month']}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(json.loads(file.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
