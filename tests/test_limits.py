"""Theory beside measurement, the longest block, and ratios out of reach."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from families import LAYERS, build
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.errors import KDPruneError
from kdprune.kernel.bounds import theorem1_bound
from kdprune.kernel.features import FourierFeatures
from kdprune.methods.common.budget import Budget, check_budget, select_by_similarity
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.kdp.diagnostics import theory
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.kdp.step1_dynamics import Step1, fit_dynamics, solve_operators
from kdprune.methods.peers.linear import Linear
from kdprune.train.loop import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tokens(rows: int = 10, length: int = 12) -> TokenSet:
    return load_tokens(
        torch.randint(3, 64, (rows, length), generator=generator()), None, samples=None, length=length, seed=0)


def growing_path(steps: int = 3, tokens: int = 400, width: int = 6, seed: int = 0) -> torch.Tensor:
    """States that move along a random map: least squares in kernel space then has singular values above 1."""
    state = torch.randn(tokens, width, generator=generator(seed))
    turn = torch.randn(width, width, generator=generator(seed + 1)) / width**0.5
    path = [state]
    for _ in range(steps):
        path.append(path[-1] + 0.5 * torch.tanh(path[-1] @ turn))
    return torch.stack(path)


def learned(path: torch.Tensor) -> Step1:
    features = FourierFeatures(path.shape[-1], 12, 2, generator(5))
    features.init_median(path.flatten(0, 1), generator(6))
    return fit_dynamics(
        features, path, torch.ones(path.shape[1]), Schedule(3, 64, 1e-2), generator(7), ridge=1e-4, name="test")


def test_every_curve_has_a_value_an_epoch() -> None:
    step1 = learned(growing_path())
    solution = torch.stack(list(solve_operators(step1.features, growing_path(), 1e-4)))
    torch.testing.assert_close(step1.dynamics.matrices().detach().double(), solution, rtol=0, atol=1e-5)
    assert {"loss", "cosine", "spectral_norm", "feature_norm", "unexplained"} == set(step1.curves)
    assert len(step1.curves["unexplained"]) == 4
    assert max(step1.curves["spectral_norm"]) > 1.01


def test_theory_taken_in_chunks_is_theory_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    path, held = growing_path(3, 300), growing_path(3, 90, seed=4)
    step1 = learned(path)
    states = SimpleNamespace(path=path, path_held=held)
    fitting = cast(
        StandInFit, SimpleNamespace(states=states, device=torch.device("cpu"), to_kernel=lambda value: value))
    for module in ("kdprune.methods.kdp.diagnostics.CHUNK", "kdprune.kernel.bounds.CHUNK"):
        monkeypatch.setattr(module, 64)
    found = theory(fitting, step1)
    with torch.no_grad():
        matrices, lifted, lifted_held = step1.dynamics.matrices(), step1.features(path), step1.features(held)
        one_step = float((lifted[:-1] @ matrices.mT - lifted[1:]).square().sum(-1).mean(-1).max())
        norm = float(torch.linalg.matrix_norm(matrices, 2).max())
        state = lifted_held[0] @ step1.dynamics.product().T
    assert found["B_A"] == pytest.approx(norm, rel=1e-5)
    assert found["bound"] == pytest.approx([theorem1_bound(one_step, norm, 1.0, 12, 300, k) for k in (1, 2, 3)])
    assert found["k_step_error"][-1] == pytest.approx(float((state - lifted_held[-1]).square().sum(-1).mean().sqrt()))
    for name, (x, y), (held_x, held_y) in (
        ("kernel_risk", lifted[[0, -1]], lifted_held[[0, -1]]), ("original_risk", path[[0, -1]], held[[0, -1]])):
        assert found[name] == pytest.approx(affine_risk(x, y, held_x, held_y), rel=1e-2)


def affine_risk(x: torch.Tensor, y: torch.Tensor, held_x: torch.Tensor, held_y: torch.Tensor) -> float:
    """Held-out share of the variance that an affine least-squares map leaves, by lstsq."""
    x, held_x = (torch.cat((value, torch.ones(len(value), 1)), 1).double() for value in (x, held_x))
    left = held_x @ torch.linalg.lstsq(x, y.double()).solution - held_y
    return float(left.square().sum() / (held_y - held_y.mean(0)).square().sum())


# ------------------------------------------------------------------------------------------ K_max and the ratio


@pytest.mark.parametrize("method", [KDP, Linear])
def test_the_longest_block_is_at_most_half_the_layers(method: type[KDP] | type[Linear]) -> None:
    model = build("llama3")
    for wrong in (1, LAYERS // 2 + 1):
        with pytest.raises(KDPruneError, match=f"max_block {wrong}, expected 2 to {LAYERS // 2}, half"):
            method(max_block=wrong, ratio=0.1).check(model, random_tokens())
    method(max_block=LAYERS // 2, ratio=0.1, protect=0).check(model, random_tokens())


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5])
def test_half_of_the_bundled_model_can_be_selected(bundled: PreTrainedModel, ratio: float) -> None:
    layers = bundled.config.num_hidden_layers
    similarity = torch.tensor([[0.97 ** abs(s - e) for e in range(layers + 1)] for s in range(layers + 1)])
    method = KDP(ratio=ratio, ranking="similarity")
    budget = Budget(bundled, method.shape(bundled), method.target(bundled))
    blocks = select_by_similarity(method, similarity, budget)
    removed = sum(budget.removal(block) for block in blocks)
    assert budget.target.parameters <= removed <= 1.1 * budget.target.parameters
    assert all(2 <= len(block) <= layers // 2 for block in blocks)


def test_a_ratio_out_of_reach_names_the_largest(bundled: PreTrainedModel) -> None:
    method = KDP(ratio=0.5, max_block=4, ranking="similarity")
    budget = Budget(bundled, method.shape(bundled), method.target(bundled))
    with pytest.raises(KDPruneError, match=r"ratio 0\.5, expected at most 0\.4\d+, .*blocks of at most 4.*max_block="):
        check_budget(method, budget)
