"""Does a stand-in's attention need keys and values of its own, or do those of the layer in front of it do?

    python benchmarks/shared_keys.py --seeds 3                 measures what docs/results/shared-keys.json lacks
    python benchmarks/shared_keys.py --model DIR --name llama  the same for another model; the page shows all
    python benchmarks/shared_keys.py --render                  only rewrites page and plot from that file
    python benchmarks/shared_keys.py --quick                   few tokens and epochs, into shared-keys-quick.json

A unit is one variant with one seed: KDP's default at 25 % net, every variant in the blocks that the default selects.
"""

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lent_keys import LentBudget, Paired, check_lending, connected, lending, projections
from matplotlib.figure import Figure
from pruned_models import QUICK, add_sizes, compared, fitted_tokens, scored_tokens, seeds_of
from stand_ins import TRAINED, spread
from transformers import PreTrainedModel
from units_file import (
    COLOURS,
    Record,
    Subject,
    arguments,
    by_model,
    compact,
    keep,
    load,
    make_page,
    table,
    write_page,
)

from kdprune.analysis import score_layers
from kdprune.data import TokenSet
from kdprune.evaluation.perplexity import perplexity
from kdprune.methods.blocks import choose_blocks, spare_features
from kdprune.methods.blockwise import index_after
from kdprune.methods.fitting import fit_block
from kdprune.methods.kdp import KDP
from kdprune.methods.shape import Shape
from kdprune.model.block_states import boundary_states, collect_block_states
from kdprune.model.families import decoder_layers
from kdprune.model.placement import work_device
from kdprune.model.surgery import Edit, apply_edits
from kdprune.runtime import Stages, generator
from kdprune.session import BATCH

RATIO = 0.25
VARIANTS = {
    "own": "keys and values of its own (the default)",
    "shared": "the neighbour's; the rest starts as the block's first attention",
    "aligned": "the neighbour's; the rest starts as the neighbour's attention",
}
OPTIONS: dict[str, Any] = TRAINED  # where they are not the default's


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["variant"], record["seed"]


def fitted(
    model: PreTrainedModel, rows: TokenSet, method: KDP, shape: Shape, blocks: Sequence[range], variant: str, seed: int,
) -> tuple[list[Edit], list[Record]]:
    """Every block's stand-in, one after the other on the states that the model with those before it gives."""
    held = rows.held_out(method.held)
    dense = collect_block_states(
        model, rows, blocks, held=held, path=method.path_rows(rows, shape), batch_size=BATCH)
    edits: list[Edit] = []
    records: list[Record] = []
    for number, states in enumerate(dense):
        start = states.block.start
        before = apply_edits(model, edits) if edits else model
        with contextlib.ExitStack() as lent:
            entering, lender = (index_after(edits, boundary) for boundary in (start, start - 1))
            with connected(before):
                found = boundary_states(before, rows, [entering, lender], batch_size=BATCH)
            if edits:
                states = dataclasses.replace(states, inputs=found[entering])
            if variant != "own":
                purse = lent.enter_context(lending(model, states.block, variant == "aligned"))
                paired: Any = Paired(states.inputs, found[lender], purse, model, start - 1)
                states = dataclasses.replace(states, inputs=paired)
            edit, record = fit_block(
                model, states, shape, method.settings(shape, rows), generator(seed, number + 1), work_device(model),
                Stages())
        edits.append(edit)
        records.append(record)
    return edits, records


class Bench:
    """One seed's rows and blocks of a model."""

    def __init__(self, subject: Subject, held_out: TokenSet, rows: TokenSet, seed: int, quick: bool):
        self.model, self.held_out, self.rows, self.seed = subject.model, held_out, rows, seed
        self.method = KDP(ratio=RATIO, **(OPTIONS | (QUICK["kdp"] if quick else {})))
        self.method.check(self.model, self.rows)
        scores = score_layers(
            self.model, self.rows, protect=self.method.protect, seed=seed, batch_size=BATCH, stages=Stages())
        self.budget = self.method.budget(self.model)
        self.blocks = choose_blocks(self.method, scores.tensors(), self.budget)
        check_lending(self.model, self.blocks)
        self.dense = perplexity(self.model, held_out)

    def measure(self, variant: str) -> Record:
        """One variant: its size, what it loses, how well it fits."""
        shape = self.budget.shape
        if self.method.fill:
            budget = self.budget if variant == "own" else LentBudget(self.model, shape, RATIO)
            shape = spare_features(shape, budget, self.blocks)
        start = time.perf_counter()
        edits, fit = fitted(self.model, self.rows, self.method, shape, self.blocks, variant, self.seed)
        seconds = time.perf_counter() - start
        pruned = apply_edits(self.model, edits)
        with connected(pruned):
            measured = compared(self.dense, pruned, self.held_out)
        layers = len(decoder_layers(pruned))
        return {
            "blocks": [[block.start, block.stop] for block in self.blocks], "features": shape.features,
            "net_ratio": 1 - pruned.num_parameters() / self.model.num_parameters(), **measured,
            "state_error": [entry["state_error"] for entry in fit],
            "saved_parameters": 0 if variant == "own" else sum(
                projections(self.model, block.start) for block in self.blocks),
            # Layers that keep keys and values of every token.
            "cache": {"dense": len(decoder_layers(self.model)),
                      "pruned": layers - (0 if variant == "own" else len(self.blocks))},
            "tokens": self.rows.tokens, "seconds": seconds,
        }


def run(options: argparse.Namespace) -> None:
    """Measures what the file lacks of one model."""
    name, file, quick = options.name, options.file, options.quick
    units: list[Record] = [{"model": name, "quick": quick, "variant": variant, "seed": seed}
                           for seed in seeds_of(options) for variant in VARIANTS]
    missing = [unit for unit in units if key(unit) not in load(file, key)]
    if not missing:
        return
    subject = Subject(options.model, options.text)
    held_out = subject.held_out(scored_tokens(options))
    for seed in seeds_of(options):
        todo = [unit for unit in missing if unit["seed"] == seed]
        if not todo:
            continue
        bench = Bench(subject, held_out, subject.rows(fitted_tokens(options), seed), seed, quick)
        for unit in todo:
            record = unit | bench.measure(unit["variant"])
            keep(compact(record), file, key)
            print(f"{name} {unit['variant']} seed {seed}: excess {record['excess_loss']:.4f}", flush=True)


# ------------------------------------------------------------------------------------------------- the page


def of_variant(records: list[Record], variant: str) -> list[Record]:
    """The records of one variant."""
    return [record for record in records if record["variant"] == variant]


def against_own(records: list[Record], variant: str) -> str:
    """By how much more a variant loses than `own`, seed by seed."""
    own = {record["seed"]: record["excess_loss"] for record in of_variant(records, "own")}
    gaps = [r["excess_loss"] - own[r["seed"]] for r in of_variant(records, variant) if r["seed"] in own]
    if variant == "own" or not gaps:
        return "—"
    return f"{statistics.fmean(gaps):+.4f}" + (f" ± {statistics.stdev(gaps):.4f}" if len(gaps) > 1 else "")


def rows_of(records: list[Record]) -> list[list[object]]:
    """A row a variant."""
    rows: list[list[object]] = []
    for variant, shown in VARIANTS.items():
        if found := of_variant(records, variant):
            rows.append([
                f"`{variant}`: {shown}", f"{statistics.fmean(r['net_ratio'] for r in found):.2%}",
                spread([r["features"] for r in found], 0), spread([r["perplexity"] for r in found], 2),
                spread([r["excess_loss"] for r in found], 4), against_own(records, variant),
                spread([statistics.fmean(r["state_error"]) for r in found]),
                " or ".join(dict.fromkeys(f"{r['cache']['pruned']} of {r['cache']['dense']}" for r in found)),
                f"{statistics.fmean(r['seconds'] for r in found):.0f}"])
    return rows


def plot(records: list[Record]) -> Figure:
    """A panel a model: excess loss of every variant, dots are seeds."""
    models = by_model(records)
    figure = Figure(figsize=(4.2 * len(models) + 1, 3), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        for place, (colour, variant) in enumerate(zip(COLOURS, VARIANTS, strict=False)):
            if excess := [record["excess_loss"] for record in of_variant(found, variant)]:
                axes.bar(place, statistics.fmean(excess), color=colour, alpha=0.6, width=0.65)
                axes.plot([place] * len(excess), excess, "o", color="#333333", markersize=3.5)
        axes.set_xticks(range(len(VARIANTS)), list(VARIANTS))
        axes.set(title=name, ylabel="excess loss, nats per token")
        axes.grid(axis="y", alpha=0.3)
    return figure


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records = list(load(file, key).values())
    parts = []
    for name, found in by_model(records).items():
        one, seeds = found[0], sorted({record["seed"] for record in found})
        blocks = ", ".join(dict.fromkeys(
            " ".join(f"{start}–{stop - 1}" for start, stop in record["blocks"]) for record in found))
        saved = max(record["saved_parameters"] for record in found)
        parts.append(f"""## {name}

Layers {blocks}; {one['tokens']:,} calibration tokens; dense perplexity {one['dense']:.2f} on {one['scored']:,} held-out
tokens (window {one['window']}, stride {one['stride']}); seeds {', '.join(map(str, seeds))}. The projections that are
not needed have {saved:,} parameters in all.

{table("keys and values | net ratio | features | perplexity | excess loss | more than `own` | state error | layers "
       "with a KV cache | seconds", rows_of(found))}""")
    sections = "\n\n".join(parts)
    page = f"""# Keys and values from the neighbour?

A stand-in with context has an attention of its own, which brings two projections and a slot in the KV cache. Can it
take keys and values from the kept layer in front of the block, at equal net parameters: what the two projections would
have cost goes into more features?

    python benchmarks/shared_keys.py --seeds 3

KDP's default at {RATIO:.0%} net with {TRAINED["refine_epochs"]} epochs of step 3.
Every variant stands in the blocks that the default selects and is fitted by the same
code on the same rows, later blocks on the states that the model with the earlier stand-ins gives. The neighbour's keys
and values are taken as its projections put them out, in front of norms and rotary positions, which the attention that
borrows applies as ever; queries, output projection, norms and features are refined, the neighbour stays as it is. Mean
± standard deviation over seeds; excess loss in nats per token; state error: held-out, mean over the blocks, dropping a
block is about 1. Seconds were taken on a shared machine and mean little.

**A measurement, no option**: neither the checkpoint format nor the generated model classes know such a layer. Models
were measured in memory and without a KV cache; how many layers would keep one is counted, not run.

![excess loss by where keys and values come from]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))


def main() -> None:
    parser = arguments(__doc__, "shared-keys")
    add_sizes(parser)
    make_page(parser, "shared-keys", run, render)


if __name__ == "__main__":
    main()
