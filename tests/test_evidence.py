"""The benchmarks of premise, theorems and outliers: their statistics against oracles, and a quick run of each."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import Bench
from torch import Tensor

from kdprune.kernel.features import FourierFeatures
from kdprune.kernel.operators import Moments
from kdprune.model.families import decoder_layers
from kdprune.model.loading import load_model
from kdprune.model.surgery import Drop, apply_edits

pytestmark = pytest.mark.usefixtures("one_thread")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def pages() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name)
               for name in ("units_file", "premise", "theorems", "theorems_page", "outliers")}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def narrowed(module: ModuleType, patch: pytest.MonkeyPatch, **values: Any) -> None:
    for name, value in values.items():
        patch.setattr(module, name, value)


# ------------------------------------------------------------------------------------------ records


def test_units_are_kept_one_by_one_and_replaced(pages: Any, tmp_path: Path) -> None:
    units, file = pages["units_file"], tmp_path / "new" / "record.json"
    for name, value in (("b", 1), ("a", 2), ("b", 3)):
        units.keep({"name": name, "value": value}, file, lambda record: record["name"])
    assert json.loads(file.read_text()) == [{"name": "b", "value": 3}, {"name": "a", "value": 2}]
    units.keep({"name": "c", "value": 0}, file, lambda r: r["name"], order=lambda r: r["value"])
    assert [record["name"] for record in units.load(file, lambda r: r["name"]).values()] == ["c", "a", "b"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["record.json"]
    assert units.load(tmp_path / "none.json", str) == {}


def test_numbers_are_rounded_wherever_they_stand(pages: Any) -> None:
    given = {"a": [1 / 3, {"b": 12345.678}], "c": 7, "d": None, "e": True, "f": (1e-9 / 3,)}
    assert pages["units_file"].compact(given, 3) == {
        "a": [0.333, {"b": 12300.0}], "c": 7, "d": None, "e": True, "f": [3.33e-10]}


# ------------------------------------------------------------------------------------------ premise


def test_rank_correlation_is_scipys(pages: Any) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for _ in range(5):
        x, y = draw.integers(6, size=12), draw.normal(size=12)  # ties on one side
        assert pages["premise"].spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        np.testing.assert_allclose(pages["premise"].ranks(x), stats.rankdata(x))


def test_the_interval_holds_the_correlation_of_many_and_shrinks(pages: Any) -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=90)
    y = x + draw.normal(size=90)
    value, low, high = pages["premise"].interval(x, y)
    assert low < value < high
    _, few_low, few_high = pages["premise"].interval(x[:10], y[:10])
    assert high - low < (few_high - few_low) / 1.5
    assert pages["premise"].interval(x, x) == (1.0, 1.0, 1.0)


def test_what_scores_expect_of_a_block(pages: Any) -> None:
    scores = {name: [[1 - size * abs(s - e) for e in range(5)] for s in range(5)]
              for name, size in (("cosine", 0.1), ("linear_cka", 0.02), ("rbf_cka", 0.01))}
    scores["relative_update"] = [0.5, 0.25, 0.25, 0.125]  # type: ignore[assignment]
    expected = {"rbf": 0.03, "linear": 0.06, "cosine": 0.3, "bi": 0.3, "update": 0.625}
    assert {name: pages["premise"].predicted(scores, [1, 4], name) for name in pages["premise"].SCORES} == (
        pytest.approx(expected))


def test_the_premise_is_measured_and_goes_on(
    pages: Any, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    premise, file = pages["premise"], tmp_path / "premise.json"
    narrowed(premise, monkeypatch, QUICK_TOKENS=(600, 600, 300), DAMAGES={"dropped": "dropped", "linear": "linear"})
    premise.run(bench.model, bench.calibration, "tiny", file, True)
    found = premise.load(file, premise.key)
    assert len(found) == 1 + 2 * 3  # of six layers the middle four are open: three pairs
    model = load_model(bench.model, device="cpu")
    held_out = pages["units_file"].Subject(bench.model, bench.calibration).held_out(300)
    window = model.config.max_position_embeddings
    loss = premise.perplexity(apply_edits(model, [Drop(range(2, 4))]), held_out, stride=window).loss
    dense = found["tiny", "scores", ()]["loss"]
    assert found["tiny", "dropped", (2, 4)]["excess_loss"] == pytest.approx(loss - dense, rel=1e-4)
    before = file.read_text()
    monkeypatch.setattr(premise, "removed", None)  # nothing is measured twice
    premise.run(bench.model, bench.calibration, "tiny", file, True)
    assert file.read_text() == before
    for record in found.values():
        premise.keep({**record, "model": "another"}, file, premise.key)
    premise.render(file)
    page = file.with_suffix(".md").read_text()
    assert page.index("## tiny") < page.index("## another")
    assert file.with_suffix(".svg").is_file()


# ------------------------------------------------------------------------------------------ theorems


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_exponent_and_limit_of_a_power_law(pages: Any, exponent: float) -> None:
    values = [0.3 + 2 * (1024 * 4**i) ** -exponent for i in range(6)]
    found, limit, local = pages["theorems_page"].falling(values)
    assert found == pytest.approx(exponent, abs=1e-6)
    assert limit == pytest.approx(0.3, abs=1e-9)
    assert local == pytest.approx([exponent] * 4, abs=1e-5)
    assert np.isnan(pages["theorems_page"].falling([1.0, 0.9, 0.95])[0])


def test_growing_moments_are_those_of_each_part(pages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theorems = pages["theorems"]
    narrowed(theorems, monkeypatch, BASE=32, SIZES=3, REPEATS=2)
    kernel = FourierFeatures(5, 4, 0, generator()).requires_grad_(False)
    state = torch.randn(16 * 32, 5, generator=generator(1))
    path = torch.stack([state, state + 0.1 * torch.tanh(state), state + 0.3 * torch.tanh(state)])
    growing = theorems.Growing(2, 4, kernel(path[:, :50]))
    for part in path.split(32, dim=1):
        growing.add(kernel(part))
    assert {tokens: len(found) for tokens, found in growing.found.items()} == {32: 2, 128: 2, 512: 1}
    second = kernel(path[:, 128:256])  # the second part of 128 tokens
    moments = Moments(8, 8)
    moments.update(second[1], second[2] - second[1])
    expected = moments.residual(moments.solve(theorems.RIDGE)) / 128
    assert growing.found[128][1]["fitted_risk"][1] == pytest.approx(expected, rel=1e-9)
    assert growing.found[512][0]["k_step_error"][1] < growing.found[32][0]["k_step_error"][1]


def test_theorems_are_measured_and_rendered(
    pages: Any, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theorems, file = pages["theorems"], tmp_path / "theorems.json"
    narrowed(theorems, monkeypatch, BASE=64, SIZES=3, EPOCHS=1, TRAIN_TOKENS=128)
    text = tmp_path / "text.txt"
    text.write_text(bench.calibration.read_text() + bench.heldout.read_text())
    theorems.run(bench.model, text, "tiny", file, True)
    records = list(theorems.load(file, theorems.key).values())
    assert {record["tokens"] for record in records if record["unit"] == "sweep"} >= {64, 256}
    assert {record["kernel"] for record in records if record["unit"] == "risk"} == {"none", "drawn", "trained"}
    for record in records:
        if record["unit"] == "sweep":
            assert all(bound >= error for bound, error in zip(record["bound"], record["k_step_error"], strict=True))
    theorems.render(file)
    assert "| original space |" in file.with_suffix(".md").read_text()


# ------------------------------------------------------------------------------------------ outliers


def made_up_states() -> tuple[Tensor, Tensor]:
    target = torch.randn(200, 16, generator=generator())
    target[:, 3] *= 50
    target[7] *= 100
    return target - torch.randn(200, 16, generator=generator(1)), target


def test_outliers_are_found_and_errors_belong_to_their_group(pages: Any) -> None:
    outliers = pages["outliers"]
    source, target = made_up_states()
    assert outliers.outlier_dimensions(target)[0].nonzero().flatten().tolist() == [3]
    assert outliers.massive_tokens(target)[0].nonzero().flatten().tolist() == [7]
    guess = target.clone()
    guess[:, 3] = source[:, 3]  # as if dropped in the outlier dimension, exact elsewhere
    found = outliers.errors(guess, source, target)
    assert found["outlier"]["update_left"] == pytest.approx(1)
    assert found["outlier"]["share"] == pytest.approx(1)
    assert found["ordinary"]["update_left"] == 0
    share = (target - source)[7, 3].square() / (target - source)[:, 3].square().sum()
    assert found["massive"]["share"] == pytest.approx(float(share), rel=1e-5)
    plain = torch.randn(300, 16, generator=generator(2))
    assert outliers.facts(plain)["outliers"] is False
    assert len(outliers.facts(plain)["dimensions"]) == outliers.FEW
    assert outliers.facts(plain)["massive_tokens"] == 3  # one in a hundred


def test_outliers_are_measured_behind_the_stand_in(
    pages: Any, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outliers, file = pages["outliers"], tmp_path / "outliers.json"
    wanted = ("default", "linear", "dropped", "paper-same-blocks")
    narrowed(outliers, monkeypatch, NAMES={name: outliers.NAMES[name] for name in wanted}, LENGTH=2, QUICK={
        "kernel_epochs": 1, "kernel_tokens": 64, "inverse_epochs": 1, "refine_epochs": 1})
    outliers.run(bench.model, bench.calibration, "tiny", file, True)
    found = {record["variant"]: record["errors"]["all"]["update_left"]
             for record in outliers.load(file, outliers.key).values()}
    assert found.keys() == set(wanted)
    assert found["dropped"] == 1
    assert found["linear"] < 1
    assert found["default"] < found["linear"]  # it has the block's attention
    outliers.render(file)
    assert "## tiny" in file.with_suffix(".md").read_text()
    model = load_model(bench.model, device="cpu")
    assert list(outliers.middle(len(decoder_layers(model)))) == [2, 3]
