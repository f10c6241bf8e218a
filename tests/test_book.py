"""The driver of the results book: pages from their records, runs that go on, figures against their definitions."""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_checkpoint import Bench

import kdprune
from kdprune.comparison import compare as comparison
from kdprune.comparison.variants import parse_variant
from kdprune.report.comparison_records import Comparison

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import book
import book_leads
import book_records
import book_tables

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
SLOW = ("leads", "size", "cost", "excess", "parts")  # a bootstrap, and pictures tested where they are made
CHEAP = ["shortgpt:protect=0", "uidl:blocks=0-3"]
BLOCK = "<!-- table: tiny -->\nold\n<!-- end -->\n"


def repository(bench: Bench, root: Path, name: str, **spec: Any) -> book.Page:
    """A repository with one page of the tiny model."""
    for folder in ("benchmarks/pages", "docs/results"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    whole = {
        "title": "Tiny", "asks": "Which?", "models": {"tiny": str(bench.model)},
        "options": {"calibration": str(bench.calibration), "heldout": str(bench.heldout), "samples": 12, "length": 32,
                    "seeds": 1}} | spec
    (root / "benchmarks" / "pages" / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    (root / "README.md").write_text(f"before\n{BLOCK}after\n", encoding="utf-8")
    return book.Page.load(name, root)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the driver asks of ``kdprune.compare``, which does it."""
    made: list[dict[str, Any]] = []
    compare = kdprune.compare
    monkeypatch.setattr(comparison, "write_comparison", lambda *arguments: [])  # its pictures take half of the time
    monkeypatch.setattr(kdprune, "compare", lambda model, **options: made.append(options) or compare(model, **options))
    return made


# ------------------------------------------------------------------------------------------ the committed book


def test_every_page_is_what_its_records_give() -> None:
    assert book.names() == ["ablation", "better", "main", "peers", "real", "stand-ins", "sweep"]
    assert book.check(leave_out=SLOW) == []


@pytest.mark.slow
def test_so_are_leads_and_the_pictures_of_the_report() -> None:
    assert book.check() == []


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    for folder in ("benchmarks/pages", "docs/results"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("benchmarks/pages/stand-ins.yaml", *(f"docs/results/stand-ins{end}" for end in (
            ".json", ".md", ".svg", "-notes.md"))):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    assert book.main(["check"], tmp_path) == 0
    record = tmp_path / "docs" / "results" / "stand-ins.json"
    units = json.loads(record.read_text())
    units[0]["excess_loss"] += 0.1
    record.write_text(json.dumps(units))
    assert book.check(tmp_path, leave_out=SLOW) == ["docs/results/stand-ins.md"]
    assert book.main(["check"], tmp_path) == 1
    assert book.main(["page", "--all"], tmp_path) == 0
    assert book.check(tmp_path) == []


def test_every_variant_of_a_page_that_runs_exists() -> None:
    for page in map(book.Page.load, book.names()):
        for one in page.spec["runs"]:
            for variant in one.get("methods", []):
                assert parse_variant(variant, 0.25).name == variant
        rows = [row for section in page.spec["shows"] for row in section.get("rows", []) if "variant" in row]
        run = {variant for one in page.spec["runs"] for variant in one.get("methods", [])}
        assert {row["variant"] for row in rows if not row.get("gone")} <= run
        assert {row["against"] for row in rows if "against" in row} <= {row["variant"] for row in rows}


def test_research_is_imported_by_nothing() -> None:
    studies = {file.stem for file in (ROOT / "research").glob("*/*.py")}
    assert len(studies) > 10
    for folder in ("src", "benchmarks", "tests", "reference"):
        for file in (ROOT / folder).rglob("*.py"):
            found = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert not studies & set(found), file
            assert not any(name.split(".")[0] == "research" for name in found), file


# ------------------------------------------------------------------------------------------ runs


def test_a_run_writes_record_and_page_and_goes_on(bench: Bench, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    shows = [{"table": "models"}, {"table": "by-model", "column": "excess loss", "readme": True},
             {"plot": "marks", "name": "excess", "says": "excess loss"}, {"table": "failures", "heading": "Failed"}]
    spec = {"record": "tiny-{model}.json", "runs": [{"methods": [*CHEAP, "uidl:blocks=0-99"]}], "shows": shows}
    repository(bench, tmp_path, "tiny", **spec)
    arguments = ["run", "tiny", "--work", str(tmp_path / "work")]
    assert book.main(arguments, tmp_path) == 0
    results = tmp_path / "docs" / "results"
    found = Comparison.load(results / "tiny-tiny.json")
    page = (results / "tiny.md").read_text(encoding="utf-8")
    assert len(found.units) == 2
    for row in found.rows[:2]:
        assert f"`{row.variant.name}` | " in page
        assert f"{row.excess_loss.mean:.3f}" in page
    assert "## Failed" in page
    assert "| failed |" in page
    assert (results / "tiny-excess.svg").read_text(encoding="utf-8").startswith("<svg")
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n<!-- table: tiny -->\n|")
    assert readme.endswith("<!-- end -->\nafter\n")
    assert "old" not in readme
    assert len(calls) == 1
    assert book.main(arguments, tmp_path) == 0
    assert len(calls) == 1, "nothing was missing"
    spec["runs"].append({"methods": CHEAP[:1], "seeds": 2})
    repository(bench, tmp_path, "tiny", **spec)
    assert book.main(arguments, tmp_path) == 0
    assert [(call["methods"], call["seeds"]) for call in calls[1:]] == [(CHEAP[:1], [1])]
    again = Comparison.load(results / "tiny-tiny.json")
    assert [(unit.variant, unit.seed) for unit in again.units] == [*((name, 0) for name in CHEAP), (CHEAP[0], 1)]
    assert again.units[0] == found.units[0]


def test_units_over_ratios_are_kept_one_by_one(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, calls = Comparison.load(ROOT / "docs" / "results" / "peers.json"), []

    def compare(model: str, *, methods: list[str], ratio: float, seeds: list[int], **options: Any) -> Comparison:
        calls.append((methods, ratio, seeds))
        return peers.model_copy(update={"ratio": ratio, "units": [
            unit for unit in peers.units if unit.variant in methods and unit.seed in seeds]})

    monkeypatch.setattr(kdprune, "compare", compare)
    titles = {"shortgpt": "ShortGPT", "uidl": "UIDL"}
    runs = [{"ratios": [0.1, 0.3], "methods": ["shortgpt"]}]
    page = repository(bench, tmp_path, "grid", units="grid.json", runs=runs,
                      shows=[{"table": "by-ratio", "titles": titles}])
    for _ in range(2):
        book.run(page, tmp_path / "work")
    assert calls == [(["shortgpt"], 0.1, [0]), (["shortgpt"], 0.3, [0])]
    units, row = page.units(), peers.row("shortgpt")
    assert [(unit.ratio, unit.seed, unit.excess_loss) for unit in units] == [
        (ratio, 0, pytest.approx(row.excess_loss.mean)) for ratio in (0.1, 0.3)]
    text = book.files(page)[tmp_path / "docs" / "results" / "grid.md"]
    cell = f"{row.excess_loss.mean:.3f} ({row.net_ratio.mean:.1%})"
    assert f"| ShortGPT | {cell} | {cell} |" in text
    assert "| UIDL | — | — |" in text


def test_another_protocol_does_not_go_into_a_record() -> None:
    found = Comparison.load(ROOT / "docs" / "results" / "better-opt.json")
    other = found.model_copy(update={"dense": found.dense.model_copy(update={"perplexity": 1.0})})
    with pytest.raises(SystemExit, match="different protocols"):
        book_records.merged([found, other])
    first, rest = (found.model_copy(update={"units": part, "seeds": [seed]}) for part, seed in (
        (found.units[:3], 0), (found.units[3:], 1)))
    whole = book_records.merged([first, rest])
    assert {row.variant.name: row.excess_loss for row in whole.rows} == {
        row.variant.name: row.excess_loss for row in found.rows}
    assert whole.seeds == [0, 1]


# ------------------------------------------------------------------------------------------ figures


def test_gains_are_differences_seed_by_seed() -> None:
    units = [book_records.Unit("m", name, 0.25, seed, excess_loss=loss, net_ratio=0.25) for name, seed, loss in (
        ("kdp", 0, 0.1), ("kdp", 1, 0.3), ("kdp:rank=2", 0, 0.05), ("kdp:rank=2", 1, 0.27), ("kdp:rank=2", 2, 9.0))]
    row = {"variant": "kdp:rank=2", "against": "kdp"}
    assert book_tables.gains(units, row) == pytest.approx([-0.05, -0.03])
    assert book_tables.gains(units, row | {"against": "sleb"}) == []
    assert book_tables.spread([-0.05, -0.03], 4, "+") == "-0.0400 ± 0.0141"


def test_a_lead_is_the_difference_of_what_the_rows_say() -> None:
    found = Comparison.load(ROOT / "docs" / "results" / "main-llama.json")
    mine, peer = "kdp:preset=fourier", "linearpatch"
    said, kept, above = book_leads._compared(found, mine, peer)
    ours, other = found.row(mine), found.row(peer)
    assert kept.difference == pytest.approx(ours.retained.mean - other.retained.mean, abs=1e-4)
    assert above.difference == pytest.approx(ours.above_chance.mean - other.above_chance.mean, abs=1e-4)
    assert kept.low < kept.difference < kept.high
    losses = [{unit.seed: unit.perplexity.excess_loss for unit in found.units if unit.variant == name}
              for name in (mine, peer)]
    gaps = [losses[0][seed] - losses[1][seed] for seed in (0, 1, 2)]
    assert said.startswith(f"{statistics.fmean(gaps):+.3f}")
    assert f"less for {sum(gap < 0 for gap in gaps)} of 3 seeds" in said
