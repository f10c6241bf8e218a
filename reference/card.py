"""The model card and its loss curve, made from a run's records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from architectures import FAMILIES
from matplotlib.figure import Figure

Point = Mapping[str, float]
FIGURE = "loss_curve.png"

# File-name prefix → what the text is, its licence, whom to credit.
SOURCES: dict[str, tuple[str, str, str]] = {
    "gutenberg": (
        "Project Gutenberg books, children's and classic fiction first (from rcdm-uga/Gutenberg_Text)",
        "public domain in the United States", "the books' authors; https://www.gutenberg.org"),
    "wiki_en_2015": (
        "English Wikipedia, core articles, 2015 text, tables removed (from jason-feng/wikiVisual)",
        "[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/)",
        "the contributors to the articles; https://en.wikipedia.org"),
    "wiki_en_2021": (
        "English Wikipedia, short articles, 2021 text (from Vibhas-hs-edu/WikiTasks)",
        "[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/)",
        "the contributors to the articles; https://en.wikipedia.org"),
    "wikinews_en": (
        "English Wikinews (from jshepp27/countaBot)",
        "[CC BY 2.5](https://creativecommons.org/licenses/by/2.5/)",
        "Wikinews contributors; https://en.wikinews.org"),
    "openstax": (
        "Five textbooks: Anatomy and Physiology 2e, Introduction to Philosophy, Introduction to Political "
        "Science, Psychology 2e, U.S. History",
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)",
        "OpenStax, Rice University, and the books' authors; access for free at https://openstax.org"),
    "african_storybook": (
        "African Storybook, the CC BY items (from global-asp/asp-source)",
        "CC BY",
        "the stories' writers, translators and illustrators; African Storybook, "
        "https://www.africanstorybook.org"),
}
OPTIMIZERS = {"adamw": "AdamW (0.9, 0.95)",
              "muon": "Muon for the layers' matrices, AdamW (0.9, 0.95) for the rest"}

CHANGES = """\
Changes to the texts: markup, headers and tables removed, documents cut into windows of tokens. Passages
that share 13 words in a row with WikiText-2 (validation, test), PTB or LAMBADA had been removed from the
files, except from the storybooks; BoolQ and CoQA passages were not looked for."""


def draw(curve: Sequence[Point], path: Path) -> None:
    """Training and held-out loss over the tokens of the run, with the learning rate beneath."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    for name, label, marker in (("loss", "training", ""), ("held_out_loss", "held-out", "o")):
        points = [(point["tokens"] / 1e6, point[name]) for point in curve if name in point]
        if points:
            above.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1, label=label)
    above.set_ylabel("loss (nats per token)")
    above.legend(frameon=False)
    rates = [(point["tokens"] / 1e6, point["lr"]) for point in curve if "lr" in point]
    if rates:
        below.plot(*zip(*rates, strict=True), color="grey", linewidth=1)
    below.set(xlabel="tokens of this run (millions)", ylabel="learning rate")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def sources_table(files: Sequence[str]) -> str:
    """One row for each source among the training files; the changes made to them, where all are known."""
    rows = ["| text | licence | credit |", "|---|---|---|"]
    known = set()
    for prefix, row in SOURCES.items():
        matching = {file for file in files if file.startswith(prefix)}
        known |= matching
        if matching:
            rows.append("| " + " | ".join(row) + " |")
    unknown = [f"| {file} | not recorded | not recorded |" for file in files if file not in known]
    return "\n".join(rows + (unknown or ["", CHANGES]))


def architecture(record: Mapping[str, Any]) -> str:
    """The shape of the model in one sentence."""
    config = record["config"]
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    return (
        f"{FAMILIES[config['model_type']].words}, "
        f"{record['parameters'] / 1e6:.2f} M parameters: {config['num_hidden_layers']} layers, width "
        f"{config['hidden_size']}, feed-forward width {config.get('intermediate_size') or config['ffn_dim']}, "
        f"{heads} {f'query heads over {groups} key-value heads' if groups else 'heads'}, "
        f"tied embeddings, byte-level BPE vocabulary of {config['vocab_size']}, context "
        f"{config['max_position_embeddings']}. The weights are stored in bfloat16."
    )


def training(record: Mapping[str, Any]) -> str:
    """How long and how the run trained, and from what it started."""
    settings, tokens, packed = record["settings"], record["tokens"], record["packed_tokens"]
    if record["continued"]:
        start = "It continues from earlier weights. " + (
            settings["history"] or "Their own training is not part of these records.")
    else:
        start = "It was trained from random weights."
    return (
        f"{start}\n\nThis run: {tokens / 1e6:.2f} M tokens in {record['steps']} steps of "
        f"{settings['batch']} × {settings['length']} tokens, {tokens / packed:.2f} epochs over "
        f"{packed / 1e6:.1f} M packed tokens ({settings['sample']:.0%} of the documents, `</s>` after each), "
        f"{record['seconds'] / 60:.0f} minutes on {'a GPU' if settings['device'] != 'cpu' else 'a CPU'}. "
        f"{OPTIMIZERS[settings.get('optimizer', 'adamw')]}, weight decay {settings['weight_decay']:g}, gradients "
        f"clipped at {settings['clip']:g}, learning rate up to {settings['lr']:g} over the first "
        f"{settings['warmup']:.0%}, then down a cosine to zero; bfloat16 autocast; seed {settings['seed']}."
    )


def perplexity_table(record: Mapping[str, Any]) -> str:
    """Held-out perplexity by file, with the protocol."""
    if not record["files"]:
        return "Not measured: no held-out text was given."
    rows = ["| held-out text | tokens | perplexity |", "|---|---|---|"]
    for name, row in record["files"].items():
        rows.append(f"| {name} | {row['tokens']} | {row['perplexity']:.2f} |")
    return (
        f"Window {record['window']}, stride {record['stride']}; the first {record['limit']} tokens of each "
        "text, every token but the first scored once; perplexity per token of this tokenizer, measured on "
        "the stored bfloat16 weights in float32 arithmetic.\n\n" + "\n".join(rows)
    )


def write_card(
    directory: Path, record: Mapping[str, Any], curve: Sequence[Point], perplexities: Mapping[str, Any]
) -> None:
    """Write README.md and the figure it shows into the model's directory."""
    draw(curve, directory / FIGURE)
    text = f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Reference model

A small English language model, made to show pruning on: deep for its size, quick on a CPU, no use as an
assistant.
{architecture(record)}

## Training

{training(record)}

![Training and held-out loss over the tokens of the run]({FIGURE})

The held-out loss in the figure is the mean over eight windows of {record['settings']['length']} tokens
from each held-out text given at the start.

## Held-out perplexity

{perplexity_table(perplexities)}

## Data

{sources_table(record['sources'])}

## Limits

It writes fluent nonsense: names, dates and facts in its text are invented. It repeats whatever views its
sources hold, among them those of books more than a century old.

This page was made by `reference/card.py` from the records of the run.
"""
    (directory / "README.md").write_text(text, encoding="utf-8")
