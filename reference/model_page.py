"""The page of a reference model, ``reference/pages/model-NAME.md``, and its pictures, from ``model-NAME.json``."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from card import architecture, perplexity_table, training

from kdprune.report.analysis_record import Analysis
from kdprune.report.plots import save_analysis_plot
from kdprune.report.style import BLUE, GREEN, MUTED, ORANGE, VERMILION, Canvas, legend_below, log_axis

Record = Mapping[str, Any]
CURVES = (("cosine", "cosine"), ("linear_cka", "linear CKA"), ("rbf_cka", "RBF CKA"))


def loss_curve(curve: Sequence[Mapping[str, float]]) -> str:
    """Training and held-out loss over the tokens of the run."""
    canvas = Canvas("Loss over the tokens of the run", 5.6, 3.2)
    with canvas as figure:
        axes = figure.add_subplot()
        for key, label, marker, colour in (("loss", "training", "", BLUE), ("held_out_loss", "held-out", "o", ORANGE)):
            points = [(point["tokens"] / 1e6, point[key]) for point in curve if key in point]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, linewidth=1.2, color=colour, label=label)
        axes.set(xlabel="tokens of this run, millions", ylabel="loss, nats per token")
        axes.legend()
    return canvas.svg


def blimp_bars(scores: Sequence[Record]) -> str:
    """Accuracy of every phenomenon with its standard error; guessing is right in half of the pairs."""
    canvas = Canvas("BLiMP by phenomenon", 5.6, 3.6)
    with canvas as figure:
        axes = figure.add_subplot()
        values = [100 * score["value"] for score in scores]
        errors = [100 * (score["stderr"] or 0.0) for score in scores]
        axes.barh([score["group"] for score in scores], values, xerr=errors, color=BLUE, ecolor=MUTED, height=0.7)
        axes.axvline(50, color=VERMILION, linewidth=1, linestyle="--")
        axes.invert_yaxis()
        axes.grid(False)
        axes.set(xlabel="pairs with the better sentence likelier, %", xlim=(0, 100))
    return canvas.svg


def outlier_curves(found: Record) -> str:
    """How far the largest dimension, token and single entry stand out at every boundary."""
    canvas = Canvas("What stands out in the states", 5.6, 3.2)
    curves = (("largest_dim_times_median", "dimension (rms)", BLUE, "o"),
              ("largest_norm_times_median", "token (norm)", ORANGE, "s"),
              ("largest_entry_times_median", "single entry", GREEN, "^"))
    with canvas as figure:
        axes = figure.add_subplot()
        for key, label, colour, marker in curves:
            axes.plot([boundary[key] for boundary in found["boundaries"]], color=colour, marker=marker, label=label)
        axes.axhline(found["threshold"], color=VERMILION, linewidth=1, linestyle="--")
        log_axis(axes.yaxis)
        axes.set(xlabel="boundary l", ylabel="largest over median")
        legend_below(figure, axes, 3)
    return canvas.svg


def layer_table(manifold: Record, found: Record) -> str:
    """A row a layer: its change of the state, and what stands out in the state that enters it."""
    titles = ["layer", "relative update", *(title for _, title in CURVES), "outlier dimensions", "large tokens",
              "massive tokens"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for layer, boundary in enumerate(found["boundaries"]):
        last = layer == len(manifold["relative_update"])
        figures = ["", "", "", ""] if last else [
            f"{manifold['relative_update'][layer]:.3f}", *(f"{manifold[key][layer]:.4f}" for key, _ in CURVES)]
        lines.append(f"| {'behind the last' if last else layer} | {' | '.join(figures)} | {_dimensions(boundary)} | "
                     f"{boundary['large_tokens']} | {boundary['massive_tokens']} |")
    return "\n".join(lines)


def _dimensions(boundary: Record, most: int = 4) -> str:
    """The outlier dimensions with their size over the median's: "45 (38×), 7 (9×)"; how many more there are."""
    pairs = list(zip(boundary["dims"], boundary["times_median"], strict=True))
    more = f" and {len(pairs) - most} more" if len(pairs) > most else ""
    return (", ".join(f"{dim} ({times:.0f}×)" for dim, times in pairs[:most]) + more) or "none"


def beside_the_paper(manifold: Record, found: Record) -> str:
    """What the paper reports of LLaMA2 and what was found here."""
    layers = len(manifold["relative_update"])
    first, last = manifold["protected"]
    inner = range(first, layers - last)
    above = {key: sum(manifold[key][layer] > manifold["cosine"][layer] for layer in range(layers))
             for key in ("linear_cka", "rbf_cka")}
    pairs = [(s, e) for s in range(layers + 1) for e in range(s + 1, layers + 1)]
    far = {key: sum(manifold[f"pair_{key}"][s][e] > manifold["pair_cosine"][s][e] for s, e in pairs)
           for key in ("linear_cka", "rbf_cka")}
    rbf = sum(manifold["rbf_cka"][layer] > manifold["linear_cka"][layer] for layer in range(layers))
    update = manifold["relative_update"]
    calm = min(inner, key=lambda layer: update[layer])
    wild = [boundary for boundary in found["boundaries"] if boundary["dims"]]
    dims = sorted({dim for boundary in wild for dim in boundary["dims"]})
    massive = max(boundary["massive_tokens"] for boundary in found["boundaries"])
    rows = [
        ("CKA against cosine, neighbouring layers", "CKA above cosine throughout: the premise (KDP, section 1)",
         f"linear CKA above cosine in {above['linear_cka']} of {layers} layers, RBF CKA in {above['rbf_cka']}"),
        ("… all pairs of states", "not known",
         f"linear CKA above cosine in {far['linear_cka']} of {len(pairs)} pairs, RBF CKA in {far['rbf_cka']}"),
        ("RBF against linear CKA", "not known", f"RBF above linear in {rbf} of {layers} layers"),
        ("relative update norm", "not known in figures",
         f"{update[calm]:.3f} at its smallest (layer {calm}), mean {statistics.fmean(update[i] for i in inner):.3f} "
         f"over layers {inner.start} to {inner.stop - 1}; first layer {update[0]:.2f}, last {update[-1]:.2f}"),
        (f"outlier dimensions (above {found['threshold']:g} times the median)", "not known in figures",
         f"{len(dims)} of the stream's, at {len(wild)} of {layers + 1} boundaries, largest "
         f"{max(b['largest_dim_times_median'] for b in found['boundaries']):.0f} times the median"),
        ("massive activations", "not known in figures", f"at most {massive} of {found['tokens']:,} tokens"),
    ]
    lines = ["| | the paper, LLaMA2 | here |", "|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def named_tokens(found: Record) -> str:
    """Which tokens have a large norm, where most have."""
    count = found["boundaries"][found["most_at"]]["large_tokens"]
    if not count:
        return f"No token's norm is above {found['threshold']:g} times the median at any boundary."
    names = ", ".join(f"{json.dumps(name, ensure_ascii=False)} ({times}×)".replace("|", "\\|")
                      for name, times in found["named"])
    return (f"Most tokens of large norm are at boundary {found['most_at']}: {count} of {found['tokens']:,}, "
            f"{found['at_first_position']} of them first in their row. The most frequent: {names}.")


def protocol(record: Record) -> str:
    """What the columns and curves of the manifold are."""
    found, times = record["outliers"], f"{record['outliers']['threshold']:g} times the median"
    return (
        f"{record['manifold']['tokens']:,} tokens of {record['text']}. Per layer: relative update norm "
        "‖hₗ₊₁ − hₗ‖ / ‖hₗ‖, and cosine and CKA of hₗ and hₗ₊₁. An outlier dimension has a root mean square above "
        f"{times} dimension's, a large token a norm above {times} token's, a massive one an entry above 100 and above "
        f"1000 times the median |entry| (Sun et al. 2024); these columns are of {found['tokens']:,} tokens and of the "
        "state that enters the layer.")


def render(record_file: Path) -> None:
    """Writes page and pictures beside the record."""
    record = json.loads(record_file.read_text(encoding="utf-8"))
    base, name, blimp = record_file.stem, record["name"], record["blimp"]
    pictures = {"loss": loss_curve(record["loss_curve"]), "blimp": blimp_bars(blimp["scores"]),
                "outliers": outlier_curves(record["outliers"])}
    for key, svg in pictures.items():
        record_file.with_name(f"{base}-{key}.svg").write_text(svg, encoding="utf-8")
    manifold = save_analysis_plot(Analysis(**record["manifold"]), record_file.with_name(f"{base}-manifold.svg"))
    undated = re.sub(r"\s*<dc:date>.*?</dc:date>", "", manifold.read_text(encoding="utf-8"))
    manifold.write_text(undated, encoding="utf-8")  # the same record, the same bytes
    mean = statistics.fmean(score["value"] for score in blimp["scores"])
    notes = record_file.with_name(f"{base}-notes.md")
    page = f"""# Reference model {name}

{architecture(record['run'])}

What is this model worth, and do its layers make the slow manifold that pruning by KDP relies on?

    {record['command']}

## Training

{training(record['run'])}

![loss over the tokens of the run]({base}-loss.svg)

## Perplexity

{perplexity_table(record['perplexity'])}

## BLiMP

{100 * mean:.1f} % of the pairs, mean over the twelve phenomena; guessing scores 50 %. The first {blimp['limit']} pairs
of each of the 67 paradigms; bars with one standard error.

![BLiMP by phenomenon]({base}-blimp.svg)

## The slow manifold

{protocol(record)}

![similarity of all pairs of states, update norm and similarity per layer]({base}-manifold.svg)

{beside_the_paper(record['manifold'], record['outliers'])}

"Not known" means that no figure of the paper is at hand to set beside ours.

{layer_table(record['manifold'], record['outliers'])}

![largest dimension, token and entry over the median]({base}-outliers.svg)

{named_tokens(record['outliers'])}
"""
    record_file.with_suffix(".md").write_text(
        page + ("\n" + notes.read_text(encoding="utf-8") if notes.is_file() else ""), encoding="utf-8")
