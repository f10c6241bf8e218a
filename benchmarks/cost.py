"""What does pruning cost, in forward passes over the calibration set, stage by stage, and how much memory?

    OMP_NUM_THREADS=1 python benchmarks/cost.py                  on a CPU: bundled and 0.1b whole, 1b and 7b in part
    python benchmarks/cost.py --device cuda                      on a GPU: every shape, a million tokens, bfloat16
    python benchmarks/cost.py --shapes 1b                        one of them; the others keep their figures
    python benchmarks/cost.py --render benchmarks/cost_….json    the page again, from the record

Every shape is pruned by KDP's default, 25 % net, in a process of its own, on random token ids with random weights
(``random_checkpoint.py``), the bundled model on its text. A forward pass is one of the layer stack over the same
tokens, without the head, timed before and after. On a CPU larger shapes get fewer tokens and epochs (``PLANS``); what
the default's epochs over a million tokens would take follows from them and is marked ~.
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import hardware
import torch
from pruning_run import Job
from random_checkpoint import write_checkpoint
from speed import SHAPES

from kdprune.data.sources import BUNDLED_MODEL
from kdprune.methods.common.analysis import ENOUGH
from kdprune.methods.kdp.kdp import PRESETS, SHORT
from kdprune.runtime.machine import resolve_device
from kdprune.store.files import readable_bytes

HERE = Path(__file__).parent
MILLION = 2**20  # tokens of the projection and of the runs on a GPU
QUICK = {"kernel_epochs": 1, "refine_epochs": 1}
# Tokens, budget and options by shape on a CPU; "bundled" has its own text. The blocks are those taken when similarity
# falls evenly with distance and none is longer than four layers.
PLANS: dict[str, dict[str, Any]] = {
    "bundled": {"tokens": None},
    "0.1b": {"tokens": 8192, "length": 128, "dtype": "float32", "options": {**QUICK, "kernel_tokens": 4096}},
    "1b": {"tokens": 1024, "length": 128, "dtype": "float32", "host_memory": "4GiB", "options": {
        **QUICK, "kernel_tokens": 512, "blocks": [[3, 5], [6, 9], [10, 13]]}},
    "7b": {"tokens": 512, "length": 128, "dtype": "bfloat16", "host_memory": "6GiB", "stop": "analyse"},
}
STEPS = ("analyse", "layer states", "kernel", "inverse", "refine", "rest", "save and verify")


def plan(shape: str, device: torch.device, work: Path, checkpoint: Path) -> Job:
    """The job of a shape: whole on a GPU, as ``PLANS`` has it on a CPU."""
    if device.type == "cpu":
        chosen = PLANS[shape]
    elif shape == "bundled":
        chosen = {"tokens": None}
    else:
        chosen = {"tokens": MILLION, "dtype": "bfloat16", "once": MILLION // 8}
    return Job(model=str(checkpoint), device=str(device), work_dir=str(work), **chosen)


def run_shape(shape: str, device: torch.device, folder: Path, checkpoints: Path | None) -> dict[str, Any]:
    """Makes the checkpoint, runs the job, and removes what it made."""
    checkpoint = BUNDLED_MODEL if shape == "bundled" else (checkpoints or folder) / shape
    made = not checkpoint.exists()
    if made:
        name = PLANS[shape]["dtype"] if device.type == "cpu" else "bfloat16"
        write_checkpoint(shape, checkpoint, getattr(torch, name))
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        found = plan(shape, device, work, checkpoint).start()
    finally:
        shutil.rmtree(work)
        if made and checkpoints is None:
            shutil.rmtree(checkpoint)
    for key in ("model", "work_dir"):  # where this machine had them
        del found["job"][key]
    return found


def by_step(found: dict[str, Any]) -> dict[str, float]:
    """Seconds by step, blocks added up."""
    sums: dict[str, float] = {}
    for stage, cost in found["stages"].items():
        # A rate on trial counts to the training that it is for, as in plan.
        step = "refine" if stage.startswith("rate ") else next((s for s in STEPS if stage.startswith(s)), None)
        if step is not None:
            sums[step] = sums.get(step, 0.0) + cost["seconds"]
    return sums


def projected(found: dict[str, Any]) -> dict[str, float]:
    """Forward passes by step for the default's epochs over a million tokens.

    States and refinement go with the tokens, analysis with those that are enough for it; step 1 with its own tokens.
    """
    forward = statistics.mean(found["forward_seconds"]) / found["tokens"]  # seconds a token
    seconds, ran, default = by_step(found), found["method"], PRESETS["default"]
    each = forward * found["tokens"]
    passes = {step: seconds[step] / each for step in ("analyse", "layer states") if step in seconds}
    if "analyse" in passes:
        passes["analyse"] *= min(1.0, ENOUGH / MILLION)
    if "kernel" in seconds:
        wanted = max(8192, 8 * found["features"][0])
        had = min(ran["kernel_tokens"] or wanted, found["tokens"])
        scale = default["kernel_epochs"] / ran["kernel_epochs"] * wanted / had
        passes["kernel"] = seconds["kernel"] * scale / (forward * MILLION)
    if "refine" in seconds:
        passes["refine"] = seconds["refine"] / each * SHORT[0] / ran["refine_epochs"]
    return passes


def whole(found: dict[str, Any]) -> bool:
    """Whether the run was the default's, with nothing left out."""
    return not found["job"]["options"] and found["job"]["stop"] == "save"


def page(record: dict[str, Any]) -> str:
    """The record as a page."""
    shapes = [shape for shape in SHAPES if shape in record["shapes"]]
    lines = [f"# Cost of pruning on {record['hardware']}", "",
             f"    {record['command']}", "",
             f"{record['threads']} thread(s), torch {record['torch']}, {record['month']}. {record['clock']} "
             "One forward pass is one of the layer stack over the same tokens.", "",
             f"| shape | parameters | tokens | one pass, s | {' | '.join(STEPS)} | all | peak memory | budget |",
             "|---" * 3 + "|---:" * (len(STEPS) + 2) + "|---" * 2 + "|"]
    for shape in shapes:
        found = record["shapes"][shape]
        forward, seconds = statistics.mean(found["forward_seconds"]), by_step(found)
        cells = [f"{seconds[step] / forward:.2f}" if step in seconds else "–" for step in STEPS]
        memory = [readable_bytes(found["peak_bytes"] - found["device_peak_bytes"])]
        if found["device_peak_bytes"]:
            memory.append(f"{readable_bytes(found['device_peak_bytes'])} on the device")
        size = f"{found['parameters'][0] / 1e6:,.1f} M, {found['dtype']}, {readable_bytes(found['model_bytes'])}"
        lines.append(
            f"| {shape} | {size}{', streamed' if found['streamed'] else ''} | {found['tokens']:,} | {forward:.2f} | "
            f"{' | '.join(cells)} | {sum(seconds.values()) / forward:.2f} | {' + '.join(memory)} | "
            f"{found['job']['host_memory'] or '–'} |")
    lines += ["", "Stages are in forward passes over the tokens of the row; rest: closed forms, theory, diagnostics. "
              "Peak memory is the process's own high-water mark, with the libraries.", ""]
    lines += [f"- {shape}: {described(record['shapes'][shape])}" for shape in shapes]
    return "\n".join([*lines, "", *projection(record["shapes"], shapes)]) + "\n"


def projection(found: dict[str, Any], shapes: list[str]) -> list[str]:
    """The table of what the default's epochs over a million tokens would take."""
    steps = ("analyse", "layer states", "kernel", "refine")
    lines = [f"## The default's epochs over {MILLION:,} tokens", "",
             f"From the runs above: states and refinement go with the tokens, analysis takes {ENOUGH:,} of them, "
             "step 1 its own number; step 1 is scaled as if all of it went with its tokens and epochs, which is too "
             "much where solving for the operators is most of it. Without rest and saving. In forward passes over the "
             "million. ~: not run so.", "",
             f"| shape | {' | '.join(steps)} | all |", "|---" + "|---:" * 5 + "|"]
    for shape in shapes:
        passes = projected(found[shape])
        cells = [f"~{passes[step]:.2f}" if step in passes else "–" for step in steps]
        cells.append(f"~{sum(passes.values()):.1f}" if len(passes) == len(steps) else "–")
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return lines


def described(found: dict[str, Any]) -> str:
    """What was run, in words."""
    if whole(found):
        return "the whole of KDP's default."
    if found["job"]["stop"] == "analyse":
        return "the analysis alone."
    options = ", ".join(f"{name}={value}" for name, value in found["job"]["options"].items())
    left_out = "" if "rest" in found["stages"] else " The rest was not timed, nor is it in the sum."
    return f"in part: {options}.{left_out}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints and work directories go")
    parser.add_argument("--checkpoints", type=Path, default=None, help="where checkpoints by shape are, and stay")
    parser.add_argument("--out", type=Path, default=HERE, help="where the results go")
    parser.add_argument("--render", type=Path, default=None, help="only write the page of this record again")
    given = parser.parse_args()
    if given.render:
        given.render.with_suffix(".md").write_text(page(json.loads(given.render.read_text())), encoding="utf-8")
        return
    device = resolve_device(given.device)
    file = given.out / f"cost_{hardware.name(device)}_{hardware.month()}.json"
    before = json.loads(file.read_text())["shapes"] if file.is_file() else {}
    own = device.type == "cpu" and torch.get_num_threads() == 1
    record = {
        **hardware.facts(device), "command": shlex.join(["python", "benchmarks/cost.py", *(
            ["--device", given.device] if given.device != "cpu" else [])]),
        "clock": "Seconds are the processor's." if own else "Seconds are the clock's.", "shapes": before,
    }
    for shape in given.shapes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            record["shapes"][shape] = run_shape(shape, device, Path(folder), given.checkpoints)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(file.with_suffix(".md").read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
