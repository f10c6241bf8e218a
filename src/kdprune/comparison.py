"""``kdprune compare`` and ``kdprune ablate``: many variants, one model, one ratio, one protocol."""

import contextlib
import datetime
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from kdprune.assemble import software_versions
from kdprune.errors import KDPruneError, one_line
from kdprune.evaluation.tasks import check_suite
from kdprune.methods import METHODS
from kdprune.model.families import decoder_layers, family_of
from kdprune.output import check_output
from kdprune.report.comparison_page import write_comparison
from kdprune.report.comparison_records import Comparison, Failure, Unit
from kdprune.report.comparison_records import Variant as VariantRecord
from kdprune.report.results import Calibration
from kdprune.runtime import Stages
from kdprune.session import Session, plain_source
from kdprune.units import PARTS, Bench, Protocol, Texts
from kdprune.variants import Variant, ablation_variants, check_ablation, parse_variant, split_methods


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options that :func:`compare` and :func:`ablate` share; their meaning stands there."""

    model: str | Path | PreTrainedModel | None
    ratio: float
    seeds: int | Sequence[int]
    output_dir: str | Path | None
    texts: Texts
    heldout: Any
    tokenizer: Any
    device: str
    dtype: str | None
    suite: str | None
    suite_data: Sequence[str | Path]
    limit: int | None
    overwrite: bool
    trust_remote_code: bool
    progress: bool

    def seed_list(self) -> list[int]:
        """N → 0 … N − 1; a list as it is, each once."""
        given = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        found = list(dict.fromkeys(given))
        if not found or min(found) < 0:
            raise KDPruneError(f"got seeds {self.seeds}, expected a number of seeds of at least 1, or a list of them")
        return found

    def check(self) -> None:
        """Raises KDPruneError for a suite that cannot be scored, or options that need one: before any work."""
        if self.limit is not None and self.limit < 1:
            raise KDPruneError(f"got limit {self.limit}, expected a number of items of at least 1")
        if self.suite is not None:
            check_suite(self.suite, [Path(folder) for folder in self.suite_data])
        elif self.suite_data or self.limit is not None:
            raise KDPruneError("got suite_data or limit without a suite, expected suite='small' or names of tasks")

    def recipe(self) -> dict[str, Any]:
        """What the record keeps of the options."""
        return {
            "ratio": self.ratio, "seeds": self.seed_list(), "calibration": plain_source(self.texts.source),
            "samples": self.texts.samples, "length": self.texts.length, "heldout": plain_source(self.heldout),
            "device": self.device, "dtype": self.dtype, "suite": self.suite,
            "suite_data": [str(folder) for folder in self.suite_data] or None, "limit": self.limit,
        }


def compare(
    model: str | Path | PreTrainedModel | None = None,
    methods: str | Sequence[str] = tuple(METHODS),
    *,
    ratio: float = 0.25,
    seeds: int | Sequence[int] = 3,
    output_dir: str | Path | None = None,
    blocks_from: str | None = None,
    calibration: Any = None,
    heldout: Any = None,
    samples: int | None = None,
    length: int | None = None,
    tokenizer: Any = None,
    suite: str | None = None,
    suite_data: Sequence[str | Path] = (),
    limit: int | None = None,
    heal: str | None = None,
    heal_what: str | None = None,
    heal_tokens: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Comparison:
    """Prunes one model with each method to the same net ratio and measures all under the same protocol.

    A variant that fails is a row that says why. With ``output_dir`` every finished unit, one variant with one seed, is
    kept in ``runs/``; an interrupted comparison that is started again does only what is missing.

    Args:
        methods: variants by name, ``["kdp", "kdp:kernel=fixed:rank=8", "sleb"]`` or the same joined by commas. Options
            are fields of the method, ``samples`` and ``length`` of its calibration text, ``heal``, ``heal_what``, ….
        seeds: how many (0, 1, …), or which; a seed orders the calibration text and is that of every draw.
        output_dir: for ``results.json``, ``table.md``, ``report.html`` and ``runs/``; None: nothing is written.
        blocks_from: a variant whose blocks all depth methods without blocks of their own take, seed by seed.
        suite, suite_data, limit: tasks to score (``small``, ``paper`` or names), folders with their data, items a task.
        heal, heal_what, heal_tokens: training after pruning, for every variant that does not say otherwise.
        overwrite: start anew. Others as in :func:`kdprune.prune`.

    Raises:
        KDPruneError: anything wrong with what was given, in one line, before any work.
    """
    common = {"heal": heal, "heal_what": heal_what, "heal_tokens": heal_tokens}
    names = split_methods(methods)
    if blocks_from is not None and blocks_from not in names:
        names.insert(0, blocks_from)
    variants = [parse_variant(name, ratio, common) for name in dict.fromkeys(names)]
    if not variants:
        raise KDPruneError(f"got no methods, expected some of {', '.join(METHODS)}")
    plan = Plan(
        model=model, ratio=ratio, seeds=seeds, output_dir=output_dir, texts=Texts(calibration, samples, length),
        heldout=heldout, tokenizer=tokenizer, device=device, dtype=dtype, suite=suite, suite_data=suite_data,
        limit=limit, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress)
    recipe = {"methods": [variant.name for variant in variants], "blocks_from": blocks_from, **common}
    return _run(plan, lambda bench: variants, recipe, blocks_from)


def ablate(
    model: str | Path | PreTrainedModel | None = None,
    *,
    base: str = "kdp",
    only: str | Sequence[str] = (),
    ratio: float = 0.25,
    seeds: int | Sequence[int] = 3,
    output_dir: str | Path | None = None,
    calibration: Any = None,
    heldout: Any = None,
    samples: int | None = None,
    length: int | None = None,
    tokenizer: Any = None,
    suite: str | None = None,
    suite_data: Sequence[str | Path] = (),
    limit: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Comparison:
    """Compares KDP with itself, one part changed at a time: what does each part buy?

    Args:
        base: the variant that is varied, ``kdp:refine=no``. only: parts (``kernel``, ``start``, ``loss``,
            ``operators``, ``alpha``, ``inverse``, ``features``, ``rank``, ``tokens``, ``length``); all when empty.
        Others as in :func:`compare`.
    """
    only = split_methods(only)
    check_ablation(base, only, ratio)
    plan = Plan(
        model=model, ratio=ratio, seeds=seeds, output_dir=output_dir, texts=Texts(calibration, samples, length),
        heldout=heldout, tokenizer=tokenizer, device=device, dtype=dtype, suite=suite, suite_data=suite_data,
        limit=limit, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=progress)

    def variants(bench: Bench) -> list[Variant]:
        dense = bench.session.model
        rows = len(bench.tokens(plan.seed_list()[0]))
        return ablation_variants(base, ratio, dense.config.hidden_size, len(decoder_layers(dense)), rows, only)

    return _run(plan, variants, {"base": base, "only": list(only)}, None, "ablation")


def _run(
    plan: Plan, variants_for: Callable[[Bench], list[Variant]], recipe: Mapping[str, Any], blocks_from: str | None,
    kind: str = "comparison",
) -> Comparison:
    """Opens the model, goes through all units, and writes what was found."""
    seeds = plan.seed_list()
    plan.check()
    folder = None if plan.output_dir is None else _prepare(Path(plan.output_dir), plan.overwrite)
    stages = Stages(show=plan.progress)
    with Session(plan.model, plan.tokenizer, seeds[0], plan.device, plan.dtype, plan.trust_remote_code,
                 stages) as session, _bench(plan, session, folder) as bench:
        variants = variants_for(bench)
        refused = _refusals(bench, variants, seeds, blocks_from)
        dense = bench.dense(seeds[0])
        tokens = bench.tokens(seeds[0])
        units: list[Unit] = []
        failures: list[Failure] = []
        for found in _units(bench, variants, seeds, blocks_from, refused, dense):
            if isinstance(found, Unit):
                units.append(found)
            else:
                failures.append(found)
            _say(found, len(units) + len(failures), len(variants) * len(seeds), plan.progress)
        result = Comparison(
            kind=kind, created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), model=session.name,
            family=family_of(session.model).model_type, ratio=plan.ratio, seeds=seeds,
            recipe={name: value for name, value in {**plan.recipe(), **recipe}.items() if value is not None},
            calibration=Calibration(
                source=tokens.source, samples=len(tokens), tokens=tokens.tokens, length=tokens.ids.shape[1]),
            device=str(session.model.device), dense=dense, variants=[_record(variant) for variant in variants],
            units=units, failures=failures, versions=software_versions())
    if folder is not None:
        result.save(folder / "results.json")
        write_comparison(result, folder)
    return result


@contextlib.contextmanager
def _bench(plan: Plan, session: Session, folder: Path | None) -> Iterator[Bench]:
    """The bench of this plan, its cache in ``runs/`` of the output unless a work directory was named."""
    if session.tokenizer is None and plan.suite is not None:
        raise KDPruneError("got a suite of tasks without a tokenizer, expected one: give tokenizer=…")
    if session.tokenizer is None and plan.heldout is None:
        raise KDPruneError("got no tokenizer and no held-out tokens, expected one: give tokenizer=… or heldout=… so "
                           "that all seeds are measured on the same text")
    tokens = session.calibration(plan.texts.source, plan.texts.samples, plan.texts.length)
    protocol = Protocol(
        session.heldout(plan.heldout, tokens, 0.1), plan.suite, [Path(path) for path in plan.suite_data], plan.limit)
    with session.cache(tokens, None if folder is None else folder / "runs") as cache:
        yield Bench(session, plan.texts, protocol, cache, plan.progress)


def _units(
    bench: Bench, variants: Sequence[Variant], seeds: Sequence[int], blocks_from: str | None,
    refused: Mapping[str, str], dense: Any,
) -> Iterator[Unit | Failure]:
    """Every variant of every seed; the one that chooses the blocks for the others goes first."""
    for seed in seeds:
        blocks, missing = None, ""
        for variant in sorted(variants, key=lambda variant: variant.name != blocks_from):
            follows = blocks_from is not None and variant.name != blocks_from and variant.takes_blocks
            reason = refused.get(variant.name, missing if follows else "")
            found = _unit(bench, variant.on(blocks) if follows else variant, seed, dense) if not reason else Failure(
                variant=variant.name, seed=seed, reason=reason)
            if variant.name == blocks_from:
                blocks = tuple(found.blocks) if isinstance(found, Unit) else None
                missing = "" if blocks else f"no blocks to take: {blocks_from} failed, or removed none"
            yield found
        bench.forget()


def _unit(bench: Bench, variant: Variant, seed: int, dense: Any) -> Unit | Failure:
    """A finished unit again, or a new one; or why there is none."""
    try:
        return bench.unit(variant, seed, dense)
    except Exception as error:  # whatever a method fails with, the others go on
        trace = "" if isinstance(error, KDPruneError) else traceback.format_exc()
        bench.cache.clean(*PARTS)
        return Failure(variant=variant.name, seed=seed, reason=_reason(error), traceback=trace)


def _refusals(
    bench: Bench, variants: Sequence[Variant], seeds: Sequence[int], blocks_from: str | None,
) -> dict[str, str]:
    """Why variants cannot be, before any work; those that wait for blocks are checked when they have them."""
    found = {}
    for variant in variants:
        tokens = bench.tokens(seeds[0], variant)
        try:
            if variant.heal is not None:
                variant.heal.check(variant.method, tokens)
            if blocks_from in (None, variant.name) or not variant.takes_blocks:
                variant.method.check(bench.session.model, tokens)
        except Exception as error:  # as in _unit
            found[variant.name] = _reason(error)
    return found


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, KDPruneError) else f"{type(error).__name__}: {one_line(error)}"


def _record(variant: Variant) -> VariantRecord:
    return VariantRecord(
        name=variant.name, title=variant.title, group=variant.group, value=variant.value, options=variant.options)


def _prepare(folder: Path, overwrite: bool) -> Path:
    """A folder that is new, empty or an earlier comparison's; emptied of that with ``overwrite``."""
    check_output(folder, overwrite=True)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "runs").is_dir():
        raise KDPruneError(
            f"got output {folder}, which is not empty and holds no comparison; choose a new directory")
    if overwrite:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        for name in ("results.json", "table.md", "report.html"):
            (folder / name).unlink(missing_ok=True)
    return folder


def _say(found: Unit | Failure, number: int, total: int, show: bool) -> None:
    """One line a unit, where progress is shown."""
    if show:
        outcome = found.reason if isinstance(found, Failure) else f"excess loss {found.perplexity.excess_loss:.3f}"
        console = Console(stderr=sys.stderr.isatty())
        console.print(Text(f"[{number}/{total}] {found.variant}, seed {found.seed}: {outcome}"), soft_wrap=True)
