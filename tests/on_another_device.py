"""Run by test_another_device.py: methods, healing, tasks and sums on a device that refuses tensors of the host.

Arguments: a checkpoint with tokenizer, a folder with tasks' rows, and families; a line each of what was tried: its name
and the relative difference from what the host gives, or what was raised.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from families import build
from methods import FORMS, QUICK, quick, taken
from other_device import PLACE, accelerator, moved
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdprune
from kdprune.errors import KDPruneError
from kdprune.evaluation.tasks import run_suite
from kdprune.model.surgery import apply_edits
from kdprune.run import heal
from kdprune.runtime import machine
from kdprune.runtime.distributed import World
from kdprune.testing.method import run_method
from kdprune.testing.models import CALIBRATION, IDS

RUNS = {
    "kdp": ("kdp", {}), "kl": ("linear", {"heal": "kl", "heal_tokens": 400}),
    "kl of some": ("linear", {"heal": "kl", "heal_tokens": 400, "heal_top": 5}),
    "lora": ("shortgpt", {"heal": "lm", "heal_tokens": 400}), "paper": ("kdp", {"preset": "paper"}),
}


def tried(name: str, difference: Callable[[], float]) -> None:
    """Prints a line."""
    try:
        print(f"{name}: {difference():.2e}", flush=True)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in place if "kdprune" in frame.filename]
        print(f"{name}: {error!r} at {' '.join(own[-3:])}", flush=True)


def of_method(form: str, family: str) -> float:
    def logits(device: torch.device) -> torch.Tensor:
        model = build(family)
        if device == PLACE:
            moved(model)
        pruned = apply_edits(model, run_method(quick(form), model).edits)
        assert {parameter.device for parameter in pruned.parameters()} == {device}
        return pruned(IDS.to(device)).logits.detach().cpu()

    expected = logits(torch.device("cpu"))
    with accelerator():
        found = logits(PLACE)
    return float((found - expected).norm() / expected.norm())


def of_run(name: str) -> float:
    method, options = RUNS[name]
    ids = torch.randint(3, 64, (40, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[::3, 20:], mask[::3, 20:] = 0, 0
    text = {"input_ids": ids, "attention_mask": mask}
    given = {"ratio": 0.2, "method": method, "calibration": text, "heldout": text, **taken(method, QUICK), **options}
    expected = kdprune.prune(build("llama3"), device="cpu", **given).metrics["perplexity"]
    with accelerator():
        found = kdprune.prune(moved(build("llama3")), **given).metrics["perplexity"]
    return abs(found["pruned"] / expected["pruned"] - 1) + abs(found["divergence"] / expected["divergence"] - 1)


def of_tasks(checkpoint: Path, data: Path) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    (expected,) = run_suite(model, tokenizer, "sciq", data=[data], batch_size=4)
    with accelerator():
        (found,) = run_suite(moved(model), tokenizer, "sciq", data=[data], batch_size=4)
    assert found.right == expected.right
    return abs(float(found.value or 0) - float(expected.value or 0))


def of_sums() -> float:
    """Over processes, of tensors on both devices and of one dtype: here one process, which thinks it is one of two."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    distributed.init_process_group("gloo", rank=0, world_size=1)
    with accelerator():
        one, other = torch.arange(6.0, device=PLACE).view(2, 3), torch.ones(2)
        World(0, 2).sum(one, other)
        return float((one.cpu() - torch.arange(6.0).view(2, 3)).abs().sum() + (other - 1).abs().sum())


def main(checkpoint: str, data: str, *families: str) -> None:
    torch.set_num_threads(1)
    # In float32 on both sides: there is no autocast on the device.
    machine.computes_in = heal.computes_in = lambda *_: False
    for family in families:
        for form in FORMS:
            try:
                quick(form).check(build(family), CALIBRATION)
            except KDPruneError:
                continue
            tried(f"{form} of {family}", lambda form=form, family=family: of_method(form, family))
    for name in RUNS:
        tried(f"run {name}", lambda name=name: of_run(name))
    tried("tasks", lambda: of_tasks(Path(checkpoint), Path(data)))
    tried("sums", of_sums)


if __name__ == "__main__":
    main(*sys.argv[1:])
