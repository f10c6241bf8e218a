"""The method: planted problems it must solve, and its contract over all families."""

import dataclasses
import itertools
import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TRIED
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.errors import KDPruneError
from kdprune.kernel.features import FourierFeatures
from kdprune.methods.common.analysis import score_layers
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.kdp import diagnostics
from kdprune.methods.kdp.diagnostics import norm_decay
from kdprune.methods.kdp.fit_block import BANDWIDTHS, fit_block
from kdprune.methods.kdp.fit_blocks import FitPlan, fit_blocks, index_after
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.kdp.step1_dynamics import Step1, fit_dynamics, position_weights, solve_operators
from kdprune.methods.kdp.step2_inverse import InverseNetwork, decay_compensation, fold
from kdprune.model import block_states
from kdprune.model.activations import layer_states
from kdprune.model.block_states import BlockStates, PathRows, collect_block_states
from kdprune.model.surgery import apply_edits
from kdprune.runtime.run import Run
from kdprune.store.cache import Cache
from kdprune.store.states import States, open_states
from kdprune.testing import with_random_weights
from kdprune.train.loop import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {
    "kernel": "learned", "ranking": "similarity", "kernel_epochs": 2, "kernel_tokens": 64, "refine_epochs": 2,
    "inverse_epochs": 2, "features": 6, "rank": 2}
NO_FEATURES = {"features": None, "fill": False}  # for kernels that have none


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tokens(rows: int = 8, length: int = 12, seed: int = 0) -> TokenSet:
    return load_tokens(
        torch.randint(3, 64, (rows, length), generator=generator(seed)), None, samples=None, length=length, seed=0)


# ------------------------------------------------------------------------------------------ step 1


def translations(steps: int, tokens: int, width: int) -> torch.Tensor:
    """h ← h + c: exactly linear in kernel space, a rotation by Wᵀc of every (cos, sin) pair."""
    h = torch.randn(tokens, width, generator=generator(1))
    shift = 0.4 * torch.randn(width, generator=generator(2))
    return torch.stack([h + step * shift for step in range(steps + 1)]), shift


def test_planted_linear_dynamics_are_recovered() -> None:
    path, shift = translations(2, 600, 4)
    features = FourierFeatures(4, 12, 2, generator())
    with torch.no_grad():
        angle = features.frequencies().T @ shift
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    rotation = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
    found = torch.stack(list(solve_operators(features, path, ridge=1e-10)))
    assert found.dtype == torch.float64
    for matrix in found:
        torch.testing.assert_close(matrix.float(), rotation, rtol=0, atol=2e-2)
    mapped = features(path).detach().double()
    assert float((mapped[1] - mapped[0] @ found[0].T).norm() / mapped[1].norm()) < 1e-4


def learned(path: torch.Tensor, anisotropic: bool) -> Step1:
    features = FourierFeatures(path.shape[-1], 24, 3, generator(), anisotropic=anisotropic)
    features.init_median(path.flatten(0, 1), generator())
    return fit_dynamics(
        features, path, torch.ones(path.shape[1]), Schedule(12, 64, 3e-2), generator(), ridge=1e-4, name="test")


def test_anisotropic_planted_kernel_is_learned_better_than_isotropic() -> None:
    # Two dimensions follow the planted dynamics, six are noise drawn anew at every layer: only a kernel with a width
    # for every dimension can look away from the noise.
    signal, _ = translations(2, 500, 2)
    path = torch.cat((signal, torch.randn(3, 500, 6, generator=generator(5))), -1)
    anisotropic, isotropic = learned(path, True), learned(path, False)
    unexplained = [step1.curves["unexplained"] for step1 in (anisotropic, isotropic)]
    assert unexplained[0][-1] < 0.5 * unexplained[1][-1]
    assert unexplained[0][-1] < 0.5 * unexplained[0][0]  # and better than before learning
    scales = anisotropic.features.log_diagonal.detach()
    assert float(scales[:2].mean()) > float(scales[2:].mean()) + 0.5


def test_operators_restart_at_least_squares_every_epoch_and_kernel_can_be_fixed() -> None:
    path, _ = translations(2, 300, 4)
    features = FourierFeatures(4, 8, 2, generator())
    before = features.frequencies().detach().clone()
    step1 = fit_dynamics(
        features, path, torch.ones(300), Schedule(3, 64, 1e-2), generator(), ridge=1e-6, name="test",
        learn_kernel=False)
    assert torch.equal(before, features.frequencies())
    assert len(step1.curves["loss"]) == 3
    assert len(step1.curves["spectral_norm"]) == 4  # at the start of every epoch, and after the last
    solved = torch.stack(list(solve_operators(features, path, 1e-6)))
    torch.testing.assert_close(step1.dynamics.matrices().double(), solved)
    assert step1.curves["feature_norm"][-1] == pytest.approx(1, abs=1e-5)


def test_position_weights_grow_to_one() -> None:
    weights = position_weights(torch.arange(5), 5)
    assert weights.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


# ------------------------------------------------------------------------------------------ step 2 and folding


@pytest.mark.parametrize("hidden", [0, 20])
@pytest.mark.parametrize("residual", [False, True])
def test_folded_equals_unfolded(hidden: int, residual: bool) -> None:
    path, _ = translations(3, 200, 10)
    features = FourierFeatures(10, 16, 3, generator())
    step1 = fit_dynamics(
        features, path, torch.ones(200), Schedule(1, 64, 1e-2), generator(), ridge=1e-4, name="test")
    inverse = InverseNetwork(32, hidden, 10)
    shape = Shape(10, "fourier", 16, hidden, residual, context=False)
    with torch.no_grad():
        inverse.alpha.fill_(1.7)
        folded = shape.build(generator())
        fold(step1.features, step1.dynamics, inverse, folded)
        x = 5 * torch.randn(50, 10, generator=generator(3))
        state = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() if residual else x
        z = features(state)
        for matrix in step1.dynamics.matrices():
            z = z @ matrix.T
        unfolded = inverse(z) + (x if residual else 0)
        torch.testing.assert_close(folded(x), unfolded, rtol=1e-5, atol=1e-5)
    assert sum(parameter.numel() for parameter in folded.parameters()) == shape.parameters()
    wider = dataclasses.replace(shape, features=17).parameters()
    assert wider - shape.parameters() == shape.parameters_per_unit()


def test_norm_decay_is_compensated(monkeypatch) -> None:
    # Noisy dynamics: least-squares operators shrink what they cannot predict, more with every step.
    path = torch.randn(1, 800, 6, generator=generator())
    for seed in range(4):
        path = torch.cat((path, path[-1:] + 0.5 * torch.randn(1, 800, 6, generator=generator(seed + 1))))
    features = FourierFeatures(6, 16, 2, generator())
    features.init_median(path.flatten(0, 1), generator())
    step1 = fit_dynamics(
        features, path, torch.ones(800), Schedule(1, 64, 1e-3), generator(), ridge=1e-4, name="test")
    with torch.no_grad():
        product = step1.dynamics.product()
        advanced, true = features(path[0, :600]) @ product.T, features(path[-1, :600])
        whole = float((features(path[0, 600:]) @ product.T).norm(dim=-1).mean())
    monkeypatch.setattr(diagnostics, "CHUNK", 77)  # several chunks of each
    norms = norm_decay(step1, decay_compensation(advanced, true), path[:, :600], path[:, 600:], ridge=1e-4)
    assert norms["feature_predicted"][-1] == pytest.approx(whole, rel=1e-5)
    assert norms["feature_true"] == pytest.approx([1.0] * 5, abs=1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(norms["feature_predicted"]))
    assert norms["feature_predicted"][-1] < 0.85
    short, restored = (
        abs(norms[key] / norms["output_true"] - 1) for key in ("output_without_alpha", "output_with_alpha"))
    assert restored < 0.6 * short


# ------------------------------------------------------------------------------------------ the whole method


def run(model, tokens: TokenSet, seed: int = 0, **options) -> MethodResult:
    method = KDP(**{**QUICK, **options})
    method.check(model, tokens)
    return method(model, tokens, Run(seed, batch_size=4))


@pytest.mark.parametrize("context", ["attention", "none"])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt_neox", "phi3", "opt-350m", "gpt2"])
def test_spare_budget_is_spent_to_within_one_stand_in(name: str, context: str, tiny_model) -> None:
    model, tokens = tiny_model(name), random_tokens()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = run(model, tokens, ratio=0.2, context=context, protect=0.0, fill=True)
    pruned = apply_edits(model, result.edits)
    total, left = model.num_parameters(), pruned.num_parameters()
    one_stand_in = max(entry["parameters"] for entry in result.fit) / total
    assert 0.2 <= 1 - left / total + 1e-9 <= 0.2 + one_stand_in + 1e-9
    assert torch.isfinite(pruned(tokens.ids[:2]).logits).all()
    for entry in result.fit:
        assert math.isfinite(entry["state_error"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_fit_beats_dropping_the_block(tiny_model) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows=64, length=16)
    result = run(model, tokens, blocks=((2, 4),), features=24, refine_epochs=8, kernel_tokens=512)
    assert result.blocks == [range(2, 4)]
    assert result.fit[0]["state_error"] < 0.8 < result.fit[0]["dropped_error"] * 1.2


def test_a_direct_inverse_goes_without_context_and_given_features_stay() -> None:
    assert KDP(inverse="direct", kernel="learned").context == "none"
    assert KDP(kernel="learned", features=64).fill is False
    assert KDP(kernel="learned", features=64, fill=True).fill is True
    with pytest.raises(KDPruneError, match="inverse 'direct' with context 'attention'"):
        KDP(inverse="direct", kernel="learned", context="attention")
    with pytest.raises(KDPruneError, match=r"inverse 'direct' with kernel 'linear\+data'"):
        KDP(inverse="direct")
    with pytest.raises(KDPruneError, match=r"hidden 8 with kernel 'linear\+data'"):
        KDP(hidden=8)


def test_where_a_row_stands_between_padding_does_not_enter_step_1(tiny_model) -> None:
    """Rows padded at the left, and columns of padding behind all rows."""
    model, plain = tiny_model("llama3"), random_tokens()
    found = []
    for left, right in ((0, 0), (3, 0), (0, 5)):
        ids = torch.nn.functional.pad(plain.ids, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(plain.ids), (left, right))
        rows, length = {"input_ids": ids, "attention_mask": mask}, ids.shape[1]
        tokens = load_tokens(rows, None, samples=None, length=length, seed=0)
        states = collect_block_states(model, tokens, [range(1, 3)], Run(batch_size=8), held=2, path=PathRows(4, 1))[0]
        assert torch.equal(states.path_position, torch.arange(12).repeat(4))
        method = KDP(**{**QUICK, "blocks": ((1, 3),), "preset": "paper", "hidden": 0, "kernel_tokens": 1000})
        found.append(apply_edits(model, method(model, tokens, Run(batch_size=8)).edits)(plain.ids).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", ["fixed", "linear+fixed+data"])
def test_the_bandwidth_is_the_one_of_least_held_out_error(kernel: str, tiny_model) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows=24)
    options = {"blocks": ((1, 4),), "kernel": kernel, "kernel_epochs": 1, "refine": False}
    chosen = run(model, tokens, **options)
    errors = {value: run(model, tokens, **options, bandwidth=value).fit[0] for value in BANDWIDTHS}
    best = min(errors, key=lambda value: errors[value]["state_error"])
    assert chosen.fit[0]["bandwidth"] == best
    assert chosen.fit[0]["state_error"] == pytest.approx(errors[best]["state_error"], rel=1e-4)
    assert len({round(entry["state_error"], 6) for entry in errors.values()}) > 1


def test_gradient_steps_in_bfloat16_come_to_the_same(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows=24)
    options = {"blocks": ((1, 4),), "kernel": "linear+data", **NO_FEATURES, "refine_epochs": 3, "rate": 2e-3}
    errors, kinds = [], []
    for able in (False, True):
        monkeypatch.setattr("kdprune.runtime.machine.computes_in", lambda dtype, place, able=able: able)
        result = run(model, tokens, **options)
        kinds += [parameter.dtype for parameter in result.edits[0].context.parameters()]
        errors.append(result.fit[0]["step3"]["watched"])
    assert set(kinds) == {torch.float32}
    assert errors[0][0] == errors[1][0]  # closed forms know nothing of it
    assert errors[0] != errors[1]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.gpu
def test_bfloat16_on_an_accelerator_with_padding(tiny_model, tmp_path) -> None:
    import kdprune

    model = tiny_model("llama3").to("cuda", torch.bfloat16)
    ids = torch.randint(3, 64, (8, 12), generator=generator())
    mask = torch.ones(8, 12).index_fill_(1, torch.tensor([10, 11]), 0)
    result = kdprune.prune(model, tmp_path / "out", ratio=0.2, calibration={"input_ids": ids, "attention_mask": mask},
                           protect=0.0, **QUICK)
    assert result.model.device.type == "cuda"
    assert math.isfinite(result.metrics["perplexity"]["pruned"])


def test_another_seed_gives_other_weights(tiny_model) -> None:
    model, tokens = tiny_model("qwen3"), random_tokens()
    first, second, other = (run(model, tokens, seed=seed, blocks=((1, 3),)) for seed in (4, 4, 5))
    weights = [result.edits[0].context.state_dict() for result in (first, second, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("context", ["attention", "none"])
def test_padding_enters_no_statistic(context: str, tiny_model) -> None:
    model, plain = tiny_model("llama3"), random_tokens()
    rubbish = torch.randint(3, 64, (8, 5), generator=generator(9))
    padded = load_tokens(
        {"input_ids": torch.cat((plain.ids, rubbish), 1),
         "attention_mask": torch.cat((torch.ones(8, 12), torch.zeros(8, 5)), 1)}, None, samples=None, length=17, seed=0)
    found = []
    for tokens in (plain, padded):
        scores = score_layers(model, tokens, Run(batch_size=4), protect=0.1)
        # Few short fits keep differences of rounding from growing.
        entry = run(model, tokens, blocks=((2, 4),), context=context, kernel_epochs=1, refine_epochs=1,
                    kernel_tokens=1000, kernel="fixed").fit[0]
        found.append((scores.tensors(), entry))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-4, atol=1e-5)
    for key in ("state_error", "linear_error"):
        assert found[0][1][key] == pytest.approx(found[1][1][key], rel=2e-2)
    assert found[0][1]["k_step_error"] == pytest.approx(found[1][1]["k_step_error"], rel=5e-2)


@pytest.mark.parametrize("options", [
    {"preset": "paper"}, {"kernel": "linear", "context": "none", **NO_FEATURES},
    {"kernel": "mlp"}, {"without": ("anisotropy",)},
    {"hidden": 8}, {"refine": False}, {"endpoints": "output"}, {"similarity": "cosine"}, {"block_length": 2},
    {"without": ("alpha", "cosine_term", "ols_start", "position_weights")}, {"without": ("operators",)},
    {"preset": "thorough", "refine_epochs": 1},
])
def test_every_option_by_name(options: dict, tiny_model) -> None:
    model, tokens = tiny_model("llama3"), random_tokens()
    result = run(model, tokens, ratio=0.15, protect=0.0, **options)
    assert torch.isfinite(apply_edits(model, result.edits)(tokens.ids[:1]).logits).all()
    if options.get("preset") == "paper":
        assert result.fit[0]["hidden"] == 32
        assert result.fit[0]["features"] == 6
        assert result.fit[0]["step3"] is None


def test_paper_preset_has_the_papers_sizes() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=4096, num_hidden_layers=1))
    shape = KDP(preset="paper").shape(model)
    assert (shape.features, shape.hidden, shape.residual, shape.context) == (2048, 4096, False, False)
    # Two blocks of four layers of LLaMA2-7B: 22.8 % net (KDP, section 2).
    layer, total = 202_383_360, 6_738_415_616
    assert (8 * layer - 2 * shape.parameters()) / total == pytest.approx(0.228, abs=5e-4)


@pytest.mark.parametrize(("options", "message"), [
    ({"ratio": 0.0}, "ratio 0.0"), ({"ratio": 1.0}, "ratio 1.0"), ({"ratio": -0.2}, "ratio -0.2"),
    ({"ratio": math.nan}, "ratio nan"), ({"preset": "papre"}, "expected one of default, thorough, fourier, paper"),
    ({"features": 0}, "features 0"), ({"features": 8}, r"features 8 with kernel 'linear\+data', which has none"),
    ({"channels": 8, "kernel": "learned"}, "channels 8 with kernel 'learned', which has none"),
    ({"kernel": "rbf"}, r"expected one of linear\+data, learned"),
    ({"protect": 0.6}, "protect 0.6"),
    ({"rate": -1.0}, "rate -1.0"), ({"context": "second"}, "expected one of none, attention"),
    ({"without": ("kernel",)}, "without 'kernel', expected one of alpha, anisotropy"),
])
def test_bad_options_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(KDPruneError, match=message) as caught:
        KDP(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "message"), [
    ({"ratio": 0.9}, "expected at most 0"), ({"blocks": ((1, 9),)}, r"block \[1, 9\)"),
    ({"blocks": ((0, 6),)}, "at least one kept"), ({"blocks": ((0, 2), (2, 4))}, "kept layer between"),
    ({"block_length": 7}, "got a model of 6 layers"), ({"protect": 0.49}, "got a model of 6 layers"),
])
def test_impossible_blocks_are_refused_before_any_fit(options: dict, message: str, tiny_model) -> None:
    with pytest.raises(KDPruneError, match=message):
        run(tiny_model("llama3"), random_tokens(), **options)


# ------------------------------------------------------------------------------------------ states


def test_states_are_those_between_the_layers(tiny_model) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows=3)
    hidden = model(tokens.ids, output_hidden_states=True).hidden_states
    seen = [states for _, states in layer_states(model, tokens, range(7), 2)]
    for index in range(6):
        torch.testing.assert_close(torch.cat([batch[index] for batch in seen]), hidden[index])
    last = torch.cat([batch[6] for batch in seen])
    torch.testing.assert_close(model.model.norm(last), hidden[6])  # h_L is taken before the final norm


@pytest.mark.parametrize("folded", [(), (0,), (1,), (1, 2), (0, 1, 2)], ids=str)
def test_what_enters_later_blocks_is_what_the_pruned_model_gives(
    folded: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind stand-ins with a layer of their own, from which the next pass goes on, and ones folded into a kept layer;
    in memory, in files, and where an earlier run left its fits but no states."""
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=12,
                         num_attention_heads=4, max_position_embeddings=64)
    model = with_random_weights(AutoModelForCausalLM.from_config(config), 0, 0.15)
    tokens, blocks = random_tokens(), [range(1, 3), range(4, 6), range(7, 8), range(10, 11)]
    shapes = [Shape(32, "linear", 0, 0, True, context=number not in folded) for number in range(len(blocks))]
    settings = KDP(kernel="linear", refine=False).settings(shapes[0], tokens)
    plan = FitPlan(blocks, shapes, settings, 2, PathRows(0, 0), sequential=True)
    entering: list[Tensor] = []

    def fit(model: PreTrainedModel, states: BlockStates, *rest: Any) -> MethodResult:
        entering.append(states.inputs[slice(None)])
        return fit_block(model, states, *rest)

    monkeypatch.setattr("kdprune.methods.kdp.fit_blocks.fit_block", fit)
    edits = fit_blocks(model, tokens, plan, Run(batch_size=3)).edits
    for _ in range(2):
        with closing(Cache(tmp_path / "work", {"model": "tiny"})) as cache:
            fit_blocks(model, tokens, plan, Run(batch_size=3, cache=cache))
        [last], states = (tmp_path / "work").glob("stages/fit-10-11-*"), tmp_path / "work" / "states"
        for folder in (last, states):
            shutil.rmtree(folder)
    for number, block in enumerate(blocks):
        before = apply_edits(model, edits[:number]) if number else model
        index = index_after(edits[:number], block.start)
        expected = torch.cat([states[index] for _, states in layer_states(before, tokens, [index], 3)])
        assert torch.equal(entering[number], expected), number
        assert torch.equal(entering[len(blocks) + number], expected), number
    assert torch.equal(entering[-1], entering[len(blocks) - 1])
    assert len(entering) == 2 * len(blocks) + 1


def test_not_finite_states_name_layer_and_batch(tiny_model) -> None:
    model = tiny_model("llama3")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(KDPruneError, match="entering layer 4 in calibration batch 0"):
        list(layer_states(model, random_tokens(), range(7), 4))


def test_site_output_is_base_plus_stand_in(tiny_model) -> None:
    for name in set(TRIED) - {"opt-350m"}:  # which normalises after the sum
        model, tokens = tiny_model(name), random_tokens(rows=4)
        states = collect_block_states(model, tokens, [range(1, 3)], Run(batch_size=4), held=1, path=PathRows(1, 1))[0]
        stand_in = Shape(32, "fourier", 5, 0, residual=True, context=True).build(generator())
        fitting = StandInFit(model, states, stand_in, 1, Run())
        rows = torch.arange(4)
        probe = fitting.probe(rows)
        with torch.no_grad():
            expected = probe.base + fitting.multiplier * stand_in(probe.kernel_input)
            torch.testing.assert_close(fitting.predict(rows).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "mlp", "linear+learned"])
def test_the_printed_method_has_other_kernels(kernel: str, tiny_model) -> None:
    """Which no hidden layer reads; the preset's is not taken for one that was asked for."""
    method = KDP(preset="paper", kernel=kernel, protect=0.0)
    assert method.hidden == 0
    method.check(tiny_model("llama3"), random_tokens(rows=4))
    with pytest.raises(KDPruneError, match="got hidden 8 with kernel"):
        KDP(preset="paper", kernel=kernel, hidden=8)


def test_later_blocks_of_a_sequential_fit_leave_the_dense_states_before_them_out(tiny_model, monkeypatch) -> None:
    """Of which they have the pruned model's: no pass stores what nobody reads."""
    opened: dict[str, States] = {}

    def remembering(*args: Any, **options: Any) -> States:
        states = open_states(*args, **options)
        opened[f"{len(opened)} {states.name}"] = states
        return states

    monkeypatch.setattr(block_states, "open_states", remembering)
    run(tiny_model("llama3"), random_tokens(rows=8), blocks=((1, 3), (4, 6)), sequential=True)
    there = [(name.split(" ", 1)[1], len(states.rows)) for name, states in opened.items()]
    assert [name for name, rows in there if rows == 0] == ["the states entering layer 4"]
    assert sorted(rows for _, rows in there) == [0, 8, 8, 8, 8]  # both ends of both, and ours
