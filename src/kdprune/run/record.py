"""A run's measurements, and their assembly into ``results.json``'s record."""

import contextlib
import datetime
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdprune.data.tokens import TokenSet
from kdprune.evaluation.fidelity import Fidelity, HeldOut, fidelities
from kdprune.evaluation.models import longest_context
from kdprune.evaluation.samples import compare_samples
from kdprune.evaluation.speed import compare_speed, kv_cache_bytes_per_token
from kdprune.methods.common.analysis import Scores
from kdprune.methods.common.result import MethodResult
from kdprune.model.families import decoder_layers, family_of, outside_embeddings
from kdprune.model.placement import reads_weights
from kdprune.model.surgery import Resize
from kdprune.report.results import (
    Calibration,
    Fit,
    Heal,
    KVCache,
    Layers,
    LayerWidth,
    Pace,
    Parameters,
    Perplexity,
    Results,
    Sample,
    Search,
    Speed,
    Step,
)
from kdprune.run.chain import chain_of
from kdprune.runtime.distributed import world
from kdprune.runtime.machine import peak_memory_bytes
from kdprune.runtime.run import Run

PROMPT_TOKENS = 32  # of the held-out text that both models continue
_SOFTWARE = ("kdprune", "torch", "transformers", "safetensors", "numpy", "lm_eval", "peft")


@dataclass(frozen=True)
class Evaluation:
    """Both models under one protocol, as the parts of ``results.json``.

    texts: perplexities at other windows and on other texts.
    speed: None, as samples are empty, where the dense model was ``streamed``: reading its weights from disk for every
    token would measure the disk.
    """

    perplexity: Perplexity
    speed: Speed | None
    cache: KVCache
    samples: list[Sample]
    texts: list[Perplexity]
    streamed: bool = False


def evaluate(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, heldout: HeldOut,
    run: Run,
) -> Evaluation:
    """Perplexity on the same windows, speed in turns, cache size, and a continuation of the same prompt.

    Every process of the run has to call it: the windows are dealt out to them. Speed and samples are taken by the
    first, while the others wait, and handed to all.

    Args:
        dense: the dense model.
        pruned: the pruned one.
        tokenizer: for the samples; without one there are none.
        heldout: held-out texts and windows; a continuation of the first text is sampled.
        run: shows the stage.
    """
    streamed = reads_weights(dense) or reads_weights(pruned)
    with run.stage("evaluate", len(heldout.pairs()) + 2) as progress:
        first, *texts = map(perplexity_record, fidelities(dense, pruned, heldout, progress))
        pace = measured_speed(dense, pruned)
        progress(1)
        samples: list[Sample] = []
        if tokenizer is not None and not streamed and world().first:
            text = heldout.texts[0]
            most = min(PROMPT_TOKENS, (longest_context(dense) or 2 * PROMPT_TOKENS) // 2)
            prompt = str(tokenizer.decode(text.ids[0][text.mask[0]][:most], skip_special_tokens=True))
            prompts = [prompt] if tokenizer(prompt)["input_ids"] else []  # special tokens alone are no prompt
            samples = [
                Sample(prompt=found.prompt, dense=found.dense, pruned=found.pruned)
                for found in compare_samples(dense, pruned, tokenizer, prompts)
            ]
        samples = world().broadcast(samples)
        progress(1)
    return Evaluation(
        first,
        pace,
        KVCache(dense=kv_cache_bytes_per_token(dense), pruned=kv_cache_bytes_per_token(pruned)),
        samples,
        texts,
        streamed,
    )


def perplexity_record(found: Fidelity) -> Perplexity:
    """What results.json says of one text at one window."""
    dense = found.dense
    return Perplexity(
        dense=dense.value, pruned=found.pruned.value, dataset=found.dataset, window=dense.window, stride=dense.stride,
        tokens=dense.tokens, divergence=found.divergence, agreement=found.agreement)


def count_skipped(measures: Iterable[Perplexity | None], heldout: HeldOut) -> None:
    """Puts how many null rows a text had into what was measured on it: no evaluation is found again by that."""
    skipped = {text.source: text.skipped for text in heldout.texts}
    for measure in measures:
        if measure is not None:
            measure.skipped = skipped.get(measure.dataset, 0)


def measured_speed(dense: PreTrainedModel, pruned: PreTrainedModel) -> Speed | None:
    """Speed of both models, measured in turns by the first process of the run; None for models streamed from disk."""
    if reads_weights(dense) or reads_weights(pruned):
        return None
    return world().broadcast(_speed(dense, pruned) if world().first else None)


def _speed(dense: PreTrainedModel, pruned: PreTrainedModel) -> Speed:
    pace = compare_speed(dense, pruned)
    return Speed(
        batch=pace.batch, prompt=pace.prompt, new_tokens=pace.new_tokens, device=pace.device,
        prefill=Pace(dense=pace.dense.prefill, pruned=pace.pruned.prefill),
        decode=Pace(dense=pace.dense.decode, pruned=pace.pruned.decode))


def parameters(
    dense: PreTrainedModel, pruned: PreTrainedModel | None = None, chain: Sequence[Step] = (),
) -> Parameters:
    """All parameters of the models, and those outside the embeddings; of the first dense one too, after others."""
    left: dict[str, Any] = {}
    if pruned is not None:
        left = {"pruned": pruned.num_parameters(), "pruned_layers": outside_embeddings(pruned)}
    if chain and chain[0].parameters is not None:
        left |= {"first": chain[0].parameters.dense, "first_layers": chain[0].parameters.dense_layers}
    return Parameters(dense=dense.num_parameters(), dense_layers=outside_embeddings(dense), **left)


def layers(dense: PreTrainedModel, pruned: PreTrainedModel | None = None, chain: Sequence[Step] = ()) -> Layers:
    """Decoder layers of the models, and of the first dense one."""
    return Layers(
        dense=len(decoder_layers(dense)), pruned=None if pruned is None else len(decoder_layers(pruned)),
        first=chain[0].layers.dense if chain and chain[0].layers is not None else None)


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages a run rests on, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _SOFTWARE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def analysis_results(
    name: str, model: PreTrainedModel, options: Mapping[str, Any], tokens: TokenSet, run: Run, method: str = "analyze",
) -> Results:
    """The record of a run that only looked: everything but what pruning adds."""
    chain = chain_of(model)
    return Results(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=name, family=family_of(model).model_type, method=method,
        recipe={key: value for key, value in options.items() if value is not None}, seed=options["seed"],
        chain=chain, layers=layers(model, chain=chain), parameters=parameters(model, chain=chain),
        calibration=Calibration(
            source=tokens.source, samples=len(tokens), tokens=tokens.tokens, length=tokens.ids.shape[1],
            skipped=tokens.skipped,
            shares=[part.tokens for part in tokens.shares(run.batch_size)] if world().size > 1 else []),
        analysis=run.scores.record() if isinstance(run.scores, Scores) else None, seconds=dict(run.stages.seconds),
        peak_memory_bytes=peak_memory_bytes(),
        versions=software_versions(),
    )


def pruning_results(
    base: Results, dense: PreTrainedModel, pruned: PreTrainedModel, outcome: MethodResult, measured: Evaluation,
    healed: dict[str, Any] | None = None,
) -> Results:
    """What pruning adds to the record of the analysis."""
    base.blocks = [(block.start, block.stop) for block in outcome.blocks]
    base.layers = layers(dense, pruned, base.chain)
    base.parameters = parameters(dense, pruned, base.chain)
    base.fit = [Fit(**record) for record in outcome.fit]
    if base.analysis is not None and outcome.damage is not None:
        states = range(base.layers.dense + 1)
        base.analysis.pair_damage = [[outcome.damage.get(range(s, e)) for e in states] for s in states]
    base.search = None if outcome.search is None else Search(**outcome.search)
    base.widths = [LayerWidth(layer=edit.layer, **edit.width) for edit in outcome.edits
                   if isinstance(edit, Resize) and edit.layer is not None]
    base.stock = pruned.config.model_type == family_of(pruned).model_type
    base.heal = None if healed is None else Heal(**healed)
    base.perplexity, base.texts = measured.perplexity, measured.texts
    base.speed, base.streamed = measured.speed, measured.streamed
    base.kv_cache_bytes_per_token, base.samples = measured.cache, measured.samples
    return base
