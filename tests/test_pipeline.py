"""The Python API: ``kdprune.prune``, ``kdprune.analyze`` and ``kdprune.KDP``."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from faults import largest_file
from safetensors import safe_open
from tiny_checkpoint import QUICK, Bench, no_drawing, random_ids, tiny_llama, tree
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import kdprune
from kdprune.errors import KDPruneError
from kdprune.report.page import render_page
from kdprune.report.results import Results, write_file
from kdprune.run import pipeline, resources
from kdprune.run.record import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {**QUICK, "calibration": random_ids(), "blocks": ((2, 4),)}  # no text anywhere


@pytest.fixture(scope="module")
def result(bench: Bench) -> kdprune.PruneResult:
    """One run from a path to text and back, with every part of a kernel. Shared: do not change it."""
    return kdprune.prune(str(bench.model), ratio=0.25, kernel="linear+learned+data", **bench.options)


@pytest.fixture(scope="module")
def saved(result: kdprune.PruneResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory ``result.save`` wrote."""
    folder = tmp_path_factory.mktemp("saved")
    path = result.save(folder / "out")
    assert path == folder / "out"
    assert [entry.name for entry in folder.iterdir()] == ["out"]  # no temporary sibling
    return path


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(random_ids(2, 16, seed=7)).logits


# ------------------------------------------------------------------------------------------ prune


def test_result(result: kdprune.PruneResult, bench: Bench) -> None:
    dense = AutoModelForCausalLM.from_pretrained(bench.model)
    assert all(isinstance(block, range) for block in result.blocks)
    gone = sum(len(block) - 1 for block in result.blocks)  # one slot a block stays: its context layer
    assert len(result.model.model.layers) == 6 - gone
    counts = result.metrics["parameters"]
    assert counts["dense"] == dense.num_parameters()
    assert counts["pruned"] == sum(p.numel() for p in result.model.parameters())
    assert counts["net_ratio"] == 1 - counts["pruned"] / counts["dense"] >= 0.25
    assert result.metrics["layers"] == {"dense": 6, "pruned": 6 - gone, "first": None}
    assert set(result.metrics) == {"layers", "parameters", "perplexity", "speed", "kv_cache_bytes_per_token"}
    assert json.loads(json.dumps(result.metrics)) == result.metrics
    cache = result.metrics["kv_cache_bytes_per_token"]
    assert cache == {"dense": 6 * 2 * 2 * 8 * 4, "pruned": (6 - gone) * 2 * 2 * 8 * 4}


def test_the_card_names_the_licence_of_the_dense_models_card(result: kdprune.PruneResult, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    of_it = result.results.model_copy(update={"model": str(tmp_path / "dense")})
    path = dataclasses.replace(result, results=of_it).save(tmp_path / "out")
    assert "\nlicense: apache-2.0\n" in (path / "README.md").read_text()


def test_plain_saving_and_loading(result: kdprune.PruneResult, tmp_path: Path) -> None:
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "KDPLlamaForCausalLM"
    assert torch.equal(logits(loaded), logits(result.model))
    assert torch.isfinite(logits(loaded)).all()


def test_saved_checkpoint(result: kdprune.PruneResult, saved: Path, bench: Bench) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(loaded), logits(result.model))
    with safe_open(saved / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(result.model.state_dict())
    text = "A house by the sea"
    assert AutoTokenizer.from_pretrained(saved)(text) == AutoTokenizer.from_pretrained(bench.model)(text)
    assert GenerationConfig.from_pretrained(saved).eos_token_id == 0
    config = json.loads((saved / "config.json").read_text())
    assert config["kdp"]["blocks"] == [[block.start, block.stop] for block in result.blocks]


def test_results_json_has_what_the_contract_names(result: kdprune.PruneResult, saved: Path, bench: Bench) -> None:
    record = json.loads((saved / "results.json").read_text(encoding="utf-8"))
    assert record["model"] == str(bench.model)
    assert (record["method"], record["seed"], record["family"]) == ("kdp", 0, "llama")
    assert record["blocks"] == [[block.start, block.stop] for block in result.blocks]
    assert record["layers"].keys() >= {"dense", "pruned"}
    assert record["parameters"].keys() >= {"dense", "pruned", "net_ratio"}
    assert record["perplexity"].keys() >= {"dense", "pruned", "dataset", "window", "stride", "tokens"}
    assert (record["perplexity"]["window"], record["perplexity"]["stride"]) == (64, 32)
    for part in ("prefill", "decode"):
        assert record["speed"][part].keys() >= {"dense", "pruned", "ratio"}
        assert all(math.isfinite(value) for value in record["speed"][part].values())
    assert len(record["fit"]) == len(record["blocks"])
    for fit, (start, end) in zip(record["fit"], record["blocks"], strict=True):
        assert fit["step1"]["loss"]
        assert fit["step3"]["loss"]
        assert len(fit["k_step_error"]) == len(fit["bound"]) == end - start
        assert all(math.isfinite(fit[name]) for name in ("explained_variance", "B_A", "R_phi", "state_error"))
        assert all(error <= bound for error, bound in zip(fit["k_step_error"], fit["bound"], strict=True))
    stages = {"load model", "calibration text", "analyse", "layer states", "evaluate"}
    assert stages <= record["seconds"].keys()
    assert all(seconds >= 0 for seconds in record["seconds"].values())
    assert record["peak_memory_bytes"] > 10**7
    assert {"python", "kdprune", "torch", "transformers"} <= record["versions"].keys()
    assert record["samples"][0]["dense"]
    assert record["calibration"]["tokens"] == 12 * 32
    assert Results.load(saved).model_dump(exclude={"seconds"}) == result.results.model_dump(exclude={"seconds"})


def test_the_recipe_holds_every_option(result: kdprune.PruneResult, bench: Bench) -> None:
    recipe = result.results.recipe
    for name, value in {**bench.options, "ratio": 0.25, "preset": "default", "context": "attention"}.items():
        assert recipe[name] == (str(value) if isinstance(value, Path) else value)


def test_report(result: kdprune.PruneResult, tmp_path: Path) -> None:
    undrawn = result.results.model_copy(update={"fit": [], "analysis": None})  # with pictures: test_command_line.py
    assert dataclasses.replace(result, results=undrawn).report(tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_page(undrawn)


def test_saving_again(
    result: kdprune.PruneResult, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (saved / "report.html").read_text(encoding="utf-8")  # drawn once
    monkeypatch.setattr(pipeline, "write_page", lambda results, path: write_file(path, page))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("old")
    (tmp_path / "full" / "results.json").write_text('{"files": ["mine", "results.json"]}')
    before = tree(tmp_path)
    with pytest.raises(KDPruneError, match="not empty"):
        result.save(tmp_path / "full")
    # The weights take 200 kB, the page more than 250 kB: the limit stops the page, after all else is written.
    with largest_file(250_000), pytest.raises(KDPruneError, match=r"cannot write.*File too large"):
        result.save(tmp_path / "full", overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@no_drawing()
def test_a_loaded_model_and_token_ids_need_no_tokenizer(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, expected = model.config.to_dict(), logits(model)
    result = kdprune.prune(model, tmp_path / "out", **IDS)
    assert result.blocks == [range(2, 4)]
    assert result.tokenizer is None
    assert result.results.samples == []
    assert result.results.perplexity.dataset.startswith("held-out rows of token ids 12 × 32")
    assert result.model.dtype == dtype
    # The dense model is as it was.
    assert model.config.to_dict() == config
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(logits(loaded), logits(result.model))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_same_seed_same_bits() -> None:
    model = tiny_llama()
    options = {**IDS, "kernel": "learned", "channels": None, "features": 6}
    first, second, other = (kdprune.prune(model, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(logits(first.model), logits(second.model))
    assert not torch.equal(logits(first.model), logits(other.model))
    assert first.results.perplexity == second.results.perplexity


def test_a_loaded_model_keeps_its_dtype() -> None:
    model = tiny_llama()
    assert kdprune.prune(model, dtype="bfloat16", **IDS).model.dtype == model.dtype == torch.float32


@pytest.mark.parametrize("fast", [False, True])
@no_drawing()
def test_a_cpu_without_the_arithmetic_computes_in_float32_and_saves_as_it_was(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "computes_in", lambda dtype, device: fast)
    seen: list[torch.dtype] = []
    monkeypatch.setattr(pipeline, "evaluate", lambda dense, *rest: seen.append(dense.dtype) or evaluate(dense, *rest))
    tiny_llama(8).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    result = kdprune.prune(
        tmp_path / "dense", tmp_path / "out", calibration=random_ids(8, 32), progress=False, **QUICK)
    assert seen == [torch.bfloat16 if fast else torch.float32]
    dense, saved = weights(tmp_path / "dense"), weights(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16} == {result.model.dtype}
    kept = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(dense[kept], saved[kept])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint in one file."""
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_held_out_text_as_given() -> None:
    held = random_ids(3, 20, seed=3)
    found = kdprune.prune(tiny_llama(), heldout=held, **IDS).results.perplexity
    assert (found.dataset, found.tokens) == ("token ids 3 × 20", 3 * 19)


def test_several_texts_at_several_windows() -> None:
    held = {"one": random_ids(3, 20, seed=3), "two": random_ids(2, 40, seed=4)}
    found = kdprune.prune(tiny_llama(), heldout=held, windows=(32, 16), **IDS).results
    shown = [found.perplexity, *found.texts]
    assert [(one.dataset, one.window, one.tokens) for one in shown] == [
        ("one", 32, 57), ("one", 16, 57), ("two", 32, 78), ("two", 16, 78)]
    alone = kdprune.prune(tiny_llama(), heldout=held["two"], windows=(16,), **IDS).results.perplexity
    assert alone.pruned == pytest.approx(found.texts[2].pruned)
    assert 0 < alone.divergence == pytest.approx(found.texts[2].divergence)
    with pytest.raises(KDPruneError, match="got window 65, expected 2 to 64 tokens"):
        kdprune.prune(tiny_llama(), heldout=held, windows=(65,), **IDS)


def test_a_second_window_of_the_calibration_length_where_that_is_much_shorter() -> None:
    found = kdprune.prune(tiny_llama(), heldout=random_ids(3, 50), **{**IDS, "calibration": random_ids(6, 32)}).results
    assert [one.window for one in (found.perplexity, *found.texts)] == [64, 32]
    assert found.texts[0].tokens == found.perplexity.tokens


def test_held_out_token_ids_are_cut_to_whole_rows_where_a_number_is_given() -> None:
    found = [kdprune.prune(tiny_llama(), heldout=random_ids(9, 20), heldout_tokens=most, **IDS) for most in (None, 40)]
    assert [one.results.perplexity.tokens for one in found] == [9 * 19, 2 * 19]
    with pytest.raises(KDPruneError, match="got no text in a mapping"):
        kdprune.prune(tiny_llama(), heldout={}, **IDS)


def test_padding_is_no_part_of_a_samples_prompt(bench: Bench) -> None:
    held = random_ids(3, 20, seed=3)
    padded = {"input_ids": torch.cat([torch.zeros(3, 12, dtype=torch.long), held], dim=1),
              "attention_mask": torch.cat([torch.zeros(3, 12, dtype=torch.long), torch.ones_like(held)], dim=1)}
    first, second = (kdprune.prune(bench.model, **{**bench.options, "heldout": text}) for text in (held, padded))
    assert first.results.samples[0].prompt == second.results.samples[0].prompt


@no_drawing()
def test_an_evaluation_of_rounded_weights_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "computes_in", lambda dtype, device: False)
    tiny_llama(8).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    options = {**QUICK, "calibration": random_ids(8, 32), "heldout": random_ids(3, 40), "progress": False}
    first, second = (kdprune.prune(tmp_path / "dense", work_dir=tmp_path / "work", dtype=dtype, **options)
                     for dtype in (None, "float32"))
    alone = kdprune.prune(tmp_path / "dense", dtype="float32", **options)
    assert first.results.perplexity.pruned != second.results.perplexity.pruned
    assert second.results.perplexity == alone.results.perplexity


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "of-its-own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@no_drawing()
def test_a_model_with_code_of_its_own_is_saved_with_it(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "own_code.py").write_text(OWN, encoding="utf-8")
    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "of-its-own", "architectures": ["OwnModel"], "auto_map": {
        "AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = kdprune.prune(
        tmp_path / "dense", tmp_path / "out", "shortgpt", calibration=random_ids(), heldout=random_ids(3, 20),
        trust_remote_code=True, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (type(loaded).__name__, loaded.config.num_hidden_layers) == ("OwnModel", result.metrics["layers"]["pruned"])
    assert torch.equal(logits(loaded), logits(result.model))


def test_a_dtype_of_torch_is_one(bench: Bench) -> None:
    found = kdprune.prune(str(bench.model), method="shortgpt", dtype=torch.bfloat16, calibration=bench.calibration,
                          heldout=bench.heldout, samples=12, length=32, progress=False)
    assert found.results.recipe["dtype"] == "bfloat16"
    assert found.model.dtype == torch.bfloat16


def test_experts_run_as_the_user_s_model_runs_them(tmp_path: Path) -> None:
    """Forecasts are of a model of the same config, and what is loaded back runs as what was saved."""
    for way in ("grouped_mm", "batched_mm"):
        model = build("mixtral")
        model.set_experts_implementation(way)
        kdprune.prune(model, tmp_path / way, kernel="linear", context="none", calibration=random_ids() % 60 + 3,
                      heldout=random_ids(3, 20) % 60 + 3, progress=True)
        assert model.config._experts_implementation == way


def test_two_rows_are_enough() -> None:
    found = kdprune.prune(tiny_llama(), **{**IDS, "calibration": random_ids(2)}).results
    assert found.calibration.samples == 2
    assert math.isfinite(found.fit[0].state_error)


@pytest.mark.parametrize(("options", "message"), [
    ({"ratoi": 0.2}, "unknown option of kdp 'ratoi'; did you mean 'ratio'"),
    ({"calibratoin": "a.txt"}, "did you mean 'calibration'"),
    ({"method": "kpd"}, "unknown method 'kpd'; did you mean 'kdp'"),
    ({"ratio": math.nan}, "ratio nan"),
    ({"heal": "lm", "heal_tokens": 0}, "got heal_tokens 0"),
    ({"model": 7}, "model of type int"),
    ({"calibration": ["text"]}, "text without a tokenizer"),
    ({"calibration": "text"}, "got 'text', which does not exist"),
    ({"calibration": random_ids().float()}, "token ids as float32"),
    ({"calibration": random_ids() + 300}, r"token id \d+ .*expected 0 to 319"),
    ({"calibration": random_ids(2, 4)}, "got 8 tokens"),
    ({"calibration": random_ids(1, 60)}, "got one row of calibration from token ids 1 × 60, expected 2 or more"),
])
def test_one_line_errors(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"model": tiny_llama(), "output_dir": tmp_path / "out", **IDS, **options}
    with pytest.raises(KDPruneError, match=message) as caught:
        kdprune.prune(**arguments)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {}


# ------------------------------------------------------------------------------------------ the dataclass


def test_method_is_a_frozen_dataclass_with_the_options_of_prune() -> None:
    method = kdprune.KDP(ratio=0.3, kernel="learned", features=16, hidden=8, rank=4)
    assert (method.ratio, method.features, method.hidden, method.rank) == (0.3, 16, 8, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.ratio = 0.2  # type: ignore[misc]
    assert dataclasses.replace(method, ratio=0.2).features == 16
    chosen = {**QUICK, "channels": None, "features": 6, "blocks": ((1, 3),), "preset": "paper"}
    options = dataclasses.asdict(kdprune.KDP(**chosen))
    result = kdprune.prune(tiny_llama(), calibration=random_ids(), **options)
    assert result.blocks == [range(1, 3)]
    assert {name: result.results.recipe.get(name) for name in options} == {
        **options, "blocks": [[1, 3]], "without": []}


# ------------------------------------------------------------------------------------------ analyze


@torch.no_grad()
def test_scores_are_those_of_the_states() -> None:
    model, ids = tiny_llama(), random_ids(8, 32)
    scores = kdprune.analyze(model, ids)
    states = [state.flatten(0, 1) for state in model.model(ids, output_hidden_states=True).hidden_states[:-1]]
    assert set(scores) == {
        "cosine", "linear_cka", "rbf_cka", "relative_update", "state_norm", "largest_norm", "median_norm",
        "massive_share", "massive_move", "massive_growth"}
    assert all(isinstance(scores[name], np.ndarray) for name in scores)
    for name in ("cosine", "linear_cka", "rbf_cka"):
        assert scores[name].shape == (7, 7)
        # Below the diagonal the scores say the same, or nothing.
        assert np.isfinite(scores[name][np.triu_indices(7)]).all()
        np.testing.assert_allclose(np.diag(scores[name]), 1, atol=1e-4)
    for first, second in itertools.combinations(range(6), 2):
        cosine = torch.cosine_similarity(states[first], states[second], dim=-1).mean()
        assert scores["cosine"][first, second] == pytest.approx(float(cosine), abs=1e-4)
    for layer in range(5):
        update = (states[layer + 1] - states[layer]).norm(dim=-1) / states[layer].norm(dim=-1)
        assert scores["relative_update"][layer] == pytest.approx(float(update.mean()), rel=1e-4)
        assert scores["state_norm"][layer] == pytest.approx(float(states[layer].norm(dim=-1).mean()), rel=1e-4)
    assert (scores.tokens, scores.protected) == (8 * 32, (1, 1))


def test_calibration_of_every_kind_gives_the_same_scores(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bench.calibration.read_bytes())
    text = bench.calibration.read_text(encoding="utf-8")
    options: dict[str, Any] = {"samples": 8, "length": 32}
    first = kdprune.analyze(bench.model, bench.calibration, **options)
    model = AutoModelForCausalLM.from_pretrained(bench.model)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    for source in (str(bench.calibration), tmp_path, [text], {bench.calibration: 1.0}):
        again = kdprune.analyze(model, source, tokenizer=tokenizer, **options)
        for name in first:
            np.testing.assert_array_equal(again[name], first[name])


def test_plot(tmp_path: Path) -> None:
    scores = kdprune.analyze(tiny_llama(2), random_ids(4))
    assert scores.plot(tmp_path / "scores.png") == tmp_path / "scores.png"
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KDPruneError):
        scores.plot(tmp_path / "scores.docx")


@no_drawing()
def test_the_bundled_model_and_text_are_the_defaults(tmp_path: Path) -> None:
    scores = kdprune.analyze(samples=4, length=32, output_dir=tmp_path / "out")
    found = Results.load(tmp_path / "out")
    assert scores["cosine"].shape == (found.layers.dense + 1,) * 2
    assert "bundled" in found.model
    assert "model" not in found.recipe
    assert found.calibration.source == "calibration.txt"
