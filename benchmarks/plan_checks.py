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

from cost import STEPS, by_step
from random_checkpoint import shape_config
from transformers import AutoConfig, PreTrainedConfig

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


def of_run(run: str, found: dict[str, Any], timed: bool = True) -> Iterator[Check]:
    """Figures of one run of ``pruning_run.py``; not ``timed``: it was made to see what it takes in memory."""
    before, made = planned_run(found)
    if len(found["parameters"]) == 2:
        yield Check(run, "parameters left", made.pruned.parameters, found["parameters"][1], exact=True)
    else:
        yield Check(run, "parameters", made.dense.parameters, found["parameters"][0], exact=True)
    yield Check(run, "bytes of the model", made.dense.disk_bytes, found["model_bytes"], "B", exact=True)
    if timed:
        yield from _times(run, found, before, made)
    analysis = found["job"]["stop"] == "analyse"
    name = "peak memory of the analysis" if analysis else "peak memory"
    choosing, fitting = (peak(planned, found["streamed"], analysis) for planned in (before, made))
    kept = 0 if analysis or found["job"]["work_dir"] else made.states_bytes
    yield Check(run, name, max(choosing, fitting + kept), found["peak_bytes"], "B")


def _times(run: str, found: dict[str, Any], before: PruningPlan, made: PruningPlan) -> Iterator[Check]:
    """Seconds of a forward pass and of every step."""
    yield Check(run, "one forward pass", made.forward_seconds, statistics.mean(found["forward_seconds"]), "s")
    seconds = {stage.name: stage.seconds for stage in (*before.stages, *made.stages)}
    measured = by_step(found)
    for step in STEPS:
        if step in seconds and step in measured:
            yield Check(run, step, seconds[step], measured[step], "s")


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
    for run in memory["by_tokens"]:
        place = "on disk" if run["job"]["work_dir"] else "in memory"
        found += of_run(f"{memory['shape']}, {run['tokens']:,} tokens, states {place}", run, timed=False)
    for name, run in memory["by_size"].items():
        found += of_run(f"{name}, {run['tokens']:,} tokens, budget {run['job']['host_memory']}", run, timed=False)
    return [*found, *of_speed()]


if __name__ == "__main__":
    for check in checks():
        print(f"{check.run:42} {check.name:38} {check.predicted:>18.6g} {check.measured:>18.6g} {check.ratio:.3f}")
