"""What stands in best? Stand-ins compared on the bundled model: same blocks, same tokens, equal net parameters.

    python benchmarks/stand_ins.py --seeds 3            runs what docs/results/stand-ins.json lacks, then renders
    python benchmarks/stand_ins.py --render             only rewrites the table and plot from that file

For every seed the default's blocks are selected first; every variant then replaces those blocks, its features filled up
to the same net ratio (the linear map and dropping have no size to fill up and remove more). The paper's preset is
measured on the same blocks and on its own selection. Step 3, where there is one, lasts 15 epochs.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kdprune.analysis import score_layers
from kdprune.data import TokenSet, bundled_calibration, bundled_heldout, load_stream, load_tokens
from kdprune.evaluation.perplexity import perplexity
from kdprune.methods.kdp import KDP
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.model.surgery import Drop, apply_edits
from kdprune.runtime import Stages
from kdprune.session import BATCH, BUNDLED_MODEL, HELD_OUT_TOKENS, LONGEST_ROW

RESULTS = Path(__file__).parent.parent / "docs" / "results"
README = Path(__file__).parent.parent / "README.md"
# name: (what it is, options). "dropped" puts nothing in the place of the blocks.
# Pages that ask what to put in a block's place train all of it alike, whatever the number of rows.
TRAINED: dict[str, Any] = {"refine_epochs": 15}
VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "default": ("**KDP, default**: attention + kernel, refined", {}),
    "context-none": ("KDP, `context=none`", {"context": "none"}),
    "mlp": ("residual MLP (`kernel=mlp context=none`)", {"kernel": "mlp", "context": "none"}),
    "linear": ("linear map in the original space (`kernel=linear context=none`)",
               {"kernel": "linear", "context": "none"}),
    "dropped": ("blocks dropped", None),
    "context-mlp": ("attention + MLP (`kernel=mlp`)", {"kernel": "mlp"}),
    "no-refine": ("KDP, `refine=False`", {"refine": False}),
    "fixed": ("KDP, `kernel=fixed`", {"kernel": "fixed"}),
    "isotropic": ("KDP, `kernel=isotropic`", {"kernel": "isotropic"}),
    "paper-same-blocks": ("KDP, `preset=paper`, same blocks", {"preset": "paper"}),
    "paper": ("KDP, `preset=paper`, its own blocks", {"preset": "paper", "blocks": None}),
}


class Bench:
    """The dense model with one seed's tokens and scores."""

    def __init__(self, seed: int):
        self.seed = seed
        self.model = load_model(BUNDLED_MODEL, device="cpu")
        tokenizer = load_tokenizer(BUNDLED_MODEL)
        self.tokens: TokenSet = load_tokens(
            bundled_calibration(), tokenizer, samples=None, length=min(LONGEST_ROW, 512), seed=seed)
        self.held_out = load_stream(bundled_heldout(), tokenizer, limit=HELD_OUT_TOKENS)
        self.scores = score_layers(
            self.model, self.tokens, protect=KDP.protect, seed=seed, batch_size=BATCH, stages=Stages())
        self.dense = perplexity(self.model, self.held_out)

    def measure(self, name: str, blocks: tuple[tuple[int, int], ...] | None) -> dict[str, Any]:
        """One variant: blocks, net ratio, excess loss, held-out state errors, seconds of fitting."""
        options = VARIANTS[name][1]
        start = time.perf_counter()
        if options is None:
            edits, fit = [Drop(range(*block)) for block in blocks or ()], []
        else:
            method = KDP(**{"blocks": blocks, **TRAINED, **options})
            result = method(self.model, self.tokens, self.scores.tensors(), seed=self.seed, batch_size=BATCH)
            edits, fit = list(result.edits), list(result.fit)
        seconds = time.perf_counter() - start
        pruned = apply_edits(self.model, edits)
        after = perplexity(pruned, self.held_out)
        return {
            "variant": name, "seed": self.seed, "blocks": [[edit.block.start, edit.block.stop] for edit in edits],
            "net_ratio": 1 - pruned.num_parameters() / self.model.num_parameters(),
            "perplexity": {"dense": self.dense.value, "pruned": after.value, "window": after.window,
                           "stride": after.stride, "tokens": after.tokens},
            "excess_loss": math.log(after.value / self.dense.value), "seconds": seconds,
            "state_error": [entry["state_error"] for entry in fit], "calibration_tokens": self.tokens.tokens,
        }


def run(seeds: range, names: list[str], file: Path) -> None:
    """Measures what the file lacks and writes it after every variant."""
    records = json.loads(file.read_text()) if file.is_file() else []
    done = {(record["variant"], record["seed"]): record for record in records}
    for seed in seeds:
        missing = [name for name in names if (name, seed) not in done]
        if not missing:
            continue
        bench = Bench(seed)
        for name in sorted(missing, key=list(VARIANTS).index):
            chosen = done.get(("default", seed))
            blocks = tuple((start, end) for start, end in chosen["blocks"]) if chosen else None
            if blocks is None and name != "default":
                raise SystemExit("run the default first: the other variants replace its blocks")
            done[name, seed] = bench.measure(name, blocks)
            print(name, seed, f"excess {done[name, seed]['excess_loss']:.4f}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(list(done.values()), indent=1) + "\n")


def summary(records: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Records by variant, in the order of VARIANTS."""
    return [
        (name, found) for name in VARIANTS if (found := [record for record in records if record["variant"] == name])
    ]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def table(records: list[dict[str, Any]], names: list[str] | None = None) -> str:
    """The Markdown table."""
    lines = ["| stand-in | net ratio | perplexity | excess loss | of linear's | seconds to fit |", "|---" * 6 + "|"]
    groups = dict(summary(records))
    linear = statistics.fmean(record["excess_loss"] for record in groups["linear"]) if "linear" in groups else math.nan
    for name, found in groups.items():
        if names is None or name in names:
            excess = [record["excess_loss"] for record in found]
            lines.append(
                f"| {VARIANTS[name][0]} | {statistics.fmean(record['net_ratio'] for record in found):.1%} "
                f"| {spread([record['perplexity']['pruned'] for record in found], 2)} | {spread(excess)} "
                f"| {statistics.fmean(excess) / linear:.2f} | {statistics.fmean(r['seconds'] for r in found):.0f} |")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """Excess loss of every variant with its seeds as points."""
    groups = summary(records)[::-1]
    figure = Figure(figsize=(8, 0.42 * len(groups) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for row, (name, found) in enumerate(groups):
        excess = [record["excess_loss"] for record in found]
        axes.barh(row, statistics.fmean(excess), color="#0072B2" if name == "default" else "#9ecae1", height=0.65)
        axes.plot(excess, [row] * len(excess), "o", color="#333333", markersize=3.5)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    axes.set_xscale("symlog", linthresh=0.5)
    axes.set_xlabel("excess loss ln(ppl / dense ppl), nats per token (linear to 0.5, then logarithmic); dots: seeds")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file)


def render(file: Path) -> None:
    """Writes the page, the plot and the README's table from the records."""
    records = json.loads(file.read_text())
    first = records[0]
    blocks = sorted({str(record["blocks"]) for record in records if record["variant"] == "default"})
    protocol, seeds = first["perplexity"], sorted({record["seed"] for record in records})
    page = f"""# Which stand-in?

At 25 % net parameters on the bundled model: what does each part of the default buy over simpler stand-ins in the same
blocks, fitted on the same {first['calibration_tokens']:,} calibration tokens?

    python benchmarks/stand_ins.py --seeds {len(seeds)}

Held-out text bundled with the package: {protocol['tokens']:,} tokens, window {protocol['window']}, stride
{protocol['stride']}; dense perplexity {protocol['dense']:.2f}. Blocks chosen by the default: {', '.join(blocks)}.
{TRAINED["refine_epochs"]} epochs of step 3.
Mean ± standard deviation over {len(seeds)} seeds (calibration order, random features, initialisation). Seconds were
taken on a shared machine and mean little.

![excess loss by stand-in](stand-ins.svg)

{table(records)}
"""
    notes = file.with_name("stand-ins-notes.md")
    file.with_suffix(".md").write_text(page + ("\n" + notes.read_text() if notes.is_file() else ""))
    plot(records, file.with_suffix(".svg"))
    text = README.read_text()
    start, end = "<!-- table: stand-ins -->\n", "<!-- end -->"
    if start in text:
        head, rest = text.split(start, 1)
        short = table(records, ["default", "context-none", "mlp", "linear", "dropped", "paper"])
        README.write_text(f"{head}{start}{short}\n{end}{rest.split(end, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, counted from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--render", action="store_true", help="only rewrite the page from the recorded results")
    parser.add_argument("--file", type=Path, default=RESULTS / "stand-ins.json")
    options = parser.parse_args()
    if not options.render:
        run(range(options.first_seed, options.first_seed + options.seeds), options.variants, options.file)
    render(options.file)


if __name__ == "__main__":
    main()
