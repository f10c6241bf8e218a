"""Recipes: what a file may say, what wins, and that a dumped one is the same run."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_checkpoint import QUICK, Bench, command, no_drawing, random_ids, tiny_llama

import kdprune
from kdprune.errors import KDPruneError
from kdprune.options import parse_blocks, reject_unknown
from kdprune.report.results import Results
from kdprune.run.recipe import check_options, dump_recipe, load_recipe, prune_options

pytestmark = pytest.mark.usefixtures("one_thread")


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"


def dumped(*arguments: object) -> dict[str, Any]:
    outcome = command("prune", *arguments, "--dump-recipe")
    assert (outcome.status, outcome.err) == (0, "")
    return yaml.safe_load(outcome.out)


# ------------------------------------------------------------------------------------------ files


def test_values_come_as_their_types(tmp_path: Path) -> None:
    found = load_recipe(written(tmp_path, """
        kernel-epochs: "7"
        ridge: 1e-5     # text in YAML 1.1, which wants a point
        refine: no
        preset: paper
        blocks: 4-7,9-12
        features: null
        calibration: [a.txt=0.7, b.jsonl=0.3]
    """))
    assert found == {
        "kernel_epochs": 7, "ridge": 1e-5, "refine": False, "preset": "paper", "blocks": ((4, 7), (9, 12)),
        "calibration": [("a.txt", 0.7), ("b.jsonl", 0.3)],
    }
    assert load_recipe(written(tmp_path, "blocks: [[1, 2], [3, 5]]"))["blocks"] == ((1, 2), (3, 5))
    assert load_recipe(written(tmp_path, "calibration: {a.txt: 1, b.txt: 3}")) == {
        "calibration": {"a.txt": 1, "b.txt": 3}}
    assert load_recipe(written(tmp_path, "calibration: [a.txt]")) == {"calibration": "a.txt"}


@pytest.mark.parametrize(("text", "message"), [
    ("ratoi: 0.2", "unknown option 'ratoi'; did you mean 'ratio'"),
    ("calibratoin: a.txt", "unknown option 'calibratoin'; did you mean 'calibration'"),
    ("method: kpd", "unknown method 'kpd'; did you mean 'kdp'"),
    ("method: [kdp]", "unknown method"),
    ("{method: shortgpt, rank: 4}", "got option 'rank', which belongs to kdp, with method 'shortgpt'"),
    ("preset: papre", "unknown preset 'papre'; did you mean 'paper'"),
    ("progress: yes", "unknown option 'progress'"),
    ("recipe: other.yaml", "unknown option 'recipe'"),
    ("7: 3", "unknown option '7'"),
    ("ridge: much", "got ridge 'much'"),
    ("features: 2.5", r"got features 2\.5"),
    ("refine: perhaps", "got refine 'perhaps'"),
    ("seed: [1]", r"got seed \[1\]"),
    ("blocks: 4", "got blocks 4"),
    ("blocks: 4-x", "got blocks '4-x'"),
    ("blocks: [[4, 7, 9]]", "got blocks"),
    ("- ratio", "got a list in the recipe"),
    ("", "got a NoneType in the recipe"),
    ("ratio: [", "is not valid YAML"),
    ("ratio: 0.2\nseed: 1\nratio: 0.3", "is not valid YAML: found 'ratio' twice"),
    ("heldout: {news: a.txt, news: b.txt}", "is not valid YAML: found 'news' twice"),
    ("heal-tokens: 100\nheal_tokens: 200", "with dashes and with underscores"),
    ("\x00", "is not valid YAML"),
])
def test_files_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(KDPruneError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("heldout: ü".encode("latin-1"))
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file"),
                          (tmp_path / "latin.yaml", "is not valid YAML")):
        with pytest.raises(KDPruneError, match=message):
            load_recipe(path)


def test_every_argument_of_prune_may_stand_in_a_recipe() -> None:
    arguments = set(inspect.signature(kdprune.prune).parameters) - {"recipe", "progress", "options"}
    assert {name for name, item in prune_options({}).items() if "recipe" in item.places} == arguments


def test_signature_and_help_show_all_options_with_their_defaults() -> None:
    shown = inspect.signature(kdprune.prune).parameters
    assert list(shown)[:3] == ["model", "output_dir", "method"]
    assert [shown[name].default for name in ("model", "method", "samples", "seed", "device", "heal", "heal_batch")] == [
        None, "kdp", None, 0, "auto", None, 4]
    for function in (kdprune.prune, kdprune.analyze, kdprune.compare, kdprune.ablate):
        for name, item in inspect.signature(function).parameters.items():
            assert item.kind is inspect.Parameter.VAR_KEYWORD or f"    {name}: " in str(function.__doc__), name
            assert repr(item.default) != "not given"


def test_what_is_dumped_is_loaded_again(tmp_path: Path) -> None:
    options = {"ratio": 0.2, "ridge": 1e-5, "blocks": ((1, 2), (4, 6)), "heldout": Path("ä.txt"), "refine": False,
               "calibration": [("a.txt", 0.5), ("b.txt", 1.0)], "features": None}
    found = load_recipe(written(tmp_path, dump_recipe(options)))
    assert found.pop("calibration") == [["a.txt", 0.5], ["b.txt", 1.0]]
    del options["calibration"], options["features"]
    assert found == {**options, "heldout": "ä.txt"}


def test_blocks_and_names() -> None:
    assert parse_blocks("4-7") == ((4, 7),)
    for text in ("", "4", "4-7-9", "4-7,", "a-b"):
        with pytest.raises(KDPruneError, match="expected half-open layer ranges such as 4-7,9-12"):
            parse_blocks(text)
    reject_unknown(["a"], ["a", "b"], "letter")
    with pytest.raises(KDPruneError, match="unknown letter 'zzzz'; expected one of a, b"):
        reject_unknown(["zzzz"], ["b", "a"], "letter")
    assert check_options({"ratio": None, "seed": 3}) == {"seed": 3}


# ------------------------------------------------------------------------------------------ runs


def test_a_dumped_recipe_dumps_itself(bench: Bench, tmp_path: Path) -> None:
    flags = bench.flags
    del flags[flags.index("--channels") : flags.index("--channels") + 2]
    first = dumped(bench.model, *flags, "--preset", "paper", "--no-fill", "--blocks", "1-3", "--seed", 5)
    assert first["inverse"] == "direct"  # filled in from the preset
    assert (first["fill"], first["blocks"], first["seed"]) == (False, [[1, 3]], 5)
    path = written(tmp_path, yaml.safe_dump(first))
    assert dumped("--recipe", path) == first
    assert dumped("--recipe", path, "--seed", 6, "--fill") == {**first, "seed": 6, "fill": True}


def test_flags_win_over_the_recipe_and_nothing_runs_when_dumping(tmp_path: Path) -> None:
    path = written(tmp_path, "model: nowhere\nratio: 0.3\nchannels: 9\noverwrite: true\noutput_dir: there\n")
    found = dumped("elsewhere", "--recipe", path, "--ratio", 0.2)
    assert (found["model"], found["ratio"], found["channels"]) == ("elsewhere", 0.2, 9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_is_given_wins_also_where_it_is_the_default(bench: Bench, tmp_path: Path) -> None:
    path = written(tmp_path, "ratio: 0.4\nseed: 7\nlength: 16\noverwrite: true\nheal: lm\n")
    found = dumped("--recipe", path, "--ratio", 0.25, "--seed", 0)
    assert (found["ratio"], found["seed"], found["length"]) == (0.25, 0, 16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "not empty" in command(
        "prune", bench.model, "--recipe", path, "-o", tmp_path / "out", "--no-overwrite").err
    with pytest.raises(KDPruneError, match=r"ratio 2\.0"):
        kdprune.prune(recipe=path, ratio=2.0)
    recipe = {"samples": 3, "length": 16, "seed": 7, "device": "abacus", "work_dir": str(tmp_path / "work"),
              "heldout": "missing.txt", "method": "sleb"}
    result = kdprune.prune(
        tiny_llama(), recipe=recipe, method="kdp", calibration=random_ids(), samples=None, length=None, seed=0,
        device="auto", work_dir=None, heldout=None, **QUICK)
    assert (result.results.method, result.results.calibration.samples, result.results.seed) == ("kdp", 12, 0)
    assert not (tmp_path / "work").exists()


@no_drawing()
def test_a_run_is_repeated_from_its_results(bench: Bench, tmp_path: Path) -> None:
    first = kdprune.prune(bench.model, ratio=0.2, seed=3, block_length=2, **bench.options)
    path = written(tmp_path, dump_recipe(first.results.recipe))
    outcome = command("prune", "--recipe", path, "-o", tmp_path / "out")
    assert outcome.status == 0
    again = Results.load(tmp_path / "out")
    assert again.recipe == first.results.recipe
    assert again.blocks == first.results.blocks
    assert again.perplexity == first.results.perplexity
    assert again.model_dump()["fit"] == first.results.model_dump()["fit"]


def test_recipes_in_python(bench: Bench, tmp_path: Path) -> None:
    path = written(tmp_path, f"model: {bench.model}\nratio: 2\nprotect: 0.2\n")
    with pytest.raises(KDPruneError, match=r"ratio 2\.0"):
        kdprune.prune(recipe=path)
    with pytest.raises(KDPruneError, match="ratio 3"):  # an argument wins
        kdprune.prune(recipe=path, ratio=3)
    with pytest.raises(KDPruneError, match=r"protect 0\.7"):
        kdprune.prune(recipe={"protect": 0.7})
    with pytest.raises(KDPruneError, match="unknown option 'protcet'; did you mean 'protect'"):
        kdprune.prune(recipe={"protcet": 0.7})
