"""The stages of a run: load → analyse → prune → evaluate → save → report."""

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdprune.data.sources import check_source, is_named
from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.fidelity import HeldOut
from kdprune.methods import METHODS, make_method
from kdprune.methods.common.analysis import Scores, score_layers
from kdprune.methods.common.method import Method, RankedMethod, boundaries_held
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.result_files import ResultCodec
from kdprune.model.checkpoint import save_model, verify
from kdprune.model.families import explained, is_sliced
from kdprune.model.placement import is_dispatched, reads_weights
from kdprune.model.streaming import is_streamed
from kdprune.model.surgery import apply_edits
from kdprune.options import at_home, options_of, recorded, taken, typed_options
from kdprune.planning.estimate import expected_seconds
from kdprune.report.card import declared_licence, render_card
from kdprune.report.page import write_analysis, write_page
from kdprune.report.results import Results
from kdprune.report.summary import duration
from kdprune.run.chain import chain_of, write_chain
from kdprune.run.heal import Heal, make_heal
from kdprune.run.heal import heal as heal_model
from kdprune.run.inputs import inputs_of
from kdprune.run.option_groups import (
    ANALYZE,
    NOT_GIVEN,
    PRUNE,
    AnalysisOptions,
    DataOptions,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    SeedOptions,
    TextOptions,
    given,
    spelled_out,
)
from kdprune.run.recipe import run_options
from kdprune.run.record import Evaluation, analysis_results, count_skipped, evaluate, pruning_results
from kdprune.run.resources import Resources, make_resources
from kdprune.run.session import Session, plain_source
from kdprune.runtime.distributed import World, start_world
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Stages
from kdprune.store.cache import JsonCodec
from kdprune.store.directories import (
    RECORD,
    Inputs,
    check_apart,
    check_output,
    claimed,
    staged_directory,
    written_files,
)
from kdprune.store.hashing import class_identity

VERIFIED_TOKENS = 64      # on which the saved model must equal the one in memory, bit for bit


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and everything known about it.

    Attributes:
        model: the pruned model; plain ``save_pretrained`` and ``from_pretrained`` work on it.
        results: the content of ``results.json``.
        tokenizer: the dense model's, or None.
        probe: token ids (1, T) on which a saved copy is compared with ``model``.
        inputs: what the run read, where nothing is ever saved.
    """

    model: PreTrainedModel
    results: Results
    tokenizer: PreTrainedTokenizerBase | None
    probe: Tensor
    inputs: Inputs = field(default_factory=dict, repr=False)

    @property
    def blocks(self) -> list[range]:
        """The removed blocks, half-open layer ranges of the dense model."""
        return [range(*block) for block in self.results.blocks]

    @property
    def metrics(self) -> dict[str, Any]:
        """Layers, parameters, perplexity, speed and cache size, as plain numbers by name."""
        names = {"layers", "parameters", "perplexity", "speed", "kv_cache_bytes_per_token"}
        return self.results.model_dump(include=names, mode="json")

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Writes checkpoint, tokenizer, model card, ``results.json`` and ``report.html``, then loads the checkpoint
        back and compares logits bit for bit.

        Raises:
            KDPruneError: the directory is not empty (with ``overwrite``: holds more than an earlier result), cannot be
                written, is a place that the run read, or the loaded model differs. Nothing half-written is left.
        """
        directory = at_home(directory)
        check_apart(directory, self.inputs)
        with staged_directory(directory, overwrite, result=True) as staging:
            save_model(self.model, staging, self.tokenizer)
            verify(staging, self.model, self.probe)
            card = render_card(self.results, declared_licence(self.results.model))
            (staging / "README.md").write_text(card, encoding="utf-8")
            self.results.files = sorted([*written_files(staging), RECORD, "report.html"])
            self.results.save(staging / RECORD)
            write_page(self.results, staging / "report.html")
        return Path(directory)

    def report(self, path: str | Path) -> Path:
        """Writes the one-file HTML report."""
        return write_page(self.results, path)


@spelled_out(PRUNE, METHODS["kdp"])
def prune(
    model: Any = NOT_GIVEN, output_dir: Any = NOT_GIVEN, method: Any = NOT_GIVEN, *,
    recipe: str | Path | Mapping[str, Any] | None = None, **options: Any,
) -> PruneResult:
    """Prunes a causal language model to a net-parameter ratio and measures what it cost.

    A loaded model is put into evaluation mode, and moved if ``device`` is given. With ``output_dir`` at None nothing is
    written (``result.save`` does it later); with a work directory a run that was stopped goes on where it was, to the
    same bits.

    Args:
        recipe: a YAML file or mapping of any of these options; what is given beside it wins.
        {options}

    The options from ``ratio`` on are those of KDP; another method has its own, the fields of its dataclass
    (docs/options.md).

    Raises:
        KDPruneError: anything wrong with what was given, in one line.
    """
    chosen = run_options(recipe, given(options, model=model, output_dir=output_dir, method=method))
    subject, data, output = taken(ModelOptions, chosen), taken(DataOptions, chosen), taken(OutputOptions, chosen)
    name, draws = taken(MethodOptions, chosen), taken(SeedOptions, chosen)
    settings = make_method(
        name.method, {key: chosen[key] for key in options_of(METHODS[name.method]) if key in chosen})
    healing, resources = make_heal(chosen, settings), make_resources(chosen)
    here = start_world(resources.device)
    inputs = inputs_of(subject.model, texts=_texts(data).values(), tokenizer=subject.tokenizer, recipe=recipe,
                       resources=resources)
    _check_named(data, output, inputs, here)
    if resources.load_in is not None:
        settings.check_states_model()
    stages = Stages(show=output.progress and here.first)
    claim = claimed(output.output_dir) if output.output_dir is not None and here.first else contextlib.nullcontext()
    with claim, open_session(subject, resources, draws.seed, stages) as session:
        tokens = session.calibration(data.calibration, data.samples, data.length)
        heldout = session.heldout(data.heldout, tokens, settings.held, data.heldout_tokens, data.windows)
        check_run(session, settings, tokens, healing)
        record = {
            **recorded(subject, name, data, draws, resources), **_sources(session, data),
            **({} if healing is None else healing.options()), **dataclasses.asdict(settings)}
        held = boundaries_held(session.model, settings.ratio, getattr(settings, "blocks", None))
        with session.run(tokens, held) as run, explained(session.model):
            if stages.show and (seconds := expected_seconds(session.model, settings, tokens, run)) is not None:
                stages.tell(f"this takes about {duration(seconds)}, evaluation and saving not counted")
            run = scored(session.model, tokens, settings, run)
            rows = None if healing is None else session.healing_rows(
                data.calibration, tokens, settings.held, healing.tokens)
            made = run_method(session.model, settings, tokens, run, healing, rows)
            measured = evaluated(session, settings, healing, session.rounded(made.pruned), heldout, run, rows)
            base = analysis_results(session.name, session.model, record, tokens, run, name.method)
            results = pruning_results(base, session.model, made.pruned, made.outcome, measured, made.healed)
            write_chain(made.pruned, results)
            count_skipped([results.perplexity, *results.texts], heldout)
            probe = tokens.ids[:1, :VERIFIED_TOKENS]
            result = PruneResult(session.as_stored(made.pruned), results, session.tokenizer, probe, inputs)
            if output.output_dir is not None:
                with stages.stage("save and verify"):
                    if here.first:
                        result.save(output.output_dir, output.overwrite)
                    here.barrier()
            run.cache.clean()
    return result


@dataclass(frozen=True)
class RunOutcome:
    """What a method decided, the pruned (and healed) model, and the fields of ``results.json``'s ``heal`` or None."""

    outcome: MethodResult
    pruned: PreTrainedModel
    healed: dict[str, Any] | None = None


def _check_named(data: TextOptions, output: OutputOptions, inputs: Inputs, here: World) -> None:
    """Raises KDPruneError, before any work, for an output that cannot be written or lies where something is read, and
    for texts that cannot be read.
    """
    if output.output_dir is not None:
        check_apart(output.output_dir, inputs)
        if here.first:
            check_output(output.output_dir, output.overwrite, result=True)
    check_texts(data)


def check_texts(data: TextOptions) -> None:
    """Raises KDPruneError for texts that cannot be read, before any work."""
    for source in _texts(data).values():
        if is_named(source) and not source:
            raise KDPruneError("got no text in a mapping of texts by name, expected one at least")
        for one in source.values() if is_named(source) else [source]:
            check_source(one)


def text_sources(data: TextOptions) -> dict[str, Any]:
    """What the record says of the texts, which may be anything."""
    return {name: plain_source(source) for name, source in _texts(data).items()}


def open_session(subject: ModelOptions, resources: Resources, seed: int, stages: Stages) -> Session:
    """The session of a command's options."""
    return Session(
        subject.model, subject.tokenizer, seed, resources.device, subject.dtype, subject.trust_remote_code, stages,
        resources)


def _texts(data: TextOptions) -> dict[str, Any]:
    """The text sources by name."""
    return {"calibration": data.calibration, **({"heldout": data.heldout} if isinstance(data, DataOptions) else {})}


def _sources(session: Session, data: TextOptions) -> dict[str, Any]:
    """What the record says of model and texts."""
    return {"model": None if session.bundled else session.name, **text_sources(data)}


def check_run(session: Session, method: Method, tokens: TokenSet, heal: Heal | None = None) -> None:
    """Raises KDPruneError if the session's model cannot be pruned, or healed, so: before any work."""
    if heal is not None:
        check_heal(session, method, tokens, heal)
    if session.states_model is not None:
        method.check_states_model()
    chain_of(session.model)
    method.check(session.model, tokens)


def check_heal(session: Session, method: Method, tokens: TokenSet, heal: Heal) -> None:
    """Raises KDPruneError if what the method makes of the session's model cannot be healed so."""
    if is_streamed(session.model) or is_dispatched(session.model):
        raise KDPruneError("got heal for a model whose layers are read from disk or spread over devices, expected one "
                           "that fits on one; give it more memory (--host-memory), or leave healing out")
    heal.check(method, tokens)


def scored(model: PreTrainedModel, tokens: TokenSet, method: Method, run: Run) -> Run:
    """The run with the similarity analysis, if the method ranks its blocks by it."""
    if not isinstance(method, RankedMethod):
        return run
    return dataclasses.replace(run, scores=score_layers(model, tokens, run, protect=method.protect))


def run_method(
    model: PreTrainedModel, method: Method, tokens: TokenSet, run: Run, heal: Heal | None = None,
    rows: TokenSet | None = None,
) -> RunOutcome:
    """One method on a model, healed if asked for, on ``rows``; in the pruned model kept weights are shared."""
    options = method_identity(method)

    def compute() -> MethodResult:
        return method(model, tokens, run)

    outcome = compute() if method.caches_parts else run.cached("method", options, compute, ResultCodec(model))
    pruned = apply_edits(model, outcome.edits)
    if heal is None:
        return RunOutcome(outcome, pruned)
    healed, record = heal_model(
        pruned, model, outcome.edits, tokens if rows is None else rows, heal, run, held=tokens.held_out(method.held),
        follows_from=options)
    return RunOutcome(outcome, healed, record)


def method_identity(method: Method) -> list[Any]:
    """What a method's result follows from beside model, tokens and seed: its class (and its code), its options."""
    return [type(method).__name__, dataclasses.asdict(method), *class_identity(type(method))]


def evaluated(
    session: Session, method: Method, heal: Heal | None, pruned: PreTrainedModel, heldout: HeldOut,
    run: Run, rows: TokenSet | None = None,
) -> Evaluation:
    """Both models measured, found in the cache or made; ``rows``: those of healing."""
    healing = None if heal is None or rows is None else [dataclasses.asdict(heal), rows.identity()]
    tokenizer = session.tokenizer
    reader = None if tokenizer is None else [type(tokenizer).__name__, tokenizer.name_or_path]  # of samples
    return run.cached(
        "evaluation", [method_identity(method), healing, heldout.identity(), reader, str(session.stored),
                       reads_weights(session.model)],
        lambda: evaluate(session.model, pruned, tokenizer, heldout, run), JsonCodec(Evaluation), "evaluate")


@spelled_out(ANALYZE)
def analyze(model: Any = NOT_GIVEN, calibration: Any = NOT_GIVEN, **options: Any) -> Scores:
    """Scores the similarity of all pairs of layer states (KDP, section 1); nothing is pruned.

    Args:
        {options}

    Returns:
        Arrays by name, with ``.plot(path)``.

    Raises:
        KDPruneError: anything wrong with what was given, in one line.
    """
    chosen = typed_options(given(options, model=model, calibration=calibration), options_of(*ANALYZE))
    subject, data, output = taken(ModelOptions, chosen), taken(TextOptions, chosen), taken(OutputOptions, chosen)
    draws, shown, resources = taken(SeedOptions, chosen), taken(AnalysisOptions, chosen), make_resources(chosen)
    here = start_world(resources.device)
    inputs = inputs_of(subject.model, texts=_texts(data).values(), tokenizer=subject.tokenizer, resources=resources)
    _check_named(data, output, inputs, here)
    stages = Stages(show=output.progress and here.first)
    with open_session(subject, resources, draws.seed, stages) as session:
        if is_sliced(session.model.config):
            raise KDPruneError("got a model that slicegpt made narrower, whose states are of another width at every "
                               "layer; expected one width, to compare them: analyse the model as it was before")
        tokens = session.calibration(data.calibration, data.samples, data.length)
        with session.run(tokens) as run:
            scores = score_layers(session.model, tokens, run, protect=shown.protect)
            run = dataclasses.replace(run, scores=scores)
        if output.output_dir is not None and here.first:
            record = {**recorded(subject, draws, data, shown, resources), **_sources(session, data)}
            results = analysis_results(session.name, session.model, record, tokens, run)
            with staged_directory(output.output_dir, output.overwrite, result=True) as staging:
                results.files = sorted([RECORD, "report.html"])
                results.save(staging / "results.json")
                write_analysis(results, staging / "report.html")
    here.barrier()
    return scores
