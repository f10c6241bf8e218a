"""Kernel mathematics against dense oracles."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdprune.errors import KDPruneError
from kdprune.kernel import bounds
from kdprune.kernel.bounds import error_growth, k_step_errors, relative_risk, theorem1_bound
from kdprune.kernel.features import FourierFeatures, effective_rank, projected_median, rms_normalize
from kdprune.kernel.operators import LinearDynamics, Moments, spectral_norm
from kdprune.kernel.similarity import LayerSimilarity, cka, median_distances, squared_distances


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_features(width: int, features: int, seed: int = 0, rank: int = 2) -> FourierFeatures:
    module = FourierFeatures(width, features, rank, generator(seed))
    with torch.no_grad():
        # A covariance that is neither diagonal nor isotropic, the same for every seed and size.
        fixed = generator(99)
        module.log_diagonal.copy_(torch.randn(width, generator=fixed) - 2)
        module.low_rank.copy_(0.4 * torch.randn(width, rank, generator=fixed))
        module.offset.copy_(torch.randn(features, generator=generator(7)))
    return module


# ------------------------------------------------------------------------------------------ features


def covariance(module: FourierFeatures) -> Tensor:
    """Σ = D + LLᵀ, (d, d)."""
    return torch.diag(module.log_diagonal.exp().expand(module.width)) + module.low_rank @ module.low_rank.T


def exact(module: FourierFeatures, x: Tensor, y: Tensor) -> Tensor:
    """exp(−½ (x − y)ᵀ Σ (x − y)), (n, d), (p, d) → (n, p)."""
    difference = x[:, None] - y
    return (-0.5 * ((difference @ covariance(module)) * difference).sum(-1)).exp()


def test_gram_approaches_the_exact_kernel_at_rate_root_m() -> None:
    x = torch.randn(60, 8, generator=generator(1))

    @torch.no_grad()
    def error(features: int) -> float:
        errors = []
        for seed in range(8):
            module = random_features(8, features, seed)
            mapped = module(x)
            errors.append(float((mapped @ mapped.T - exact(module, x, x)).square().mean()))
        return math.sqrt(sum(errors) / len(errors))

    errors = [error(features) for features in (64, 256, 1024, 4096)]
    slope = math.log(errors[-1] / errors[0]) / math.log(4096 / 64)
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert errors[-1] < 0.02


def test_features_have_unit_norm_and_frequencies_the_stated_covariance() -> None:
    module = random_features(6, 20_000)
    x = 10 * torch.randn(7, 6, generator=generator(4))
    torch.testing.assert_close(module(x).norm(dim=-1), torch.ones(7))
    w = module.frequencies()
    torch.testing.assert_close(w @ w.T / w.shape[1], covariance(module), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("anisotropic", [True, False])
def test_median_heuristic_with_an_outlier_dimension(anisotropic: bool) -> None:
    x = torch.randn(2000, 16, generator=generator(5))
    x[:, 3] *= 60
    module = FourierFeatures(16, 8, 2, generator(), anisotropic=anisotropic)
    module.init_median(x, generator(), scale=1.5)
    precision = module.log_diagonal.detach().exp()
    assert projected_median(x, precision, generator(8)) == pytest.approx(1.5**2, rel=0.1)
    if anisotropic:  # the outlier does not drown the rest: every dimension moves the kernel alike
        share = precision * x.var(0)
        assert float(share.max() / share.min()) < 1.2


def test_same_generator_same_features() -> None:
    first, second = (FourierFeatures(6, 5, 2, generator(3)).frequencies() for _ in range(2))
    assert torch.equal(first, second)


def test_rms_normalize_and_effective_rank() -> None:
    x = torch.randn(4, 32, generator=generator()) * 100
    torch.testing.assert_close(rms_normalize(x).square().mean(-1), torch.ones(4))
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(5, 5)) == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------------------ operators


def test_streamed_least_squares_equals_lstsq() -> None:
    x = torch.randn(500, 12, generator=generator(), dtype=torch.float64)
    y = torch.randn(500, 7, generator=generator(1), dtype=torch.float64)
    moments = Moments(12, 7)
    for chunk_x, chunk_y in zip(x.split(64), y.split(64), strict=True):
        moments.update(chunk_x, chunk_y)
    expected = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(moments.solve(), expected)
    with_one = torch.linalg.lstsq(torch.cat((x, torch.ones(500, 1, dtype=x.dtype)), 1), y).solution.T
    matrix, offset = moments.solve_affine()
    torch.testing.assert_close(torch.cat((matrix, offset[:, None]), 1), with_one)
    residual = (x @ matrix.T + offset - y).square().sum()
    assert moments.residual(matrix, offset) == pytest.approx(float(residual))
    assert moments.variance() == pytest.approx(float((y - y.mean(0)).square().sum()))


def test_ridge_is_the_augmented_least_squares_solution() -> None:
    x = torch.randn(50, 6, generator=generator(), dtype=torch.float64)
    y = torch.randn(50, 3, generator=generator(1), dtype=torch.float64)
    moments = Moments(6, 3)
    moments.update(x, y)
    penalty = 0.1 * float((x.T @ x).diagonal().mean())
    augmented = torch.cat((x, math.sqrt(penalty) * torch.eye(6, dtype=x.dtype)))
    expected = torch.linalg.lstsq(augmented, torch.cat((y, torch.zeros(6, 3, dtype=x.dtype)))).solution.T
    torch.testing.assert_close(moments.solve(0.1), expected)


def test_dynamics_keep_the_matrices_they_start_from() -> None:
    matrices = torch.eye(5) + 0.3 * torch.randn(3, 5, 5, generator=generator())
    dynamics = LinearDynamics(3, 5)
    dynamics.start(matrices)
    torch.testing.assert_close(dynamics.matrices(), matrices)
    torch.testing.assert_close(dynamics.product(), matrices[2] @ matrices[1] @ matrices[0])
    torch.testing.assert_close(dynamics.spectral_norms(), torch.linalg.svdvals(matrices)[:, 0])
    torch.testing.assert_close(torch.linalg.matrix_norm(dynamics.direction, 2), torch.ones(3))


def test_power_iteration_agrees_with_singular_values() -> None:
    matrices = torch.eye(40) + 0.3 * torch.randn(3, 40, 40, generator=generator())
    torch.testing.assert_close(spectral_norm(matrices), torch.linalg.svdvals(matrices)[:, 0], rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------ similarity


def dense_unbiased_hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Song et al. 2012, equation 5, term by term."""
    n = len(k)
    k, m = k.clone().fill_diagonal_(0), m.clone().fill_diagonal_(0)
    one = torch.ones(n, dtype=k.dtype)
    value = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (value - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def dense_cka(h: torch.Tensor, gram: str, widths: torch.Tensor | None = None) -> torch.Tensor:
    h = h.double()
    if gram == "linear":
        grams = [state @ state.T for state in h]
    else:
        assert widths is not None
        grams = [(-torch.cdist(s, s).square() / (2 * w)).exp() for s, w in zip(h, widths.double(), strict=True)]
    values = torch.tensor([[float(dense_unbiased_hsic(a, b)) for b in grams] for a in grams], dtype=torch.float64)
    return values / values.diagonal().sqrt().outer(values.diagonal().sqrt())


def walk(states: int, tokens: int, width: int, step: float = 0.4) -> torch.Tensor:
    h = torch.randn(tokens, width, generator=generator()) * 3
    h[:, 1] *= 20  # an outlier dimension, as trained streams have
    path = [h]
    for index in range(states - 1):
        path.append(path[-1] + step * torch.randn(tokens, width, generator=generator(index + 1)))
    return torch.stack(path)


def test_streamed_cka_in_one_chunk_equals_dense_cka() -> None:
    h = walk(4, 120, 10)
    streamed = LayerSimilarity(median_distances(h))
    streamed.update(h)
    value = streamed.value()
    torch.testing.assert_close(value["linear_cka"], dense_cka(h, "linear"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value["rbf_cka"], dense_cka(h, "rbf", streamed.width), rtol=1e-4, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(h[0], h[3], dim=-1).mean()
    assert float(value["cosine"][0, 3]) == pytest.approx(float(cosine), rel=1e-5)
    update = ((h[1:] - h[:-1]).norm(dim=-1) / h[:-1].norm(dim=-1)).mean(-1)
    torch.testing.assert_close(value["relative_update"].float(), update)


def test_cka_streamed_over_chunks_approaches_dense_cka() -> None:
    h = walk(3, 1024, 8, step=2.0)
    streamed = LayerSimilarity(median_distances(h[:, :256]))
    for chunk in h.split(256, dim=1):
        streamed.update(chunk)
    torch.testing.assert_close(streamed.value()["linear_cka"], dense_cka(h, "linear"), rtol=0, atol=3e-4)


def test_sums_of_two_halves_are_those_of_the_whole() -> None:
    h = walk(3, 256, 8)
    whole, *halves = (LayerSimilarity(median_distances(h)) for _ in range(3))
    for half, chunk in zip(halves, h.split(128, dim=1), strict=True):
        half.update(chunk)
        whole.update(chunk)
    for name, value in whole.sums.items():
        torch.testing.assert_close(halves[0].sums[name] + halves[1].sums[name], value, rtol=1e-12, atol=0)
    assert float(whole.sums["tokens"]) == 256


def test_a_token_of_a_large_norm_costs_no_digits() -> None:
    h = walk(4, 120, 10)
    h[:, 0] *= 1000  # as the first token of a row has in trained models
    streamed = LayerSimilarity(median_distances(h))
    streamed.update(h)
    value = streamed.value()
    torch.testing.assert_close(value["linear_cka"], dense_cka(h, "linear"), rtol=0, atol=1e-5)
    torch.testing.assert_close(value["rbf_cka"], dense_cka(h, "rbf", streamed.width), rtol=0, atol=1e-4)


def test_rbf_width_is_the_median_distance() -> None:
    h = walk(2, 64, 6)
    expected = torch.pdist(h[1]).square().quantile(0.5, interpolation="lower")
    assert float(median_distances(h)[1]) == pytest.approx(float(expected), rel=1e-4)
    torch.testing.assert_close(squared_distances(h)[0], torch.cdist(h[0], h[0]).square(), rtol=1e-3, atol=1e-2)


def test_unrelated_states_have_cka_near_zero_and_equal_ones_one() -> None:
    a, b = (torch.randn(1, 400, 5, generator=generator(seed)) for seed in (0, 1))
    h = torch.cat((a, b, 7 * a + 3))
    streamed = LayerSimilarity(median_distances(h))
    streamed.update(h)
    value = streamed.value()["linear_cka"]
    assert abs(float(value[0, 1])) < 0.05
    assert float(value[0, 2]) == pytest.approx(1, abs=1e-4)
    assert float(cka(torch.eye(2)).sum()) == pytest.approx(2)


# ------------------------------------------------------------------------------------------ bounds


def test_bound_holds_for_exact_dynamics_and_grows_with_the_horizon(monkeypatch) -> None:
    matrices = torch.eye(6) + 0.1 * torch.randn(3, 6, 6, generator=generator())
    features = [torch.nn.functional.normalize(torch.randn(200, 6, generator=generator(1)), dim=-1)]
    for matrix in matrices:
        noise = 0.02 * torch.randn(200, 6, generator=generator(2))
        features.append(features[-1] @ matrix.T + noise)
    path = torch.stack(features)
    errors = k_step_errors(matrices, path)
    monkeypatch.setattr(bounds, "CHUNK", 33)
    assert k_step_errors(matrices, path / 2, lambda states: 2 * states) == pytest.approx(errors)
    one_step = (path[:-1] @ matrices.transpose(1, 2) - path[1:]).square().sum(-1).mean(-1).max()
    norm = float(torch.linalg.matrix_norm(matrices, 2).max())
    limits = [theorem1_bound(float(one_step), norm, 1.0, 3, 200, k) for k in (1, 2, 3)]
    assert all(error <= limit for error, limit in zip(errors, limits, strict=True))
    assert limits[0] < limits[1] < limits[2]
    assert error_growth(2.0, 3) == 7
    inner = 0.1 + 4.0 * math.sqrt(2 * 8 * math.log(2 * 8 / 0.05) / 1000)
    assert theorem1_bound(0.1, 2.0, 1.0, 8, 1000, 2) == pytest.approx(3 * math.sqrt(inner))


def test_relative_risk_of_an_affine_map_is_zero_and_of_noise_one() -> None:
    x = torch.randn(800, 5, generator=generator())
    y = x @ torch.randn(5, 4, generator=generator(1)) + 3
    noise = torch.randn(800, 4, generator=generator(2))
    assert relative_risk((x[:400], y[:400]), (x[400:], y[400:])) < 1e-6
    assert relative_risk((x[:400], noise[:400]), (x[400:], noise[400:])) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("solve", [
    lambda sums: sums.solve(), lambda sums: sums.solve_affine(), lambda sums: sums.leverages(0.0),
    lambda sums: sums.cost_of_leaving_out(0.0)])
def test_inputs_that_cannot_be_told_apart_are_told(solve: Callable[[Moments], object]) -> None:
    sums = Moments(3, 2)
    sums.update(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), torch.ones(2, 2))
    with pytest.raises(KDPruneError, match="got 2 tokens that 3 inputs cannot be told apart from"):
        solve(sums)
