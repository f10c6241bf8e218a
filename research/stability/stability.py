"""Does KDP stay stable beyond 25 %? Spectral normalisation, a shared kernel and K_max at 25, 40 and 50 % net.

    python benchmarks/stability.py --seeds 3            runs what docs/results/stability.json lacks, then renders
    python benchmarks/stability.py --render             only rewrites page and plot from that file
    python benchmarks/stability.py --quick --seeds 1    a tenth of the work, into stability-quick.json, to try it

A unit is one variant at one ratio with one seed; its record is kept as soon as it is measured, so that a run may be
stopped, and two runs (of other seeds or ratios) may share the file. A K_max that leads to the default's blocks has the
default's figures; one that cannot reach the ratio says so.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import units_file
from matplotlib.figure import Figure
from stand_ins import RESULTS, TRAINED, Bench, spread

from kdprune.errors import KDPruneError
from kdprune.evaluation.perplexity import perplexity
from kdprune.methods.blocks import choose_blocks
from kdprune.methods.kdp import KDP
from kdprune.model.surgery import apply_edits
from kdprune.session import BATCH

RATIOS = (0.25, 0.4, 0.5)
# name: (what it is, options). The default's K_max is 8, half the layers of the bundled model and the largest allowed.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("without `sequential` (K_max 8)", {"sequential": False}),
    "spectral-norm": ("`spectral_norm=1.0`", {"spectral_norm": 1.0, "sequential": False}),
    "shared-kernel": ("`share_kernel`", {"share_kernel": True, "sequential": False}),
    "sequential": ("`sequential`, the default: later blocks fitted on the pruned model's states", {"sequential": True}),
    "both": ("`spectral_norm=1.0 share_kernel`", {"spectral_norm": 1.0, "share_kernel": True, "sequential": False}),
    "k-max-6": ("`max_block=6`", {"max_block": 6, "sequential": False}),
    "k-max-4": ("`max_block=4`", {"max_block": 4, "sequential": False}),
}
QUICK: dict[str, Any] = {"kernel_epochs": 3, "refine_epochs": 2}
QUICK_ROWS = 48
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
Record = units_file.Record


def key(record: Record) -> tuple[float, str, int]:
    """What makes a unit."""
    return record["ratio"], record["variant"], record["seed"]


def load(file: Path) -> dict[Any, Record]:
    """The records of a file by unit; none if there is no file yet."""
    return units_file.load(file, key)


def keep(record: Record, file: Path) -> None:
    """Adds a record to the file, which another run may be writing too."""
    units_file.keep(record, file, key, order=lambda found: _order(key(found)))


def _order(unit: tuple[float, str, int]) -> tuple[float, int, int]:
    ratio, variant, seed = unit
    return ratio, list(VARIANTS).index(variant), seed


def measure(bench: Bench, ratio: float, variant: str, known: Record | None, quick: bool) -> Record:
    """One unit. ``known``: the default's record at this ratio and seed, whose blocks may turn out to be these."""
    unit: Record = {"ratio": ratio, "variant": variant, "seed": bench.seed, "quick": quick}
    method = KDP(ratio=ratio, **(QUICK if quick else TRAINED), **VARIANTS[variant][1])
    scores = bench.scores.tensors()
    try:
        chosen = choose_blocks(method, scores, method.budget(bench.model))
    except KDPruneError as error:
        return unit | {"unreachable": str(error)}
    blocks = [[block.start, block.stop] for block in chosen]
    if known is not None and variant.startswith("k-max") and blocks == [entry["block"] for entry in known["blocks"]]:
        return known | unit | {"same_as": "default"}
    start = time.perf_counter()
    result = method(bench.model, bench.tokens, scores, seed=bench.seed, batch_size=BATCH)
    seconds = time.perf_counter() - start
    pruned = apply_edits(bench.model, list(result.edits))
    after = perplexity(pruned, bench.held_out)
    return unit | {
        "net_ratio": 1 - pruned.num_parameters() / bench.model.num_parameters(),
        "perplexity": {"dense": bench.dense.value, "pruned": after.value, "window": after.window,
                       "stride": after.stride, "tokens": after.tokens},
        "excess_loss": math.log(after.value / bench.dense.value), "seconds": seconds,
        "calibration_tokens": bench.tokens.tokens, "blocks": [_block(entry) for entry in result.fit],
    }


def _block(fit: Record) -> Record:
    """What is shown of one block's fit; k-step error and bound at its last step."""
    return {
        "block": list(fit["block"]), "features": fit["features"], "B_A": fit["B_A"],
        "k_step_error": fit["k_step_error"], "bound": fit["bound"], "explained_variance": fit["explained_variance"],
        "effective_rank": fit["effective_rank"], "state_error": fit["state_error"],
        "dropped_error": fit["dropped_error"], "refined": fit["refined"],
    }


def run(seeds: Iterable[int], ratios: list[float], names: list[str], file: Path, quick: bool) -> None:
    """Measures what the file lacks, the default first: other variants compare their blocks with its."""
    for seed in seeds:
        units = [(ratio, name) for ratio in ratios for name in VARIANTS if name in names]
        if all((ratio, name, seed) in load(file) for ratio, name in units):
            continue
        bench = Bench(seed)
        if quick:
            bench.tokens = bench.tokens.select(slice(QUICK_ROWS))
        for ratio, name in units:
            done = load(file)
            if (ratio, name, seed) in done:
                continue
            record = measure(bench, ratio, name, done.get((ratio, "default", seed)), quick)
            keep(record, file)
            said = "unreachable" if "unreachable" in record else f"excess {record['excess_loss']:.4f}"
            print(f"{ratio:.0%} {name} seed {seed}: {said}", flush=True)


def grouped(records: Iterable[Record], ratio: float) -> list[tuple[str, list[Record]]]:
    """Records of one ratio by variant, in the order of VARIANTS."""
    here = [record for record in records if record["ratio"] == ratio]
    return [(name, found) for name in VARIANTS if (found := [entry for entry in here if entry["variant"] == name])]


def _worst(record: Record, name: str) -> float:
    """The largest value over the blocks, at the last step where there is one a step."""
    return max(entry[name][-1] if isinstance(entry[name], list) else entry[name] for entry in record["blocks"])


def _layers(record: Record) -> str:
    return " ".join(f"{start}–{stop - 1}" for start, stop in (entry["block"] for entry in record["blocks"]))


def table(records: list[Record], ratio: float) -> str:
    """One ratio, a row a variant."""
    titles = "variant | layers replaced | net ratio | excess loss | state error | B_A | k-step error | bound | seconds"
    lines = [f"| {titles} |", "|---" * 9 + "|"]
    for name, found in grouped(records, ratio):
        reached = [record for record in found if "unreachable" not in record]
        if not reached:
            largest = found[0]["unreachable"].split("at most ")[1].split(",")[0]
            lines.append(f"| {VARIANTS[name][0]} | cannot: at most {float(largest):.1%} " + "| " * 7 + "|")
            continue
        layers = ", ".join(dict.fromkeys(_layers(record) for record in reached))
        layers += " (the default's)" if all(record.get("same_as") for record in reached) else ""
        worst = {column: [_worst(record, column) for record in reached]
                 for column in ("state_error", "B_A", "k_step_error", "bound")}
        lines.append(
            f"| {VARIANTS[name][0]} | {layers} | {statistics.fmean(r['net_ratio'] for r in reached):.1%} "
            f"| {spread([r['excess_loss'] for r in reached])} | {spread(worst['state_error'])} "
            f"| {spread(worst['B_A'], 4)} | {spread(worst['k_step_error'])} | {statistics.fmean(worst['bound']):.3g} "
            f"| {statistics.fmean(r['seconds'] for r in reached):.0f} |")
    return "\n".join(lines)


def block_table(records: list[Record]) -> str:
    """Every block that was replaced, a row a block and variant, means over the seeds that chose it."""
    titles = "net | layers | variant | B_A | k-step error | bound | bound / error | state error | explained | seeds"
    lines = [f"| {titles} |", "|---" * 10 + "|"]
    entries: dict[tuple[float, str, tuple[int, ...]], list[Record]] = {}
    for record in records:
        if "unreachable" not in record and "same_as" not in record:
            for entry in record["blocks"]:
                entries.setdefault((record["ratio"], record["variant"], tuple(entry["block"])), []).append(entry)
    order = sorted(entries, key=lambda unit: (unit[0], unit[2], list(VARIANTS).index(unit[1])))
    for ratio, variant, (start, stop) in order:
        found = entries[ratio, variant, (start, stop)]
        error, bound = (statistics.fmean(entry[name][-1] for entry in found) for name in ("k_step_error", "bound"))
        lines.append(
            f"| {ratio:.0%} | {start}–{stop - 1} | {VARIANTS[variant][0]} "
            f"| {statistics.fmean(entry['B_A'] for entry in found):.4f} | {error:.3f} | {bound:.3g} "
            f"| {bound / error:.3g} | {statistics.fmean(entry['state_error'] for entry in found):.3f} "
            f"| {statistics.fmean(entry['explained_variance'] for entry in found):.3f} | {len(found)} |")
    return "\n".join(lines)


def plot(records: list[Record], file: Path) -> None:
    """Left: excess loss against the ratio, dots are seeds. Right: every block's bound against its measured error."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    quality, theory = figure.subplots(1, 2)
    reached = [record for record in records if "unreachable" not in record]
    for colour, name in zip(COLOURS, VARIANTS, strict=True):
        found = [record for record in reached if record["variant"] == name]
        ratios = sorted({record["ratio"] for record in found})
        means = [statistics.fmean(r["excess_loss"] for r in found if r["ratio"] == ratio) for ratio in ratios]
        quality.plot(ratios, means, color=colour, linewidth=1.2, label=name)
        quality.plot([r["ratio"] for r in found], [r["excess_loss"] for r in found], "o", color=colour, markersize=3.5)
        own = [entry for record in found if "same_as" not in record for entry in record["blocks"]]
        theory.plot([entry["k_step_error"][-1] for entry in own], [entry["bound"][-1] for entry in own], "o",
                    color=colour, markersize=4, label=name)
    quality.set_xlabel("share of the parameters removed, net")
    quality.set_ylabel("excess loss ln(ppl / dense ppl), nats per token")
    quality.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    theory.set_xlabel("measured k-step error on held-out tokens (‖φ‖ = 1)")
    theory.set_ylabel("Theorem 1's bound (C = 1)")
    theory.set_yscale("log")
    for axes in (quality, theory):
        axes.grid(alpha=0.3)
    quality.legend(fontsize=8)
    figure.savefig(file)


def render(file: Path) -> None:
    """Writes the page and the plot beside the record; a file of notes beside it is appended."""
    records = list(load(file).values())
    reached = [record for record in records if "unreachable" not in record]
    protocol, seeds = reached[0]["perplexity"], sorted({record["seed"] for record in records})
    command = f"python benchmarks/stability.py {'--quick ' if reached[0]['quick'] else ''}--seeds {len(seeds)}"
    ratios = sorted({record["ratio"] for record in records})
    tables = "\n\n".join(f"## {ratio:.0%} net\n\n{table(records, ratio)}" for ratio in ratios)
    page = f"""# Stable beyond 25 %?

Theorem 1's bound grows with Σ B_A^(k−1−j), B_A the largest spectral norm of an operator: with longer blocks and more of
them it may explode. What do spectral normalisation (every ‖A_i‖₂ ≤ 1, so that the sum is k), one kernel shared by all
blocks, and the longest block K_max change on the bundled model, in theory and in the pruned model?

    {command}

{TRAINED["refine_epochs"]} epochs of step 3;
{reached[0]['calibration_tokens']:,} calibration tokens; held-out text: {protocol['tokens']:,} tokens, window
{protocol['window']}, stride {protocol['stride']}; dense perplexity {protocol['dense']:.2f}. Mean ± standard deviation
over {len(seeds)} seeds. State error (of the finished stand-in, on held-out tokens, dropping the block is about 1), B_A,
k-step error at the last step (root mean square on held-out tokens, ‖φ‖ = 1) and bound (C = 1, δ = 0.05) are those of
the worst block of a model. B_A, k-step error and bound describe the kernel as step 1 leaves it; refinement follows.
Seconds were taken on a shared machine and mean little.

![excess loss against the ratio, and the bound against the measured error]({file.stem}.svg)

{tables}

## Block by block

{block_table(records)}
"""
    notes = file.with_name(f"{file.stem}-notes.md")
    file.with_suffix(".md").write_text(page + ("\n" + notes.read_text() if notes.is_file() else ""))
    plot(records, file.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, counted from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="few epochs on few rows, into another file")
    parser.add_argument("--render", action="store_true", help="only rewrite the page from the recorded results")
    parser.add_argument("--file", type=Path, help="the record (docs/results/stability.json)")
    options = parser.parse_args()
    file = options.file or (Path("stability-quick.json") if options.quick else RESULTS / "stability.json")
    if not options.render:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        run(seeds, options.ratios, options.variants, file, options.quick)
    render(file)


if __name__ == "__main__":
    main()
