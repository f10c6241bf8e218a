"""Units of a comparison: one variant with one seed, pruned, measured, and cached once it is done."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kdprune.comparison.variants import Variant
from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.fidelity import DenseStates, HeldOut, fidelities
from kdprune.evaluation.generation import compared, continuations, prompts_of, sizes
from kdprune.evaluation.perplexity import perplexity
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.evaluation.tasks import run_suite
from kdprune.methods.common.analysis import Scores, score_layers
from kdprune.methods.common.method import RankedMethod
from kdprune.model.families import decoder_layers, outside_embeddings
from kdprune.model.placement import reads_weights
from kdprune.report.comparison_records import COMPARISON_VERSION, Dense, Unit
from kdprune.report.heal_record import Heal
from kdprune.report.size_records import KVCache, Layers
from kdprune.report.task_records import Generation, TaskScore
from kdprune.run.pipeline import RunOutcome, run_method
from kdprune.run.record import count_skipped, measured_speed, parameters, perplexity_record, software_versions
from kdprune.run.session import Session
from kdprune.runtime.machine import Meter, metered
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Stages
from kdprune.store.cache import Cache, JsonCodec
from kdprune.store.hashing import class_identity, code_identity, digest

PARTS = ("fit-", "method-", "heal-")  # stages of a unit that go when it is done


def stand_in_name(record: Mapping[str, Any]) -> str:
    """What a fit made: the parts of its kernel, and what stands before it."""
    context = record.get("context", "none")
    return str(record.get("kind", "")) + ("" if context == "none" else f", {context}")


@dataclass(frozen=True)
class Texts:
    """Calibration text as given: ``source``, ``samples`` and ``length`` of :func:`kdprune.prune`."""

    source: Any = None
    samples: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How every model of a comparison is measured: perplexity on ``heldout``, and a suite of tasks if there is one.

    generate: prompts from the held-out texts that models continue; None: none.
    """

    heldout: HeldOut
    suite: str | None = None
    data: Sequence[Path] = ()
    limit: int | None = None
    generate: int | None = None

    def check(self, session: Session) -> None:
        """Raises KDPruneError where prompts cannot be had, or continued: before any work."""
        if self.generate is None:
            return
        if reads_weights(session.model):
            raise KDPruneError("got generate for a model whose layers are read from disk, anew for each of 64 tokens; "
                               "expected one in memory: leave generate out, or give more memory (--host-memory)")
        self.prompts(session.model)

    def prompts(self, dense: PreTrainedModel) -> Tensor:
        """What is continued, (generate, T) token ids."""
        return prompts_of(self.heldout.texts, self.generate or 0, sizes(dense)[0])

    def identity(self) -> list[Any]:
        """What makes two protocols the same; local task files count by name, size and time of change."""
        files = [
            (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for folder in self.data if self.suite for path in sorted(Path(folder).rglob("*")) if path.is_file()
        ]
        return [self.heldout.identity(), self.suite, self.limit, self.generate, files]

    def tasks(self, model: PreTrainedModel, session: Session, run: Run) -> list[TaskScore]:
        """Scores of the suite; none without one."""
        if self.suite is None:
            return []
        return run_suite(
            model, session.tokenizer, self.suite, data=self.data, limit=self.limit, stages=run.stages)


class Bench:
    """One model under one protocol; tokens and similarity scores of a seed are shared by its variants.

    Args:
        session: the model and its texts.
        texts: calibration text as given.
        protocol: how every model is measured.
        cache: finished units, and the stages of one that is not.
        show: whether progress is shown.
    """

    def __init__(self, session: Session, texts: Texts, protocol: Protocol, cache: Cache, show: bool):
        self.session, self.texts, self.protocol, self.cache, self.show = session, texts, protocol, cache, show
        self._common = digest([
            code_identity(), software_versions(), COMPARISON_VERSION, session.weights_identity(),
            str(session.model.device), str(session.stored), session.resources.load_in, protocol.identity(),
        ])
        self._tokens: dict[Any, TokenSet] = {}
        self._scores: dict[Any, tuple[Scores, Meter]] = {}
        self._known = DenseStates()
        self._written: Tensor | None = None  # the dense model's continuations

    def forget(self) -> None:
        """Lets go of the tokens and scores of the seeds so far."""
        self._tokens.clear()
        self._scores.clear()

    def tokens(self, seed: int, variant: Variant | None = None) -> TokenSet:
        """Calibration tokens of this seed: as for all, or as many as the variant says."""
        key = self._rows(seed, variant)
        if key not in self._tokens:
            session = self.session.again(seed, Stages(show=self.show))
            self._tokens[key] = session.calibration(self.texts.source, *key[1:])
        return self._tokens[key]

    def run(self, seed: int, variant: Variant | None = None) -> Run:
        """A run on these tokens; its stages follow from model, protocol, tokens and seed."""
        about = digest([self._common, seed, self.tokens(seed, variant).identity()])
        return Run(seed, stages=Stages(show=self.show), cache=self.cache, about=about,
                   states_model=self.session.states_model)

    def dense(self, seed: int) -> Dense:
        """The dense model's figures, measured once."""
        run = dataclasses.replace(self.run(seed), about=self._common)
        return run.cached("dense", None, lambda: self._measure_dense(run), JsonCodec(Dense))

    def _measure_dense(self, run: Run) -> Dense:
        model, (text, window) = self.session.model, self.protocol.heldout.pairs()[0]
        with run.stage("evaluate dense model"):
            loss = perplexity(model, text, window)
        return Dense(
            layers=len(decoder_layers(model)), parameters=model.num_parameters(),
            parameters_layers=outside_embeddings(model), perplexity=loss.value, dataset=text.source,
            window=loss.window, stride=loss.stride, tokens=loss.tokens,
            kv_cache_bytes_per_token=kv_cache_bytes_per_token(model),
            tasks=self.protocol.tasks(model, self.session, run), generation=self._generation(model, run))

    def _generation(self, model: PreTrainedModel, run: Run) -> Generation | None:
        """What a model, the dense one or a pruned one, writes after the prompts; None where that is not asked for."""
        dense, count = self.session.model, self.protocol.generate
        if count is None:
            return None
        (prompt, new), ids = sizes(dense), self.protocol.prompts(dense)
        with run.stage("generate"):
            if self._written is None:
                self._written = continuations(dense, ids, new)
            written = self._written if model is dense else continuations(model, ids, new)
        return compared(self._written, written, prompt)

    def unit(self, variant: Variant, seed: int, dense: Dense) -> Unit:
        """The unit, if an earlier run finished it, or pruned and measured; raises whatever the method raises.

        What an interrupted run finished of it is found; afterwards only the unit's record stays.
        """
        run, name = self.run(seed, variant), f"{variant.options['method']}-seed{seed}"
        rows = self._healing_rows(variant, run)
        own = class_identity(type(variant.method))
        found = run.cached(
            name, [variant.options, *own, *([] if rows is None else [rows.identity()])],
            lambda: self._measure(variant, run, dense), JsonCodec(Unit), shown=None)
        count_skipped([found.perplexity, *found.texts], self.protocol.heldout)
        return found.model_copy(update={"variant": variant.name})

    def _healing_rows(self, variant: Variant, run: Run) -> TokenSet | None:
        """The rows that the variant is healed on, read once; None where it is not."""
        if variant.heal is None:
            return None
        key = (*self._rows(run.seed, variant), variant.method.held, variant.heal.tokens)
        if key not in self._tokens:
            self._tokens[key] = self.session.again(run.seed, run.stages).healing_rows(
                self.texts.source, self.tokens(run.seed, variant), variant.method.held, variant.heal.tokens)
        return self._tokens[key]

    def _measure(self, variant: Variant, run: Run, dense: Dense) -> Unit:
        tokens, seed = self.tokens(run.seed, variant), run.seed
        scores, shared = self._similarity(variant, run)
        run = dataclasses.replace(run, scores=scores)
        rows = self._healing_rows(variant, run)
        with metered(self._known.nbytes) as cost:
            made = run_method(self.session.model, variant.method, tokens, run, variant.heal, rows)
        outcome, healed = made.outcome, made.healed or {}
        seen = tokens.tokens if outcome.tokens is None else outcome.tokens
        unit = Unit(
            variant=variant.name, seed=seed, blocks=[(block.start, block.stop) for block in outcome.blocks],
            seconds=cost.seconds + shared.seconds, analysis_seconds=shared.seconds,
            peak_memory_bytes=max(cost.peak_memory_bytes, shared.peak_memory_bytes),
            peak_memory_scope="unit" if cost.own_peak else "process",
            resumed=bool(set(run.stages.reused) - {"analyse"}),
            tokens=seen + int(healed.get("tokens", 0)), heal=Heal(**healed) if healed else None,
            trained=outcome.training + int(healed.get("parameters", 0)) * int(healed.get("tokens", 0)),
            passes=None if outcome.search is None else outcome.search["passes"],
            rates=list(outcome.rates), **self._measured(run, made, dense), stages=dict(run.stages.seconds),
        )
        self.cache.clean(*PARTS)
        return unit

    def _measured(self, run: Run, made: RunOutcome, dense: Dense) -> dict[str, Any]:
        """The pruned model's part of a unit."""
        pruned, heldout = self.session.rounded(made.pruned), self.protocol.heldout
        with run.stage("evaluate", len(heldout.pairs()) + 1) as progress:
            first, *others = fidelities(self.session.model, pruned, heldout, progress, self._known)
            pace = measured_speed(self.session.model, pruned)
            progress(1)
        return {
            "layers": Layers(dense=dense.layers, pruned=len(decoder_layers(pruned))),
            "parameters": parameters(self.session.model, pruned),
            "perplexity": perplexity_record(first), "texts": [perplexity_record(one) for one in others],
            "window_sums": [round(value, 4) for value in first.pruned.sums],
            "speed": pace,
            "kv_cache_bytes_per_token": KVCache(
                dense=dense.kv_cache_bytes_per_token, pruned=kv_cache_bytes_per_token(pruned)),
            "tasks": self.protocol.tasks(pruned, self.session, run), "generation": self._generation(pruned, run),
            "state_error": [record.get("state_error") for record in made.outcome.fit],
            "stand_ins": [stand_in_name(record) for record in made.outcome.fit],
        }

    def _similarity(self, variant: Variant, run: Run) -> tuple[Scores | None, Meter]:
        """The analysis and its cost, once a seed, for a method that needs it."""
        method = variant.method
        if not isinstance(method, RankedMethod) or method.blocks is not None:
            return None, Meter()
        key = self._rows(run.seed, variant)
        if key not in self._scores:
            with metered(self._known.nbytes) as cost:
                scores = score_layers(
                    self.session.model, self.tokens(run.seed, variant), run, protect=method.protect)
            # Of an analysis that an interrupted run made, the cost it had then.
            cost = run.cached("cost-of-analysis", None, lambda: cost, JsonCodec(Meter), shown=None)
            self._scores[key] = (scores, cost)
        return self._scores[key]

    def _rows(self, seed: int, variant: Variant | None) -> tuple[int, int | None, int | None]:
        own = variant or self.texts
        return seed, own.samples or self.texts.samples, own.length or self.texts.length
