"""What ``kdprune plan`` says of real models, and how its figures compare with runs on record: docs/real-models.md.

    python benchmarks/real_models.py             plans anew, writes docs/real-models/plans.json and the page
    python benchmarks/real_models.py --render    only the page again, from the record

Needs no network and no weights: the configs are in docs/real-models, as the hub has them.
"""

import argparse
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import plan_checks
from book_tables import markdown
from plan_checks import Check
from rich.console import Console

from kdprune.cli.plan import print_plan
from kdprune.planning import forecast
from kdprune.planning.forecast import DEVICES
from kdprune.planning.plan import PruningPlan, plan
from kdprune.report.summary import count, duration
from kdprune.store.files import readable_bytes

ROOT = Path(__file__).parent.parent
CONFIGS, PAGE = ROOT / "docs" / "real-models", ROOT / "docs" / "real-models.md"
RECORD = CONFIGS / "plans.json"
# Config → hub name.
MODELS = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "qwen3-8b": "Qwen/Qwen3-8B",
}
CALIBRATION = "allenai/c4:en"
SAMPLES = (500, 1000, 2048, 4000)
PAPER = {"preset": "paper", "block_length": 4, "ratio": 0.2278}
ON = ("h100", "a100", "rtx4090")
INTRO = """# Real models

What it takes to prune models that could not be had here, as `kdprune plan` computes it: the command reads a model's
config, builds it without weights, and counts. Page written by `python benchmarks/real_models.py` from
`docs/real-models/plans.json`.

    kdprune plan meta-llama/Llama-2-7b-hf --ratio 0.25              # or a directory with config.json, or that file
    kdprune plan config.json --preset paper --blocks 4-8,20-24      # every option of KDP, as in kdprune prune
    kdprune plan config.json --device a100 --host-memory 64GiB --samples 1000 --json plan.json
    kdprune plan config.json --device cpu
    kdprune plan config.json --tflops 400 --utilisation 0.3         # any other device

**None of the runs on this page was made.** Sizes and operations are exact; memory and time are counts with constants
that were set from runs on one CPU thread and have not been tried on an accelerator. How well they fit those runs is
in the last but one section.

The paper's table has six models. The notes this project was built from name three of them, LLaMA2-7B, LLaMA2-13B and
LLaMA3-8B; the other three rows are two OPT models that SliceGPT reports perplexities of, and a Qwen3, so that every
family that the reference suite trains is here. Configs: `docs/real-models/*.json`, sizes as the hub has them; the
parameters they come to are the published ones (`tests/test_plan.py`).
"""
READING = """Reading and writing: operations of a token before / after, the most that it can be faster; head
included. c: channels of a stand-in, m: its random frequencies.

Without data the choice of blocks is unknown. Those shown are what `--ranking similarity` takes when similarity falls
evenly with distance: as many as remove at most half a layer more than asked for. By damage, the default, there may be
fewer and longer ones; what grows with the longest block (step 1's operators) moves with them. Options that bound it:
`--max-block`, `--block-length`, `--features`.
"""
PAPER_FORM = """Two blocks of four on LLaMA2-7B are the paper's 22.8 %. On the others the ratio asked for is the same,
and there are as many blocks of four as it takes.
"""
TAKES = """Peak memory on the host and on an accelerator, with the model whole on it or read layer by layer; disk that
the states take in the work directory, and beside them the analysis of a streamed model. Time is that of counted
operations at the share of the peaks in the last table, without reading and writing files; in brackets, what `kdprune
prune` would do with the model there. Most of the time is the stand-ins' passes over all tokens, in float32, and the
moments of their solves, in float64. What a device takes beside the model is the regression that landmarks are chosen
by. With a Fourier part the states inside the blocks take most of the host's memory: step 1 sees 16 m tokens of them,
held two to three times for a moment, and `--kernel-tokens` sets how many.
"""
SMALLER = """On an H100. States and disk go with the tokens; step 1 has its own number, and memory hardly moves.
"""
CHECKED = """Runs of `benchmarks/cost.py`, `memory.py` and `speed.py` on one CPU thread. The records of the first two
set the constants: this says how well one count fits shapes from 3.5 M to 7 B parameters, and is no test on another
machine. The bundled model's time is far off because its matrices are too small for the rates of large ones, its memory
because buffers that are not counted are most of it. Of the trials that blocks may be chosen by (damage) a share is
counted, as many as these runs made. Of the runs of `memory.py` only peaks are compared: they are too short to be
timed. Step 2 with a hidden layer (the paper's form) is in none of them: it has step 3's constant.
"""
RATES = """Peaks in TFLOP/s, dense. Stand-ins are fitted in float32 and their operators solved for in float64, hence
the three columns. The share of a GPU's peaks is an assumption: `--utilisation`.
"""


def printed(found: PruningPlan) -> str:
    """What the command prints."""
    out = io.StringIO()
    print_plan(found, Console(file=out, width=100, color_system=None))
    return out.getvalue()


def recorded(found: PruningPlan) -> dict[str, Any]:
    """A plan as data."""
    return json.loads(json.dumps({**dataclasses.asdict(found), "seconds": found.seconds}))


def config(name: str) -> str:
    """Path of a config from the root of the repository: what the record calls the model."""
    return str((CONFIGS / f"{name}.json").relative_to(ROOT))


def planned(name: str, **options: Any) -> PruningPlan:
    """A plan whose model is called by its hub name."""
    return dataclasses.replace(plan(ROOT / config(name), **options), model=MODELS[name])


def make_record() -> dict[str, Any]:
    """Everything the page shows."""
    devices = {device: {name: recorded(planned(name, device=device)) for name in MODELS} for device in ON}
    return {
        "devices": devices,
        "paper": {name: recorded(planned(name, **PAPER)) for name in MODELS},
        "samples": {str(rows): recorded(planned("llama-2-7b", samples=rows)) for rows in SAMPLES},
        "printed": {
            "kdprune plan meta-llama/Llama-2-7b-hf --ratio 0.25": printed(planned("llama-2-7b", ratio=0.25)),
            "kdprune plan meta-llama/Llama-2-7b-hf --preset paper --blocks 4-8,20-24": printed(
                planned("llama-2-7b", preset="paper", blocks="4-8,20-24")),
        },
        "checks": [dataclasses.asdict(check) for check in plan_checks.checks()],
    }


def table(titles: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """A Markdown table whose first ``left`` columns stand to the left, and an empty line."""
    return [markdown(titles, rows, left), ""]


def plain(text: str) -> str:
    """Without the spaces that do not break."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def blocks_of(found: dict[str, Any]) -> str:
    """Layers and blocks, with lengths."""
    lengths = [end - start for start, end in found["blocks"]]
    return f"{sum(lengths)} in {len(lengths)} ({' + '.join(map(str, lengths))})"


def what_it_gives(plans: dict[str, Any], size: str) -> list[str]:
    """Net ratio, parameters, disk, cache, operations, and how large stand-ins are: "channels" or "features"."""
    rows = []
    for name, found in plans.items():
        dense, pruned = found["dense"], found["pruned"]
        rows.append([
            name, blocks_of(found), str(found[size]), f"{100 * found['net_ratio']:.2f} %",
            plain(f"{count(dense['parameters'])} → {count(pruned['parameters'])}"),
            f"{readable_bytes(dense['disk_bytes'])} → {readable_bytes(pruned['disk_bytes'])}",
            f"{readable_bytes(dense['kv_bytes'])} → {readable_bytes(pruned['kv_bytes'])}",
            f"×{dense['prefill_flops'] / pruned['prefill_flops']:.3f}",
            f"×{dense['decode_flops'] / pruned['decode_flops']:.3f}"])
    symbol = {"channels": "c", "features": "m"}[size]
    titles = ["model", "layers out", symbol, "net", "parameters", "on disk", "KV cache a token", "reading", "writing"]
    return table(titles, rows, 2)


def what_it_takes(by_device: dict[str, Any]) -> list[str]:
    """Memory, disk and time of every model on every device."""
    rows = []
    for name in MODELS:
        found = by_device[ON[0]][name]
        whole, streamed = found["memory"]
        row = [name, readable_bytes(whole["host_bytes"]), readable_bytes(whole["device_bytes"]),
               readable_bytes(streamed["host_bytes"]), readable_bytes(streamed["device_bytes"]),
               readable_bytes(found["states_bytes"]), readable_bytes(found["scratch_bytes"])]
        for device in ON:
            need = next(need for need in by_device[device][name]["memory"] if need["taken"])
            how = " (layer by layer)" if need["streamed"] else ""
            how = how if need["device_bytes"] <= (DEVICES[device].memory or 0) else " (does not fit)"
            row.append(plain(duration(by_device[device][name]["seconds"])) + how)
        rows.append(row)
    return table(["model", "host, whole", "device, whole", "host, layer by layer", "device, layer by layer",
                  "states on disk", "scratch, layer by layer", *ON], rows)


def by_samples(plans: dict[str, Any]) -> list[str]:
    """LLaMA2-7B against the size of the calibration set."""
    return table(
        ["rows of 512", "tokens", "states on disk", "host", "device", "forward passes", "time"],
        [[f"{int(rows):,}", f"{found['samples'] * found['length']:,}", readable_bytes(found["states_bytes"]),
          readable_bytes(found["memory"][0]["host_bytes"]), readable_bytes(found["memory"][0]["device_bytes"]),
          f"{found['seconds'] / found['forward_seconds']:.1f}", plain(duration(found["seconds"]))]
         for rows, found in plans.items()], 0)


def commands() -> list[str]:
    """What to type for every model."""
    lines = []
    for name, hub in MODELS.items():
        given = f"--calibration {CALIBRATION} --work-dir work/{name}"
        lines += [f"    kdprune plan {hub} --ratio 0.25",
                  f"    kdprune prune {hub} --ratio 0.25 {given} -o {name}-kdp",
                  f"    kdprune prune {hub} --preset paper --ratio 0.2278 --block-length 4 {given} -o {name}-paper", ""]
    return lines


def shown(check: Check, value: float) -> str:
    """A figure with its unit."""
    if check.unit == "B":
        return readable_bytes(value)
    if check.unit:
        return f"{value:,.3g} s" if check.unit == "s" else f"×{value:.3f}"
    return f"{value:,.0f}" if value > 1 else f"{100 * value:.3f} %"


def against_measured(checks: list[Check]) -> list[str]:
    """Predicted beside measured; what must agree exactly in one line."""
    exact, rest = [check for check in checks if check.exact], [check for check in checks if not check.exact]
    equal = sum(abs(check.ratio - 1) < 1e-12 for check in exact)
    near = [check for check in rest if 0.85 <= check.ratio <= 1.15]
    far = sorted({check.run.split(",")[0] for check in rest if not 0.75 <= check.ratio <= 1.33})
    names = ", ".join(sorted({check.name for check in exact}))
    return [
        f"Exact figures ({names}): {equal} of {len(exact)} equal those of the runs. Of the {len(rest)} others "
        f"{len(near)} are within 15 %; farther off than a third: {', '.join(far) or 'none'}.", "",
        *table(["run", "figure", "predicted", "measured", "predicted / measured"],
               [[check.run, check.name, shown(check, check.predicted), shown(check, check.measured),
                 f"{check.ratio:.2f}"] for check in rest], 2)]


def constants() -> list[str]:
    """The devices and the named constants."""
    rates = [[device, item.title, f"{item.half / 1e12:.4g}", f"{item.single / 1e12:.4g}", f"{item.double / 1e12:.4g}",
              "–" if item.bandwidth is None else f"{item.bandwidth / 1e12:.4g}", f"{item.utilisation:g}", item.source]
             for device, item in DEVICES.items()]
    names = ("ANALYSE", "REFINE", "GRADIENT", "SOLVE", "RANK", "THEORY", "PATH", "PASSES", "MOMENT", "INVERSE", "TRIED",
             "LIBRARIES", "OPERATOR", "SYSTEM", "LOGIT", "MATRICES")
    shown = ", ".join(f"{name} {getattr(forecast, name):,}" for name in names)
    return [*table(["device", "", "bfloat16", "float32", "float64", "TB/s", "share", "source"], rates, 2), RATES,
            f"Constants of `src/kdprune/planning/forecast.py`, each explained there: {shown}.", ""]


def page(record: dict[str, Any]) -> str:
    """The page, from the record alone."""
    lines = [INTRO, "## What is gained, at 25 % net", "", *what_it_gives(record["devices"][ON[0]], "channels"), READING,
             "## In the paper's form: `--preset paper --block-length 4 --ratio 0.2278`", "",
             *what_it_gives(record["paper"], "features"), PAPER_FORM,
             "## What it takes, 4,000 rows of 512 tokens", "", *what_it_takes(record["devices"]), TAKES,
             "### LLaMA2-7B, fewer rows", "", *by_samples(record["samples"]), SMALLER,
             "## Commands", "", *commands(), "## What `kdprune plan` prints", ""]
    for command, text in record["printed"].items():
        lines += [f"    $ {command}", *(f"    {line}".rstrip() for line in plain(text).splitlines()), ""]
    checks = [Check(**check) for check in record["checks"]]
    lines += ["## Predicted and measured", "", CHECKED, *against_measured(checks), "## Devices and constants", "",
              *constants()]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the page again")
    if not parser.parse_args().render:
        RECORD.write_text(json.dumps(make_record(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
