"""What a user owns stays: no output where something is read, and only an earlier result is ever replaced."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_command_line import refused
from tiny_checkpoint import Bench, command, tree

import kdprune
from kdprune.errors import KDPruneError
from kdprune.run.inputs import inputs_of
from kdprune.store.directories import check_apart, staged_directory


@pytest.fixture
def mine(bench: Bench, tmp_path: Path) -> Path:
    """A folder of a user's: a model, texts, a recipe, something else, and links."""
    folder = tmp_path / "mine"
    shutil.copytree(bench.model, folder / "model")
    (folder / "texts").mkdir()
    shutil.copy(bench.calibration, folder / "texts" / "a.txt")
    shutil.copy(bench.heldout, folder / "heldout.txt")
    (folder / "recipe.yaml").write_text("ratio: 0.25\n")
    (folder / "linked").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "linked" / name).symlink_to(folder / "model" / name)
    (tmp_path / "link").symlink_to(folder)
    return folder


@pytest.mark.parametrize(("output", "message"), [
    ("mine/model", "is the model"), ("link/model", "is the model"), ("mine", "holds the model"),
    ("link", "holds the model"), ("mine/model/new", "lies in the model"), ("mine/texts", "is the text"),
    ("mine/texts/a/b", "lies in the text"), ("link/texts/new", "lies in the text"),
    ("mine/../mine/model", "is the model"),
])
def test_no_output_where_something_is_read(output: str, message: str, mine: Path, tmp_path: Path) -> None:
    arguments = (mine / "model", "--calibration", mine / "texts", "-o", tmp_path / output, "--overwrite")
    for name in ("prune", "analyze", "compare", "ablate"):
        refused(f"got output .*which {message}.*choose another", name, *arguments, folder=tmp_path)


def test_recipe_held_out_text_work_directory_and_cache(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    for output, flags, message in (
        (mine, ("--recipe", mine / "recipe.yaml"), "holds the recipe"),
        (mine, ("--heldout", mine / "heldout.txt"), "holds the text"),
        (tmp_path / "work" / "out", ("--work-dir", tmp_path / "work"), "lies in the work directory"),
        (Path(os.environ["KDPRUNE_CACHE"]) / "out", (), "lies in the cache"),
    ):
        refused(message, "prune", "-o", output, *flags, "--overwrite", folder=tmp_path)


def test_links_in_what_is_read_are_followed(mine: Path, tmp_path: Path) -> None:
    refused("holds the model .*linked", "prune", mine / "linked", "-o", mine / "model", "--overwrite", folder=tmp_path)


def test_a_loaded_model_and_its_result(bench: Bench, mine: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = tree(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(mine / "model")
    for call in (lambda: kdprune.prune(model, mine / "model", overwrite=True),
                 lambda: check_apart(mine, inputs_of(model))):
        with pytest.raises(KDPruneError, match=r"(is|holds) the model"):
            call()
    options = {**bench.options, "method": "shortgpt"}
    for name in ("kernel_epochs", "kernel_tokens", "refine_epochs", "inverse_epochs", "channels", "rank", "ranking"):
        del options[name]
    result = kdprune.prune(mine / "model", **options)
    with pytest.raises(KDPruneError, match="is the model"):
        result.save(mine / "model", overwrite=True)
    assert tree(tmp_path) == before


def earlier(folder: Path) -> None:
    """What a run leaves, in short."""
    with staged_directory(folder, result=True) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "file").write_text("x")
        (staging / "results.json").write_text(json.dumps({"files": ["deep/file", "results.json"]}))


@pytest.mark.parametrize("add", [
    lambda folder: (folder / "notes.txt").write_text("mine"),
    lambda folder: (folder / "deep" / "notes.txt").write_text("mine"),
    lambda folder: (folder / "empty").mkdir(),
    lambda folder: (folder / "link").symlink_to(folder / "deep"),
    lambda folder: (folder / "results.json").unlink(),
    lambda folder: (folder / "results.json").write_text('{"files": 7}'),
])
def test_only_an_earlier_result_is_replaced(add: Callable[[Path], object], tmp_path: Path) -> None:
    earlier(tmp_path / "out")
    with staged_directory(tmp_path / "out", overwrite=True, result=True) as staging:
        shutil.copytree(tmp_path / "out", staging, dirs_exist_ok=True)
    add(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(KDPruneError, match="that no run wrote; only an earlier result is replaced") as caught, \
            staged_directory(tmp_path / "out", overwrite=True, result=True):
        pytest.fail("the body ran")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_files_to_write_do_not_replace_what_is_read(mine: Path, tmp_path: Path) -> None:
    model, config = mine / "model", mine / "model" / "config.json"
    refused("config.json to write, which is a part of the model", "eval", model, "--json", config, folder=tmp_path)
    refused("a.txt to write, which is a part of the text", "eval", model, "--text", mine / "texts" / "a.txt", "--json",
            mine / "texts" / "a.txt", folder=tmp_path)
    refused("config.json to write, which is a part of the model", "plan", model, "--json", config, folder=tmp_path)
    refused("which is a directory", "plan", model, "--json", mine, folder=tmp_path)
    refused("is a file; choose another name", "eval", model, "--json", config / "x.json", folder=tmp_path)
    for _ in range(2):  # the second time it replaces its own
        assert command("plan", model, "--json", model / "plan.json", "--ratio", 0.2).status == 0


def test_a_page_does_not_replace_its_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    refused("where something else lies", "report", tmp_path, "-o", tmp_path / "results.json", folder=tmp_path)


def test_a_comparison_leaves_other_runs_alone(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "events").write_text("of a training")
    refused("holds no comparison", "compare", mine / "model", "-o", tmp_path / "out", "--overwrite",
            folder=tmp_path)
