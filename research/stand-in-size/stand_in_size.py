"""How much would a larger stand-in of the same inputs keep? KL of held-out rows, one block, closed form, by channels.

    python stand_in_size.py run MODEL NAME START STOP CHANNELS     # CHANNELS: "0,256,576", 0: attention and a linear map
    python stand_in_size.py page
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdprune.data.tokens import load_tokens
from kdprune.methods.common.shape import Candidate
from kdprune.methods.kdp import measuring
from kdprune.methods.kdp.kdp import KDP
from kdprune.runtime.run import Run

HERE = Path(__file__).parent
RECORD = HERE / "stand-in-size.json"
TEXT = HERE / "calibration.jsonl"  # benchmarks/texts.py makes it


def run(where: str, name: str, start: int, stop: int, channels: list[int]) -> None:
    """Measures and adds to the record. All 43 fitted rows of 512 tokens are fitted to, not the first alone."""
    torch.set_num_threads(1)
    measuring.FIT_TOKENS = 1 << 20
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    tokens = load_tokens(
        str(TEXT), AutoTokenizer.from_pretrained(where), samples=48, length=512, seed=0, vocabulary=None)
    method, block = KDP(refine=False, ratio=0.25, of="layers"), range(start, stop)
    shape = method.budget(model).shape
    trial = measuring.Trial(method.settings(shape, tokens), method.held, 0)
    dense = measuring.Measuring.of(model, tokens, [block], trial, Run(0))
    for count in channels:
        form = dataclasses.replace(shape, channels=count, kind=shape.kind if count else "linear")
        [value] = dense.damages([[Candidate(block, form)]], "damage")
        known = json.loads(RECORD.read_text()) if RECORD.exists() else []
        known.append({"model": name, "block": [start, stop], "channels": count, "kl": value,
                      "parameters": form.parameters()})
        RECORD.write_text(json.dumps(known, indent=1) + "\n")


def page() -> str:
    """The record as a table."""
    lines = ["| model | block | channels | parameters | KL(dense‖pruned) |", "|---|---|---:|---:|---:|"]
    lines += [f"| {one['model']} | `[{one['block'][0]}, {one['block'][1]})` | {one['channels']:,} | "
              f"{one['parameters']:,} | {one['kl']:.4f} |"
              for one in json.loads(RECORD.read_text())]
    return "\n".join(["# KL by the size of a stand-in", "", *lines]) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "page":
        (HERE / "stand-in-size.md").write_text(page())
    else:
        run(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), [int(one) for one in sys.argv[6].split(",")])
