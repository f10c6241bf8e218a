"""The command line: what every command writes, and one line with exit status 2 for bad input."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import largest_file
from safetensors.torch import load_file, save_file
from tiny_checkpoint import DAMAGE, Bench, Outcome, command, no_drawing, tiny_llama, tree
from transformers import BertConfig, BertForMaskedLM, GPTBigCodeConfig, GPTBigCodeForCausalLM

from kdprune import cli
from kdprune.cli.options_page import markdown
from kdprune.methods import METHODS
from kdprune.options import HEADINGS, options_of
from kdprune.report.results import Results
from kdprune.run import pipeline
from kdprune.run.heal import Heal
from kdprune.run.option_groups import PRUNE, DataOptions
from kdprune.run.resources import Resources

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINT = {
    "config.json", "generation_config.json", "model.safetensors", "modeling_kdp.py", "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def out(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that one run of ``kdprune prune`` wrote. Shared: do not change it."""
    return tmp_path_factory.mktemp("run") / "out"


@pytest.fixture(scope="module")
def pruned(bench: Bench, out: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What that run printed, which finds nothing of another test's."""
    work = tmp_path_factory.mktemp("work")
    return command("prune", bench.model, "-o", out, *bench.flags, *DAMAGE, "--ratio", 0.25, "--work-dir", work)


def refused(message: str, *arguments: object, folder: Path) -> None:
    """The command fails with one line that matches; what lies in ``folder`` is as before."""
    before = tree(folder)
    outcome = command(*arguments)
    assert outcome.status == 2
    assert outcome.err.startswith("kdprune: error: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.out
    assert tree(folder) == before


# ------------------------------------------------------------------------------------------ what they do


def test_prune_shows_stages_table_samples_and_paths(pruned: Outcome, out: Path) -> None:
    assert (pruned.status, pruned.err) == (0, "")
    for stage in ("load model", "calibration text", "analyse", "damage", "layer states", "refine block",
                  "evaluate", "save and verify"):
        assert re.search(rf"{stage}.*(\d+)/\1 ", pruned.out), stage
    for row in ("layers", "parameters", "net ratio", "perplexity", "retained", "prefill", "decode", "KV cache"):
        assert f"│ {row}" in pruned.out
    assert re.search(r"^dense +\S", pruned.out, re.MULTILINE)
    assert re.search(r"^pruned +\S", pruned.out, re.MULTILINE)
    unwrapped = pruned.out.replace("\n", "")
    for name in ("results.json", "report.html"):
        assert str(out / name) in unwrapped


def test_prune_writes_all_of_it_and_nothing_else(pruned: Outcome, out: Path) -> None:
    assert {path.name for path in out.iterdir()} == CHECKPOINT | {"README.md", "results.json", "report.html"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no temporary sibling
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    found = Results.load(out)
    assert f"{found.perplexity.pruned:.2f}" in card
    assert "ratio: 0.25" in card
    assert len(load_file(out / "model.safetensors")) > 10
    assert json.loads((out / "config.json").read_text())["model_type"] == "kdp_llama"


def test_eval_agrees_with_the_run(pruned: Outcome, out: Path, bench: Bench, tmp_path: Path) -> None:
    found = Results.load(out).perplexity
    for checkpoint, expected in ((bench.model, found.dense), (out, found.pruned)):
        outcome = command("eval", checkpoint, "--text", bench.heldout, "--json", tmp_path / "eval.json")
        record = json.loads((tmp_path / "eval.json").read_text())
        assert (outcome.status, outcome.err) == (0, "")
        assert f"perplexity {expected:.3f} on heldout.txt" in outcome.out
        assert f"window {found.window}, stride {found.stride}" in outcome.out
        assert re.search(r"prefill \d+ tokens/s, decode [\d.]+ tokens/s", outcome.out)
        assert record["perplexity"]["value"] == pytest.approx(expected, rel=1e-6)
        assert record["perplexity"]["tokens"] == found.tokens
        assert record["speed"]["decode"] > 0


def test_eval_takes_families_that_cannot_be_pruned(bench: Bench, tmp_path: Path) -> None:
    code(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench.model / name, tmp_path / "model")
    outcome = command(
        "eval", tmp_path / "model", "--text", bench.heldout, "--window", 20, "--stride", 7, "--dtype", "bfloat16")
    assert (outcome.status, outcome.err) == (0, "")
    assert "window 20, stride 7" in outcome.out


def test_report_is_rebuilt_from_results_alone(pruned: Outcome, out: Path, tmp_path: Path) -> None:
    shutil.copy(out / "results.json", tmp_path)
    assert command("report", tmp_path).status == 0
    assert (tmp_path / "report.html").read_bytes() == (out / "report.html").read_bytes()


def test_analyze_writes_the_similarity_report_alone(bench: Bench, tmp_path: Path) -> None:
    arguments = ("analyze", bench.model, "-o", tmp_path / "new", "--samples", 8, "--length", 32)
    mixture = ("--calibration", f"{bench.calibration}=0.5", "--calibration", f"{bench.heldout}=0.5")
    assert command(*arguments, *mixture).status == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.json", "report.html"}
    found = Results.load(tmp_path / "new")
    assert (found.method, found.blocks, found.fit, found.perplexity) == ("analyze", [], [], None)
    assert found.analysis is not None
    assert len(found.analysis.pair_rbf_cka) == 7
    assert found.calibration.samples == 8
    assert found.recipe["calibration"] == [[str(bench.calibration), 0.5], [str(bench.heldout), 0.5]]
    page = tmp_path / "x" / "page.html"
    assert command("report", tmp_path / "new" / "results.json", "-o", page).status == 0
    assert len(page.read_bytes()) > 10_000
    refused("not empty", *arguments, *mixture, folder=tmp_path)
    with no_drawing():
        assert command(*arguments, "--calibration", bench.heldout, "--overwrite").status == 0
    assert Results.load(tmp_path / "new").calibration.source == "heldout.txt"


def test_help_and_version() -> None:
    outcome = command("--version")
    assert (outcome.status, outcome.err) == (0, "")
    assert re.fullmatch(r"kdprune \d+\.\d+\.\d+\n", outcome.out)
    for name in ("prune", "analyze", "eval", "report"):
        outcome = command(name, "--help")
        assert (outcome.status, outcome.err) == (0, "")


def shown_options(text: str) -> list[str]:
    """The flags that a help text lists, those that stand within a sentence left out."""
    return re.findall(r"^  (?:-\w, )?--(\S+)", text, re.MULTILINE)


@pytest.mark.parametrize("method", METHODS)
def test_help_is_short_and_in_groups(method: str) -> None:
    few, all_of_them = (command("prune", "--method", method, flag).out for flag in ("--help", "--help-all"))
    assert len(shown_options(few)) <= 30
    assert set(shown_options(few)) < set(shown_options(all_of_them))
    for text in (few, all_of_them):
        assert re.findall(r"^([A-Z]\w+):$", text, re.MULTILINE) == [heading.capitalize() for heading in HEADINGS]
        assert max(map(len, text.splitlines())) <= 110
    known = {**options_of(*PRUNE), **options_of(METHODS[method])}
    for item in known.values():
        if "shell" in item.places and not item.positional:
            shown = {item.flag[2:], f"[no-]{item.flag[2:]}"}
            assert shown & set(shown_options(all_of_them)), item.name
            assert bool(shown & set(shown_options(few))) is not item.rare, item.name


def test_commands_take_the_same_resources() -> None:
    resources = {item.flag[2:] for item in options_of(Resources).values()}
    for name in ("prune", "analyze", "compare", "ablate", "eval"):
        left_out = {"work-dir"} if name == "eval" else set()  # nothing is kept of an evaluation
        assert resources - left_out <= set(shown_options(command(name, "--help-all").out)), name
    healing = {item.flag[2:] for item in options_of(Heal).values()}
    assert healing <= set(shown_options(command("compare", "--help-all").out))


def test_the_page_of_options_is_current() -> None:
    page = Path(__file__).parents[1] / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == markdown()


@pytest.mark.parametrize("name", ["prune", "plan", "analyze", "compare", "ablate", "eval", "export-gguf"])
def test_the_page_of_options_has_all_that_a_command_shows(name: str) -> None:
    shown = {flag.removeprefix("[no-]") for flag in shown_options(command(name, "--help-all").out)}
    assert shown - {"help", "help-all"} - set(re.findall(r"`--([a-z0-9-]+)`", markdown())) == set()


@pytest.mark.parametrize("name", ["prune", "analyze", "compare", "ablate", "eval"])
def test_what_is_named_is_opened_before_the_model(name: str, bench: Bench, tmp_path: Path) -> None:
    """The model is damaged, which only loading it would say."""
    shutil.copytree(bench.model, tmp_path / "model")
    truncated(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("{")
    (tmp_path / "data").mkdir()
    run = (name, tmp_path / "model", *(() if name == "eval" else ("-o", tmp_path / "out")))
    missing, texts = tmp_path / "missing.txt", ["--text"] if name == "eval" else ["--calibration"]
    if name in ("prune", "compare", "ablate"):
        texts.append("--heldout")
    for flag in texts:
        refused("missing.txt', which does not exist", *run, flag, missing, folder=tmp_path)
        refused("invalid JSON in .*line 1", *run, flag, tmp_path / "rows.jsonl", folder=tmp_path)
        refused("'nothing here', which does not exist", *run, flag, "nothing here", folder=tmp_path)
    if name in ("compare", "ablate", "eval"):
        refused("unknown|expected", *run, "--suite", "no-such-task", folder=tmp_path)
        refused("without a suite|without --suite", *run, "--suite-data", tmp_path / "data", folder=tmp_path)
    if name != "eval":
        refused("output .*, which holds the work directory", *run, "--work-dir", tmp_path / "out" / "work",
                folder=tmp_path)
    refused("truncated or damaged", *run, folder=tmp_path)


def test_held_out_text_is_read_before_the_first_stage(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr("kdprune.run.pipeline.scored", lambda *_: started.append("analyse"))
    (tmp_path / "short.txt").write_text("Short.")
    refused("tokens from short.txt, expected at least", "prune", bench.model, "-o", tmp_path / "out", *bench.flags,
            "--heldout", tmp_path / "short.txt", folder=tmp_path)
    assert not started


def test_eval_within_budgets(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("eval", bench.model, "--text", bench.heldout, "--device", "cpu", "--json", tmp_path / "eval.json")
    assert command(*run).status == 0
    whole = json.loads((tmp_path / "eval.json").read_text())
    refused("got memory 'much'", *run, "--host-memory", "much", folder=tmp_path)
    monkeypatch.setattr("kdprune.runtime.memory.MODEL_SHARE", 0.0)
    outcome = command(*run)
    assert (outcome.status, outcome.err) == (0, "")
    assert "speed: not measured, layers are read from disk" in outcome.out
    streamed = json.loads((tmp_path / "eval.json").read_text())
    assert streamed["perplexity"]["value"] == pytest.approx(whole["perplexity"]["value"], rel=1e-6)
    assert streamed["speed"] is None


def test_no_command_shows_the_commands() -> None:
    outcome = command()
    assert "analyze" in outcome.out
    assert "error" not in outcome.err


# ------------------------------------------------------------------------------------------ models it refuses


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def missing_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    tiny_llama().save_pretrained(model, max_shard_size="100KB")
    sorted(model.glob("model-0000*.safetensors"))[1].unlink()


def masked(model: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(model)


def code(model: Path) -> None:
    GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(model)


def shallow(model: Path) -> None:
    tiny_llama(1).save_pretrained(model)


def infinite(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"].fill_(math.inf)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def not_a_number(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][:] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(("damage", "message"), [
    (shutil.rmtree, "which is no such directory"),
    (empty, r"without config\.json"),
    (truncated, r"model\.safetensors, which is truncated or damaged"),
    (missing_shard, r"without model-00002-of-0000\d\.safetensors"),
    (masked, "expected a causal LM"),
    (code, r"unknown model family 'gpt_bigcode'.*add"),
    (shallow, "got a model of 1 layers, 1 of them unprotected; expected at least 2"),
    (infinite, "NaN or infinite states entering layer 4 in calibration batch 0"),
    (not_a_number, "NaN or infinite states entering layer 0 in calibration batch 0"),
    (no_tokenizer, "text without a tokenizer"),
])
def test_models_that_cannot_be_pruned(
    damage: Callable[[Path], None], message: str, bench: Bench, tmp_path: Path
) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    damage(tmp_path / "model")
    refused(message, "prune", tmp_path / "model", "-o", tmp_path / "out", *bench.flags, folder=tmp_path)


def test_an_unknown_hub_id_without_a_network(bench: Bench, tmp_path: Path) -> None:
    refused("the hub did not give it", "prune", "nobody/nothing", "-o", tmp_path / "out", folder=tmp_path)


# ------------------------------------------------------------------------------------------ options it refuses


@pytest.mark.parametrize(("options", "message"), [
    (["--ratio", "0"], "ratio 0.0, expected a number between 0 and 1"),
    (["--ratio", "1"], "ratio 1.0, expected a number between 0 and 1"),
    (["--ratio", "-0.5"], "ratio -0.5, expected a number between 0 and 1"),
    (["--ratio", "nan"], "ratio nan, expected a number between 0 and 1"),
    (["--ratio", "much"], "'--ratio'.*valid number"),
    (["--ratio", "0.9"], r"ratio 0\.9, expected at most 0\.\d+, the largest"),
    (["--ratoi", "0.2"], "No such option: --ratoi; did you mean --ratio[?]"),
    (["--featuers", "8"], "No such option: --featuers; did you mean --features[?]"),
    (["--method", "kdb"], "unknown method 'kdb'; did you mean 'kdp'[?]"),
    (["--preset", "papre"], "unknown preset 'papre'; did you mean 'paper'[?]"),
    (["--context", "atention"], "unknown context 'atention'; did you mean 'attention'[?]"),
    (["--rank", "-1"], "rank -1, expected a whole number of at least 0"),
    (["--hidden", "-5"], "hidden -5, expected a whole number of at least -1"),
    (["--features", "0"], "features 0, expected a whole number of at least 1"),
    (["--samples", "0"], "samples 0"),
    (["--length", "0"], "length 0"),
    (["--blocks", "four"], "blocks 'four', expected half-open layer ranges such as 4-7,9-12"),
    (["--blocks", "4-9"], r"block \[4, 9\), expected 0 <= start < end <= 6"),
    (["--blocks", "1-2,2-4"], "at least one kept layer between"),
    (["--block-length", "6", "--protect", "0.1"], "got a model of 6 layers, 4 of them unprotected"),
    (["--device", "abacus"], "device 'abacus'"),
    (["--dtype", "int8"], "dtype 'int8'"),
    (["--recipe", "nowhere.yaml"], "cannot read the recipe 'nowhere.yaml': No such file"),
    (["surplus"], "unexpected extra argument"),
])
def test_options_that_cannot_be(options: list[str], message: str, bench: Bench, tmp_path: Path) -> None:
    refused(message, "prune", bench.model, "-o", tmp_path / "out", *bench.flags, *options, folder=tmp_path)


def test_an_option_of_another_method_is_named_as_such(bench: Bench, tmp_path: Path) -> None:
    refused(
        "got option --features, which belongs to kdp; choose that with --method", "prune", bench.model, "-o",
        tmp_path / "out", "--method", "sleb", "--features", "8", folder=tmp_path)


@no_drawing()
def test_the_largest_ratio_it_names_is_possible_and_overwriting_waits_for_it(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "stale").write_text("old")
    (tmp_path / "full" / "results.json").write_text('{"files": ["results.json", "stale"]}')
    run = ("prune", bench.model, "-o", tmp_path / "full", *bench.flags, "--overwrite", "--ratio")
    largest = re.search(r"at most (0\.\d+)", command(*run, 0.99).err)
    assert largest is not None
    refused("at most", *run, float(largest[1]) + 0.001, folder=tmp_path)  # takes nothing away
    assert command(*run, largest[1]).status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert not (tmp_path / "full" / "stale").exists()
    assert Results.load(tmp_path / "full").parameters.net_ratio >= float(largest[1])


def test_unknown_commands_name_the_nearest(tmp_path: Path) -> None:
    refused("No such command 'prnue'. Did you mean 'prune'[?]", "prnue", folder=tmp_path)


def test_texts_that_are_none(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("Too short a text to learn from.")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text"')
    (tmp_path / "folder").mkdir()
    run = ("prune", bench.model, "-o", tmp_path / "out")
    for name, message in (
        ("empty.txt", r"no text in empty\.txt"), ("blank.txt", r"no text in blank\.txt"),
        ("short.txt", r"tokens from short\.txt, expected at least 256"), ("rows.jsonl", r"rows\.jsonl line 2"),
        ("folder", "without text"), ("missing.txt", "does not exist"),
    ):
        refused(message, *run, "--calibration", tmp_path / name, folder=tmp_path)
    given = ("--calibration", bench.calibration, "--samples", 12, "--length", 32)
    refused(r"got 1 tokens from empty\.txt|tokens from empty\.txt, expected at least 32", *run, *given, "--heldout",
            tmp_path / "empty.txt", folder=tmp_path)


def test_an_interrupt_is_one_line(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_method", interrupted)
    outcome = command("prune", bench.model, "-o", tmp_path / "out", "--work-dir", "none", *bench.flags)
    assert outcome.status == 130
    assert outcome.err.splitlines()[-1] == "kdprune: error: interrupted"
    assert tree(tmp_path) == {}


def test_columns_and_names_of_texts_that_are_not_there(bench: Bench, tmp_path: Path) -> None:
    run = ("prune", bench.model, "-o", tmp_path / "out")
    alone = "got text_field 'body' without a text that has columns"
    refused(alone, *run, "--text-field", "body", folder=tmp_path)
    (tmp_path / "plain.txt").write_text("words " * 300)
    plain = str(tmp_path / "plain.txt")
    refused(alone, *run, "--text-field", "body", "--calibration", plain, folder=tmp_path)
    for given in (
        {"calibration": "rows.jsonl", "heldout": plain}, {"calibration": {"rows.jsonl": 1, plain: 1}},
        {"calibration": plain, "heldout": {"a": plain, "b": "org/name"}}, {"calibration": [{"body": "text"}]},
    ):
        DataOptions(text_field="body", **given)
    (tmp_path / "plain.txt").unlink()
    refused("got two texts by the name x", *run, "--heldout", f"x={bench.heldout}", "--heldout",
            f"x={bench.calibration}", folder=tmp_path)


def test_eval_and_report_of_what_is_not_there(bench: Bench, tmp_path: Path) -> None:
    refused("no such directory", "eval", tmp_path / "none", folder=tmp_path)
    refused("window 65, expected 2 to 64", "eval", bench.model, "--text", bench.heldout, "--window", 65,
            folder=tmp_path)
    for flag, value, message in (
        ("--window", 0, "got window 0"), ("--stride", 0, "got stride 0"), ("--text-field", "body", "without --text"),
        ("--batch-size", 3, "--batch-size without --suite"), ("--text", "", "got an empty text"),
        ("--json", "", "got an empty --json"),
        ("--device-memory", "3GiB", "got device memory 3GiB where the run computes"),
    ):
        refused(message, "eval", bench.model, flag, value, "--device", "cpu", folder=tmp_path)
    refused("got stride 40, expected 1 to 32", "eval", bench.model, "--window", 32, "--stride", 40, folder=tmp_path)
    refused("does not exist", "report", tmp_path, folder=tmp_path)
    (tmp_path / "results.json").write_text("{}")
    refused("schema version", "report", tmp_path, folder=tmp_path)


def test_the_figures_of_eval_on_standard_output(bench: Bench) -> None:
    outcome = command("eval", bench.model, "--text", bench.heldout, "--json", "-")
    assert outcome.status == 0
    assert f"perplexity {json.loads(outcome.out)['perplexity']['value']:.3f} on" in outcome.err


def test_a_single_text_may_have_a_name(bench: Bench, tmp_path: Path) -> None:
    run = ("prune", bench.model, "-o", tmp_path / "out", "--method", "shortgpt", "--calibration", bench.calibration)
    assert command(*run, "--samples", 12, "--length", 32, "--heldout", f"books={bench.heldout}").status == 0
    assert Results.load(tmp_path / "out").perplexity.dataset == "books"


def test_options_that_would_mean_something_else(bench: Bench, tmp_path: Path) -> None:
    run = ("prune", bench.model, "-o", tmp_path / "out")
    refused("got an empty calibration", *run, "--calibration", "", folder=tmp_path)
    refused("got length 5000, expected 2 to 64 tokens", *run, "--length", 5000, folder=tmp_path)
    for name, how in (("compare", "write it into a variant, kdp:kernel="), ("ablate", "write it into --base"),
                      ("analyze", "kdprune analyze has none of it")):
        refused(how, name, bench.model, "--kernel", "linear", folder=tmp_path)
    outcome = command(*run, *bench.flags, "--samples", 8000)
    assert re.search(r"calibration\.txt has \d+ rows of 32 tokens; 8,000 were asked for", outcome.out)


def test_a_prompt_that_cannot_be_continued_costs_no_run(bench: Bench, tmp_path: Path) -> None:
    """Held-out text that begins with special tokens; a context hardly longer than a prompt."""
    text = tmp_path / "text.txt"
    text.write_text(40 * "<|endoftext|>" + bench.heldout.read_text(encoding="utf-8"), encoding="utf-8")
    short = tmp_path / "short"
    shutil.copytree(bench.model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    for number, (model, heldout) in enumerate(((bench.model, text), (short, bench.heldout))):
        outcome = command("prune", model, "-o", tmp_path / str(number), "--calibration", bench.calibration, "--samples",
                          12, "--length", 32, "--method", "shortgpt", "--heldout", heldout)
        assert outcome.status == 0, outcome.err


def test_chains_of_a_later_version_and_broken_ones(bench: Bench, tmp_path: Path) -> None:
    assert command("prune", bench.model, "-o", tmp_path / "once", *bench.flags).status == 0
    file = tmp_path / "once" / "config.json"
    config = json.loads(file.read_text())
    config["kdp"]["chain"][0]["more"] = 1
    file.write_text(json.dumps(config))
    run = ("prune", tmp_path / "once", "-o", tmp_path / "twice", "--method", "shortgpt", "--ratio", 0.1,
           "--calibration", bench.calibration, "--samples", 12, "--length", 32, "--heldout", bench.heldout)
    assert command(*run).status == 0
    config["kdp"]["chain"][0]["blocks"] = "none"
    file.write_text(json.dumps(config))
    refused("whose kdp.chain is not one of earlier prunings", *run, "--overwrite", folder=tmp_path)


# ------------------------------------------------------------------------------------------ outputs it refuses


def test_outputs_that_are_taken(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    for command_name in ("prune", "analyze"):
        run = (command_name, bench.model, "--calibration", bench.calibration, "--output")
        refused("which is a file", *run, tmp_path / "file", folder=tmp_path)
        refused("which is a file", *run, tmp_path / "file" / "below", folder=tmp_path)
        refused("not empty; choose a new directory or add --overwrite", *run, tmp_path / "full", folder=tmp_path)
        if Path("/proc/self").exists():
            refused("cannot write /proc/out|/proc is read-only", *run, "/proc/out", folder=tmp_path)


def test_a_disk_that_is_full(bench: Bench, tmp_path: Path) -> None:
    with largest_file(20_000):
        refused("cannot write.*File too large", "prune", bench.model, "-o", tmp_path / "new" / "out", *bench.flags,
                folder=tmp_path)


@pytest.mark.parametrize("take", [lambda: torch.empty(2**56), lambda: bytearray(2**56),
                                  lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))])
def test_memory_that_there_is_not(take: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build_app", lambda method: lambda **given: take())
    outcome = command("families")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("kdprune: error: out of memory (")
    assert "give it less at once" in outcome.err


def test_an_error_of_ours_is_none_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build_app", lambda method: lambda **given: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        command("families")


def test_a_process_of_its_own(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "kdprune", "prune", str(tmp_path / "none"), "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert re.fullmatch(r"kdprune: error: .*no such directory.*\n", found.stderr)
    assert tree(tmp_path) == {}
