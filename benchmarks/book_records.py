"""The records of a page: a comparison a model and ratio, with tasks, texts and cost; merged as runs add to them."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdprune.report.comparison_records import Comparison

ROOT = Path(__file__).parent.parent
Section = Mapping[str, Any]
SAME = 1e-4  # of a perplexity, relative: on two processors 2e-5 was seen, another text is far from it


@dataclass(frozen=True)
class Page:
    """One page of the book: its YAML, and the repository it belongs to."""

    name: str
    spec: Mapping[str, Any]
    root: Path = ROOT

    @classmethod
    def load(cls, name: str, root: Path = ROOT) -> "Page":
        """The page of this name.

        Raises:
            SystemExit: there is none.
        """
        file = root / "benchmarks" / "pages" / f"{name}.yaml"
        if not file.is_file():
            raise SystemExit(f"got page {name!r}, expected one of {', '.join(names(root))}")
        return cls(name, yaml.safe_load(file.read_text(encoding="utf-8")), root)

    @property
    def results(self) -> Path:
        """Where records and pages lie."""
        return self.root / "docs" / "results"

    @property
    def models(self) -> dict[str, str]:
        """Name → directory of the model."""
        found: dict[str, str] = self.spec["models"]
        return found

    def comparisons(self, record: str | None = None) -> dict[str, Comparison]:
        """Model → its comparison, of those that have been run.

        Args:
            record: name of other files than the page's.
        """
        pattern = record or self.spec["record"]
        files = {model: self.results / pattern.format(model=model) for model in self.models}
        return {model: _loaded(file, file.stat().st_mtime_ns) for model, file in files.items() if file.is_file()}

    def keep(self, found: Comparison, model: str, run: Mapping[str, Any]) -> None:
        """Puts what a run gave into the page's record, or the run's own."""
        record = run.get("record", self.spec["record"])
        known = self.comparisons(record).get(model)
        merged([known, found] if known else [found], self.root).save(self.results / record.format(model=model))


@functools.cache
def _loaded(file: Path, written: int) -> Comparison:
    """A record, read once: every section of a page looks into it."""
    return Comparison.load(file)


def names(root: Path = ROOT) -> list[str]:
    """Names of all pages."""
    return sorted(file.stem for file in (root / "benchmarks" / "pages").glob("*.yaml"))


def merged(found: Sequence[Comparison], root: Path = ROOT) -> Comparison:
    """Comparisons of one model under one protocol as one: later ones add variants and seeds. Paths from the root.

    Raises:
        SystemExit: they differ in model, ratio, calibration or the dense model's figures.
    """
    first = _with_tasks([portable(one, root) for one in found])
    for other in (portable(one, root) for one in found[1:]):
        if not _same(first, other):
            raise SystemExit(f"got comparisons of {first.model} and {other.model} under different protocols, expected "
                             "the same model, ratio, calibration, held-out text and tasks; delete the old record first")
    units = {(unit.variant, unit.seed): unit for one in found for unit in one.units}
    variants = {variant.name: variant for one in found for variant in one.variants}
    failures = {(failed.variant, failed.seed): failed for one in found for failed in one.failures}
    seeds = sorted({seed for one in found for seed in one.seeds})
    # Rows and signal are made anew from the units.
    return Comparison.model_validate(first.model_dump(exclude={"rows", "signal", "left_out"}) | {
        "seeds": seeds, "variants": [variant.model_dump() for variant in variants.values()],
        "units": [unit.model_dump() for unit in units.values()],
        "failures": [failed.model_dump() for key, failed in failures.items() if key not in units],
        "recipe": first.recipe | {"methods": list(variants), "seeds": seeds}})


def _with_tasks(found: Sequence[Comparison]) -> Comparison:
    """The first, with the dense model's tasks and continuations, and what the recipe says of them, of the first that
    has them: some seeds may be without.
    """
    dense, recipe = found[0].dense, found[0].recipe
    for part, names in (("tasks", ("suite", "limit", "suite_data")), ("generation", ("generate",))):
        if holder := next((one for one in found if getattr(one.dense, part)), None):
            dense = dense.model_copy(update={part: getattr(holder.dense, part)})
            recipe = recipe | {name: holder.recipe[name] for name in names if name in holder.recipe}
    return found[0].model_copy(update={"dense": dense, "recipe": recipe})


def _same(first: Comparison, other: Comparison) -> bool:
    """Whether both were measured alike; tasks and prompts count where both have them."""
    tasks = [[(score.task, score.group, score.items) for score in one.dense.tasks] for one in (first, other)]
    values = [[score.value for score in one.dense.tasks] for one in (first, other)]
    prompts = [one.dense.generation and (len(one.dense.generation.repeated), one.dense.generation.prompt)
               for one in (first, other)]
    return (_protocol(first) == _protocol(other)
            and math.isclose(first.dense.perplexity or 0, other.dense.perplexity or 0, rel_tol=SAME)
            and (not all(tasks) or (tasks[0] == tasks[1] and values[0] == values[1]))
            and (not all(prompts) or prompts[0] == prompts[1]))


def _protocol(found: Comparison) -> tuple[Any, ...]:
    return (found.model, found.ratio, found.of, found.calibration.source, found.calibration.tokens,
            found.dense.tokens, found.dense.parameters)


def portable(found: Comparison, root: Path) -> Comparison:
    """The record with paths as they are from the repository's root."""
    def relative(value: Any) -> Any:
        if isinstance(value, list):
            return [relative(item) for item in value]
        return os.path.relpath(value, root) if isinstance(value, str) and os.path.isabs(value) else value

    return found.model_copy(update={
        "model": relative(found.model), "recipe": {name: relative(value) for name, value in found.recipe.items()}})
