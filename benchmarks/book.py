"""Makes the results book, docs/results, from one YAML a page in benchmarks/pages.

    python benchmarks/book.py run PAGE [--folder DIR] [--suite-data DIR] [--device cuda --processes 8]
                                                            runs what the page's records lack, and writes the page
    python benchmarks/book.py page PAGE | --all             page and pictures again, from records and notes
    python benchmarks/book.py check                         which pages are not what their records give

A page's YAML (benchmarks/README.md says what may stand there) names models, runs of `kdprune compare`, and what is
shown. Every figure comes from the records beside the page; NAME-notes.md is appended. An interrupted run goes
on where it stopped. A section with `readme: [variants]` fills the README's block `<!-- table: NAME -->`, with these
of the first model.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from book_plots import PLOTS
from book_records import ROOT, Page, names
from book_tables import TABLES as FIGURES
from book_tasks import tasks, writing

import kdprune
from kdprune.report.comparison_records import Comparison

TABLES = {**FIGURES, "tasks": tasks, "writing": writing}
PATHS = ("heldout", "calibration")  # options that may name a file of the repository, or of a given folder
END = "<!-- end -->"

# ------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Job:
    """A comparison of variants that a record lacks.

    Attributes:
        model: as the page names it. one: the run of the page. at: where the model lies.
        folder: of the comparison. call: what else ``kdprune.compare`` is given.
    """

    model: str
    one: Mapping[str, Any]
    at: str
    folder: Path
    call: Mapping[str, Any]

    def made(self) -> Comparison:
        """Runs it, or finishes it."""
        return kdprune.compare(self.at, output_dir=self.folder, progress=True, **self.call)


def run(
    page: Page, work: Path, suite_data: Sequence[str] = (), folders: Sequence[Path] = (), only: Sequence[str] = (),
    records: Sequence[str] = (), device: str | None = None, processes: int = 1,
) -> None:
    """Runs what the page's records lack, and keeps each comparison as soon as it ends.

    Args:
        work: folder of unfinished comparisons.
        suite_data: folders with the tasks' data, for runs that score tasks.
        folders: where models and texts are looked for that the repository does not hold.
        only: names of models; none: all.
        records: of the runs that are looked at; none: all.
        device: where they compute; none: as ``kdprune.compare`` chooses.
        processes: comparisons at once, each of one variant then; times of such runs are of a busy machine.

    Raises:
        SystemExit: some of several comparisons failed, after the others ended.
    """
    places = (page.root, *folders)
    jobs = _jobs(page, work, suite_data, places, only, records, device, apart=processes > 1)

    def keep(job: Job, found: Comparison) -> None:
        page.keep(_as_named(found, page.models[job.model], page.spec.get("options", {}) | job.one), job.model, job.one)

    if processes == 1:
        for job in jobs:  # what is missing is asked when the one before has been kept
            keep(job, job.made())
        return
    failed = []
    # A new process each: what one leaves on a device is gone.
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(job.made): job for job in jobs}
        for done in as_completed(waiting):
            if (error := done.exception()) is None:
                keep(waiting[done], done.result())
            else:
                failed.append(f"{waiting[done].folder}: {error}")
    if failed:
        raise SystemExit("\n".join(failed))


def _jobs(
    page: Page, work: Path, suite_data: Sequence[str], places: Sequence[Path], only: Sequence[str],
    records: Sequence[str], device: str | None, apart: bool,
) -> Iterator[Job]:
    """The comparisons that the page lacks, in its order; ``apart``: a variant each. Else as of :func:`run`.

    Those of a model run one after the other and keep their stages in one place, so that what is measured of the dense
    model, tasks above all, is found by the next. Processes at work at once cannot share it.
    """
    for number, one in enumerate(page.spec["runs"]):
        options = {"ratio": 0.25, "seeds": 3} | page.spec.get("options", {}) | {
            name: value for name, value in one.items() if name not in ("record", "models")}
        if suite_data and options.get("suite"):
            options["suite_data"] = list(suite_data)
        if device:
            options["device"] = device
        if records and one.get("record", page.spec.get("record")) not in records:
            continue
        for model in one.get("models", list(page.models)):
            if only and model not in only:
                continue
            for call in missing(page, one, model, options, places):
                record = Path(one.get("record", page.spec.get("record")).format(model=model)).stem
                name = f"{record}-{'_'.join(map(str, call['seeds']))}"
                split = [(name, call | {"work_dir": work / page.name / "stages" / model})] if not apart else [
                    (f"{name}-{number}-{place}", call | {"methods": [variant]})
                    for place, variant in enumerate(call["methods"])]
                for folder, own in split:
                    yield Job(model, one, _path(page.models[model], places), work / page.name / folder, own)


def missing(
    page: Page, one: Mapping[str, Any], model: str, options: Mapping[str, Any], places: Sequence[Path],
) -> Iterator[dict[str, Any]]:
    """The calls of compare that give what the record lacks of a run: variants that lack the same seeds."""
    seeds = range(options["seeds"]) if isinstance(options["seeds"], int) else options["seeds"]
    done: set[tuple[str, int]] = set()
    if known := page.comparisons(one.get("record")).get(model):
        done = {(failed.variant, failed.seed) for failed in known.failures}
        done |= {(unit.variant, unit.seed) for unit in known.units  # but those measured before the page asked for these
                 if (unit.tasks or not options.get("suite")) and (unit.generation or not options.get("generate"))}
    call = {name: _path(value, places) if name in PATHS else value for name, value in options.items()}
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for variant in options["methods"]:
        by_seeds.setdefault(tuple(seed for seed in seeds if (variant, seed) not in done), []).append(variant)
    for lacking, variants in by_seeds.items():
        if lacking:
            yield call | {"methods": variants, "seeds": list(lacking)}


def _as_named(found: Comparison, model: str | None, options: Mapping[str, Any]) -> Comparison:
    """The record with model and texts as the page names them, wherever they lay."""
    named = {name: options[name] for name in PATHS if name in options}
    return found.model_copy(update={"model": model or found.model, "recipe": found.recipe | named})


def _path(value: Any, places: Sequence[Path]) -> Any:
    """A path below one of these folders as one that can be opened from anywhere; all else as it is."""
    if isinstance(value, Mapping):
        return {name: _path(one, places) for name, one in value.items()}
    there = [place / value for place in places if isinstance(value, str) and (place / value).exists()]
    return str(there[0].absolute()) if there else value


# ------------------------------------------------------------------------------------------------- page


def files(page: Page, leave_out: Sequence[str] = ()) -> dict[Path, str]:
    """Every file that is made from the page's records → its content; none before anything is on record.

    Args:
        leave_out: kinds of tables and plots that are slow to make.
    """
    spec, made, parts = page.spec, {}, []
    if not any(page.comparisons(one.get("record")) for one in spec["runs"]):
        return {}
    for section in spec["shows"]:
        if section.get("table", section.get("plot")) in leave_out:
            continue
        if "plot" in section:
            image = f"{page.name}-{section['name']}.svg" if "name" in section else f"{page.name}.svg"
            if drawn := PLOTS[section["plot"]](page, section):
                made[page.results / image] = drawn
                parts.append(f"![{section['says']}]({image})")
            continue
        body = TABLES[section["table"]](page, section) if "table" in section else ""
        if "table" not in section or body:  # a table of nothing has no heading
            heading = f"## {section['heading']}" if "heading" in section else ""
            parts += [part.strip() for part in (heading, section.get("says", ""), body) if part]
        if only := section.get("readme"):
            made |= _readme(page, TABLES[section["table"]](page, {**section, "only": only}).partition("\n\n### ")[0])
    notes = page.results / f"{page.name}-notes.md"
    said = f"\n{notes.read_text(encoding='utf-8').strip()}\n" if notes.is_file() else ""
    command = f"    python benchmarks/book.py run {page.name} --folder FOLDER"
    head = [f"# {spec['title']}", spec["asks"].strip(), command]
    made[page.results / f"{page.name}.md"] = "\n\n".join([*head, *parts]) + "\n" + said
    return made


def _readme(page: Page, table: str) -> dict[Path, str]:
    """The README with this table in the page's block; nothing where it has none."""
    file, start = page.root / "README.md", f"<!-- table: {page.name} -->\n"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if start not in text:
        return {}
    head, rest = text.split(start, 1)
    return {file: f"{head}{start}{table}\n{END}{rest.split(END, 1)[1]}"}


def render(page: Page) -> None:
    """Writes the page, its pictures, and its block of the README."""
    for file, text in files(page).items():
        file.write_text(text, encoding="utf-8")


def check(root: Path = ROOT, leave_out: Sequence[str] = ()) -> list[str]:
    """Files that are not what the records give; of pictures only the words count, layout differs between systems.

    Args:
        leave_out: kinds of tables and plots that are not made again; only what else a page says is looked for.
    """
    wrong = []
    for name in names(root):
        for file, text in files(Page.load(name, root), leave_out).items():
            found = file.read_text(encoding="utf-8") if file.is_file() else ""
            if file.suffix == ".svg":
                same = _words(found) == _words(text)
            else:
                same = set(text.splitlines()) <= set(found.splitlines()) if leave_out else found == text
            wrong += [] if same else [str(file.relative_to(root))]
    return wrong


def _words(svg: str) -> list[str]:
    return re.findall(r">([^<>\n]+)</t", svg)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page", "check"))
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(names(root))}")
    parser.add_argument("--all", action="store_true", help="every page")
    parser.add_argument("--work", type=Path, default=Path("kdprune-out-book"), help="unfinished runs (%(default)s)")
    parser.add_argument("--folder", action="append", type=Path, default=[],
                        help="where models and texts are that the repository does not hold; may be repeated")
    parser.add_argument("--only", action="append", default=[], help="a model of the page; may be repeated (all)")
    parser.add_argument("--record", action="append", default=[],
                        help="only runs of this record, as the page names it; may be repeated (all)")
    parser.add_argument("--suite-data", action="append", help="a folder with data of the tasks; may be repeated")
    parser.add_argument("--device", help="where runs compute (as kdprune compare chooses)")
    parser.add_argument("--processes", type=int, default=1, help="comparisons at once (%(default)s)")
    options = parser.parse_args(arguments)
    if options.what == "check":
        wrong = check(root)
        print("\n".join(f"{file} is not what its records give" for file in wrong) or "all is what the records give")
        return int(bool(wrong))
    if bool(options.pages) == options.all:
        parser.error("got no page, or pages and --all; expected one of both")
    for page in [Page.load(name, root) for name in options.pages or names(root)]:
        if options.what == "run":
            run(page, options.work, options.suite_data or (), options.folder, options.only,
                options.record, options.device, options.processes)
        render(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
