"""Units of a comparison: one variant with one seed, pruned, measured, and kept in a file once it is done."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from transformers import PreTrainedModel

from kdprune.analysis import Scores
from kdprune.assemble import measured_speed, software_versions
from kdprune.data import TokenSet
from kdprune.evaluation.perplexity import perplexity
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.evaluation.tasks import run_suite
from kdprune.identity import code_identity, digest, tokens_identity
from kdprune.methods.method import RankedMethod
from kdprune.model.families import decoder_layers
from kdprune.pipeline import RunOutcome, run_method
from kdprune.report.comparison_records import COMPARISON_VERSION, Dense, Unit
from kdprune.report.heal_record import Heal
from kdprune.report.records import KVCache, Layers, Parameters, Perplexity, Record
from kdprune.report.results import write_file
from kdprune.report.task_records import TaskScore
from kdprune.runtime import Meter, Stages, metered
from kdprune.session import Session
from kdprune.variants import Variant

Kept = TypeVar("Kept", bound=Record)


@dataclass(frozen=True)
class Texts:
    """Calibration text as given: ``source``, ``samples`` and ``length`` of :func:`kdprune.prune`."""

    source: Any = None
    samples: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How every model of a comparison is measured: perplexity on ``heldout``, and a suite of tasks if there is one."""

    heldout: TokenSet
    suite: str | None = None
    data: Sequence[Path] = ()
    limit: int | None = None

    def identity(self) -> list[Any]:
        """What makes two protocols the same; local task files count by name, size and time of change."""
        files = [
            (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for folder in self.data if self.suite for path in sorted(Path(folder).rglob("*")) if path.is_file()
        ]
        return [tokens_identity(self.heldout), self.suite, self.limit, files]

    def tasks(self, model: PreTrainedModel, run: Session) -> list[TaskScore]:
        """Scores of the suite; none without one."""
        if self.suite is None:
            return []
        found = run_suite(
            model, run.tokenizer, self.suite, data=self.data, limit=self.limit, stages=run.stages)
        return [TaskScore(**dataclasses.asdict(score)) for score in found]


class Store:
    """Records of finished work in ``FOLDER/runs/``, each found again by a hash of everything it follows from."""

    def __init__(self, folder: Path | None):
        self.folder = None if folder is None else folder / "runs"

    def get(self, name: str, key: str, kind: type[Kept]) -> Kept | None:
        """The record, or None where it is missing or its file cannot be read."""
        if self.folder is None:
            return None
        try:
            found = json.loads(self._file(name, key).read_text(encoding="utf-8"))
            return kind.model_validate(found["record"]) if found["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def put(self, name: str, key: str, record: Record) -> None:
        """Writes the record whole or not at all."""
        if self.folder is not None:
            content = {"key": key, "record": record.model_dump(mode="json")}
            write_file(self._file(name, key), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _file(self, name: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{key[:16]}.json"


class Bench:
    """One model under one protocol; tokens and similarity scores of a seed are shared by its variants."""

    def __init__(self, session: Session, texts: Texts, protocol: Protocol, store: Store, show: bool):
        self.session, self.texts, self.protocol, self.store, self.show = session, texts, protocol, store, show
        self._common = digest([
            code_identity(), software_versions(), COMPARISON_VERSION, session.weights_identity(),
            str(session.model.device), protocol.identity(),
        ])
        self._tokens: dict[Any, TokenSet] = {}
        self._scores: dict[Any, tuple[Scores, Meter]] = {}

    def forget(self) -> None:
        """Lets go of the tokens and scores of the seeds so far."""
        self._tokens.clear()
        self._scores.clear()

    def tokens(self, seed: int, variant: Variant | None = None) -> TokenSet:
        """Calibration tokens of this seed: as for all, or as many as the variant says."""
        key = self._rows(seed, variant)
        if key not in self._tokens:
            run = self.session.again(seed, Stages(show=self.show))
            self._tokens[key] = run.calibration(self.texts.source, *key[1:])
        return self._tokens[key]

    def dense(self) -> Dense:
        """The dense model's figures, measured once."""
        key = digest([self._common, "dense"])
        found = self.store.get("dense", key, Dense)
        if found is None:
            model, text, run = self.session.model, self.protocol.heldout, self.session
            with run.stages.stage("evaluate dense model"):
                loss = perplexity(model, text)
            found = Dense(
                layers=len(decoder_layers(model)), parameters=model.num_parameters(), perplexity=loss.value,
                dataset=text.source, window=loss.window, stride=loss.stride, tokens=loss.tokens,
                kv_cache_bytes_per_token=kv_cache_bytes_per_token(model), tasks=self.protocol.tasks(model, run))
            self.store.put("dense", key, found)
        return found

    def key(self, variant: Variant, seed: int) -> str:
        """The hash of all that the unit's figures follow from, the machine's speed apart."""
        return digest([self._common, variant.options, seed, tokens_identity(self.tokens(seed, variant))])

    def finished(self, variant: Variant, seed: int) -> Unit | None:
        """The unit, if an earlier run finished it."""
        found = self.store.get(unit_name(variant, seed), self.key(variant, seed), Unit)
        return None if found is None else found.model_copy(update={"variant": variant.name})

    def keep(self, variant: Variant, unit: Unit) -> None:
        """Writes a finished unit to its file."""
        self.store.put(unit_name(variant, unit.seed), self.key(variant, unit.seed), unit)

    def measure(self, variant: Variant, seed: int, dense: Dense) -> Unit:
        """Prunes and measures; raises whatever the method raises."""
        run = self.session.again(seed, Stages(show=self.show))
        tokens = self.tokens(seed, variant)
        scores, shared = self._similarity(variant, seed)
        with metered() as cost:
            made = run_method(run, variant.method, tokens, scores, seed, variant.heal)
        outcome, healed = made.outcome, made.healed or {}
        seen = tokens.tokens if outcome.tokens is None else outcome.tokens
        return Unit(
            variant=variant.name, seed=seed, blocks=[(block.start, block.stop) for block in outcome.blocks],
            seconds=cost.seconds + shared.seconds, analysis_seconds=shared.seconds,
            peak_memory_bytes=max(cost.peak_memory_bytes, shared.peak_memory_bytes),
            peak_memory_scope="unit" if cost.own_peak else "process",
            tokens=seen + int(healed.get("tokens", 0)), heal=Heal(**healed) if healed else None,
            **self._measured(run, made, dense), stages=dict(run.stages.seconds),
        )

    def _measured(self, run: Session, made: RunOutcome, dense: Dense) -> dict[str, Any]:
        """The pruned model's part of a unit."""
        pruned = made.pruned
        with run.stages.stage("evaluate", 2) as advance:
            loss = perplexity(pruned, self.protocol.heldout)
            advance(1)
            pace = measured_speed(run.model, pruned)
            advance(1)
        return {
            "layers": Layers(dense=dense.layers, pruned=len(decoder_layers(pruned))),
            "parameters": Parameters(dense=dense.parameters, pruned=pruned.num_parameters()),
            "perplexity": Perplexity(
                dense=dense.perplexity, pruned=loss.value, dataset=dense.dataset, window=loss.window,
                stride=loss.stride, tokens=loss.tokens),
            "window_sums": [round(value, 4) for value in loss.sums],
            "speed": pace,
            "kv_cache_bytes_per_token": KVCache(
                dense=dense.kv_cache_bytes_per_token, pruned=kv_cache_bytes_per_token(pruned)),
            "tasks": self.protocol.tasks(pruned, run),
            "state_error": [record.get("state_error") for record in made.outcome.fit],
        }

    def _similarity(self, variant: Variant, seed: int) -> tuple[Scores | None, Meter]:
        """The analysis and its cost, once a seed, for a method that needs it."""
        method = variant.method
        if not isinstance(method, RankedMethod) or method.blocks is not None:
            return None, Meter()
        key = self._rows(seed, variant)
        if key not in self._scores:
            run = self.session.again(seed, Stages(show=self.show))
            with metered() as cost:
                scores = run.score(self.tokens(seed, variant), method.protect)
            self._scores[key] = (scores, cost)
        return self._scores[key]

    def _rows(self, seed: int, variant: Variant | None) -> tuple[int, int | None, int | None]:
        own = variant or self.texts
        return seed, own.samples or self.texts.samples, own.length or self.texts.length


def unit_name(variant: Variant, seed: int) -> str:
    """The readable part of a unit's file name."""
    return f"{variant.options['method']}-seed{seed}"
