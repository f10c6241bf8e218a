"""Better than the paper: what each change to KDP buys, at equal net parameters, on several models.

    python benchmarks/better.py --methods                        the variants, as `kdprune compare --methods` takes them
    kdprune compare reference/models/llama --methods "$(python benchmarks/better.py --methods)" … -o better-llama
    python benchmarks/better.py --add better-llama llama         # → docs/results/better-llama.json, and the page
    python benchmarks/better.py                                  # the page again, from docs/results/better-*.json

Every figure of docs/results/better.md comes from these records and from docs/results/shared_keys.json;
docs/results/better-notes.md is appended.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from main_table import RESULTS, add, row_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from publish import command
from stand_ins import spread
from units_file import COLOURS, table

from kdprune.report import summary
from kdprune.report.comparison_records import Comparison, Row

SHORT = "refine_epochs=15"  # of step 3, whatever the number of rows
DEFAULT = "kdp"
TOP = f"kdp:{SHORT}"
BASE = f"kdp:slack=0:{SHORT}"  # what most single changes are measured on
PRINTED = "kdp:preset=paper:fill=yes"
PAPER = f"{PRINTED}:kernel_epochs=20"
RESIDUAL = f"{PAPER}:inverse=residual"
REFINED = f"{RESIDUAL}:refine=yes:{SHORT}"
WIDE = f"kdp:context=none:sequential=no:slack=0:{SHORT}"
ATTENDING = f"kdp:sequential=no:slack=0:{SHORT}"
SMALL = "batch=2:rate=0.0078:refine_epochs=60"
HEALED = "heal=kl:heal_tokens=100000"
UNREFINED = "kdp:slack=0:refine=no"
MISSING = "—"
Models = Mapping[str, Comparison]


@dataclass(frozen=True)
class Step:
    """One change. variant: what is measured; against: the variant it changes; says: what changes."""

    variant: str
    against: str
    says: str


LADDER = (
    Step(PRINTED, "", "the method as printed, filled up to the ratio"),
    Step(PAPER, PRINTED, "20 epochs of step 1 instead of 100"),
    Step(RESIDUAL, PAPER, "the inverse gives the update, on a normed input"),
    Step(REFINED, RESIDUAL, "kernel and inverse refined together, 15 epochs"),
    Step(WIDE, REFINED, "no hidden layer in the inverse, twice the bandwidth, blocks ranked by their own ends"),
    Step(ATTENDING, WIDE, "one attention sublayer in front"),
    Step(BASE, ATTENDING, "later blocks fitted on the pruned model's states"),
    Step(TOP, BASE, "more and shorter blocks, within half a layer of slack"),
    Step(DEFAULT, TOP, "as many epochs of refinement as make 1,200 steps: 60 here"),
)
CHANGES: Mapping[str, tuple[Step, ...]] = {
    "Context": (
        Step(f"kdp:slack=0:context_from=middle:{SHORT}", BASE, "attention started from the block's middle layer"),
        Step(f"kdp:slack=0:context_from=last:{SHORT}", BASE, "attention started from the block's last layer"),
        Step(f"kdp:slack=0:context_heads=0.5:{SHORT}", BASE,
             "half of the key-value groups, the rest spent on features"),
    ),
    "Longer blocks or larger stand-ins": (
        Step(f"kdp:slack=0:longer=1:{SHORT}", BASE, "one layer more goes, spent on features"),
    ),
    "Selection": (
        Step(f"kdp:slack=0:ranking=damage:{SHORT}", BASE,
             "blocks ranked by the loss measured behind a closed-form stand-in"),
        Step(f"kdp:ranking=damage:{SHORT}", TOP, "… on top of the slack"),
    ),
    "Polish of the stand-ins": (
        Step(f"kdp:slack=0:{HEALED}:{SHORT}", BASE, "KL to the dense logits, 100,000 tokens"),
    ),
    "Feature map": (
        Step(f"kdp:slack=0:kernel=mlp:{SHORT}", BASE, "a GELU layer instead of Fourier features"),
    ),
    "What helped above, on top of the slack": (
        Step(f"kdp:context_from=middle:{SHORT}", TOP, "attention started from the block's middle layer"),
        Step(f"kdp:{HEALED}:{SHORT}", TOP, "KL to the dense logits, 100,000 tokens"),
        Step(f"kdp:kernel=mlp:{SHORT}", TOP, "a GELU layer instead of Fourier features"),
        Step(f"kdp:kernel=mlp:{HEALED}:{SHORT}", TOP, "a GELU layer and the KL polish"),
    ),
    "Training, on top of the slack": (
        Step(f"kdp:batch=4:rate=0.0156:{SHORT}", TOP, "steps of half the rows at half the rate, in the same time"),
        Step("kdp:refine_epochs=30", TOP, "step 3 for 30 epochs instead of 15"),
        Step(f"kdp:samples=320:{SHORT}", TOP, "twice the calibration text, in the time of 30 epochs"),
        Step(DEFAULT, TOP, "step 3 for 60 epochs, the default on so few rows"),
    ),
    "On top of the default": (
        Step("kdp:kernel=mlp", DEFAULT, "a GELU layer instead of Fourier features"),
        Step(f"kdp:{SMALL}", DEFAULT, "steps of a quarter of the rows at a quarter of the rate"),
        Step(f"kdp:kernel=mlp:{SMALL}", DEFAULT, "… and a GELU layer"),
    ),
}
# What the inverse network reads: features of a random kernel, least-squares operators on it, or all that step 1 learns.
STEP1 = (
    Step(UNREFINED, "", "fully trained: kernel and operators, without step 3"),
    Step(f"{UNREFINED}:kernel=fixed", UNREFINED, "least-squares operators on the kernel as drawn"),
    Step(f"{UNREFINED}:operators=no", UNREFINED, "random kernel, no operators"),
    Step(PAPER, "", "fully trained, the paper's form"),
    Step(f"{PAPER}:kernel=fixed", PAPER, "… least-squares operators on the kernel as drawn"),
)
STEPS = (*LADDER, *(step for steps in CHANGES.values() for step in steps), *STEP1)


def load() -> dict[str, Comparison]:
    """Name of the model → its comparison."""
    return {file.stem.removeprefix("better-"): Comparison.load(file) for file in sorted(RESULTS.glob("better-*.json"))}


def losses(found: Comparison, variant: str) -> dict[int, float]:
    """Seed → excess loss."""
    return {unit.seed: unit.perplexity.excess_loss for unit in found.units
            if unit.variant == variant and unit.perplexity.excess_loss is not None}


def gains(found: Comparison, step: Step) -> list[float]:
    """Excess loss less that of what the step changes, over the seeds that have both: below 0 the step helps."""
    mine, base = losses(found, step.variant), losses(found, step.against)
    return [mine[seed] - base[seed] for seed in mine if seed in base]


def gain_cell(found: Comparison, step: Step) -> str:
    """What the step changes the loss by; small, so that it has its sign and a digit more."""
    values = gains(found, step)
    if not values:
        return MISSING
    return ("+" if statistics.fmean(values) >= 0 else "") + spread(values, 4)


def loss_cell(found: Comparison, step: Step) -> str:
    """Excess loss, and the net ratio where it is not the one asked for; why there is none."""
    row: Row | None = row_of(found, step.variant)
    if row is None or not row.seeds or row.net_ratio is None:
        return MISSING if row is None or not row.failures else "refused"
    off = abs(row.net_ratio.mean - found.ratio) > 0.002
    ratio = f" ({summary.percent(row.net_ratio.mean)})" if off else ""
    return spread(list(losses(found, step.variant).values())) + ratio


def verdict(models: Models, step: Step) -> str:
    """On how many of the models the step helps."""
    means = [statistics.fmean(found) for comparison in models.values() if (found := gains(comparison, step))]
    if not means:
        return ""
    wins = sum(mean < 0 for mean in means)
    return f"{'**all**' if wins == len(means) and wins == len(models) else wins} of {len(means)}"


def rows(models: Models, steps: Sequence[Step]) -> list[list[str]]:
    """A row a step: what changes, the variant, then loss and gain of every model, and the verdict."""
    return [[step.says, f"`{step.variant}`",
             *(cell for found in models.values()
               for cell in (loss_cell(found, step), gain_cell(found, step))),
             verdict(models, step)] for step in steps]


def tables(models: Models) -> str:
    """The ladder, then the changes of the default by question."""
    heads = " | ".join(f"{name} | Δ" for name in models)
    parts = [f"## From the paper's form to the default\n\nEach row changes the one above it; Δ is what that does.\n\n"
             f"{table(f'what changes | variant | {heads} | helps on', rows(models, LADDER))}"]
    base = [["what is changed", f"`{BASE}`",
             *(cell for found in models.values() for cell in (loss_cell(found, Step(BASE, "", "")), "")), ""]]
    changed = [row for title, steps in CHANGES.items()
               for row in ([f"*{title}*", *[""] * (2 + 2 * len(models))], *rows(models, steps))]
    parts.append(f"## One change at a time\n\nΔ is the difference from the default without slack and with 15 "
                 "epochs of step 3, in the last\ngroups from what they say, seed by seed. A figure "
                 "without ± has one seed.\n\n"
                 f"{table(f'what changes | variant | {heads} | helps on', [*base, *changed])}")
    parts.append("## Does step 1 dominate?\n\nThe same inverse network on three kernels; Δ is the difference from the "
                 "fully trained one: above 0, step 1's training pays.\n\n"
                 f"{table(f'kernel | variant | {heads} | better on', rows(models, STEP1))}")
    return "\n\n".join(parts)


def failures(models: Models) -> str:
    """What a model refused, and why."""
    lines = [f"- {name}, `{failure.variant}`, seed {failure.seed}: {failure.reason}"
             for name, found in models.items() for failure in found.failures]
    return "\n\n" + "\n".join(lines) if lines else ""


def plot(models: Models) -> Figure:
    """Left the ladder, right the changes: excess loss, and what it changes by, a mark a model."""
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, found) in enumerate(models.items()):
        look = {"marker": "osD^v"[number % 5], "color": COLOURS[number % len(COLOURS)], "label": name}
        known = [(place, statistics.fmean(values.values())) for place, step in enumerate(LADDER)
                 if (values := losses(found, step.variant))]
        left.plot([loss for _, loss in known], [place for place, _ in known], linewidth=1.2, **look)
        changes = [step for steps in CHANGES.values() for step in steps]
        moved = [(place, statistics.fmean(values)) for place, step in enumerate(changes)
                 if (values := gains(found, step))]
        right.plot([gain for _, gain in moved], [place for place, _ in moved], linestyle="", **look)
    finish(left, [step.says for step in LADDER], "excess loss, nats per token", "from the paper's form to the default")
    finish(right, [step.variant for steps in CHANGES.values() for step in steps],
           "excess loss less that of what is changed", "one change at a time")
    right.axvline(0, color="black", linewidth=0.8)
    return figure


def finish(axes: Axes, names: Sequence[str], label: str, title: str) -> None:
    """Names down the side, the first on top."""
    axes.set_yticks(range(len(names)), ["\n".join(_halves(name)) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)


def _halves(name: str, most: int = 34) -> list[str]:
    if len(name) <= most or " " not in name:
        return [name]
    cut = name.rfind(" ", 0, len(name) // 2 + 8)
    return [name[:cut], name[cut + 1:]]


def page(models: Models) -> str:
    """docs/results/better.md without its notes."""
    commands = "\n".join(
        f"    {command(found)} -o better-{name}\n    python benchmarks/better.py --add better-{name} {name}"
        for name, found in models.items())
    settings = table("model | parameters | dense perplexity | calibration tokens | held-out tokens | seeds", [
        [name, summary.count(found.dense.parameters), f"{found.dense.perplexity:.2f}", f"{found.calibration.tokens:,}",
         f"{found.dense.tokens:,}", len({unit.seed for unit in found.units})] for name, found in models.items()])
    ratio = summary.percent(next(iter(models.values())).ratio)
    return f"""# Better than the paper: what each change buys

Which changes of KDP lower the loss at equal net parameters ({ratio}), and on every model? Excess loss is
ln(pruned / dense perplexity) in nats per token, in brackets the net ratio where it is another one; ± is the standard
deviation over seeds. Every variant is filled up with features to the same net ratio.

{commands}

{settings}

![from the paper's form to the default, and one change at a time](better.svg)

{tables(models)}{failures(models)}
"""


def render() -> None:
    """Writes the page and its picture."""
    if not (models := load()):
        raise SystemExit("no docs/results/better-*.json: use --add FOLDER MODEL")
    notes = RESULTS / "better-notes.md"
    (RESULTS / "better.md").write_text(page(models) + ("\n" + notes.read_text() if notes.is_file() else ""))
    plot(models).savefig(RESULTS / "better.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", action="store_true", help="print the variants and stop")
    parser.add_argument("--add", nargs="+", metavar="FOLDER… MODEL",
                        help="finished comparisons (results.json in each) of one model, and its name")
    options = parser.parse_args(arguments)
    if options.methods:
        print(",".join(dict.fromkeys(step.variant for step in STEPS)))
        return
    if options.add:
        add([Path(folder) for folder in options.add[:-1]], "better", options.add[-1])
    render()


if __name__ == "__main__":
    main()
