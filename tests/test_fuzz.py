"""Whatever a user gives, in a shell, a file or Python: a result or one line, never a traceback."""

import contextlib
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import Bench, command, no_drawing, tiny_llama

import kdprune
from kdprune.cli.evaluate import EVAL
from kdprune.cli.plan import PlanOptions
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.options import Option, options_of
from kdprune.run.option_groups import ABLATE, ANALYZE, COMPARE, PRUNE

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
FEW, MANY = 20, 500
COMMANDS: dict[str, dict[str, Option]] = {
    "prune": options_of(*PRUNE, METHODS["kdp"]), "analyze": options_of(*ANALYZE), "compare": options_of(*COMPARE),
    "ablate": options_of(*ABLATE), "eval": EVAL, "plan": options_of(PlanOptions, METHODS["kdp"]),
}
# Numbers are small where they are counts: a run that is asked to take a year takes one.
NUMBERS = ("0", "1", "2", "3", "-1", "0.5", "1e-3", "nan", "inf", "-inf", "1e999", "0x10", "١")
# What may be pruned, compared or measured: a dense model, what was pruned before, and one that is damaged.
MODELS = ("model", "stand-ins", "narrow", "sliced", "stock", "broken")
WORDS = ("", " ", "none", "auto", "x", "-", "--", "~", "~nobody/x", ".", "..", "/", "é\u2212", "\udcff", "a=b", "a,b:c",
         "word " * 999, "4-7", "2-4", "8bit", "shortgpt", "kdp:rank=x", "org/name", "file.gguf", "%s{}")
ROWS: tuple[Any, ...] = (
    None, 7, "text", [], {}, {"text": "words " * 400}, {"text": None}, {"text": 7}, {"text": ["a"]}, {"messages": []},
    {"messages": [{"role": "user", "content": "hi"}]}, {"messages": [None]}, {"conversations": [{"from": "x"}]},
    {"prompt": "a", "completion": None}, {"content": "words " * 400}, {"": ""})
NAMES = ("a.txt", "a.TXT", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.xz", "a.txt.bz2",
         "a.yaml", "a.gguf", "a", "results.json", "config.json", "a\u2212é.jsonl")


def contents() -> st.SearchStrategy[bytes]:
    """What may stand in a file: bytes, or rows in some of the forms that rows have."""
    rows = st.lists(st.sampled_from(ROWS), max_size=4)
    forms: list[Callable[[list[Any]], bytes]] = [
        lambda rows: "\n".join(map(json.dumps, rows)).encode(),
        lambda rows: json.dumps(rows).encode("utf-8-sig"),
        lambda rows: json.dumps(rows).encode("utf-16"),
        lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
        lambda rows: gzip.compress(json.dumps(rows).encode())[:-4],
        lambda rows: ("id,text\n" + "\n".join(f"1,{row}" for row in rows)).encode(),
        lambda rows: b"PAR1" + json.dumps(rows).encode() + b"PAR1",
    ]
    texts = (b"", b"\0" * 99, b"[" * 9999, b"{", b"\xff\xfe", b"ratio: [", b"ratio: 2020-13-45", b"method: 7",
             b"? a\n: b", b"&a [*a]", b"text\n\"", b"plain words " * 200, b'{"model_type": 7}',
             b'{"model_type": "llama"}', b'{"schema_version": 1}', b"1e999", b"GGUF", b'{"files": 7}')
    return st.one_of(st.sampled_from(texts), st.binary(max_size=40),
                     st.builds(lambda form, rows: form(rows), st.sampled_from(forms), rows))


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[tuple[str, str]], dict[str, bytes], str]:
    """A command, flags with values, files by name, and the name of its argument."""
    name = draw(st.sampled_from([*COMMANDS, "report"]))
    known = [item.flag for item in COMMANDS.get(name, {}).values() if "shell" in item.places and not item.positional]
    extra = ["--json", "--recipe", "--nothing"] if name in ("eval", "plan", "prune") else ["--output"]
    files = draw(st.dictionaries(st.sampled_from(NAMES), contents(), max_size=2))
    values = st.sampled_from([*NUMBERS, *WORDS, *files])
    flags = draw(st.lists(st.tuples(st.sampled_from([*known, *extra]), values), max_size=3))
    for file in files:
        flags.append((draw(st.sampled_from(["--calibration", "--heldout", "--text", "--recipe", "--output"])), file))
    return name, flags, files, draw(st.sampled_from([*2 * MODELS, *WORDS, *files]))


@pytest.fixture(scope="module")
def world(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to be in: a model of three layers, results of one of four, and one that is damaged."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(bench.model, folder / "model")
    tiny_llama(3).save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    given: dict[str, Any] = {name: bench.options[name] for name in ("calibration", "heldout", "samples", "length")}
    dense, ways = folder / "dense", {"stand-ins": "linear", "narrow": "llm-pruner", "sliced": "slicegpt",
                                     "stock": "shortgpt"}
    shutil.copytree(bench.model, dense)
    tiny_llama(4).save_pretrained(dense)
    for name, method in ways.items():
        own = {"blocks": ((1, 2),)} if method in ("linear", "shortgpt") else {"ratio": 0.1}
        with no_drawing():
            kdprune.prune(dense, folder / name, method=method, work_dir="none", **own, **given)
    return folder


def try_command(tried: tuple[str, list[tuple[str, str]], dict[str, bytes], str], world: Path, bench: Bench) -> None:
    """Runs a command in a fresh folder beside the models: success, or one line."""
    name, flags, files, argument = tried
    here = world / "here"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    for file, content in files.items():
        (here / file).write_bytes(content)
    argument = str(world / argument) if argument in MODELS else argument
    data = ["--calibration", str(bench.calibration), "--samples", "8", "--length", "32"]
    base = {"prune": bench.flags, "analyze": data, "ablate": [*data, "--only", "none"],
            "compare": [*data, "--heldout", str(bench.heldout), "--methods", "shortgpt", "--seeds", "1"],
            "eval": ["--text", str(bench.heldout)]}.get(name, [])
    if name in ("prune", "compare"):
        base = [*base, "--work-dir", "none"]
    with contextlib.chdir(here), no_drawing():
        outcome = command(name, argument, *base, *(text for pair in flags for text in pair))
    assert outcome.status in (0, 2), outcome
    if outcome.status:
        last = outcome.err.splitlines()[-1]
        assert last.startswith("kdprune: error: "), outcome.err
        assert sum(line.startswith("kdprune: error: ") for line in outcome.err.splitlines()) == 1, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    for model in MODELS:
        assert (world / model / "config.json").is_file()


def options_for(examples: int) -> Any:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


def test_a_few_command_lines(world: Path, bench: Bench) -> None:
    options_for(FEW)(given(command_lines())(lambda tried: try_command(tried, world, bench)))()


@pytest.mark.slow
def test_many_command_lines(world: Path, bench: Bench) -> None:
    options_for(MANY)(given(command_lines())(lambda tried: try_command(tried, world, bench)))()


VALUES: tuple[Any, ...] = (
    "", "x", " ", "a\0b", "word " * 999, b"x", 0, 1, -1, 10**30, 0.5, float("nan"), float("inf"), True, [], {}, (), [1],
    ["text"], [None], {"x": 1}, {"input_ids": [[1]]}, {"input_ids": "x"}, object(), type, Path("nothing"),
    torch.ones(1), torch.ones(2, 40, dtype=torch.long), torch.device("cpu"), torch.float16, range(3), {1, 2},
    [("a", 1)])
# Counts of what is trained: what may be huge takes as long.
LONG = ("epochs", "tokens", "samples", "sequences", "iterations")


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``prune`` with values of any kind."""
    known = [item.name for item in COMMANDS["prune"].values() if "python" in item.places]
    found = draw(st.dictionaries(st.sampled_from([*known, "recipe", "nothing"]), st.sampled_from(VALUES), max_size=2))
    kept = {name: value for name, value in found.items()
            if not (value == 10**30 if isinstance(value, int) else False) or not any(part in name for part in LONG)}
    return {"over": draw(st.sampled_from(MODELS)), **kept}


def try_arguments(chosen: dict[str, Any], world: Path, bench: Bench) -> None:
    """Prunes with these arguments over some that are right: success, or an error of one line."""
    here = world / "here"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    told, model = "", world / chosen["over"]
    rest = {name: value for name, value in chosen.items() if name != "over"}
    with contextlib.chdir(here), no_drawing():
        try:
            kdprune.prune(**{"model": model, **bench.options, **rest})
        except KDPruneError as error:
            told = str(error)
    assert "\n" not in told


def test_a_few_arguments(world: Path, bench: Bench) -> None:
    options_for(FEW)(given(arguments())(lambda chosen: try_arguments(chosen, world, bench)))()


@pytest.mark.slow
def test_many_arguments(world: Path, bench: Bench) -> None:
    options_for(MANY)(given(arguments())(lambda chosen: try_arguments(chosen, world, bench)))()
