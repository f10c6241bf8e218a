"""What ``kdprune plan`` says of the runs on record, beside what was measured: sizes, operations, memory and time.

    python benchmarks/plan_checks.py

The records are those of benchmarks/cost.py, memory.py and speed.py on one CPU thread. Constants of
``kdprune.planning.forecast`` were set from the first two, so that these say how well one count fits all shapes, not
how it does on a machine it has not seen.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cost import STEPS, by_step
from random_checkpoint import shape_config
from transformers import AutoConfig, PreTrainedConfig

from kdprune.methods.kdp import kdp
from kdprune.planning.plan import PruningPlan, plan

HERE = Path(__file__).parent
HARDWARE = "cpu1-amd-epyc_202611"


@dataclass(frozen=True)
class Check:
    """One figure: of what run, what it is, predicted and measured. ``exact``: they must agree to rounding."""

    run: str
    name: str
    predicted: float
    measured: float
    unit: str = ""
    exact: bool = False

    @property
    def ratio(self) -> float:
        """Predicted / measured."""
        return self.predicted / self.measured


def record(theme: str) -> dict[str, Any]:
    """The committed record of a theme."""
    return json.loads((HERE / f"{theme}_{HARDWARE}.json").read_text(encoding="utf-8"))


def plan_of(config: PreTrainedConfig, **options: Any) -> PruningPlan:
    """The plan of a model of this config, on a CPU if nothing else is said."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return plan(folder, **{"device": "cpu", **options})


def planned_run(found: dict[str, Any]) -> Iterator[PruningPlan]:
    """Plans of a run of ``pruning_run.py``: before its blocks are known and, if it got so far, with them."""
    job, (rows, length) = found["job"], found["rows"]
    options = {"dtype": found["dtype"], "samples": rows, "length": length, "host_memory": job["host_memory"],
               "ratio": job["ratio"], "device": "cpu" if found["bfloat16"] else "cpu-float32", **job["options"]}
    for blocks in ({}, {"blocks": found["blocks"]} if found["blocks"] else {}):
        yield plan_of(AutoConfig.for_model(**found["config"]), **(options | blocks))


def peak(made: PruningPlan, streamed: bool, analysis: bool = False) -> int:
    """Predicted peak of the host, of the whole run or of its analysis."""
    need = next(need for need in made.memory if need.streamed is streamed)
    return need.analysis_bytes if analysis else need.host_bytes


def of_run(run: str, found: dict[str, Any]) -> Iterator[Check]:
    """Figures of one run of ``pruning_run.py``."""
    before, made = planned_run(found)
    if len(found["parameters"]) == 2:
        yield Check(run, "parameters left", made.pruned.parameters, found["parameters"][1], exact=True)
    else:
        yield Check(run, "parameters", made.dense.parameters, found["parameters"][0], exact=True)
    yield Check(run, "bytes of the model", made.dense.disk_bytes, found["model_bytes"], "B", exact=True)
    yield Check(run, "one forward pass", made.forward_seconds, statistics.mean(found["forward_seconds"]), "s")
    seconds = {stage.name: stage.seconds for stage in (*before.stages, *made.stages)}
    measured = by_step(found)
    for step in STEPS:
        if step in seconds and step in measured:
            yield Check(run, step, seconds[step], measured[step], "s")
    analysis = found["job"]["stop"] == "analyse"
    name = "peak memory of the analysis" if analysis else "peak memory"
    yield Check(run, name, peak(made, found["streamed"], analysis), found["peak_bytes"], "B")


def plan_before(shape: str, **options: Any) -> PruningPlan:
    """The plan of a run of memory.py as KDP was when its record was made: Fourier features alone, of any number, no
    slack for its blocks, later ones not corrected, no rate on trial."""
    with mock.patch.object(kdp, "unit_of", return_value=1):
        return plan_of(shape_config(shape), length=128, slack=0.0, preset="fourier", **options)


def of_memory(shape: str, row: dict[str, Any]) -> Iterator[Check]:
    """Peak and stages of one run of memory.py that pruned."""
    options = {"kernel_epochs": 1, "refine_epochs": 1, "kernel_tokens": 512, "sequential": False, "rate": 1e-3}
    made = plan_before(shape, dtype=row["dtype"], samples=row["tokens"] // 128, blocks=row["blocks"], **options)
    run = f"{shape}, {row['tokens']:,} tokens, {'states on disk' if row['work_dir'] else 'states in memory'}"
    yield Check(run, "parameters left", made.pruned.parameters, row["parameters"][1], exact=True)
    kept = 0 if row["work_dir"] else made.states_bytes
    yield Check(run, "peak memory", peak(made, row["streamed"]) + kept, row["peak_bytes"], "B")
    seconds = {stage.name: stage.seconds for stage in made.stages}
    for step, value in by_step(row).items():
        if step in seconds:
            yield Check(run, step, seconds[step], value, "s")


def of_size(shape: str, row: dict[str, Any]) -> Check:
    """Peak of one analysis of memory.py."""
    made = plan_before(shape, dtype=row["dtype"], samples=row["tokens"] // 128, host_memory=row["budget"])
    return Check(f"{shape}, {row['tokens']:,} tokens, budget {row['budget']}", "peak memory of the analysis",
                 peak(made, row["streamed"], analysis=True), row["peak_bytes"], "B")


def of_speed() -> Iterator[Check]:
    """Net ratio, cache and operations of the models that speed.py measured."""
    for row in record("speed")["rows"]:
        if row["compiled"] or row["batch"] > 1 or row["pass"] != "prefill":
            continue
        made = plan_of(shape_config(row["shape"]), dtype=row["dtype"], length=row["prompt"], preset="fourier",
                       blocks=row["blocks"], features=row["features"],
                       **({"context": "none"} if row["form"] == "token-wise" else {}))
        run = f"{row['shape']}, {row['form']}, its own blocks"
        yield Check(run, "net ratio", made.net_ratio, row["net_ratio"], exact=True)
        yield Check(run, "cache a token", made.pruned.kv_bytes, row["cache_bytes"]["pruned"], "B", exact=True)
        yield Check(run, "speed-up of reading, from operations", made.dense.prefill_flops / made.pruned.prefill_flops,
                    row["speedup"], "×")


def checks() -> list[Check]:
    """All of them."""
    found = [check for name, run in record("cost")["runs"].items()
             for check in of_run(f"{name}, {run['tokens']:,} tokens", run)]
    memory = record("memory")
    found += [check for row in memory["by_tokens"] for check in of_memory(memory["shape"], row)]
    found += [of_size(shape, row) for shape, row in memory["by_size"].items()]
    return [*found, *of_speed()]


if __name__ == "__main__":
    for check in checks():
        print(f"{check.run:42} {check.name:38} {check.predicted:>18.6g} {check.measured:>18.6g} {check.ratio:.3f}")
