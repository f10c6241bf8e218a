"""Run by test_processes.py in one or two processes: every form of every method prunes the tiny checkpoint.

Arguments: a checkpoint, where the files for the weights begin. Rows are of two lengths: padding is at work.
"""

import sys
from typing import Any

import torch
from methods import FORMS, QUICK, in_float32, taken
from safetensors.torch import save_file
from tiny_checkpoint import CONTEXT

import kdprune
from kdprune.runtime.distributed import world

ROWS = 40  # batches hold 16 rows: both processes have some
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "kdp-options": ("kdp", {"without": ("alpha", "cosine_term"), "context": "none", "kernel": "learned", "hidden": 4}),
    "kdp-damage": ("kdp", {"kernel": "linear+learned+data", "refine": False}),  # paths too are dealt out
    "healed": ("linear", {"heal": "lm", "heal_tokens": 400}),
}


def main(checkpoint: str, file: str) -> None:
    torch.set_num_threads(1)
    in_float32()  # sums in another order are not equal behind products in bfloat16
    ids = torch.randint(3, 256, (ROWS, CONTEXT // 2), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[::3, 20:], mask[::3, 20:] = 0, 0
    text = {"input_ids": ids, "attention_mask": mask}
    for form, (name, options) in {**FORMS, **MORE}.items():
        result = kdprune.prune(
            checkpoint, method=name, calibration=text, heldout=text, device="cpu",
            **{**taken(name, QUICK), "ratio": 0.2, **options})
        if world().first:
            state = {key: value.clone() for key, value in result.model.state_dict().items()}
            save_file(state, f"{file}-{form}.safetensors")
            print(form, "shares", result.results.calibration.shares, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
