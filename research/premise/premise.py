"""KDP's premise: is CKA above cosine, RBF above linear CKA, and do they rank blocks by the damage of their removal?

    python benchmarks/premise.py                                measures what docs/results/premise.json lacks, renders
    python benchmarks/premise.py --model DIR --name llama       the same for another model; the page shows all
    python benchmarks/premise.py --render                       only rewrites page and plot from that file
    python benchmarks/premise.py --quick                        few tokens and blocks, into premise-quick.json

A unit is the scores of one model, or one block of it dropped or replaced; every block of 2, 4 and 6 unprotected layers.
"""

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from stand_ins import TRAINED
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
from kdprune.evaluation.perplexity import default_window, perplexity
from kdprune.methods.kdp import KDP
from kdprune.methods.linear import Linear
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import Drop, apply_edits
from kdprune.runtime import Stages
from kdprune.selection import candidate_blocks, open_layers
from kdprune.session import BATCH

LENGTHS = (2, 4, 6)
# Tokens the scores are taken over, tokens stand-ins are fitted to, held-out tokens that are scored.
TOKENS, QUICK_TOKENS = (65_536, 16_384, 16_384), (2048, 1024, 1024)
PAIRS = {"linear CKA > cosine": ("linear_cka", "cosine"), "RBF CKA > cosine": ("rbf_cka", "cosine"),
         "RBF CKA > linear CKA": ("rbf_cka", "linear_cka")}
DAMAGES = {"dropped": "dropped", "linear": "linear map", "kernel": "attention + kernel, closed form",
           "refined": "attention + kernel, refined"}
SCORES = {
    "rbf": "RBF CKA", "linear": "linear CKA", "cosine": "cosine", "bi": "Σ BI (ShortGPT)",
    "update": "Σ relative update norm",
}
RESAMPLES = 2000
# Only solves: the kernel as drawn, least-squares operators, a ridge read-out behind the block's first attention.
CLOSED_FORM = {"kernel": "fixed", "kernel_epochs": 1, "refine": False, "fill": False}
# The default, with smaller batches as there are few rows; on a subset of the blocks.
REFINED, REFINED_LENGTH = {"kernel_epochs": 3, "batch": 2, "fill": False, **TRAINED}, 4


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["unit"], tuple(record.get("block", ()))


def blocks_of(layers: int, lengths: Sequence[int], quick: bool) -> list[range]:
    """The blocks that are removed, one at a time."""
    lengths = lengths[:1] if quick else lengths
    return [block for length in lengths
            for block in candidate_blocks(open_layers(layers, KDP.protect), length, length)][: 4 if quick else None]


def scored(subject: Subject, held_out: TokenSet, tokens: int) -> Record:
    """Similarity of all pairs of states, and the dense model's perplexity."""
    rows = subject.rows(tokens, seed=0)
    scores = score_layers(
        subject.model, rows, protect=KDP.protect, seed=0, batch_size=BATCH, stages=Stages(), limit=tokens)
    dense = perplexity(subject.model, held_out, stride=default_window(subject.model))
    arrays = {name: scores[name].tolist() for name in ("cosine", "linear_cka", "rbf_cka", "relative_update")}
    return {**compact(arrays, 6), "tokens": scores.tokens, "protected": list(scores.protected), "loss": dense.loss,
            "perplexity": dense.value, "window": dense.window, "stride": dense.stride, "scored": dense.tokens}


def removed(subject: Subject, held_out: TokenSet, rows: TokenSet, unit: str, block: range, dense: float) -> Record:
    """One block dropped or replaced: what the mean loss grows by."""
    start = time.perf_counter()
    span = ((block.start, block.stop),)
    if unit == "dropped":
        edits, error = [Drop(block)], None
    else:
        options = CLOSED_FORM if unit == "kernel" else REFINED
        method = Linear(blocks=span) if unit == "linear" else KDP(blocks=span, **options)  # type: ignore[arg-type]
        result = method(subject.model, rows, None, seed=0, batch_size=BATCH)
        edits, error = list(result.edits), result.fit[0]["state_error"]
    seconds = time.perf_counter() - start
    # Windows that do not overlap: half the cost, and the same for every block.
    loss = perplexity(apply_edits(subject.model, edits), held_out, stride=default_window(subject.model)).loss
    return {"block": [block.start, block.stop], "excess_loss": loss - dense, "state_error": error,
            "fitted_tokens": rows.fitted(KDP.held).tokens if error is not None else 0, "seconds": seconds}


def run(
    path: Path, text: Path, name: str, file: Path, quick: bool, lengths: Sequence[int] = LENGTHS,
    removals: Sequence[str] | None = None,
) -> None:
    """Measures what the file lacks of one model, dropping first."""
    subject = Subject(path, text)
    wide, fitted, scored_tokens = QUICK_TOKENS if quick else TOKENS
    held_out, rows = subject.held_out(scored_tokens), subject.rows(fitted, seed=0)
    unit: Record = {"model": name, "quick": quick, "unit": "scores"}
    if key(unit) not in load(file, key):
        keep(unit | scored(subject, held_out, wide), file, key)
    dense = load(file, key)[key(unit)]["loss"]
    blocks = blocks_of(len(decoder_layers(subject.model)), lengths, quick)
    for kind, block in itertools.product(removals or DAMAGES, blocks):
        unit = {"model": name, "quick": quick, "unit": kind, "block": [block.start, block.stop]}
        if key(unit) not in load(file, key) and (kind != "refined" or len(block) == REFINED_LENGTH):
            record = unit | removed(subject, held_out, rows, kind, block, dense)
            keep(compact(record), file, key)
            print(f"{name} {kind} {unit['block']}: excess {record['excess_loss']:.4f}", flush=True)


# ------------------------------------------------------------------------------------------------- figures


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, ties share their mean."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal + 1) / 2


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of the ranks along the last axis; NaN where one side is constant."""
    centred = [found - found.mean(-1, keepdims=True) for found in (ranks(x), ranks(y))]
    size = np.sqrt(np.prod([(found**2).sum(-1) for found in centred], axis=0))
    with np.errstate(invalid="ignore"):
        return (centred[0] * centred[1]).sum(-1) / size


def interval(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation and the 95 % of its bootstrap over entries (percentiles)."""
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.nanpercentile(spearman(x[draws], y[draws]), (2.5, 97.5))
    return float(spearman(x, y)), float(low), float(high)


def predicted(scores: Record, block: list[int], name: str) -> float:
    """How much damage a score expects of a block: 1 − similarity of h_s and h_e, or a sum over its layers."""
    start, end = block
    if name == "update":
        return sum(scores["relative_update"][start:end])
    if name == "bi":  # BI = 1 − E cos(h_l, h_{l+1})
        return sum(1 - scores["cosine"][layer][layer + 1] for layer in range(start, end))
    return 1 - scores[{"rbf": "rbf_cka", "linear": "linear_cka", "cosine": "cosine"}[name]][start][end]


def shares(scores: Record) -> list[list[object]]:
    """For which share of the pairs of states s < e each inequality holds, and by how much on average."""
    states = len(scores["cosine"])
    first, last = scores["protected"][0], states - 1 - scores["protected"][1]
    sets = {
        "one layer apart": [(s, s + 1) for s in range(states - 1)],
        "candidate blocks (2 to half the layers, unprotected)": [
            (s, e) for s in range(first, last) for e in range(s + 2, min(last, s + (states - 1) // 2) + 1)],
        "all pairs": list(itertools.combinations(range(states), 2)),
    }
    rows = []
    for title, pairs in sets.items():
        row: list[object] = [title, len(pairs)]
        for above, below in PAIRS.values():
            gaps = [scores[above][s][e] - scores[below][s][e] for s, e in pairs]
            row.append(f"{sum(gap > 0 for gap in gaps) / len(gaps):.0%} ({math.fsum(gaps) / len(gaps):+.3f})")
        rows.append(row)
    return rows


def _damage(records: list[Record], kind: str, length: int | None) -> list[Record]:
    return [record for record in records if record["unit"] == kind
            and (length is None or record["block"][1] - record["block"][0] == length)]


def correlations(scores: Record, records: list[Record]) -> list[list[object]]:
    """A row a kind of removal and block length: Spearman's ρ of every score with the damage."""
    rows = []
    for kind, length in itertools.product(DAMAGES, (*LENGTHS, None)):
        found = _damage(records, kind, length)
        if len(found) < 4 or (length is None and kind == "refined"):
            continue
        damage = np.array([record["excess_loss"] for record in found])
        row: list[object] = [DAMAGES[kind], "all" if length is None else length, len(found)]
        for name in SCORES:
            value, low, high = interval(np.array([predicted(scores, r["block"], name) for r in found]), damage)
            row.append(f"{value:.2f} ({low:.2f} … {high:.2f})")
        rows.append(row)
    return rows


def picks(scores: Record, records: list[Record]) -> list[list[object]]:
    """A row a kind of removal and block length: the damage of the block that each score would choose."""
    rows = []
    for kind, length in itertools.product(DAMAGES, LENGTHS):
        if found := _damage(records, kind, length):
            best, worst = (pick(found, key=lambda record: record["excess_loss"]) for pick in (min, max))
            row: list[object] = [DAMAGES[kind], length, _shown(best), _shown(worst)]
            for name in SCORES:
                row.append(_shown(min(found, key=lambda r, score=name: predicted(scores, r["block"], score))))
            rows.append(row)
    return rows


def _shown(record: Record) -> str:
    start, end = record["block"]
    return f"{record['excess_loss']:.3f} ({start}–{end - 1})"


def plot(records: list[Record]) -> Figure:
    """A row a model: how far neighbouring states are, the first open one and later ones; damage against RBF CKA."""
    models = by_model(records)
    figure = Figure(figsize=(12, 3.7 * len(models)), layout="constrained")
    for row, (name, found) in zip(figure.subplots(len(models), 3, squeeze=False), models.items(), strict=True):
        scores = next(record for record in found if record["unit"] == "scores")
        origin = scores["protected"][0]
        for colour, kind in zip(COLOURS, ("rbf_cka", "linear_cka", "cosine"), strict=False):
            values, label = torch.tensor(scores[kind]), kind.replace("_cka", " CKA").replace("rbf", "RBF")
            row[0].plot(1 - values.diagonal(1), "o-", color=colour, label=label, markersize=3)
            row[1].plot(range(origin + 1, len(values)), 1 - values[origin, origin + 1:], "o-", color=colour,
                        label=label, markersize=3)
        row[0].set(xlabel="layer", ylabel=f"{name}: 1 − similarity of its input and output", yscale="log")
        row[1].set(xlabel="state e", ylabel=f"1 − similarity of states {origin} and e", yscale="log")
        for (colour, length), (kind, mark) in itertools.product(
                zip(COLOURS, LENGTHS, strict=False), zip(DAMAGES, "oxs+", strict=False)):
            chosen = _damage(found, kind, length)
            row[2].plot([predicted(scores, r["block"], "rbf") for r in chosen], [r["excess_loss"] for r in chosen],
                        mark, color=colour, markersize=4, fillstyle="none",
                        label=f"{length} layers, {kind}" if chosen else None)
        row[2].set(xlabel="1 − RBF CKA of h_s and h_e", ylabel="excess loss, nats per token")
        if all(record.get("excess_loss", 1) > 0 for record in found):
            row[2].set_yscale("log")
        for axes in row:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    return figure


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records = list(load(file, key).values())
    parts = []
    for name, found in by_model(records).items():
        scores = next(record for record in found if record["unit"] == "scores")
        tokens = max((record.get("fitted_tokens", 0) for record in found), default=0)
        parts.append(f"""## {name}

Scores over {scores['tokens']:,} calibration tokens, stand-ins fitted to {tokens:,}; excess loss over the dense
model's {scores['loss']:.4f} nats on {scores['scored']:,} held-out tokens (window {scores['window']}, stride
{scores['stride']}).

{table("pairs of states | number | " + " | ".join(PAIRS), shares(scores))}

Spearman's ρ of each score with the measured damage (1: the score ranks the blocks exactly):

{table("removal | layers | blocks | " + " | ".join(SCORES.values()), correlations(scores, found))}

Excess loss of the block (its layers) that each score would choose, beside the best and the worst there is:

{table("removal | layers | best | worst | " + " | ".join(SCORES.values()), picks(scores, found))}""")
    sections = "\n\n".join(parts)
    page = f"""# The premise: is there a slow manifold, and does CKA find it?

The paper's premise is that kernel CKA between layer states lies above linear CKA and cosine, and that blocks of high
CKA can go. For which share of the pairs is the first true (mean difference in brackets), and does CKA rank blocks by
the damage that their removal does, better than cosine, ShortGPT's Block Influence or the relative update norm?

    python benchmarks/premise.py

Every block of 2, 4 and 6 unprotected layers is removed by itself: **dropped**; replaced by an affine **linear map**
(`method=linear`); replaced by the default's **attention + kernel in closed form** (the kernel as drawn, least-squares
operators, ridge read-out behind the block's first attention; no gradient steps on the state); blocks of
{REFINED_LENGTH} layers also by the default, **refined** for {REFINED["refine_epochs"]} epochs, in batches of
{REFINED["batch"]} rows as there are few. RBF CKA, linear
CKA and cosine compare h_s with h_e; BI, one minus the cosine of a layer's input and output, and the
relative update norm are summed over the block's layers. In brackets: 95 % of {RESAMPLES} bootstrap resamples of the
blocks, which overlap, so that the true uncertainty is larger. Over all lengths together any score does well that grows
with length.

![similarities of states, and excess loss against CKA]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))


def main() -> None:
    parser = arguments(__doc__, "premise")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="of the blocks, in layers")
    parser.add_argument(
        "--removals", nargs="+", choices=tuple(DAMAGES), default=list(DAMAGES), help="what is done to them")
    make_page(
        parser, "premise",
        lambda options: run(options.model, options.text, options.name, options.file, options.quick, options.lengths,
                            options.removals), render)


if __name__ == "__main__":
    main()
