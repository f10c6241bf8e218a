"""The page of changes: its figures are those of the comparison's units, and every variant it names exists."""

import sys
from pathlib import Path

import pytest
from tiny_checkpoint import Bench

import kdprune
from kdprune.report.comparison_records import Comparison
from kdprune.variants import parse_variant

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import better
import main_table

pytestmark = pytest.mark.usefixtures("one_thread")
BASE, FIXED = "kdp:refine=no:protect=0", "kdp:refine=no:protect=0:kernel=fixed"


@pytest.fixture(scope="module")
def made(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A real comparison of two variants on a tiny model, and one that cannot be."""
    folder = tmp_path_factory.mktemp("better") / "out"
    return kdprune.compare(
        str(bench.model), [BASE, FIXED, f"{BASE}:blocks=0-99"], seeds=2, output_dir=folder,
        calibration=bench.calibration, heldout=bench.heldout, samples=12, length=32)


def test_every_variant_of_the_page_exists():
    for step in better.STEPS:
        assert parse_variant(step.variant, 0.25).name == step.variant
    known = {step.variant for step in better.STEPS}
    assert {step.against for step in better.STEPS} <= {*known, ""}


def test_gains_are_differences_seed_by_seed(made: Comparison):
    step = better.Step(FIXED, BASE, "the kernel as drawn")
    by_seed = {name: {unit.seed: unit.perplexity.excess_loss for unit in made.units if unit.variant == name}
               for name in (BASE, FIXED)}
    assert better.gains(made, step) == [by_seed[FIXED][seed] - by_seed[BASE][seed] for seed in (0, 1)]
    assert better.gains(made, better.Step("kdp:rank=3", BASE, "not measured")) == []


def test_the_page_shows_them_and_says_what_failed(made: Comparison, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    refused = f"{BASE}:blocks=0-99"
    monkeypatch.setattr(better, "LADDER", (better.Step(BASE, "", "base"), better.Step(FIXED, BASE, "as drawn")))
    monkeypatch.setattr(better, "CHANGES", {"More": (better.Step(refused, BASE, "too long"),)})
    monkeypatch.setattr(better, "RESULTS", tmp_path)
    monkeypatch.setattr(main_table, "RESULTS", tmp_path)
    folder = made.save(tmp_path / "out" / "results.json").parent
    better.main(["--add", str(folder), "tiny"])
    page = (tmp_path / "better.md").read_text(encoding="utf-8")
    gain = better.gain_cell(made, better.Step(FIXED, BASE, ""))
    assert f"| {gain} |" in page
    assert f"`{refused}`" in page
    assert "refused" in page
    assert (tmp_path / "better.svg").stat().st_size > 1000
