"""``kdprune compare`` and ``kdprune ablate``: many variants, one model, one ratio, one protocol."""

import contextlib
import datetime
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from kdprune.comparison.units import PARTS, Bench, Protocol, Texts
from kdprune.comparison.variants import Variant, ablation_variants, check_ablation, parse_variant, split_methods
from kdprune.errors import KDPruneError, one_line
from kdprune.evaluation.tasks import check_suite
from kdprune.methods import METHODS
from kdprune.methods.common.method import boundaries_held
from kdprune.model.families import decoder_layers, family_of
from kdprune.options import options_of, recorded, taken, typed_options
from kdprune.report.comparison_page import write_comparison
from kdprune.report.comparison_records import Comparison, Failure, Unit, is_comparison
from kdprune.report.comparison_records import Variant as VariantRecord
from kdprune.report.records import Block
from kdprune.report.results import Calibration, read_record
from kdprune.report.summary import OUTSIDE
from kdprune.run.heal import HEAL_OPTIONS
from kdprune.run.inputs import inputs_of
from kdprune.run.option_groups import (
    ABLATE,
    COMPARE,
    NOT_GIVEN,
    AblateOptions,
    CompareOptions,
    DataOptions,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    SeedsOptions,
    SuiteOptions,
    given,
    spelled_out,
)
from kdprune.run.pipeline import check_heal, check_texts, open_session, text_sources
from kdprune.run.record import software_versions
from kdprune.run.resources import make_resources
from kdprune.run.session import Session
from kdprune.runtime.stages import Stages
from kdprune.store.cache import LOCK, MANIFEST
from kdprune.store.directories import check_apart, check_output

RUNS = "runs"  # the work directory in a comparison's folder


@spelled_out(COMPARE)
def compare(model: Any = NOT_GIVEN, methods: Any = NOT_GIVEN, **options: Any) -> Comparison:
    """Prunes one model with each method to the same net ratio and measures all under the same protocol.

    A variant that fails is a row that says why. With ``output_dir`` every finished unit, one variant with one seed, is
    kept in ``runs/``; an interrupted comparison that is started again does only what is missing. Options in a
    variant's name are fields of its method, ``samples`` and ``length`` of its calibration text, ``heal``, …; those of
    healing that are given beside the names hold for every variant that does not say otherwise.

    Args:
        {options}

    Raises:
        KDPruneError: anything wrong with what was given, in one line, before any work.
    """
    chosen = typed_options(given(options, model=model, methods=methods), options_of(*COMPARE))
    wanted = taken(CompareOptions, chosen)
    common = {name: value for name, value in chosen.items() if name in HEAL_OPTIONS}
    names = split_methods(wanted.methods)
    if wanted.blocks_from is not None and wanted.blocks_from not in names:
        names.insert(0, wanted.blocks_from)
    variants = [parse_variant(name, wanted.ratio, common, wanted.of) for name in dict.fromkeys(names)]
    if not variants:
        raise KDPruneError(f"got no methods, expected some of {', '.join(METHODS)}")
    recipe = {**recorded(wanted), "methods": [variant.name for variant in variants], **common}
    return _run(chosen, wanted, lambda bench: variants, recipe, wanted.blocks_from)


@spelled_out(ABLATE)
def ablate(model: Any = NOT_GIVEN, **options: Any) -> Comparison:
    """Compares KDP with itself, one part changed at a time: what does each part buy?

    Args:
        {options}

    Raises:
        KDPruneError: anything wrong with what was given, in one line, before any work.
    """
    chosen = typed_options(given(options, model=model), options_of(*ABLATE))
    wanted = taken(AblateOptions, chosen)
    only = split_methods(wanted.only)
    check_ablation(wanted.base, only, wanted.ratio)

    def variants(bench: Bench) -> list[Variant]:
        dense = bench.session.model
        rows = len(bench.tokens(wanted.seed_list()[0]))
        return ablation_variants(
            wanted.base, wanted.ratio, dense.config.hidden_size, len(decoder_layers(dense)), rows, only, wanted.of)

    return _run(chosen, wanted, variants, {**recorded(wanted), "only": only}, None, "ablation")


def _check_suite(suite: SuiteOptions) -> None:
    """Raises KDPruneError for a suite that cannot be scored, or options that need one: before any work."""
    if suite.suite is not None:
        check_suite(suite.suite, [Path(folder) for folder in suite.suite_data])
    elif suite.suite_data or suite.limit is not None:
        raise KDPruneError("got suite_data or limit without a suite, expected suite='small' or names of tasks")


def _run(
    chosen: Mapping[str, Any], wanted: SeedsOptions, variants_for: Callable[[Bench], list[Variant]],
    recipe: Mapping[str, Any], blocks_from: str | None, kind: str = "comparison",
) -> Comparison:
    """Opens the model, goes through all units, and writes what was found."""
    data, output, suite = taken(DataOptions, chosen), taken(OutputOptions, chosen), taken(SuiteOptions, chosen)
    subject, resources, seeds = taken(ModelOptions, chosen), make_resources(chosen), wanted.seed_list()
    writing = taken(GenerationOptions, chosen)
    _check_suite(suite)
    check_texts(data)
    if output.output_dir is not None:
        check_apart(output.output_dir, inputs_of(
            subject.model, texts=(data.calibration, data.heldout), tokenizer=subject.tokenizer,
            folders=suite.suite_data, resources=resources))
    folder = None if output.output_dir is None else _prepare(Path(output.output_dir))
    if folder is not None and not output.overwrite:
        _check_question(folder, kind, wanted, subject.model)
    stages = Stages(show=output.progress)
    with open_session(subject, resources, seeds[0], stages) as session, _bench(
            data, suite, writing, session, wanted.ratio, folder, output.progress) as bench:
        if output.overwrite:  # only now: nobody else is at work there
            bench.cache.clean("")
        variants = variants_for(bench)
        refused = _refusals(bench, variants, seeds, blocks_from)
        dense = bench.dense(seeds[0])
        tokens = bench.tokens(seeds[0])
        result = Comparison(
            kind=kind, created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), model=session.name,
            family=family_of(session.model).model_type, ratio=wanted.ratio, of=wanted.of, seeds=seeds,
            recipe=_recipe({
                **recorded(data, suite, writing, resources), **recipe, "dtype": subject.dtype, "seeds": seeds,
                **text_sources(data)}),
            calibration=Calibration(
                source=tokens.source, samples=len(tokens), tokens=tokens.tokens, length=tokens.ids.shape[1],
                skipped=tokens.skipped),
            device=str(session.model.device), dense=dense,
            variants=[_record(variant, session.model, blocks_from) for variant in variants],
            versions=software_versions())
        earlier = len(_recorded(folder).get("units", ()))
        for number, found in enumerate(_units(bench, variants, seeds, blocks_from, refused, dense), 1):
            result.add(found)
            # What is done can be read, whatever comes of the rest; of fewer units than before, when all are done.
            if folder is not None and len(result.units) >= earlier:
                result.save(folder / "results.json")
            _say(found, number, len(variants) * len(seeds), output.progress)
    if folder is not None:
        result.save(folder / "results.json")
        write_comparison(result, folder)
    return result


@contextlib.contextmanager
def _bench(
    data: DataOptions, suite: SuiteOptions, writing: GenerationOptions, session: Session, ratio: float,
    folder: Path | None, show: bool,
) -> Iterator[Bench]:
    """The bench of these texts and tasks, its cache in ``runs/`` of the output unless a work directory was named."""
    if session.tokenizer is None and suite.suite is not None:
        raise KDPruneError("got a suite of tasks without a tokenizer, expected one: give tokenizer=…")
    if session.tokenizer is None and data.heldout is None:
        raise KDPruneError("got no tokenizer and no held-out tokens, expected one: give tokenizer=… or heldout=… so "
                           "that all seeds are measured on the same text")
    tokens = session.calibration(data.calibration, data.samples, data.length)
    protocol = Protocol(
        session.heldout(data.heldout, tokens, 0.1, data.heldout_tokens, data.windows), suite.suite,
        [Path(path) for path in suite.suite_data], suite.limit, writing.generate)
    protocol.check(session)
    texts = Texts(data.calibration, data.samples, data.length)
    held = boundaries_held(session.model, ratio)
    with session.cache(tokens, held, None if folder is None else folder / RUNS) as cache:
        yield Bench(session, texts, protocol, cache, show)


def _units(
    bench: Bench, variants: Sequence[Variant], seeds: Sequence[int], blocks_from: str | None,
    refused: Mapping[str, Mapping[str, str]], dense: Any,
) -> Iterator[Unit | Failure]:
    """Every variant of every seed; the one that chooses the blocks for the others goes first."""
    for seed in seeds:
        blocks: tuple[Block, ...] | None = None
        missing: dict[str, str] = {}
        for variant in sorted(variants, key=lambda variant: variant.name != blocks_from):
            follows = _follows(variant, blocks_from)
            why = refused.get(variant.name, missing if follows else {})
            found = Failure(variant=variant.name, seed=seed, **why) if why else _unit(
                bench, variant.on(blocks) if follows else variant, seed, dense, follows)
            if variant.name == blocks_from:
                blocks = tuple(found.blocks) if isinstance(found, Unit) else None
                missing = {} if blocks else {"reason": f"no blocks to take: {blocks_from} failed, or removed none"}
            yield found
        bench.forget()


def _follows(variant: Variant, blocks_from: str | None) -> bool:
    """Whether the variant is handed the blocks that another one chose."""
    return blocks_from not in (None, variant.name) and variant.takes_blocks


def _unit(bench: Bench, variant: Variant, seed: int, dense: Any, handed: bool) -> Unit | Failure:
    """A finished unit again, or a new one; or why there is none. ``handed``: its blocks were not known before."""
    try:
        if handed:
            variant.method.check(bench.session.model, bench.tokens(seed, variant))
        return bench.unit(variant, seed, dense)
    except Exception as error:  # whatever a method fails with, the others go on
        bench.cache.clean(*PARTS)
        return Failure(variant=variant.name, seed=seed, **_why(error))


def _refusals(
    bench: Bench, variants: Sequence[Variant], seeds: Sequence[int], blocks_from: str | None,
) -> dict[str, dict[str, str]]:
    """Why variants cannot be, before any work; those that wait for blocks are checked when they have them."""
    found = {}
    for variant in variants:
        tokens = bench.tokens(seeds[0], variant)
        try:
            if variant.heal is not None:
                check_heal(bench.session, variant.method, tokens, variant.heal)
            if bench.session.states_model is not None:
                variant.method.check_states_model()
            if not _follows(variant, blocks_from):
                variant.method.check(bench.session.model, tokens)
        except Exception as error:  # as in _unit
            found[variant.name] = _why(error)
    return found


def _why(error: Exception) -> dict[str, str]:
    """The reason in one line, and the traceback of an error that is not the user's."""
    if isinstance(error, KDPruneError):
        return {"reason": str(error)}
    trace = "".join(traceback.format_exception(error))
    return {"reason": f"{type(error).__name__}: {one_line(error)}", "traceback": trace}


def _record(variant: Variant, model: PreTrainedModel, blocks_from: str | None) -> VariantRecord:
    return VariantRecord(
        name=variant.name, title=variant.title, group=variant.group, value=variant.value, options=variant.options,
        protected=None if _follows(variant, blocks_from) else variant.method.protected(model))


def _recipe(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the record keeps of the options: those that say something."""
    return {name: [str(item) for item in value] if name == "suite_data" else value
            for name, value in options.items() if value is not None and value != ()}


def _prepare(folder: Path) -> Path:
    """A folder that is new, empty or an earlier comparison's, finished or not."""
    check_output(folder, overwrite=True)
    runs, names = folder / RUNS, _names(folder)
    begun = (runs / MANIFEST).is_file()
    if not begun and (_names(runs) - {LOCK} or (names - {RUNS} and not is_comparison(folder))):
        raise KDPruneError(
            f"got output {folder}, which is not empty and holds no comparison; choose a new directory")
    return folder


def _check_question(folder: Path, kind: str, wanted: SeedsOptions, model: Any) -> None:
    """Raises KDPruneError where the folder's record is of another question or model, which this run would replace.

    A model is known by the end of its name: the same one may be reached by another path.
    """
    if not (there := _recorded(folder)):
        return
    named = isinstance(model, str | Path)
    old, new = (f"the {what} at {ratio} of the parameters{OUTSIDE.get(of, '')}{about}" for what, ratio, of, about in (
        (there.get("kind"), there.get("ratio"), there.get("of", "all"), _about(there.get("model")) if named else ""),
        (kind, wanted.ratio, wanted.of, _about(model) if named else "")))
    if old != new:
        raise KDPruneError(f"got output {folder}, which holds {old}, expected {new}: choose a new directory, or "
                           "replace it with --overwrite")


def _about(model: Any) -> str:
    return f", of {Path(str(model)).name}"


def _recorded(folder: Path | None) -> Mapping[str, Any]:
    """The record that a folder has of a comparison, as it is there; empty where it has none."""
    return {} if folder is None or not is_comparison(folder) else read_record(folder, "compare")[0]


def _names(folder: Path) -> set[str]:
    """What lies in a folder; nothing in one that is not there."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _say(found: Unit | Failure, number: int, total: int, show: bool) -> None:
    """One line a unit, where progress is shown."""
    if show:
        outcome = found.reason if isinstance(found, Failure) else f"excess loss {found.perplexity.excess_loss:.3f}"
        console = Console(stderr=sys.stderr.isatty())
        console.print(Text(f"[{number}/{total}] {found.variant}, seed {found.seed}: {outcome}"), soft_wrap=True)
