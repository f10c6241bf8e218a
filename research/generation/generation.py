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

import torch
from generation_page import CHANCE, MEASURES, METHODS, NEW, PROMPT, RATIO, SHOWN_SAMPLES, key, render
from pruned_models import Pruner, add_options, compared, fitted_tokens, scored_tokens, seeds_of
from rouge_score.rouge_scorer import RougeScorer
from torch import LongTensor, Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from units_file import Record, Subject, arguments, compact, keep, load, make_page

from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating
from kdprune.evaluation.perplexity import perplexity
from kdprune.runtime import quiet_libraries

PROMPTS, QUICK_PROMPTS = 64, 4
BATCH_ROWS = 16


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

    def __init__(self, subject: Subject, options: argparse.Namespace):
        self.subject, tokenizer = subject, subject.tokenizer
        self.held_out = subject.held_out(scored_tokens(options))
        found = spans(self.held_out, QUICK_PROMPTS if options.quick else PROMPTS, tokenizer.eos_token_id)
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
    shared, prune = Prompts(subject, options), Pruner(subject, options.name, options.pruned, options.quick)
    for unit in missing:
        record = unit | {"quick": options.quick, "prompts": len(shared.prompts)}
        if unit["method"] == "dense":
            record |= shared.of(subject.model)
        elif unit["method"] == CHANCE:
            record |= shared.measure([*shared.dense[1:], shared.dense[0]])
        else:
            rows = subject.rows(fitted_tokens(options), unit["seed"])
            pruned, facts = prune(unit["method"], RATIO, rows, unit["seed"])
            record |= facts | ({} if pruned is None else shared.of(pruned))
        keep(compact(record), options.file, key, order)
        said = statistics.fmean(record["rouge"]["dense"]["rougeL"]) if "rouge" in record else record["unreachable"]
        print(f"{options.name} {unit['method']} seed {unit['seed']}: ROUGE-L to dense {said}", flush=True)


def main() -> None:
    parser = arguments(__doc__, "generation")
    add_options(parser, METHODS)
    make_page(parser, "generation", run, render)


if __name__ == "__main__":
    main()
