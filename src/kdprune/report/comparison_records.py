"""``results.json`` of a comparison: every unit as measured, and the rows of the table made from them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kdprune.errors import KDPruneError
from kdprune.report.heal_record import Heal
from kdprune.report.records import (
    Block,
    Calibration,
    FreeForm,
    Number,
    Perplexity,
    Record,
    Speed,
    divide,
)
from kdprune.report.results import encode, parsed, read_record, write_file
from kdprune.report.retention import retention, row_name
from kdprune.report.size_records import KVCache, Layers, Parameters, removed
from kdprune.report.task_records import Generation, TaskScore

COMPARISON_VERSION = 1
KINDS = ("comparison", "ablation")
WRITTEN = ("same_beginning", "same_tokens", "repeated")  # measures of continuations


class Stat(Record):
    """A figure over seeds."""

    mean: Number = Field(description="mean over the seeds that have the figure")
    sd: Number = Field(None, description="standard deviation over seeds (n − 1); null for one seed")
    count: int = Field(description="how many seeds")

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Stat | None":
        """Mean and spread of what was measured; None where nothing was."""
        known = [float(value) for value in values if value is not None]
        if not known:
            return None
        return cls(mean=statistics.fmean(known), sd=statistics.stdev(known) if len(known) > 1 else None,
                   count=len(known))


class Dense(Record):
    """The dense model under the protocol of the comparison."""

    layers: int = Field(description="decoder layers")
    parameters: int = Field(description="parameters, embeddings included")
    parameters_layers: int | None = Field(None, description="those outside the embeddings; null in older records")
    perplexity: Number = Field(description="on the held-out text")
    dataset: str = Field(description="the held-out text")
    window: int = Field(description="tokens per window")
    stride: int = Field(description="tokens between the starts of two windows")
    tokens: int = Field(description="tokens whose loss was counted")
    kv_cache_bytes_per_token: int = Field(description="bytes")
    tasks: list[TaskScore] = Field(default_factory=list, description="scores of the task suite")
    generation: Generation | None = Field(None, description="continuations; null where none were asked for")


class Unit(Record):
    """One variant with one seed, as measured."""

    variant: str = Field(description="the variant as the user named it")
    seed: int = Field(description="of the calibration order and of every draw")
    blocks: list[Block] = Field(default_factory=list, description="removed blocks, half-open")
    layers: Layers = Field(description="decoder layers")
    parameters: Parameters = Field(description="parameters and net ratios")
    perplexity: Perplexity = Field(description="on the same text for all")
    texts: list[Perplexity] = Field(
        default_factory=list, description="the same at other windows and on other held-out texts")
    window_sums: list[Number] = Field(
        default_factory=list,
        description="summed loss of each window of that text, nats; empty in older records")
    speed: Speed | None = Field(
        None, description="measured in turns with the dense model; null where that was streamed from disk")
    kv_cache_bytes_per_token: KVCache = Field(description="key-value cache per token, bytes")
    tasks: list[TaskScore] = Field(default_factory=list, description="scores of the task suite")
    generation: Generation | None = Field(None, description="continuations; null where none were asked for")
    seconds: Number = Field(description="wall time of pruning, the similarity analysis counted where it was needed")
    analysis_seconds: Number = Field(0.0, description="the part of it that a seed's variants share: the analysis")
    stages: dict[str, Number] = Field(default_factory=dict, description="wall time per stage")
    peak_memory_bytes: int = Field(description="largest memory of the process while pruning, the model included")
    peak_memory_scope: Literal["unit", "process"] = Field(
        description="since pruning began, or since the process began where the system cannot reset its mark")
    resumed: bool = Field(
        False, description="whether an interrupted run had finished a part: seconds and memory are those of the rest")
    tokens: int = Field(description="calibration tokens the method looked at, those of healing counted")
    trained: int | None = Field(
        None, description="parameters trained × tokens seen in training, all fits and healing; closed forms and rates "
        "on trial count nothing; null in older records")
    passes: Number = Field(
        None, description="forward passes of the calibration rows that a search over pruned models took, whatever "
        "their depth; null for methods without one")
    rates: list[Number] = Field(
        default_factory=list, description="learning rates found on trial, one a block; empty where they were given")
    state_error: list[Number] = Field(default_factory=list, description="of each stand-in, on held-out rows")
    stand_ins: list[str] = Field(
        default_factory=list, description="of each stand-in the parts of its kernel and what stands before it; empty "
        "in older records")
    heal: Heal | None = Field(None, description="training after pruning, and whether it was kept")


class Failure(Record):
    """One variant with one seed that came to nothing."""

    variant: str = Field(description="the variant")
    seed: int = Field(description="the seed")
    reason: str = Field(description="why, in one line")
    traceback: str = Field("", description="of an error that is not the user's; empty where the reason says it all")


class Variant(Record):
    """What a row of the table is, before anything is measured."""

    name: str = Field(description="as the user named it")
    title: str = Field(description="as tables show it")
    group: str = Field("", description="ablations: the part of the table it stands in")
    value: Number = Field(None, description="ablations: what a sweep varies, at this point")
    options: FreeForm = Field(default_factory=dict, description="every option of method and run")
    protected: tuple[int, int] | None = Field(
        None, description="layers at the start and at the end that it never takes, as its own code has it; null where "
        "blocks are named or given, or no layer is chosen, and in older records")


class TextStat(Record):
    """What a variant loses on one text at one window, over its seeds."""

    dataset: str = Field(description="the held-out text")
    window: int = Field(description="tokens per window")
    excess_loss: Stat | None = Field(None, description="ln(pruned / dense perplexity), nats per token")
    divergence: Stat | None = Field(None, description="KL(dense‖pruned), nats per token")
    agreement: Stat | None = Field(None, description="share of tokens with the same most probable next token")


class Row(Record):
    """One variant over its seeds."""

    variant: Variant = Field(description="what it is")
    seeds: list[int] = Field(default_factory=list, description="seeds that came to an end")
    failures: list[Failure] = Field(default_factory=list, description="seeds that did not")
    blocks: list[list[Block]] = Field(default_factory=list, description="distinct choices of blocks")
    net_ratio: Stat | None = Field(None, description="1 − pruned / dense parameters, exact")
    net_ratio_layers: Stat | None = Field(None, description="the same of the parameters outside the embeddings")
    parameters: Stat | None = Field(None, description="of the pruned model")
    perplexity: Stat | None = Field(None, description="of the pruned model")
    excess_loss: Stat | None = Field(None, description="ln(pruned / dense perplexity), nats per token")
    divergence: Stat | None = Field(None, description="KL(dense‖pruned), nats per token")
    agreement: Stat | None = Field(None, description="share of tokens with the same most probable next token")
    texts: list[TextStat] = Field(default_factory=list, description="the first text and all others, at every window")
    retained: Stat | None = Field(None, description="Σ score / Σ dense score over all rows (the paper's measure)")
    above_chance: Stat | None = Field(None, description="mean of (score − chance) / (dense − chance) over `signal`")
    same_beginning: Stat | None = Field(None, description="share of a continuation before it leaves the dense model's")
    same_tokens: Stat | None = Field(None, description="share of its tokens that are the dense model's at their place")
    repeated: Stat | None = Field(None, description="share of its runs of four tokens that stood in it before")
    prefill: Stat | None = Field(None, description="prefill speed over the dense model's")
    decode: Stat | None = Field(None, description="decode speed over the dense model's")
    kv_cache_saving: Stat | None = Field(None, description="1 − pruned / dense bytes per token")
    seconds: Stat | None = Field(None, description="of pruning, resumed units apart")
    equivalents: Stat | None = Field(
        None, description="the same in forward passes of the calibration text, each as long as the dense model would "
        "take at the prefill speed that was measured beside it")
    peak_memory_bytes: Stat | None = Field(None, description="while pruning, resumed units apart")
    tokens: Stat | None = Field(None, description="calibration tokens looked at")
    trained: Stat | None = Field(None, description="parameters trained × tokens seen in training")
    passes: Stat | None = Field(None, description="forward passes of the calibration rows that a search took")
    tasks: dict[str, Stat] = Field(default_factory=dict, description="score of each task")
    task_retained: dict[str, Stat] = Field(default_factory=dict, description="score / dense score of each task")


class Comparison(Record):
    """Variants of pruning one model to one ratio, under one protocol."""

    kind: Literal["comparison", "ablation"] = Field("comparison", description="what made it")
    schema_version: int = Field(COMPARISON_VERSION, description="version of this schema")
    created: str = Field(description="when it was begun, ISO 8601")
    model: str = Field(description="the dense model as the user named it")
    family: str = Field("", description="its model_type")
    ratio: float = Field(description="the net ratio asked for")
    of: Literal["all", "layers"] = Field(
        "all", description="what it is a share of: all parameters, or those outside the embeddings")
    seeds: list[int] = Field(description="seeds asked for")
    recipe: FreeForm = Field(default_factory=dict, description="the options of the run")
    calibration: Calibration = Field(description="calibration text; its order differs from seed to seed")
    device: str = Field("cpu", description="where it ran")
    dense: Dense = Field(description="the dense model")
    variants: list[Variant] = Field(description="in the order of the table")
    units: list[Unit] = Field(default_factory=list, description="what was measured")
    failures: list[Failure] = Field(default_factory=list, description="what could not be")
    rows: list[Row] = Field(default_factory=list, description="one per variant; derived from the units")
    signal: list[str] = Field(default_factory=list, description="tasks on which the dense model is above chance")
    left_out: list[str] = Field(default_factory=list, description="tasks on which it is not")
    versions: dict[str, str] = Field(default_factory=dict, description="versions of the software used")

    def model_post_init(self, context: Any) -> None:
        """Derives the rows, and which tasks carry signal."""
        self.rows = [self._row(variant) for variant in self.variants]
        if _scored(self.dense.tasks):
            found = retention(self.dense.tasks, self.dense.tasks)
            self.signal, self.left_out = list(found.signal), list(found.left_out)

    def add(self, found: Unit | Failure) -> None:
        """Takes in one unit or failure more, and derives its row."""
        if isinstance(found, Unit):
            self.units.append(found)
        else:
            self.failures.append(found)
        self.rows = [self._row(variant) for variant in self.variants]

    def row(self, name: str) -> Row | None:
        """The row of the variant of this name; None where there is none."""
        return next((row for row in self.rows if row.variant.name == name), None)

    def _row(self, variant: Variant) -> Row:
        units = [unit for unit in self.units if unit.variant == variant.name]
        # Tasks take time: a record may have them of some seeds alone.
        kept = [retention(self.dense.tasks, unit.tasks) for unit in units if unit.tasks and _scored(self.dense.tasks)]
        written = [unit.generation for unit in units if unit.generation]
        whole = [unit for unit in units if not unit.resumed]  # of another, time and memory are those of the rest
        return Row(
            variant=variant, seeds=[unit.seed for unit in units],
            failures=[failure for failure in self.failures if failure.variant == variant.name],
            blocks=_distinct(unit.blocks for unit in units),
            net_ratio=Stat.of(unit.parameters.net_ratio for unit in units),
            net_ratio_layers=Stat.of(unit.parameters.net_ratio_layers for unit in units),
            parameters=Stat.of(unit.parameters.pruned for unit in units),
            perplexity=Stat.of(unit.perplexity.pruned for unit in units),
            excess_loss=Stat.of(unit.perplexity.excess_loss for unit in units),
            divergence=Stat.of(unit.perplexity.divergence for unit in units),
            agreement=Stat.of(unit.perplexity.agreement for unit in units),
            texts=_by_text(units),
            retained=Stat.of(found.mean for found in kept),
            above_chance=Stat.of(found.above_chance for found in kept),
            **{name: Stat.of(one.mean(name) for one in written) for name in WRITTEN},
            prefill=Stat.of(unit.speed.prefill.ratio for unit in units if unit.speed),
            decode=Stat.of(unit.speed.decode.ratio for unit in units if unit.speed),
            kv_cache_saving=Stat.of(
                removed(unit.kv_cache_bytes_per_token.dense, unit.kv_cache_bytes_per_token.pruned) for unit in units),
            seconds=Stat.of(unit.seconds for unit in whole),
            equivalents=Stat.of(
                unit.seconds * pace / self.calibration.tokens for unit in whole
                if unit.seconds is not None and unit.speed and (pace := unit.speed.prefill.dense)),
            peak_memory_bytes=Stat.of(unit.peak_memory_bytes for unit in whole),
            tokens=Stat.of(unit.tokens for unit in units),
            trained=Stat.of(unit.trained for unit in units), passes=Stat.of(unit.passes for unit in units),
            tasks=_by_task(units),
            task_retained=_by_task(units, {task_name(score): score for score in self.dense.tasks}),
        )

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read a results.json (or the one in a folder); every mistake is one KDPruneError line."""
        return parsed(cls, *read_record(path, "compare"), COMPARISON_VERSION)

    def save(self, path: str | Path) -> Path:
        """Write results.json atomically."""
        return write_file(path, encode(self.model_dump(mode="json")) + "\n")


def is_comparison(path: str | Path) -> bool:
    """Whether a results.json (or the one in a folder) is a comparison's, not a single run's."""
    try:
        record, _ = read_record(path, "compare")
    except KDPruneError:
        return False
    return isinstance(record, dict) and record.get("kind") in KINDS


def _distinct(choices: Iterable[list[Block]]) -> list[list[Block]]:
    found: list[list[Block]] = []
    for blocks in choices:
        if blocks not in found:
            found.append(blocks)
    return found


def _scored(tasks: Sequence[TaskScore]) -> bool:
    """Whether there is anything to retain: a score that is not a perplexity, and not 0."""
    return any(score.higher_is_better and score.value for score in tasks)


def task_name(score: TaskScore) -> str:
    """The row of a table of tasks: "sciq", "blimp: binding", "lambada_openai (perplexity)"."""
    plain = score.higher_is_better or "perplexity" in score.task
    return row_name(score) if plain else f"{row_name(score)} (perplexity)"


def _by_task(units: Sequence[Unit], dense: Mapping[str, TaskScore] | None = None) -> dict[str, Stat]:
    """Score of every task over the units; with ``dense``, over the dense model's (perplexities inverted: 1 = all)."""
    values: dict[str, list[float | None]] = {}
    for unit in units:
        for score in unit.tasks:
            name = task_name(score)
            before = dense.get(name) if dense is not None else None
            kept = score.value if dense is None else _kept(score, before)
            values.setdefault(name, []).append(kept)
    stats = {task: Stat.of(found) for task, found in values.items()}
    return {task: stat for task, stat in stats.items() if stat is not None}


def _by_text(units: Sequence[Unit]) -> list[TextStat]:
    """One a text and window, where there is more than one."""
    found: dict[tuple[str, int], list[Perplexity]] = {}
    for unit in units:
        for one in (unit.perplexity, *unit.texts):
            found.setdefault((one.dataset, one.window), []).append(one)
    return [] if len(found) < 2 else [
        TextStat(dataset=dataset, window=window, **{
            name: Stat.of(getattr(one, name) for one in every)
            for name in ("excess_loss", "divergence", "agreement")})
        for (dataset, window), every in found.items()]


def _kept(score: TaskScore, dense: TaskScore | None) -> float | None:
    if dense is None:
        return None
    pair = (score.value, dense.value) if score.higher_is_better else (dense.value, score.value)
    return divide(*pair)
