"""Do pruned models still write what the dense one writes? ROUGE of greedy continuations, for KDP and its peers.

    python benchmarks/generation.py                             what docs/results/generation.json lacks, and the page
    python benchmarks/generation.py --methods kdp kdp:rank=8    these methods or variants
    python benchmarks/generation.py --model DIR --name llama    the same for another model; the page shows all
    python benchmarks/generation.py --render                    only rewrites page and plot from that file
    python benchmarks/generation.py --quick                     few prompts and epochs, into generation-quick.json

A unit is one pruned model: the dense model itself, or a method at 25 % net with one seed. Prompts are spans of the
bundled held-out text, the same for all; what follows in the text is the true continuation. ROUGE: rouge-score.
"""

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pruned_models import HELD_OUT, QUICK_TOKENS, TOKENS, Pruner, add_options, compared, seeds_of, title
from rouge_score.rouge_scorer import RougeScorer
from torch import LongTensor, Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from units_file import COLOURS, Record, Subject, arguments, by_model, compact, keep, load, parsed, table, write_page

from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating
from kdprune.evaluation.perplexity import perplexity
from kdprune.runtime import quiet_libraries

RATIO = 0.25
METHODS = ("shortgpt", "linearpatch", "streamline", "kdp")
PROMPTS, PROMPT, NEW = 64, 64, 64  # how many, tokens of each, tokens of a continuation
QUICK_PROMPTS = 4
MEASURES = ("rouge1", "rouge2", "rougeL")
AGAINST = {"dense": "the dense model's continuation", "true": "the true text"}
CHANCE = "chance"  # the dense model's continuation of another prompt
RESAMPLES = 2000
SHOWN_SAMPLES = 2
BATCH_ROWS = 16


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["method"], record["seed"]


def order(record: Record) -> tuple[object, ...]:
    """Where it stands in the file."""
    return record["model"] != "bundled", record["model"], record["method"] not in ("dense", CHANCE), *key(record)[1:]


def spans(held_out: TokenSet, count: int, end: int | None) -> LongTensor:
    """Prompts with their true continuation, (count, PROMPT + NEW): evenly spread, none with an end of text inside.

    Raises:
        KDPruneError: the text has fewer such spans.
    """
    row = held_out.ids[0][held_out.mask[0]]
    size = PROMPT + NEW
    pieces = row[: len(row) // size * size].view(-1, size)
    pieces = pieces if end is None else pieces[(pieces != end).all(1)]
    if len(pieces) < count:
        raise KDPruneError(f"got {len(pieces)} spans of {size} tokens in {held_out.source}, expected {count}")
    return pieces[torch.linspace(0, len(pieces) - 1, count).long()]  # type: ignore[return-value]


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, bos: int | None,
) -> list[Tensor]:
    """Greedy continuations of prompts (N, PROMPT), each (≤ NEW,): up to the end of text, which is left out."""
    if bos is not None:
        prompts = torch.cat([prompts.new_full((len(prompts), 1), bos), prompts], 1)
    end = tokenizer.eos_token_id
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=end)
    with evaluating(model), quiet_libraries():
        found = torch.cat([
            functional.pad(ids, (0, prompts.shape[1] + NEW - ids.shape[1]), value=end)
            for ids in (model.generate(part, attention_mask=torch.ones_like(part), generation_config=settings)
                        for part in prompts.split(BATCH_ROWS))])[:, prompts.shape[1]:]
    return [row[: int((row == end).cumsum(0).eq(0).sum())] for row in found]


@torch.no_grad()
def surprise(model: PreTrainedModel, prompts: Tensor, texts: Sequence[Tensor]) -> float:
    """Perplexity of continuations under a model, each given its prompt; NaN if all are empty."""
    total, count = 0.0, 0
    with evaluating(model):
        for prompt, text in zip(prompts, texts, strict=True):
            if len(text):
                logits = model(torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1: -1].float()
                total += float(functional.cross_entropy(logits, text, reduction="sum").double())
                count += len(text)
    return math.exp(total / count) if count else math.nan


def same_prefix(text: Tensor, other: Tensor) -> int:
    """How many tokens two continuations share before they part."""
    length = min(len(text), len(other))
    return int((text[:length] == other[:length]).long().cumprod(0).sum())


def repeated(text: Tensor, size: int = 4) -> float:
    """Share of the runs of four tokens that occurred before in the same continuation."""
    runs = Counter(tuple(run) for run in text.unfold(0, size, 1).tolist()) if len(text) >= size else Counter()
    return 1 - len(runs) / runs.total() if runs else 0.0


def scores(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Tensor], wanted: Sequence[Tensor]) -> Record:
    """ROUGE F1 of each continuation, by measure."""
    scorer = RougeScorer(list(MEASURES), use_stemmer=False)
    pairs = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in pair]
             for pair in zip(wanted, texts, strict=True)]
    found = [scorer.score(target, text) for target, text in pairs]
    return {name: [round(entry[name].fmeasure, 4) for entry in found] for name in MEASURES}


class Prompts:
    """What all units share: the prompts, the true continuations and the dense model's."""

    def __init__(self, subject: Subject, quick: bool):
        self.subject, tokenizer = subject, subject.tokenizer
        self.held_out = subject.held_out(QUICK_TOKENS if quick else HELD_OUT)
        found = spans(self.held_out, QUICK_PROMPTS if quick else PROMPTS, tokenizer.eos_token_id)
        self.prompts, self.true = found[:, :PROMPT], list(found[:, PROMPT:])
        self.dense = continuations(subject.model, tokenizer, self.prompts, self.held_out.bos)
        self.perplexity = perplexity(subject.model, self.held_out)

    def measure(self, texts: Sequence[Tensor]) -> Record:
        """What can be said of continuations without the model that wrote them."""
        decode = self.subject.tokenizer.decode
        return {
            "rouge": {"dense": scores(self.subject.tokenizer, texts, self.dense),
                      "true": scores(self.subject.tokenizer, texts, self.true)},
            "same_prefix": [same_prefix(*pair) for pair in zip(texts, self.dense, strict=True)],
            "repeated": statistics.fmean(map(repeated, texts)),
            "under_dense": surprise(self.subject.model, self.prompts, texts),
            "samples": [{"prompt": decode(self.prompts[at]), "text": decode(texts[at])}
                        for at in range(0, len(texts), max(1, len(texts) // SHOWN_SAMPLES))][:SHOWN_SAMPLES]}

    def of(self, model: PreTrainedModel) -> Record:
        """Everything of a model."""
        texts = continuations(model, self.subject.tokenizer, self.prompts, self.held_out.bos)
        return self.measure(texts) | compared(self.perplexity, model, self.held_out) | {
            "of_dense_text": surprise(model, self.prompts, self.dense)}


def run(options: argparse.Namespace) -> None:
    """Measures what the file lacks of one model."""
    units = [{"model": options.name, "method": name, "seed": None} for name in ("dense", CHANCE)]
    units += [{"model": options.name, "method": method, "seed": seed}
              for seed in seeds_of(options) for method in options.methods]
    missing = [unit for unit in units if key(unit) not in load(options.file, key)]
    if not missing:
        return
    subject = Subject(options.model, options.text)
    shared, prune = Prompts(subject, options.quick), Pruner(subject, options.name, options.pruned, options.quick)
    for unit in missing:
        record = unit | {"quick": options.quick, "prompts": len(shared.prompts)}
        if unit["method"] == "dense":
            record |= shared.of(subject.model)
        elif unit["method"] == CHANCE:
            record |= shared.measure([*shared.dense[1:], shared.dense[0]])
        else:
            rows = subject.rows(QUICK_TOKENS if options.quick else TOKENS, unit["seed"])
            pruned, facts = prune(unit["method"], RATIO, rows, unit["seed"])
            record |= facts | ({} if pruned is None else shared.of(pruned))
        keep(compact(record), options.file, key, order)
        said = statistics.fmean(record["rouge"]["dense"]["rougeL"]) if "rouge" in record else record["unreachable"]
        print(f"{options.name} {unit['method']} seed {unit['seed']}: ROUGE-L to dense {said}", flush=True)


# ------------------------------------------------------------------------------------------------- figures


def mean_score(record: Record, against: str, measure: str) -> float:
    """Mean ROUGE over the prompts."""
    return statistics.fmean(record["rouge"][against][measure])


def lead(records: list[Record], method: str, peer: str, against: str, measure: str) -> str:
    """How much higher a method's ROUGE is than a peer's, with the 95 % of a paired bootstrap over prompts.

    Seeds that both have are averaged prompt by prompt first.
    """
    by_seed = [{r["seed"]: r["rouge"][against][measure] for r in records if r["method"] == name and "rouge" in r}
               for name in (method, peer)]
    both = sorted(set(by_seed[0]) & set(by_seed[1]))
    gaps = np.mean([np.subtract(by_seed[0][seed], by_seed[1][seed]) for seed in both], axis=0)
    draws = np.random.default_rng(0).integers(len(gaps), size=(RESAMPLES, len(gaps)))
    low, high = np.percentile(gaps[draws].mean(1), (2.5, 97.5))
    return f"{gaps.mean():+.3f} ({low:+.3f} … {high:+.3f})"


def names_of(records: list[Record]) -> list[str]:
    """Measured: dense, KDP, the peers, chance last."""
    others = (record["method"] for record in records if record["method"] != CHANCE)
    found = dict.fromkeys(["dense", *reversed(METHODS), *others, CHANCE])
    return [name for name in found if any(r["method"] == name and "rouge" in r for r in records)]


def shown(name: str) -> str:
    """As the page calls it."""
    return {"dense": "dense", CHANCE: "dense, another prompt"}.get(name) or title(name)


def score_table(records: list[Record]) -> str:
    """A row a model, means over seeds."""
    rows: list[list[object]] = []
    for name in names_of(records):
        found = [record for record in records if record["method"] == name and "rouge" in record]

        def cell(values: list[float], digits: int = 3) -> str:
            return f"{statistics.fmean(values):.{digits}f}"

        own = [record for record in found if "perplexity" in record]
        rows.append([
            shown(name), f"{statistics.fmean(r.get('net_ratio', 0) for r in found):.1%}",
            cell([r["perplexity"] for r in own], 2) if own else "",
            *(cell([mean_score(r, against, measure) for r in found]) for against in AGAINST for measure in MEASURES),
            cell([statistics.fmean(r["same_prefix"]) for r in found], 1), cell([r["under_dense"] for r in found], 2),
            cell([r["of_dense_text"] for r in own], 2) if own else "",
            f"{statistics.fmean(r['repeated'] for r in found):.0%}"])
    return table(
        "model | net ratio | perplexity | R-1 to dense | R-2 | R-L | R-1 to true text | R-2 | R-L "
        "| tokens as dense | its text under dense | dense's text under it | repeated", rows)


def lead_table(records: list[Record]) -> str:
    """KDP's lead over every peer."""
    rows = [[title(name), *(lead(records, "kdp", name, against, measure)
                            for against in AGAINST for measure in ("rouge1", "rougeL"))]
            for name in names_of(records) if name not in ("dense", "kdp", CHANCE)]
    return table("over | R-1 to dense | R-L to dense | R-1 to true text | R-L to true text", rows)


def samples(records: list[Record]) -> str:
    """A few continuations, as written."""
    parts = []
    first = {name: next(r for r in records if r["method"] == name and "rouge" in r) for name in names_of(records)}
    first.pop(CHANCE, None)
    for at in range(SHOWN_SAMPLES):
        lines = [f"> {_line(next(iter(first.values()))['samples'][at]['prompt'])} …\n"]
        lines += [f"- **{shown(name)}**: {_line(record['samples'][at]['text'])}" for name, record in first.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(text: str) -> str:
    """On one line, and nothing in it that Markdown would take for its own."""
    return " ".join("".join(f"\\{c}" if c in "*_`<|#[" else c for c in text).split())


def plot(records: list[Record]) -> Figure:
    """A row a model: ROUGE to the dense model's continuations, ROUGE to the true text; bars are means over prompts."""
    models = by_model(records)
    figure = Figure(figsize=(11, 3.8 * len(models)), layout="constrained")
    for row, (name, found) in zip(figure.subplots(len(models), 2, squeeze=False), models.items(), strict=True):
        for axes, (against, what) in zip(row, AGAINST.items(), strict=True):
            # The dense model's ROUGE to itself is 1 and says nothing.
            names = [entry for entry in names_of(found) if (entry, against) != ("dense", "dense")]
            for place, measure in enumerate(MEASURES):
                values = [[score for r in found if r["method"] == entry and "rouge" in r
                           for score in r["rouge"][against][measure]] for entry in names]
                axes.bar([at + (place - 1) * 0.27 for at in range(len(names))], list(map(statistics.fmean, values)),
                         0.25, color=COLOURS[place], label=f"ROUGE-{measure[5:]}", capsize=2, ecolor="#555555",
                         yerr=[statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0 for v in values])
            axes.set_xticks(range(len(names)), [shown(entry).replace(", ", ",\n") for entry in names], fontsize=8)
            axes.set(ylabel=f"F1 to {what}", title=name, ylim=(0, None))
            axes.grid(alpha=0.3, axis="y")
            axes.legend(fontsize=8)
    return figure


def section(name: str, records: list[Record]) -> str:
    """One model's part of the page."""
    known = names_of(records)
    one = next(record for record in records if record["method"] == "dense")
    lacking = [title(method) for method in METHODS if method not in known]
    cannot = [f"{title(r['method'])} cannot: {r['unreachable']}." for r in records if "unreachable" in r]
    seeds = len({record["seed"] for record in records} - {None})
    lead_part = f"""KDP's lead over each peer, mean difference over prompts (95 % of {RESAMPLES} bootstrap resamples):

{lead_table(records)}

""" if "kdp" in known and len(known) > 3 else ""
    return f"""## {name}

{one['prompts']} prompts; perplexity on {one['scored']:,} held-out tokens (window {one['window']}, stride
{one['stride']}); {seeds} seed{'s' * (seeds != 1)} at most. \
{f"Not measured yet: {', '.join(lacking)}." if lacking else "Every unit is measured."} {' '.join(cannot)}

{score_table(records)}

{lead_part}Continuations as written, two prompts of them, chosen by place:

{samples(records)}"""


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records = list(load(file, key).values())
    sections = "\n\n".join(section(name, found) for name, found in by_model(records).items())
    page = f"""# Generation: does a pruned model still write what the dense one writes?

In generation the paper finds KDP only comparable with its peers. Here, at {RATIO:.0%} net: greedy continuations of
{NEW} tokens after prompts of {PROMPT} tokens from the held-out text, compared with the dense model's continuations and
with what really follows.

    python benchmarks/generation.py

ROUGE-1, -2 and -L are F1 of words, word pairs and the longest common subsequence of words. **dense, another prompt**
is chance: what the dense model wrote after the next prompt. *Tokens as dense*: how long a continuation is the dense
model's, token by token. *Its text under dense*: perplexity of what it wrote under the dense model, low also for text
that repeats itself; *repeated*: share of runs of four tokens that stood before in the same continuation. Error bars:
one standard error over prompts.

![ROUGE to the dense model's continuations, and to the true text]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))


def main() -> None:
    parser = arguments(__doc__, "generation")
    add_options(parser, METHODS)
    options = parsed(parser, "generation")
    if not options.render:
        run(options)
    render(options.file)


if __name__ == "__main__":
    main()
