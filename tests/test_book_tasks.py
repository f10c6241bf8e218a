"""The book's tables of tasks and of what models write, and records in which some seeds have no tasks."""

import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import Bench, no_drawing

import kdprune
from kdprune.report.bootstrap import lead
from kdprune.report.comparison_records import Comparison
from kdprune.report.retention import by_task, retention

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import book
import book_records
import book_tables
import book_tasks
import texts

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
OURS, PEER = "kdp:preset=fourier", "linearpatch"


@pytest.fixture(scope="module")
def llama() -> Comparison:
    """A record with tasks. Shared: do not change it."""
    return Comparison.load(ROOT / "research" / "small-models" / "main-llama.json")


def page_of(root: Path, found: Comparison, **spec: Any) -> book_records.Page:
    """A page whose record is this one."""
    page = book_records.Page("tiny", {"models": {"tiny": None}, "record": "tiny-{model}.json"} | spec, root)
    page.results.mkdir(parents=True)
    found.save(page.results / "tiny-tiny.json")
    return page


def lines_of(table: str) -> dict[str, list[str]]:
    """First cell → the others, of all rows of Markdown tables."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_blimp_is_one_task_and_the_mean_over_its_paradigms(llama: Comparison) -> None:
    rows = [score for score in llama.dense.tasks if score.task == "blimp"]
    one = next(score for score in by_task(llama.dense.tasks) if score.task == "blimp")
    paradigms = [text for row in rows for text in row.right]
    shares = [text.count("1") / len(text) for text in paradigms]
    assert len(rows) == 12
    assert len(paradigms) == 67
    assert one.value == pytest.approx(statistics.fmean(shares))
    assert one.stderr == pytest.approx(np.sqrt(sum(
        share * (1 - share) / (len(text) - 1) for share, text in zip(shares, paradigms, strict=True))) / 67)
    assert (one.group, one.chance, one.items) == ("blimp", pytest.approx(0.5), sum(map(len, paradigms)))
    assert one.right == paradigms
    others = [score for score in llama.dense.tasks if score.task != "blimp"]
    assert [score for score in by_task(llama.dense.tasks) if score.task != "blimp"] == others


def test_the_table_of_tasks(llama: Comparison, tmp_path: Path) -> None:
    page = page_of(tmp_path, llama)
    text = book_tasks.tasks(page, {"ours": "kdp"})
    assert text.startswith(book_tasks.READING)
    assert not book_tasks.tasks(page, {"ours": "kdp", "record": "tiny-{model}.json"}).startswith(book_tasks.READING)
    rows, dense = lines_of(text), by_task(llama.dense.tasks)
    kept = {}
    for row in llama.rows:
        units = [by_task(unit.tasks) for unit in llama.units if unit.variant == row.variant.name]
        if not units:
            continue
        kept[row.variant.name] = 100 * statistics.fmean(retention(dense, unit).above_chance for unit in units)
        cells = rows[book_tables.title([llama], row.variant.name)]
        shown, low, high = (float(part.strip("[],")) for part in cells[-3].split())
        assert shown == pytest.approx(kept[row.variant.name], abs=0.051)
        assert low < shown < high
        sciq = statistics.fmean(score.value for unit in units for score in unit if score.task == "sciq")
        place = [score.task for score in dense].index("sciq")
        assert f"{100 * sciq:.1f}" == cells[place].strip("*")
    best = max((value, name) for name, value in kept.items() if not name.startswith("kdp"))[1]
    assert f"against `{best}`" in text
    found = lead(dense, *([by_task(unit.tasks) for unit in llama.units if unit.variant == name]
                          for name in (OURS, best)), above_chance=True)
    assert f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]" in text
    assert rows[book_tables.title([llama], PEER)][-2] == "", "a peer is not compared with a peer"


def test_which_tasks_carry_signal_is_said(llama: Comparison) -> None:
    said = book_tasks.signal(llama)
    sure, rest = said.split(" Do not: ")
    weak = rest.split(" Of BLiMP's")[0]
    for score in by_task(llama.dense.tasks):
        if score.chance is not None:
            assert (f"{score.task} (" in sure) == (score.value - score.chance > 2 * score.stderr)
            assert (f"{score.task} (" in sure) != (f"{score.task} (" in weak)
    assert "perplexity" not in said
    coarse = [score for score in llama.dense.tasks if score.task == "blimp"
              and score.value - score.chance <= 2 * score.stderr]
    for score in coarse:
        assert score.group in said.split("Of BLiMP's")[1]


def test_seeds_without_tasks_go_into_a_record_with_tasks(llama: Comparison, tmp_path: Path) -> None:
    dense = llama.dense.model_copy(update={"tasks": []})
    seeds = {seed: [unit for unit in llama.units if unit.seed == seed] for seed in llama.seeds}
    plain = [unit.model_copy(update={"tasks": []}) for unit in seeds[1]]
    bare = llama.model_copy(update={"dense": dense, "units": plain, "seeds": [1], "recipe": {
        name: value for name, value in llama.recipe.items() if name not in ("suite", "limit")}})
    scored = llama.model_copy(update={"units": seeds[0], "seeds": [0]})
    for order in itertools.permutations([bare, scored]):
        found = book_records.merged(order)
        assert found.dense.tasks == llama.dense.tasks
        assert (found.recipe["suite"], found.recipe["limit"]) == (llama.recipe["suite"], llama.recipe["limit"])
        assert found.row(OURS).excess_loss.count == 2
        assert found.row(OURS).above_chance.count == 1
        alone = Comparison.model_validate(scored.model_dump(exclude={"rows", "signal", "left_out"}))
        assert found.row(OURS).above_chance == alone.row(OURS).above_chance
        assert found.signal == alone.signal
    assert book_tasks.tasks(page_of(tmp_path, bare), {"ours": "kdp"}) == ""
    other = scored.model_copy(update={"dense": llama.dense.model_copy(update={
        "tasks": [score.model_copy(update={"value": 0.5}) for score in llama.dense.tasks]})})
    with pytest.raises(SystemExit, match="different protocols"):
        book_records.merged([scored, other])


def test_units_lack_what_their_page_asks_for_later(llama: Comparison, tmp_path: Path) -> None:
    half = llama.model_copy(update={"units": [
        unit if unit.variant == OURS else unit.model_copy(update={"tasks": []}) for unit in llama.units
        if unit.variant in (OURS, PEER)]})
    page, run = page_of(tmp_path, half), {"methods": [OURS, PEER]}
    options = run | {"seeds": [0], "ratio": llama.ratio}

    def lacking(**more: Any) -> list[list[str]]:
        return [call["methods"] for call in book.missing(page, run, "tiny", options | more, ())]

    assert lacking() == []
    assert lacking(suite="small") == [[PEER]]
    assert lacking(suite=None) == []
    assert lacking(generate=4) == [[OURS, PEER]]


@no_drawing()
def test_texts_apart_and_what_is_written(bench: Bench, tmp_path: Path) -> None:
    found = kdprune.compare(
        str(bench.model), ["shortgpt:protect=0", "uidl:blocks=0-3"], seeds=2, generate=4, suite=None, limit=None,
        calibration=bench.calibration, samples=12, length=32, heldout_tokens=300, windows=(32,),
        heldout={"prose": bench.heldout, "code": bench.calibration})
    page, row = page_of(tmp_path, found), found.rows[0]
    whole, apart = (lines_of(book_tables.texts(page, section))[book_tables.title([found], row.variant.name)]
                    for section in ({}, {"apart": ["code"]}))
    prose, code = (one.excess_loss.mean for one in row.texts)
    assert whole[1] == f"{(prose + code) / 2:.3f}"
    assert apart[1] == f"{prose:.3f}"
    assert whole[4:6] == apart[4:6] == [f"{prose:.3f}", f"{code:.3f}"]
    written = book_tasks.writing(page, {})
    assert "32 tokens, greedy, after each of 4 prompts of 31." in written
    cells = lines_of(written)[book_tables.title([found], row.variant.name)]
    assert cells[-1] == "2"
    for cell, name in zip(cells, ("same_beginning", "same_tokens", "repeated"), strict=False):
        shown = cell.split("[")[0].replace("\N{NO-BREAK SPACE}", " ")
        low, high = (float(part) for part in cell.split("[")[1].strip("]").split(", "))
        value = 100 * getattr(row, name).mean
        assert shown.startswith(f"{value:.1f}")
        assert low <= value + 1e-9
        assert high >= value - 1e-9
    assert f"{100 * found.dense.generation.mean('repeated'):.1f}" in lines_of(written)["dense"][2]
    bare = found.model_copy(update={"dense": found.dense.model_copy(update={"generation": None})})
    assert book_tasks.writing(page_of(tmp_path / "bare", bare), {}) == ""


def test_code_is_python_of_the_standard_library() -> None:
    import argparse
    import bisect

    text = texts.code()
    assert 100_000 < len(text) < texts.EVALUATED
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    first = text[:4000]
    assert first in source
    assert source.index(first) == source.index("\nclass ") + 1
    assert text.rstrip().splitlines()[-1] in Path(bisect.__file__).read_text(encoding="utf-8")
