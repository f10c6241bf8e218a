"""Names that are none: texts where a path is expected, NULs, homes of nobody; and ``~``, which is the user's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_command_line import refused
from tiny_checkpoint import Bench, command, no_drawing

import kdprune
from kdprune.errors import KDPruneError
from kdprune.options import at_home
from kdprune.run.recipe import load_recipe
from kdprune.store.cache import cache_dir

NAMES = ("model", "tokenizer", "calibration", "heldout", "output_dir", "work_dir", "recipe")


@pytest.mark.parametrize(
    "text", ["word " * 1000, "a\0b", "no\nsuch", "~nobody-here/x.txt"], ids=["long", "nul", "line", "home"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "output_dir"])
def test_a_text_that_is_no_name(name: str, text: str, bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "work_dir" and text in ("no\nsuch", "~nobody-here/x.txt"):
        return  # strange, but a name
    with pytest.raises(KDPruneError) as caught:
        kdprune.prune(**{"model": bench.model, **bench.options, "method": "shortgpt", name: text})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("text", ["word " * 1000, "a\0b", "o\udce2\udc88\udc921"], ids=["long", "nul", "locale"])
def test_an_output_that_is_no_name(text: str, bench: Bench) -> None:
    with pytest.raises(KDPruneError) as caught:
        kdprune.prune(bench.model, text, method="shortgpt", calibration=bench.calibration)
    assert len(str(caught.value)) < 700
    if "\udce2" in text:
        assert "characters this locale's encoding lacks" in str(caught.value)


def test_commands_that_take_a_name(tmp_path: Path) -> None:
    for name in ("eval", "plan", "report"):
        refused("5,000 characters", name, "word " * 1000, folder=tmp_path)


def test_home_in_shell_recipe_and_python(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    shutil.copytree(bench.model, home / "model")
    shutil.copy(bench.calibration, home / "a.txt")
    (home / "recipe.yaml").write_text("calibration: ['~/a.txt=2', '~/a.txt=1']\nmodel: ~/model\n", encoding="utf-8-sig")
    monkeypatch.setenv("HOME", str(home))
    assert load_recipe("~/recipe.yaml") == {
        "calibration": [(str(home / "a.txt"), 2.0), (str(home / "a.txt"), 1.0)], "model": str(home / "model")}
    assert at_home({Path("~/a.txt"): 1.0}) == {home / "a.txt": 1.0}
    assert at_home(["~/a.txt"]) == ["~/a.txt"]  # a text, perhaps
    assert at_home(("~/a.txt", "b"), each=True) == (str(home / "a.txt"), "b")
    with no_drawing():
        outcome = command("analyze", "~/model", "--calibration=~/a.txt", "--samples", 8, "--length", 32,
                          "--work-dir=none", "-o", "~/out")
    assert outcome.status == 0, outcome.err
    assert (home / "out" / "results.json").is_file()


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:  # what it raises where neither HOME nor the system's list of users has one
        raise RuntimeError("Could not determine home directory.")

    for name in ("KDPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(KDPruneError, match="set KDPRUNE_CACHE to a directory, or give --work-dir"):
        cache_dir()
