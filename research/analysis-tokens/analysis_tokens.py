"""How many tokens do the scores of layers need? Scores from fewer tokens against those from all of the bundled text.

    OMP_NUM_THREADS=1 python benchmarks/analysis_tokens.py
    python benchmarks/analysis_tokens.py --render benchmarks/analysis-tokens_….json     the page again, from the record

Bundled model, calibration and held-out text together. Differences are over the pairs of states that can be a block's
ends, and beside them the blocks that KDP's default takes at 25 % net.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import hardware
import torch

from kdprune.analysis import ENOUGH, Scores, score_layers
from kdprune.data import TokenSet, bundled_calibration, bundled_heldout, load_tokens
from kdprune.methods.blocks import choose_blocks
from kdprune.methods.kdp import KDP
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.runtime import Stages
from kdprune.session import BATCH, BUNDLED_MODEL, LONGEST_ROW

HERE = Path(__file__).parent
COUNTS = {8192: 3, 32768: 3, ENOUGH: 1}  # tokens: how many seeds
NAMES = ("cosine", "linear_cka", "rbf_cka")


def whole_text() -> TokenSet:
    """Rows of the bundled texts, one behind the other."""
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    parts = [load_tokens(text, tokenizer, samples=None, length=LONGEST_ROW, seed=0)
             for text in (bundled_calibration(), bundled_heldout())]
    return dataclasses.replace(
        parts[0], ids=torch.cat([part.ids for part in parts]), mask=torch.cat([part.mask for part in parts]))


def compared(found: Scores, whole: Scores, longest: int) -> dict[str, float]:
    """Largest differences over pairs of at most ``longest`` layers, and of the relative update."""
    states = len(whole["state_norm"])
    pairs = [(s, e) for s in range(states) for e in range(s + 1, min(states, s + longest + 1))]
    differences = {name: max(abs(found[name][pair] - whole[name][pair]) for pair in pairs) for name in NAMES}
    differences["relative_update"] = float(abs(found["relative_update"] / whole["relative_update"] - 1).max())
    return {name: float(value) for name, value in differences.items()}


def measure() -> dict[str, Any]:
    """Scores at every count of tokens."""
    model, tokens, method = load_model(BUNDLED_MODEL, device="cpu"), whole_text(), KDP()
    budget = method.budget(model)
    longest = model.config.num_hidden_layers // 2

    def scored(limit: int, seed: int) -> tuple[Scores, list[list[int]]]:
        scores = score_layers(model, tokens, protect=method.protect, seed=seed, batch_size=BATCH, stages=Stages(),
                              limit=limit)
        return scores, [[block.start, block.stop] for block in choose_blocks(method, scores.tensors(), budget)]

    whole, blocks = scored(tokens.tokens, 0)
    rows = [{"tokens": whole.tokens, "seed": 0, "blocks": blocks, "differences": None}]
    for count, seeds in COUNTS.items():
        for seed in range(seeds):
            found, blocks = scored(count, seed)
            rows.append({"tokens": found.tokens, "seed": seed, "blocks": blocks,
                         "differences": compared(found, whole, longest)})
    return {**hardware.facts(torch.device("cpu")), "longest": longest, "rows": rows}


def page(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = ["# Tokens of the analysis", "", "    python benchmarks/analysis_tokens.py", "",
             "Blocks are half-open ranges of layers. Largest difference from all "
             f"{record['rows'][0]['tokens']:,} tokens over pairs of states at most "
             f"{record['longest']} layers apart; of the relative update norm, the largest relative one.", "",
             "| tokens | seed | cosine | linear CKA | RBF CKA | relative update | blocks |",
             "|---:|---:" + "|---:" * 4 + "|---|"]
    for row in record["rows"]:
        found = row["differences"]
        cells = ["–"] * 4 if found is None else [
            *(f"{found[name]:.4f}" for name in NAMES), f"{100 * found['relative_update']:.2f} %"]
        blocks = ", ".join(f"{start}–{stop}" for start, stop in row["blocks"])
        lines.append(f"| {row['tokens']:,} | {row['seed']} | {' | '.join(cells)} | {blocks} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", type=Path, default=None, help="only write the page of this record again")
    given = parser.parse_args()
    file = given.render or HERE / f"analysis-tokens_{hardware.name(torch.device('cpu'))}_{hardware.month()}.json"
    if not given.render:
        file.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    text = page(json.loads(file.read_text()))
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
