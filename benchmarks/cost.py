"""What does pruning cost, in forward passes over the calibration set, stage by stage, and how much memory?

    OMP_NUM_THREADS=1 python benchmarks/cost.py                  on a CPU: whole, or as far as a CPU gets (``RUNS``)
    python benchmarks/cost.py --device cuda                      on a GPU: every shape, a million tokens, bfloat16
    python benchmarks/cost.py --runs 1b                          one of them; the others keep their figures
    python benchmarks/cost.py --render benchmarks/cost_….json    the page again, from the record

Every model is pruned by KDP's default, 25 % net, in a process of its own: shapes with random weights
(``random_checkpoint.py``) on random token ids, trained models on the bundled text, SmolLM2 where ``--checkpoints`` has
it. A forward pass is one of the layer stack over the same tokens, without the head, timed before and after.
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

from kdprune.data.sources import BUNDLED_MODEL
from kdprune.runtime.machine import resolve_device
from kdprune.store.files import readable_bytes

HERE = Path(__file__).parent
MILLION = 2**20  # tokens of the runs on a GPU
# What is run on a CPU: shape or trained model, tokens (None: of the bundled text, as many as by default), budget and
# options. The Fourier kernel's blocks are those taken when similarity falls evenly with distance.
RUNS: dict[str, dict[str, Any]] = {
    "bundled": {"tokens": None},
    "smollm2-135m": {"tokens": None, "dtype": "float32"},
    "smollm2-135m, closed form": {"tokens": None, "samples": 128, "once": 16_384, "dtype": "float32", "options": {
        "refine": False}},
    "0.1b": {"tokens": 8192, "length": 128, "dtype": "float32"},
    "0.1b, Fourier": {"tokens": 8192, "length": 128, "dtype": "float32", "options": {
        "preset": "fourier", "blocks": [[2, 4], [5, 7], [8, 11]], "kernel_epochs": 1, "refine_epochs": 1,
        "kernel_tokens": 4096}},
    "1b": {"tokens": 1024, "length": 128, "dtype": "float32", "host_memory": "4GiB", "options": {"refine_epochs": 1}},
    "7b": {"tokens": 512, "length": 128, "dtype": "bfloat16", "host_memory": "6GiB", "stop": "analyse"},
}
TRAINED = ("bundled", "smollm2-135m")
# Steps, and how the stages begin that they are made of.
STEPS = {"analyse": ("analyse",), "damage": ("damage", "linear maps"), "layer states": ("layer states",),
         "corrected states": ("corrected states",), "kernel": ("kernel",), "inverse": ("inverse",),
         "refine": ("rate", "refine"), "rest": ("rest",), "save and verify": ("save and verify",)}


def job(name: str, device: torch.device, work: Path, checkpoint: Path, tokens: int) -> Job:
    """The job of a run: whole on a GPU, of so many tokens; as ``RUNS`` has it on a CPU."""
    chosen = RUNS[name]
    if device.type != "cpu" and name.partition(",")[0] not in TRAINED:
        options = {option: value for option, value in chosen.get("options", {}).items() if option == "preset"}
        chosen = {"tokens": tokens, "dtype": "bfloat16", "once": tokens // 8, "options": options}
    return Job(model=str(checkpoint), device=str(device), work_dir=str(work), **chosen)


def run(
    name: str, device: torch.device, folder: Path, checkpoints: Path | None, tokens: int = MILLION,
) -> dict[str, Any]:
    """Makes the checkpoint, runs the job, and removes what it made. Raises SystemExit for a trained model that is not
    there."""
    shape = name.partition(",")[0]
    checkpoint = BUNDLED_MODEL if shape == "bundled" else (checkpoints or folder) / shape
    made = not checkpoint.exists()
    if made and shape in TRAINED:
        raise SystemExit(f"got no {shape} in {checkpoints or folder}, expected a checkpoint: give --checkpoints DIR, "
                         "or leave it out of --runs")
    if made:
        dtype = RUNS[name]["dtype"] if device.type == "cpu" else "bfloat16"
        write_checkpoint(shape, checkpoint, getattr(torch, dtype))
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        found = job(name, device, work, checkpoint, tokens).start()
    finally:
        shutil.rmtree(work)
        if made and checkpoints is None:
            shutil.rmtree(checkpoint)
    found["job"] |= {"model": None, "work_dir": True}  # where this machine had them
    return found


def by_step(found: dict[str, Any]) -> dict[str, float]:
    """Seconds by step, blocks added up; loading and reading text are none."""
    sums: dict[str, float] = {}
    for stage, cost in found["stages"].items():
        for step in (step for step, begins in STEPS.items() if stage.startswith(begins)):
            sums[step] = sums.get(step, 0.0) + cost["seconds"]
    return sums


def page(record: dict[str, Any]) -> str:
    """The record as a page."""
    names = [name for name in RUNS if name in record["runs"]]
    steps = [step for step in STEPS if any(step in by_step(record["runs"][name]) for name in names)]
    lines = [f"# Cost of pruning on {record['hardware']}", "",
             f"    {record['command']}", "",
             f"{record['threads']} thread(s), torch {record['torch']}, {record['month']}. {record['clock']} "
             "One forward pass is one of the layer stack over the same tokens.", "",
             f"| run | parameters | tokens | one pass, s | {' | '.join(steps)} | all | without refine | peak memory | "
             "budget |", "|---" * 3 + "|---:" * (len(steps) + 3) + "|---" * 2 + "|"]
    for name in names:
        found = record["runs"][name]
        forward, seconds = statistics.mean(found["forward_seconds"]), by_step(found)
        every = sum(seconds.values())
        cells = [f"{seconds[step] / forward:.2f}" if step in seconds else "–" for step in steps]
        cells += [f"{every / forward:.2f}", f"{(every - seconds.get('refine', 0.0)) / forward:.2f}"]
        memory = [readable_bytes(found["peak_bytes"] - found["device_peak_bytes"])]
        if found["device_peak_bytes"]:
            memory.append(f"{readable_bytes(found['device_peak_bytes'])} on the device")
        size = f"{found['parameters'][0] / 1e6:,.1f} M, {found['dtype']}, {readable_bytes(found['model_bytes'])}"
        lines.append(
            f"| {name} | {size}{', streamed' if found['streamed'] else ''} | {found['tokens']:,} | {forward:.2f} | "
            f"{' | '.join(cells)} | {' + '.join(memory)} | {found['job']['host_memory'] or '–'} |")
    lines += ["", "Stages are in forward passes over the tokens of the row; rest: closed forms, theory, diagnostics. "
              "Peak memory is the process's own high-water mark, with the libraries.", ""]
    return "\n".join([*lines, *(f"- {name}: {described(record['runs'][name])}" for name in names)]) + "\n"


def described(found: dict[str, Any]) -> str:
    """What was run, in words."""
    if found["job"]["stop"] == "analyse":
        return "the analysis alone."
    if not found["job"]["options"]:
        return "the whole of KDP's default."
    return f"with {', '.join(f'{name}={value}' for name, value in found['job']['options'].items())}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=MILLION, help="of random weights on a GPU (%(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints and work directories go")
    parser.add_argument("--checkpoints", type=Path, default=None, help="where checkpoints by name are, and stay")
    parser.add_argument("--out", type=Path, default=HERE, help="where the results go")
    parser.add_argument("--render", type=Path, default=None, help="only write the page of this record again")
    given = parser.parse_args()
    if given.render:
        given.render.with_suffix(".md").write_text(page(json.loads(given.render.read_text())), encoding="utf-8")
        return
    device = resolve_device(given.device)
    file = given.out / f"cost_{hardware.name(device)}_{hardware.month()}.json"
    before = json.loads(file.read_text())["runs"] if file.is_file() else {}
    own = hardware.Clock(device).own
    record = {
        **hardware.facts(device), "command": shlex.join(["python", "benchmarks/cost.py", *(
            ["--device", given.device] if given.device != "cpu" else [])]),
        "clock": "Seconds are the processor's." if own else "Seconds are the clock's.", "runs": before,
    }
    for name in given.runs:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            record["runs"][name] = run(name, device, Path(folder), given.checkpoints, given.tokens)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(file.with_suffix(".md").read_text(), file=sys.stdout)


if __name__ == "__main__":
    main()
