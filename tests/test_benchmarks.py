"""The instruments: random checkpoints, a measured run, and pages made from records."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cost  # noqa: E402
import memory  # noqa: E402
import pruning_run  # noqa: E402
import random_checkpoint  # noqa: E402
import served_speed  # noqa: E402
import speed  # noqa: E402
import speed_page  # noqa: E402

TINY = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speed.SHAPES, "tiny", TINY)
        return random_checkpoint.write_checkpoint(
            "tiny", tmp_path_factory.mktemp("shapes") / "tiny", torch.float32, shard=2**21)


def test_a_random_checkpoint_is_one_of_transformers(tiny: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1, "one shard is no test of sharding"
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    with torch.no_grad():
        states = model(torch.arange(64)[None], output_hidden_states=True).hidden_states
    for before, after in itertools.pairwise(states[:-1]):  # the last one is taken behind the final norm
        assert 0.02 < float((after - before).norm() / before.norm()) < 0.5


def test_the_same_seed_writes_the_same_weights(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.SHAPES, "tiny", TINY)
    again = random_checkpoint.write_checkpoint("tiny", tmp_path / "again", torch.float32)  # one shard
    other = random_checkpoint.write_checkpoint("tiny", tmp_path / "other", torch.float32, seed=1)
    first = {name: value for file in sorted(tiny.glob("*.safetensors")) for name, value in load_file(file).items()}
    same, different = (load_file(next(folder.glob("*.safetensors"))) for folder in (again, other))
    assert first.keys() == same.keys()
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not torch.equal(first["model.embed_tokens.weight"], different["model.embed_tokens.weight"])


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    folder = random_checkpoint.write_checkpoint("bundled", tmp_path, torch.bfloat16)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in names
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Any]:
    work = str(tmp_path_factory.mktemp("work"))
    options = {"kernel_epochs": 1, "refine_epochs": 2, "kernel_tokens": 256, "protect": 0.0, "kernel": "learned",
               "ranking": "similarity"}
    job = pruning_run.Job(model=str(tiny), tokens=512, length=32, ratio=0.01, options=options, work_dir=work)
    return json.loads(json.dumps(pruning_run.measure(job)))


def test_a_run_is_measured_stage_by_stage(measured: dict[str, Any]) -> None:
    assert measured["tokens"] == 512
    assert measured["parameters"][0] > measured["parameters"][1]
    steps = cost.by_step(measured)
    assert set(steps) == {"analyse", "layer states", "kernel", "refine", "rest", "save and verify"}
    assert sum(steps.values()) == pytest.approx(sum(
        value["seconds"] for stage, value in measured["stages"].items() if not stage.startswith(("load", "calib"))))
    peaks = [value["peak_bytes"] for value in measured["stages"].values()]
    assert 0 < peaks[0] <= max(peaks) <= measured["peak_bytes"]


@pytest.mark.parametrize(("stem", "page"), [
    ("cost", cost.page), ("memory", memory.page), ("speed", speed_page.page), ("served", served_speed.page)])
def test_pages_of_instruments_are_what_their_records_give(stem: str, page: Callable[[Any], str]) -> None:
    found = list(BENCHMARKS.glob(f"{stem}_*.json"))
    assert found
    for record in found:
        assert record.with_suffix(".md").read_text(encoding="utf-8") == page(json.loads(record.read_text("utf-8")))


def test_a_page_shows_what_was_measured(measured: dict[str, Any]) -> None:
    facts = {"hardware": "a machine", "threads": 1, "torch": "2", "month": "202611", "command": "x", "clock": "."}
    found = {**measured, "forward_seconds": [0.5, 1.5], "peak_bytes": 3 * 2**30}
    text = cost.page({**facts, "runs": {"0.1b": found}})
    row = next(line for line in text.splitlines() if line.startswith("| 0.1b"))
    assert f"| {cost.by_step(found)['analyse']:.2f} |" in row
    assert "| 3 GiB |" in row


def test_what_is_served_is_measured_against_the_ideal(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("PROMPT", 12), ("WRITTEN", 3), ("ROUNDS", 1)):
        monkeypatch.setattr(served_speed, name, value)
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.num_hidden_layers = 3
    half = AutoModelForCausalLM.from_config(config)
    half.save_pretrained(tmp_path / "half")
    served_speed.run(str(tiny), str(tmp_path / "half"), ["transformers"], [2], tmp_path / "served.json")
    record = json.loads((tmp_path / "served.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(tiny)
    table = 0 if whole.config.tie_word_embeddings else whole.get_input_embeddings().weight.numel()
    assert record["ideal"]["decode"] == pytest.approx(
        (whole.num_parameters() - table) / (half.num_parameters() - table))
    assert 1 < record["ideal"]["prefill"] < 2
    [row] = record["rows"]
    text = served_speed.page(record)
    for kind in ("prefill", "decode"):
        assert f"| **{row['pruned'][kind] / row['dense'][kind]:.2f}×** | {record['ideal'][kind]:.2f}× |" in text
