"""Run by test_another_device.py: methods, healing, tasks and sums on devices that refuse each other's tensors.

Arguments: a checkpoint with tokenizer, a folder with tasks' rows, and families; a line each of what was tried: its name
and the relative difference from what the host gives, or what was raised.
"""

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from families import build
from methods import FORMS, QUICK, in_float32, quick, taken
from other_device import PLACE, accelerator, moved, spread
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kdprune
from kdprune.errors import KDPruneError
from kdprune.evaluation.tasks import run_suite
from kdprune.methods import METHODS
from kdprune.model.placement import input_device
from kdprune.model.surgery import apply_edits
from kdprune.runtime.distributed import World
from kdprune.testing.method import run_method
from kdprune.testing.models import CALIBRATION, IDS

RUNS = {
    "kdp": ("kdp", {}), "kl": ("linear", {"heal": "kl", "heal_tokens": 400}),
    "kl of some": ("linear", {"heal": "kl", "heal_tokens": 400, "heal_top": 5}),
    "lora": ("shortgpt", {"heal": "lm", "heal_tokens": 400}), "paper": ("kdp", {"preset": "paper"}),
}

Placed = Callable[[PreTrainedModel], PreTrainedModel]


def tried(name: str, difference: Callable[[], float]) -> None:
    """Prints a line."""
    try:
        print(f"{name}: {difference():.2e}", flush=True)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in place if "kdprune" in frame.filename]
        print(f"{name}: {error!r} at {' '.join(own[-3:])}", flush=True)


def of_method(form: str, family: str, place: Placed) -> float:
    expected = logits(form, build(family))
    with accelerator():
        found = logits(form, place(build(family)))
    return float((found - expected).norm() / expected.norm())


def logits(form: str, model: PreTrainedModel) -> torch.Tensor:
    """Of the model pruned, which is where the model was."""
    places = {parameter.device for parameter in model.parameters()}
    pruned = apply_edits(model, run_method(quick(form), model).edits)
    assert {parameter.device for parameter in pruned.parameters()} <= places
    return pruned(IDS.to(input_device(model))).logits.detach().cpu()


def of_run(name: str, place: Placed) -> float:
    method, options = RUNS[name]
    ids = torch.randint(3, 64, (40, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[::3, 20:], mask[::3, 20:] = 0, 0
    text = {"input_ids": ids, "attention_mask": mask}
    given = {"ratio": 0.2, "method": method, "calibration": text, "heldout": text, **taken(method, QUICK), **options}
    expected = kdprune.prune(build("llama3"), device="cpu", **given).metrics["perplexity"]
    with accelerator():
        found = kdprune.prune(place(build("llama3")), **given).metrics["perplexity"]
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
    in_float32()  # on both sides: there is no autocast on the device
    for family in families:
        for form, (method, _) in FORMS.items():
            try:
                quick(form).check(build(family), CALIBRATION)
            except KDPruneError:
                continue
            for place in (moved, spread) if METHODS[method].spreads else (moved,):
                tried(f"{form} of {family}, {place.__name__}", partial(of_method, form, family, place))
    for name in RUNS:
        tried(f"run {name}", partial(of_run, name, moved))
    tried("run kdp, spread", partial(of_run, "kdp", spread))
    tried("tasks", lambda: of_tasks(Path(checkpoint), Path(data)))
    tried("sums", of_sums)


if __name__ == "__main__":
    main(*sys.argv[1:])
