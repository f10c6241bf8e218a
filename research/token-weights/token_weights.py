"""Do solves gain from weighing a token by 1/‖h_e‖²? KL of held-out rows, one block, closed form.

    python token_weights.py run MODEL NAME START STOP
    python token_weights.py page
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdprune.data.tokens import load_tokens
from kdprune.kernel.operators import Moments
from kdprune.methods.common.shape import Candidate
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.kdp import fit_block, landmarks, measuring
from kdprune.methods.kdp.kdp import KDP
from kdprune.runtime.run import Run

HERE = Path(__file__).parent
RECORD = HERE / "token-weights.json"
TEXT = HERE / "calibration.jsonl"  # benchmarks/texts.py makes it
PROBE = StandInFit.probe
LAST: list[Tensor] = [torch.empty(0)]  # ‖h_e‖² of the tokens that were looked at last


def probe(fitting: StandInFit, rows: Tensor) -> object:
    """What ``StandInFit.probe`` gives, with the tokens' ‖h_e‖² kept aside for the sums that follow."""
    found = PROBE(fitting, rows)
    LAST[0] = found.target.double().square().sum(-1, keepdim=True)
    return found


class Weighted(Moments):
    """Sums over tokens of weight 1/‖h_e‖², of one process."""

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a chunk: x (n, p), y (n, q)."""
        x, y, weight = x.double(), y.double(), 1 / LAST[0]
        self.xx += x.T @ (weight * x)
        self.xy += x.T @ (weight * y)
        self.x += (weight * x).sum(0)
        self.y += (weight * y).sum(0)
        self.yy += (weight * y.square()).sum()
        self.n += float(weight.sum())

    def add_processes(self) -> "Weighted":
        """There is one."""
        return self


def run(where: str, name: str, start: int, stop: int) -> None:
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
    found = {}
    for how in ("alike", "by 1/‖h_e‖²"):
        with ExitStack() as stack:
            if how != "alike":
                stack.enter_context(patch.object(StandInFit, "probe", probe))
                for module in (fit_block, landmarks):
                    stack.enter_context(patch.object(module, "Moments", Weighted))
            [found[how]] = dense.damages([[Candidate(block, shape)]], "damage")
    known = json.loads(RECORD.read_text()) if RECORD.exists() else []
    known.append({"model": name, "block": [start, stop], "kl": found})
    RECORD.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def page() -> str:
    """The record as a table."""
    rows = json.loads(RECORD.read_text())
    ways = list(rows[0]["kl"])
    lines = ["| model | block | " + " | ".join(f"tokens {way}" for way in ways) + " |",
             "|---|---|" + "---:|" * len(ways)]
    lines += [f"| {one['model']} | `[{one['block'][0]}, {one['block'][1]})` | "
              + " | ".join(f"{one['kl'][way]:.4f}" for way in ways) + " |" for one in rows]
    return "\n".join(["# KL(dense‖pruned) by the weight of a token in the solves", "", *lines]) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "page":
        (HERE / "token-weights.md").write_text(page())
    else:
        run(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
