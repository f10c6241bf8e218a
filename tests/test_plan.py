"""``kdprune plan``: its figures against pruned models of every family, the runs on record, the paper's arithmetic."""

import itertools
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EARLIER, build
from pruned import prune
from safetensors import safe_open
from tiny_checkpoint import QUICK, Bench, command
from transformers import AutoConfig

from kdprune.errors import KDPruneError
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods.common.method import boundaries_held
from kdprune.methods.common.selection import candidate_blocks, open_layers
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.checkpoint import save_model
from kdprune.model.edits import Substitute
from kdprune.model.surgery import apply_edits, context_layer
from kdprune.planning.forecast import DEVICES, Work, device_of_name
from kdprune.planning.meta import meta_model
from kdprune.planning.plan import PruningPlan, plan
from kdprune.report.results import Results
from kdprune.runtime.machine import generator

ROOT = Path(__file__).parent.parent
CONFIGURATIONS = ROOT / "docs" / "real-models"
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan_checks  # noqa: E402
import real_models  # noqa: E402

LLAMA2 = CONFIGURATIONS / "llama-2-7b.json"
# As the hub shows them, from the headers of the checkpoints.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-3-8b": 8_030_261_248,
    "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984, "qwen3-8b": 8_190_735_360,
}


def planned(name: str, folder: Path, **options: Any) -> PruningPlan:
    """The plan of a tiny model of tests/families.py, from its config file alone."""
    build(name).config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return plan(folder, length=16, **options)


def test_the_papers_net_ratio_on_llama2() -> None:
    found = plan(LLAMA2, preset="paper", blocks="4-8,20-24")
    d = 4096
    layer = 4 * d * d + 3 * d * 11008 + 2 * d
    stand_in = d * (d // 2) + d // 2 + 2 * (d // 2) * d + d + d * d + d  # KDP, section 6
    assert found.added == [stand_in] * 2
    assert found.dense.parameters - found.pruned.parameters == 8 * layer - 2 * stand_in
    assert round(found.net_ratio, 4) == 0.2278
    outcome = command("plan", LLAMA2, "--preset", "paper", "--blocks", "4-8,20-24")
    assert outcome.status == 0, outcome.err
    assert "22.8\N{NO-BREAK SPACE}% net" in outcome.out
    assert "5,203,255,296" in outcome.out


def test_two_blocks_of_four_is_what_the_paper_form_takes_for_that_ratio() -> None:
    found = plan(LLAMA2, preset="paper", ratio=0.2278, block_length=4)
    assert [end - start for start, end in found.blocks] == [4, 4]
    assert not found.given


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_real_models_have_the_published_number_of_parameters(name: str) -> None:
    found = plan(CONFIGURATIONS / f"{name}.json", ratio=0.25)
    assert found.dense.parameters == PUBLISHED[name]
    assert found.dense.disk_bytes == 2 * PUBLISHED[name]
    assert 0.25 <= found.net_ratio < 0.2502  # fill leaves less than one feature a block


@pytest.mark.parametrize(("name", "options"), [
    *((name, {"channels": 6}) for name in EARLIER),
    *((name, {"preset": "paper", "features": 6}) for name in ("llama3.1", "opt", "opt-350m", "gpt2"))])
def test_figures_equal_those_of_a_pruned_model(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    blocks = ((1, 3), (4, 6))
    found = planned(name, tmp_path, blocks=blocks, dtype="float32", **options)
    dense = build(name)
    shape = KDP(**options).shape(dense)
    edits = []
    for start, end in blocks:
        stand_in = shape.build(generator(start))
        source = start if shape.context else None
        context = None if source is None else context_layer(dense, source, stand_in)
        edits.append(Substitute(range(start, end), stand_in, context, source))
    pruned = apply_edits(dense, edits)
    for side, model, folder in ((found.dense, dense, "dense"), (found.pruned, pruned, "pruned")):
        assert side.parameters == model.num_parameters()
        assert side.layers == model.config.num_hidden_layers
        assert side.kv_bytes == kv_cache_bytes_per_token(model)
        save_model(model, tmp_path / folder, None)
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            held = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (no mapping)
        assert side.disk_bytes == held
    assert found.net_ratio == 1 - pruned.num_parameters() / dense.num_parameters()
    assert found.pruned.prefill_flops < found.dense.prefill_flops


def test_without_blocks_the_least_removal_at_or_above_the_ratio(tmp_path: Path) -> None:
    found = planned("llama3", tmp_path, ratio=0.2, channels=6, protect=0.0, max_block=3)
    dense = build("llama3")
    candidates = candidate_blocks(open_layers(6, 0.0), 2, 3)
    total, layer = dense.num_parameters(), sum(p.numel() for p in dense.model.layers[0].parameters())
    removals = set()
    for count in (1, 2, 3):
        for chosen in itertools.combinations(candidates, count):
            if all(second.start > first.stop for first, second in itertools.pairwise(chosen)):
                removals.add(sum(map(len, chosen)) * layer - count * found.added[0])
    least = min(removed for removed in removals if removed >= round(0.2 * total))
    assert total - found.pruned.parameters == least
    spare = planned("llama3", tmp_path, ratio=0.2, protect=0.0, max_block=3)
    assert 0.2 <= spare.net_ratio <= 0.2 + 40 * 3 / total * len(spare.blocks)  # one channel has about 3 d


def test_what_layers_of_fewer_heads_cache_is_counted_layer_by_layer(tmp_path: Path) -> None:
    narrow = prune(build("llama3"), "heads")
    save_model(narrow, tmp_path / "narrow", None)
    found = plan(tmp_path / "narrow", blocks=((2, 4),), channels=6, samples=4, length=8)
    assert found.dense.kv_bytes == kv_cache_bytes_per_token(narrow)
    assert found.dense.kv_bytes < kv_cache_bytes_per_token(build("llama3"))


def test_a_real_run_ended_where_the_plan_says(bench: Bench, alone: Path) -> None:
    results = Results.load(alone / "results.json")
    found = plan(bench.model, blocks=results.blocks, samples=12, length=32,
                 **{name: QUICK[name] for name in ("channels", "protect")})
    assert found.pruned.parameters == results.parameters.pruned
    assert found.pruned.kv_bytes == results.kv_cache_bytes_per_token.pruned


# Predicted / measured: how far off a figure may be. The smallest model spends its time on calls, which nothing counts.
BOUNDS: dict[str, tuple[float, float]] = defaultdict(lambda: (0.75, 1.33), {
    "one forward pass": (0.9, 1.1), "peak memory": (0.85, 1.15), "peak memory of the analysis": (0.9, 1.1),
    "speed-up of reading, from operations": (0.98, 1.06)})
SMALLEST = (0.35, 1.4)


def test_figures_agree_with_the_runs_on_record() -> None:
    checks = plan_checks.checks()
    assert len({check.run for check in checks}) > 10
    assert {"net ratio", "parameters left", "peak memory", "kernel", "damage", "refine", "analyse", "cache a token",
            "one forward pass"} <= {check.name for check in checks}
    for check in checks:
        low, high = SMALLEST if check.run.startswith("bundled") else BOUNDS[check.name]
        if check.exact:
            assert math.isclose(check.predicted, check.measured, rel_tol=1e-12), check
        else:
            assert low <= check.ratio <= high, check


def test_the_page_is_made_from_its_record() -> None:
    assert real_models.PAGE.read_text(encoding="utf-8") == real_models.page(
        json.loads(real_models.RECORD.read_text(encoding="utf-8")))
    assert {path.stem for path in CONFIGURATIONS.glob("*.json")} == {*real_models.MODELS, "plans"}


def test_seconds_are_operations_over_what_the_device_does() -> None:
    device = device_of_name("a100", None, 0.5)
    assert Work(model=312e12).seconds(device, 2) == pytest.approx(2)
    assert Work(model=19.5e12).seconds(device, 4) == pytest.approx(2)
    assert Work(single=19.5e12, double=39e12).seconds(device, 2) == pytest.approx(6)
    assert device_of_name("h100", 150.0, None).single == pytest.approx(1e13)
    assert all(device.source for device in DEVICES.values())


def test_more_tokens_take_more_of_what_goes_with_them() -> None:
    small, large = (plan(LLAMA2, samples=count, kernel="learned") for count in (1000, 10_000))
    ends = 2 * len(small.blocks)
    assert large.states_bytes == 10 * small.states_bytes == 10_000 * 512 * 4096 * 2 * ends
    assert large.forward_seconds == pytest.approx(10 * small.forward_seconds)
    kernel = [next(stage.seconds for stage in found.stages if stage.name == "kernel") for found in (small, large)]
    assert kernel[0] == kernel[1]  # step 1 takes its own number of tokens
    assert [need.device_bytes for need in small.memory] == [need.device_bytes for need in large.memory]


@pytest.mark.parametrize(("model", "options"), [
    (LLAMA2, {}), (LLAMA2, {"ratio": 0.1}), (LLAMA2, {"ratio": 0.5}), (LLAMA2, {"blocks": ((4, 6), (9, 10), (20, 28))}),
    (CONFIGURATIONS / "qwen3-8b.json", {"of": "layers"})])
def test_no_fewer_states_are_expected_in_memory_than_are_held(model: Path, options: dict[str, Any]) -> None:
    found = plan(model, **options)
    dense = meta_model(AutoConfig.from_pretrained(model), torch.float16)
    boundary = found.samples * found.length * dense.config.hidden_size * 2
    held = boundaries_held(dense, options.get("ratio", 0.25), options.get("blocks"))
    assert found.states_bytes <= held * boundary <= 4 * found.states_bytes


def test_the_budget_says_whether_layers_stay_in_the_checkpoint() -> None:
    for options, streamed in (
        ({"host_memory": "24GiB"}, [True]), ({"host_memory": "64GiB"}, [False]), ({"device": "rtx4090"}, [True]),
        ({"device": "cpu"}, []), ({"device": "cpu", "host_memory": "24GiB"}, [True]),
    ):
        assert [need.streamed for need in plan(LLAMA2, **options).memory if need.taken] == streamed


def test_json_holds_every_figure(tmp_path: Path) -> None:
    outcome = command("plan", LLAMA2, "--json", "-", "--device", "cpu")
    found, expected = json.loads(outcome.out), plan(LLAMA2, device="cpu")
    assert found["dense"]["parameters"] == expected.dense.parameters
    assert found["seconds"] == pytest.approx(expected.seconds)
    assert found["blocks"] == [list(block) for block in expected.blocks]
    assert command("plan", LLAMA2, "--json", tmp_path / "plan.json").status == 0
    assert json.loads((tmp_path / "plan.json").read_text())["device"]["title"] == "NVIDIA H100 SXM"


@pytest.mark.parametrize(("arguments", "expected"), [
    (["/no/such/place/here"], "no such directory or file"),
    ([LLAMA2, "--ratio", "0.95"], "expected at most"),
    ([LLAMA2, "--blocks", "4:8"], "half-open layer ranges"),
    ([LLAMA2, "--blocks", "30-34"], "the model's layers"),
    ([LLAMA2, "--device", "abacus"], "expected one of h100"),
    ([LLAMA2, "--tflops", "-1"], "positive"),
    ([LLAMA2, "--utilisation", "2"], "expected a share"),
    ([LLAMA2, "--samples", "1"], "at least 2"),
    ([LLAMA2, "--host-memory", "1MB"], "the libraries alone"),
    ([LLAMA2, "--host-memory", "much"], "amount"),
    ([LLAMA2, "--dtype", "int4"], "expected auto"),
    (["org/no-such-model"], "no such directory here"),
])
def test_bad_input_is_one_line(arguments: list[object], expected: str) -> None:
    outcome = command("plan", *arguments)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("kdprune: error: got ")
    assert expected in outcome.err


@pytest.mark.parametrize(("content", "expected"), [
    ("{", "cannot read the config"), ("{}", "cannot read the config"), ('{"model_type": "t5"}', "encoder-decoder"),
    ('{"model_type": "mamba"}', "unknown model family"),
    ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "got"),
    ('{"model_type": "kdp_llama", "kdp": {"version": 9, "blocks": [], "stand_ins": []}}', "reads versions 1 to 3"),
])
def test_damaged_or_unsuitable_configs_say_so(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(KDPruneError, match=expected):
        plan(tmp_path)
    with pytest.raises(KDPruneError, match=r"without config\.json"):
        plan(tmp_path.parent)
