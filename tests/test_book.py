"""The driver of the results book: pages from their records, runs that go on, figures against their definitions."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_checkpoint import Bench

import kdprune
from kdprune.comparison import compare as comparison
from kdprune.comparison.variants import parse_variant
from kdprune.report.comparison_records import Comparison

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import book
import book_plots
import book_records
import book_tables
import real_page
import real_premise
import real_theorems

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
SLOW = ("tasks", "writing")  # a bootstrap
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
    assert book.names() == ["real", "real-calibration", "real-parts"]
    assert book.check(leave_out=SLOW) == []


@pytest.mark.slow
def test_so_are_tables_with_a_bootstrap() -> None:
    assert book.check() == []


def test_the_page_on_the_premise_is_what_its_records_give() -> None:
    found = real_page.records(real_premise.PAGE)
    assert len(found) == 3
    assert (real_page.RESULTS / "real-premise.md").read_text(encoding="utf-8") == real_premise.page(found)


def test_the_page_on_the_theorems_is_what_its_records_give() -> None:
    found = real_page.records(real_theorems.PAGE)
    assert found
    assert (real_page.RESULTS / "real-theorems.md").read_text(encoding="utf-8") == real_theorems.page(found)
    assert (real_page.RESULTS / "real-theorems.svg").is_file()


def test_a_linear_block_has_no_risk_where_the_state_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_theorems, "SIZES", (256, 512))
    monkeypatch.setattr(real_theorems, "TRAINED", ((1.0,), 512, 1))
    draw = torch.Generator().manual_seed(0)
    states, steps = torch.randn(1024, 6, generator=draw), torch.randn(2, 6, 6, generator=draw) / 20
    path = torch.stack([states, states + states @ steps[0], states + states @ steps[0] + states @ steps[1]])
    fitted, held = path[:, :768], path[:, 768:]
    original, *kernels = real_theorems.risks(fitted, held, torch.arange(768))
    assert max(original["risk"]) == pytest.approx(0, abs=1e-9)
    assert [one["kernel"] for one in kernels] == ["drawn"] * 6 + ["trained"]
    for one in kernels:
        assert one["sum"] == pytest.approx(0, abs=1e-5)
        assert one["sum"] < one["state"]
    for one in real_theorems.bounds(fitted, held):
        assert one["error_1"] <= one["bound_1"]
        assert one["error_K"] <= one["bound_K"]
        assert one["fitted"] < one["held"]


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    for folder in ("benchmarks/pages", "docs/results"):
        (tmp_path / folder).mkdir(parents=True)
    kept = [file.relative_to(ROOT) for file in (ROOT / "docs" / "results").glob("real*") if "premise" not in file.name]
    files = [Path("benchmarks/pages/real.yaml"), *kept]
    for file in files:
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    assert book.main(["check"], tmp_path) == 0
    record = tmp_path / "docs" / "results" / "real-qwen25-coder-05b.json"
    found = json.loads(record.read_text())
    found["units"][0]["texts"][0]["excess_loss"] += 0.1
    found["units"][0]["texts"][0]["pruned"] *= 1.1
    del found["rows"]
    record.write_text(json.dumps(found))
    assert book.check(tmp_path, leave_out=SLOW) == ["docs/results/real.md"]
    assert book.main(["check"], tmp_path) == 1
    assert book.main(["page", "--all"], tmp_path) == 0
    assert book.check(tmp_path) == []


def test_every_variant_of_a_page_that_runs_exists() -> None:
    for page in map(book.Page.load, book.names()):
        for one in page.spec["runs"]:
            for variant in one.get("methods", []):
                assert parse_variant(variant, 0.25).name == variant
        shown = {name for section in page.spec["shows"] for name in section.get("titles", {})}
        assert shown <= {variant for one in page.spec["runs"] for variant in one["methods"]}


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
    shows = [{"table": "cost"}, {"table": "texts", "readme": CHEAP[:1]}, {"table": "failures", "heading": "Failed"}]
    spec = {"record": "tiny-{model}.json", "runs": [{"methods": [*CHEAP, "uidl:blocks=0-99"]}], "shows": shows}
    repository(bench, tmp_path, "tiny", **spec)
    arguments = ["run", "tiny", "--work", str(tmp_path / "work")]
    assert book.main(arguments, tmp_path) == 0
    results = tmp_path / "docs" / "results"
    found = Comparison.load(results / "tiny-tiny.json")
    page = (results / "tiny.md").read_text(encoding="utf-8")
    assert len(found.units) == 2
    for row in found.rows[:2]:
        assert page.count(f"`{row.variant.name}` | ") == 2
        assert f"{row.excess_loss.mean:.3f}" in page
    assert "## Failed\n\n- tiny, `uidl:blocks=0-99` at 0.25: got block" in page
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n<!-- table: tiny -->\n### tiny\n\n|")
    assert readme.endswith("<!-- end -->\nafter\n")
    assert [f"`{name}`" in readme for name in CHEAP] == [True, *[False] * (len(CHEAP) - 1)]
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
    kept = tmp_path / "work" / "tiny" / "stages" / "tiny" / "stages"
    assert len(list(kept.glob("dense-*"))) == 1, "the dense model was measured once, for both comparisons"


def test_runs_in_processes_give_the_same_record(bench: Bench, tmp_path: Path) -> None:
    """And one that ends in an error is told when the others are kept."""
    run = {"methods": CHEAP[:1], "record": "tiny-{model}.json"}
    broken, found = {**run, "heldout": str(tmp_path / "none.txt"), "record": "broken-{model}.json"}, []
    for name, runs in (("one", [run]), ("two", [broken, run])):
        page = repository(bench, tmp_path / name, "tiny", record=run["record"], shows=[], runs=runs)
        if name == "one":
            book.run(page, tmp_path / name / "work")
        else:
            with pytest.raises(SystemExit, match=r"broken-tiny-0-0-0: .*none\.txt"):
                book.run(page, tmp_path / name / "work", device="cpu", processes=2)
        (unit,) = page.comparisons()["tiny"].units
        found.append((unit.blocks, unit.perplexity.pruned, page.comparisons()["tiny"].recipe))
    assert found[0] == found[1]


def test_sizes_of_several_records_make_curves(tmp_path: Path) -> None:
    page = book_records.Page("grid", {"models": {"coder": None}, "record": "b-{model}.json"}, tmp_path)
    page.results.mkdir(parents=True)
    found = Comparison.load(ROOT / "docs" / "results" / "real-qwen25-coder-05b.json")
    ours, peer = "kdp", "linear"
    sizes = {"a": (0.10, 0.1), "b": (0.25, 0.2), "c": (0.40, 0.8)}
    for name, (net, loss) in sizes.items():
        units = []
        for unit in found.units:
            further = {ours: 0.0, peer: 0.05}.get(unit.variant, 0.0)
            one = unit.model_copy(deep=True)
            one.parameters.net_ratio_layers = net + further
            for text in (one.perplexity, *one.texts):
                text.excess_loss = loss
            units.append(one)
        found.model_copy(update={"units": units}).model_validate(
            found.model_dump(exclude={"rows", "signal", "left_out"}) | {"units": [one.model_dump() for one in units]}
        ).save(page.results / f"{name}-coder.json")
    section = {"records": [f"{name}-{{model}}.json" for name in "cab"], "ours": ours, "says": "sizes",
               "titles": {ours: "KDP", peer: "map"}}
    points = book_tables.curve_points(page, section)["coder"]
    assert [(point.net, point.excess_loss) for point in points[ours]] == [pytest.approx(at) for at in sizes.values()]
    lines = book_tables.at_size(page, section).splitlines()
    assert lines[2] == "|  | 10.0 % | 25.0 % | 40.0 % |"
    assert f"| `{ours}` | 0.100 | 0.200 | 0.800 |" in lines
    # Two thirds of the way from .15 to .30 and from .30 to .45, in the logarithm; nothing is known below .15.
    assert f"| `{peer}` | — | {0.1 ** (1 / 3) * 0.2 ** (2 / 3):.3f} | {0.2 ** (1 / 3) * 0.8 ** (2 / 3):.3f} |" in lines
    # Of all that a method was measured as, every size once.
    assert book_tables.at_size(page, {**section, "ours": "kdp"}).splitlines()[2] == lines[2]
    assert ">KDP</t" in book_plots.curves(page, section)
    one = {**section, "records": ["a-{model}.json"]}
    assert book_plots.curves(page, one) == ""


def test_another_protocol_does_not_go_into_a_record() -> None:
    found = Comparison.load(ROOT / "research" / "small-models" / "better-opt.json")
    other = found.model_copy(update={"dense": found.dense.model_copy(update={"perplexity": 1.0})})
    with pytest.raises(SystemExit, match="different protocols"):
        book_records.merged([found, other])
    first, rest = (found.model_copy(update={"units": part, "seeds": [seed]}) for part, seed in (
        (found.units[:3], 0), (found.units[3:], 1)))
    whole = book_records.merged([first, rest])
    assert {row.variant.name: row.excess_loss for row in whole.rows} == {
        row.variant.name: row.excess_loss for row in found.rows}
    assert whole.seeds == [0, 1]
