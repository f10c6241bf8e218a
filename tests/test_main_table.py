"""The main table across models: real tiny comparisons with items, and the page made from their records."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import Bench

import kdprune
from kdprune.evaluation.tasks import run_suite
from kdprune.model.loading import load_model, load_tokenizer
from kdprune.report.comparison_records import Comparison

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import main_table

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")
KDP, PEERS = "kdp:kernel=linear:context=none:refine=no:protect=0", ["shortgpt:blocks=1-5", "uidl:blocks=0-3"]
WORDS = ("ran.", "sleeps.", "a dog.", "blue.")
ITEMS = 12


def write(folder: Path, answers: list[int]) -> Path:
    """sciq.jsonl with these right answers."""
    rows = [{"support": "", "question": f"The {number} cats", "correct_answer": WORDS[answer],
             **{f"distractor{n}": WORDS[(answer + n) % 4] for n in (1, 2, 3)}} for number, answer in enumerate(answers)]
    folder.mkdir()
    (folder / "sciq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def results(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like docs/results with one model's record; what the dense model answers counts as right."""
    work = tmp_path_factory.mktemp("main")
    model, tokenizer = load_model(bench.model), load_tokenizer(bench.model, None)
    chosen = [run_suite(model, tokenizer, "sciq", data=[write(work / f"all{n}", [n] * ITEMS)])[0].right[0]
              for n in range(4)]
    answers = [next(n for n in range(4) if chosen[n][item] == "1") for item in range(ITEMS)]
    answers[0] = (answers[0] + 1) % 4  # one wrong: a score of 1 has no standard error
    data = write(work / "data", answers)
    folder = work / "results"
    folder.mkdir()
    kdprune.compare(
        str(bench.model), [KDP, *PEERS], seeds=2, output_dir=work / "out", suite="sciq", suite_data=[data], limit=10,
        calibration=bench.calibration, heldout=bench.heldout, samples=12, length=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_table, "RESULTS", folder)
        main_table.main(["--add", str(work / "out"), "tiny"])
    return folder


def answered(found: Comparison, name: str) -> np.ndarray:
    """Right or wrong, (seeds, items)."""
    return np.array([[int(c) for c in unit.tasks[0].right[0]] for unit in found.units if unit.variant == name])


def test_the_page_says_what_the_items_say(results: Path) -> None:
    found = Comparison.load(results / "main-tiny.json")
    page = (results / "main.md").read_text(encoding="utf-8")
    dense = found.dense.tasks[0]
    assert (found.signal, dense.right[0], dense.value) == (["sciq"], "0" + "1" * 9, 0.9)
    ours = answered(found, KDP)
    assert ours.shape == (2, 10)
    assert any((answered(found, name) != ours).any() for name in PEERS), "nothing to tell the methods apart"
    for name in PEERS:
        difference = (ours.mean(0) - answered(found, name).mean(0)).mean()
        line = next(line for line in page.splitlines() if f"`{name}`" in line and "points" not in line and "[" in line)
        assert f"{100 * difference / dense.value:+.1f} [" in line  # retained: over the dense score
        assert f"{100 * difference / (dense.value - 0.25):+.1f} [" in line  # above chance
        losses = [{unit.seed: unit.perplexity.excess_loss for unit in found.units if unit.variant == which}
                  for which in (KDP, name)]
        gaps = [losses[0][seed] - losses[1][seed] for seed in (0, 1)]
        assert f"{np.mean(gaps):+.3f}" in line
        sums = [[unit.window_sums for unit in found.units if unit.variant == which] for which in (KDP, name)]
        windows = (np.mean(sums[0], 0) - np.mean(sums[1], 0)).sum() / found.dense.tokens
        assert windows == pytest.approx(np.mean(gaps), abs=1e-5)
        assert line.count("p ") == 3
    assert "What is missing" not in page
    assert not any(word.startswith("/") and word != "/" for word in page.split()), "a path of this machine"
    assert (results / "main-excess.svg").read_text(encoding="utf-8").startswith("<svg")


def changed(results: Path, folder: Path, change: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page where another model's record stands beside this one."""
    found = Comparison.load(results / "main-tiny.json")
    found.save(folder / "main-tiny.json")
    change(found)
    found.save(folder / "main-other.json")
    monkeypatch.setattr(main_table, "RESULTS", folder)
    main_table.main([])
    return (folder / "main.md").read_text(encoding="utf-8")


def test_older_records_are_said_to_lack_items(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(found: Comparison) -> None:
        for unit in found.units:
            unit.tasks = [score.model_copy(update={"right": []}) for score in unit.tasks]

    page = changed(results, tmp_path, older, monkeypatch)
    assert f"- other: {', '.join([KDP, *PEERS])} were measured before items were kept" in page
    other, tiny = (next(line for line in page.splitlines() if line.startswith(f"- **{name}**, KDP")) for name in (
        "other", "tiny"))
    assert "against the best peer" in other
    assert other.endswith("; no items to compare by.")
    assert "above chance it" in tiny
    assert page.count("not kept item by item") == 2 * len(PEERS)


def test_no_signal_and_a_method_that_failed(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(found: Comparison) -> None:
        found.dense.tasks = [score.model_copy(update={"value": 0.26}) for score in found.dense.tasks]
        found.signal, found.left_out = [], ["sciq"]
        found.units = [unit for unit in found.units if unit.variant != PEERS[1]]

    page = changed(results, tmp_path, other, monkeypatch)
    assert page.count("no signal") == 1
    assert "| other | llama | " in page
    assert "0 of 1 |" in page


def pieces(results: Path) -> list[Comparison]:
    """The record cut in two: one seed of one variant, and the rest with another order of the variants."""
    found = Comparison.load(results / "main-tiny.json")
    first = [unit for unit in found.units if unit.variant == KDP and unit.seed == 0]
    rest = [unit for unit in found.units if unit not in first]
    return [found.model_copy(update={
        "units": units, "seeds": sorted({unit.seed for unit in units}),
        "variants": [variant for variant in found.variants if variant.name in {unit.variant for unit in units}]})
        for units in (first, rest)]


def test_a_comparison_made_in_pieces_is_the_whole_one(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [part.save(tmp_path / name / "results.json").parent
               for name, part in zip("ab", pieces(results), strict=True)]
    monkeypatch.setattr(main_table, "RESULTS", tmp_path)
    main_table.add(folders, "main", "tiny")
    whole, made = Comparison.load(results / "main-tiny.json"), Comparison.load(tmp_path / "main-tiny.json")
    assert made.seeds == whole.seeds
    assert {row.variant.name: row.excess_loss for row in made.rows} == {
        row.variant.name: row.excess_loss for row in whole.rows}


def test_pieces_under_another_protocol_are_refused(results: Path):
    first, other = pieces(results)
    other = other.model_copy(update={"dense": other.dense.model_copy(update={"perplexity": 1.0})})
    with pytest.raises(SystemExit, match="different protocols"):
        main_table.merged([first, other])


def test_an_ablation_made_in_pieces_keeps_its_parts(results: Path):
    parts = {"base": KDP, "only": ["rank"]}
    first, other = (part.model_copy(update={"kind": "ablation", "recipe": part.recipe | parts})
                    for part in pieces(results))
    whole = main_table.merged([first, other])
    assert (whole.recipe["base"], whole.recipe["only"], whole.recipe["seeds"]) == (KDP, ["rank"], [0, 1])
    other.recipe["only"] = ["kernel"]
    with pytest.raises(SystemExit, match="different protocols"):
        main_table.merged([first, other])
