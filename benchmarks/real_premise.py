"""KDP's premise on really trained models: what similarity says of blocks, and what removing them costs.

    python benchmarks/real_premise.py run NAME MODEL TEXTS      measures what docs/results/real-premise-NAME.json lacks
    python benchmarks/real_premise.py page                      writes docs/results/real-premise.md and its picture

KL(dense‖pruned) and excess loss on held-out text of every block of 2, 4 and 6 layers dropped, of 2 and 4 behind a
linear map, of 4 behind KDP's closed form; beside cosine, linear and RBF CKA between its ends, each over all tokens and
without massive ones. TEXTS is what benchmarks/texts.py made. An interrupted run goes on where it stopped.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from book_tables import markdown
from real_page import RESULTS, arguments, joined, loaded, publish, write
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet, load_stream, load_tokens
from kdprune.evaluation.fidelity import HeldOut, fidelities
from kdprune.kernel.similarity import LayerSimilarity, median_distances
from kdprune.methods import METHODS
from kdprune.methods.common.analysis import CHUNK, score_layers
from kdprune.model.activations import layer_states
from kdprune.model.edits import Drop
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import apply_edits
from kdprune.report.style import MARKERS, SERIES, Canvas, legend_below, log_axis
from kdprune.runtime.run import Run

PAGE = "real-premise"
HELD_OUT = ("books", "encyclopedia", "news", "chat")
ROWS, LENGTH, SCORED = 64, 512, 4096  # calibration rows, tokens of a row, held-out tokens of a text
KINDS = {"dropped": "dropped", "linear": "behind a linear map", "kdp": "behind KDP's closed form"}
LENGTHS = {"dropped": (2, 4, 6), "linear": (2, 4), "kdp": (4,)}
SCORES = {"cosine": "cosine", "linear_cka": "linear CKA", "rbf_cka": "RBF CKA"}

# ------------------------------------------------------------------------------------------------- measuring


def measure(name: str, model_at: str, texts: Path, only: Sequence[str] = tuple(KINDS)) -> None:
    """Measures what the record lacks, and keeps it after every block."""
    model, tokenizer = loaded(model_at)
    tokens = load_tokens(f"{texts}/calibration.jsonl", tokenizer, samples=ROWS, length=LENGTH, seed=0, vocabulary=None)
    held = HeldOut(tuple(
        dataclasses.replace(load_stream(f"{texts}/{one}.txt", tokenizer, limit=SCORED, vocabulary=None), source=one)
        for one in HELD_OUT), (LENGTH,))
    file, run = RESULTS / f"real-premise-{name}.json", Run(0)
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"blocks": []}
    layers = len(decoder_layers(model))
    record |= {"model": name, "layers": layers, "tokens": tokens.tokens, "scored": SCORED, "device": model.device.type,
               "rows": LENGTH}
    if "scores" not in record:
        without = score_layers(model, tokens, run, protect=0.0)
        record["scores"] = {
            "without": {one: without[one].tolist() for one in SCORES},
            "with": {one: value.tolist() for one, value in all_tokens(model, tokens, run).items() if one in SCORES}}
        analysis = without.record()
        record |= {"writes": analysis.writes, "erases": analysis.erases, "left_out": analysis.left_out,
                   "relative_update": analysis.relative_update}
    known = {(one["kind"], *one["block"]) for one in record["blocks"]}
    for kind in only:
        for length in LENGTHS[kind]:
            for start in range(layers - length + 1):
                block = (start, start + length)
                if (kind, *block) in known:
                    continue
                record["blocks"].append({"kind": kind, "block": block, **damage(model, tokens, held, run, kind, block)})
                write(record, file)
    write(record, file)


@torch.no_grad()
def all_tokens(model: PreTrainedModel, tokens: TokenSet, run: Run) -> dict[str, torch.Tensor]:
    """Similarities of all pairs of states over all tokens, massive ones among them, in the same shuffled chunks."""
    similarity, wanted = None, range(len(decoder_layers(model)) + 1)
    for number, (batch, states) in enumerate(layer_states(model, tokens, wanted, run.batch_size)):
        real = batch.mask.flatten().nonzero().flatten()
        order = real[torch.randperm(len(real), generator=run.generator(number + 1))]
        for part in order.split(CHUNK):
            if len(part) < CHUNK:
                continue
            chunk = torch.stack([states[index].flatten(0, 1)[part.to(states[index].device)] for index in wanted])
            similarity = similarity or LayerSimilarity(median_distances(chunk))
            similarity.update(chunk)
    assert similarity is not None, "there are rows"
    return similarity.value()


def damage(
    model: PreTrainedModel, tokens: TokenSet, held: HeldOut, run: Run, kind: str, block: tuple[int, int],
) -> dict[str, float]:
    """Means over the texts with one block removed."""
    edits: Sequence[Any] = [Drop(range(*block))]
    if kind != "dropped":
        options = {"refine": False} if kind == "kdp" else {}
        edits = METHODS[kind](blocks=(block,), **options)(model, tokens, run).edits
    found = fidelities(model, apply_edits(model, edits), held, lambda _: None)
    return {"kl": statistics.fmean(one.divergence for one in found),
            "excess_loss": statistics.fmean(one.pruned.loss - one.dense.loss for one in found)}


# ------------------------------------------------------------------------------------------------- page


def losses(record: Mapping[str, Any], kind: str, length: int, of: str = "kl") -> dict[int, float]:
    """Start of the block → its damage, of one kind and length."""
    return {one["block"][0]: one[of] for one in record["blocks"]
            if one["kind"] == kind and one["block"][1] - one["block"][0] == length}


def ranking(record: Mapping[str, Any], kind: str, length: int) -> list[object]:
    """Spearman's correlation of the damage with 1 − similarity of the block's ends, score by score; last, with the
    sum of relative updates."""
    found = losses(record, kind, length)
    if len(found) < 4:
        return []
    row: list[object] = []
    for tokens in ("with", "without"):
        for score in SCORES:
            pair = record["scores"][tokens][score]
            row.append(f"{spearmanr([-pair[s][s + length] for s in found], list(found.values())).statistic:.2f}")
    updates = [sum(record["relative_update"][start:start + length]) for start in found]
    return [*row, f"{spearmanr(updates, list(found.values())).statistic:.2f}"]


def rank_table(found: Sequence[Mapping[str, Any]]) -> str:
    """How well each score ranks blocks of one length by what removing them costs."""
    rows = [[record["model"], title, length, *row] for record in found for kind, title in KINDS.items()
            for length in LENGTHS[kind] if (row := ranking(record, kind, length))]
    heads = ["model", "the block is", "layers", *SCORES.values(), *(f"{one}, no massive" for one in SCORES.values()),
             "Σ relative update"]
    return markdown(heads, rows, left=2)


def block_table(record: Mapping[str, Any], length: int) -> str:
    """Excess loss of every block of one length; an asterisk where it holds a layer that moves massive tokens."""
    moved = {*record["writes"], *record["erases"]}
    starts = range(record["layers"] - length + 1)
    heads = ["first layer", *(f"{start}{'*' if moved & {*range(start, start + length)} else ''}" for start in starts)]
    rows = []
    for kind, title in KINDS.items():
        if found := losses(record, kind, length, "excess_loss"):
            rows.append([title, *(f"{found[start]:.2f}" if start in found else "" for start in starts)])
    return markdown(heads, rows)


def picture(found: Sequence[Mapping[str, Any]], length: int = 4) -> str:
    """KL of every block of one length by its first layer, a panel a model; layers that move massive tokens shaded."""
    canvas = Canvas(f"KL by first of {length} layers", 6.4, 1.0 + 1.9 * len(found))
    with canvas as figure:
        for record, axes in zip(found, figure.subplots(len(found), 1, squeeze=False)[:, 0], strict=True):
            for number, (kind, title) in enumerate(KINDS.items()):
                values = losses(record, kind, length)
                axes.plot(list(values), list(values.values()), marker=MARKERS[number], color=SERIES[number],
                          label=title)
            for layer in (*record["writes"], *record["erases"]):
                axes.axvspan(layer - length + 0.5, layer + 0.5, color="#eceff2", zorder=0)
            axes.set(title=record["model"], xlabel=f"first of {length} layers", ylabel="KL, nats a token")
            log_axis(axes.yaxis)
        legend_below(figure, axes)
    return canvas.svg


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The page, from the records."""
    one = found[0]
    parts = [
        "# Premise: does similarity say which blocks can go?",
        "What do cosine, linear and RBF CKA between a block's ends say of what removing it costs, with massive tokens "
        "and without, and is it another thing behind a stand-in?",
        "    python benchmarks/real_premise.py run NAME MODEL TEXTS\n    python benchmarks/real_premise.py page",
        f"One seed, {one['tokens']:,} calibration tokens in rows of {one['rows']}, {one['scored']:,} held-out tokens "
        "of each of four texts at that window.",
        "## Do scores rank blocks?",
        "Spearman's correlation of 1 − score with KL(dense‖pruned) over all blocks of one length: 1 says that the "
        "score orders blocks as their damage does. *No massive*: tokens that are massive at some layer left out.",
        rank_table(found), "![KL by first layer of the block](real-premise.svg)"]
    for record in found:
        massive = ", ".join(map(str, record["writes"])) or "none"
        erased = ", ".join(map(str, record["erases"])) or "none"
        parts += [f"## {record['model']}", f"Excess loss, nats a token. Layers that write massive tokens: {massive}; "
                  f"that erase them: {erased} (*: the block holds one).",
                  *(f"{length} layers:\n\n{block_table(record, length)}" for length in LENGTHS["dropped"])]
    return joined(PAGE, parts)


def main() -> None:
    parser, measuring = arguments(__doc__)
    measuring.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    if given.what == "run":
        measure(given.name, given.model, given.texts, given.only)
    publish(PAGE, page, picture)


if __name__ == "__main__":
    main()
