"""One pruning run in a process of its own, stage by stage, in units of a forward pass: what cost.py and memory.py call.

Prints one JSON object. ``python benchmarks/pruning_run.py '{"model": …}'`` with the fields of :class:`Job`.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hardware import Clock
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods import make_method
from kdprune.methods.common.method import boundaries_held
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.activations import layer_states
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.families import decoder_layers
from kdprune.model.streaming import is_streamed
from kdprune.run.pipeline import run_method, scored
from kdprune.run.resources import Resources
from kdprune.run.session import Session
from kdprune.runtime.machine import (
    BATCH,
    computes_in,
    generator,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
)
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance, Stages

WARM = 1  # rows of the forward pass before it is timed


@dataclass(frozen=True)
class Job:
    """What is run: a checkpoint, tokens in rows of ``length``, the method's options, and how far.

    Attributes:
        tokens: calibration tokens, random ids; None: the bundled text, so many ``samples`` of it, or as many as by
            default. stop: "analyse" or "save", the last stage.
        once: take the forward pass's time from so many tokens.
        options: of KDP. work_dir, host_memory: as of ``kdprune.prune``.
    """

    model: str
    tokens: int | None
    length: int = 512
    samples: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    stop: str = "save"
    once: int | None = None
    ratio: float = 0.25
    options: dict[str, Any] = field(default_factory=dict)
    work_dir: str | None = None
    host_memory: str | None = None

    def start(self) -> dict[str, Any]:
        """Runs it in a fresh process, so that its peak memory is its own; returns what that printed.

        Raises:
            SystemExit: the process failed; its errors are on stderr.
        """
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(dataclasses.asdict(self))], stdout=subprocess.PIPE, text=True,
            check=False)
        if done.returncode:
            raise SystemExit(f"a run failed with exit code {done.returncode}: {self}")
        return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Timed(Stages):
    """Stages with the seconds of a :class:`hardware.Clock` and the highest resident set by the end of each."""

    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        start = self.clock.now()
        with super().stage(name, total) as advance:
            yield advance
        cost = self.costs.setdefault(name, {"seconds": 0.0})
        cost["seconds"] += self.clock.now() - start
        cost["peak_bytes"] = peak_memory_bytes()


def forward_seconds(model: PreTrainedModel, tokens: TokenSet, clock: Clock) -> float:
    """Seconds of one plain forward pass of the layer stack over these tokens, scaled from some of them if need be."""
    last = len(decoder_layers(model))
    start = clock.now()
    for _ in layer_states(model, tokens, [last], BATCH):
        pass
    return clock.now() - start


def measure(job: Job) -> dict[str, Any]:
    """Runs the job here and returns its figures."""
    reset_peak_memory()
    device = resolve_device(job.device)
    stages = Timed(clock=Clock(device))
    resources = Resources(work_dir=job.work_dir, host_memory=job.host_memory)
    with Session(job.model, None, 0, job.device, job.dtype, False, stages, resources) as session:
        model, ids = session.model, None
        if job.tokens is not None:
            shape = (job.tokens // job.length, job.length)
            ids = torch.randint(model.config.vocab_size, shape, generator=generator(0, 1))
        tokens = session.calibration(ids, job.samples, job.length)
        some = tokens if job.once is None else tokens.select(slice(0, max(1, job.once // job.length)))
        method = make_method("kdp", {"ratio": job.ratio, **job.options})
        method.check(model, tokens)
        assert isinstance(method, KDP)
        with session.run(tokens, boundaries_held(model, job.ratio)) as run:
            forward_seconds(model, some.select(slice(0, WARM)), stages.clock)
            passes = [forward_seconds(model, some, stages.clock)]
            found = pruned(job, model, method, tokens, run, stages)
            passes.append(forward_seconds(model, some, stages.clock))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "job": dataclasses.asdict(job), "config": model.config.to_diff_dict(), **found, "tokens": tokens.tokens,
        "rows": list(tokens.ids.shape), "streamed": is_streamed(model),
        "bfloat16": computes_in(torch.bfloat16, device),
        "dtype": str(model.dtype).removeprefix("torch."), "model_bytes": weights,
        "forward_seconds": [seconds * tokens.tokens / some.tokens for seconds in passes],
        "stages": stages.costs, "wall_seconds": dict(stages.seconds), "peak_bytes": peak_memory_bytes(),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def pruned(
    job: Job, model: PreTrainedModel, method: KDP, tokens: TokenSet, run: Run, stages: Timed,
) -> dict[str, Any]:
    """Scores, prunes, saves and verifies; returns blocks and parameters."""
    run = scored(model, tokens, method, run)
    found: dict[str, Any] = {"blocks": [], "parameters": [model.num_parameters()]}
    if job.stop == "analyse":
        return found
    start, before = stages.clock.now(), sum(cost["seconds"] for cost in stages.costs.values())
    made = run_method(model, method, tokens, run)
    within = sum(cost["seconds"] for cost in stages.costs.values()) - before
    # Closed forms, theory, diagnostics: what no stage counts.
    stages.costs["rest"] = {"seconds": stages.clock.now() - start - within, "peak_bytes": peak_memory_bytes()}
    found["parameters"].append(made.pruned.num_parameters())
    found["blocks"] = [[block.start, block.stop] for block in made.outcome.blocks]
    with stages.stage("save and verify"), tempfile.TemporaryDirectory(dir=job.work_dir) as out:
        save_model(made.pruned, Path(out), None)
        verify(out, made.pruned, tokens.ids[:1, :64])
    return found


def main() -> None:
    try:
        print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))
    except KDPruneError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
