"""Beyond 25 %: operators limited in spectral norm, a kernel shared by blocks, and the longest block."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from families import CONFIGS, LAYERS, build
from tiny_checkpoint import command
from transformers import PreTrainedModel

from kdprune.comparison.variants import parse_variant
from kdprune.data.tokens import TokenSet, load_tokens
from kdprune.errors import KDPruneError
from kdprune.kernel.bounds import theorem1_bound
from kdprune.kernel.features import FourierFeatures
from kdprune.kernel.operators import LinearDynamics, clip_spectral_norm
from kdprune.methods.common.budget import Budget, choose_blocks, possible_blocks
from kdprune.methods.common.stand_in_fit import Site
from kdprune.methods.kdp.diagnostics import theory
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.kdp.step1_dynamics import Parts, Step1, fit_dynamics, solve_operators
from kdprune.methods.peers.linear import Linear
from kdprune.model.surgery import Substitute, apply_edits
from kdprune.run.recipe import load_recipe
from kdprune.train.loop import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {"kernel_epochs": 2, "kernel_tokens": 64, "refine_epochs": 1, "features": 6, "rank": 2}
TWO_BLOCKS = ((1, 3), (4, 6))


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


def learned(paths: list[torch.Tensor], limit: float | None = None, ols_start: bool = True) -> list[Step1]:
    features = FourierFeatures(paths[0].shape[-1], 12, 2, generator(5))
    features.init_median(paths[0].flatten(0, 1), generator(6))
    return fit_dynamics(
        features, paths, torch.ones(paths[0].shape[1]), Schedule(3, 64, 1e-2), generator(7), ridge=1e-4,
        name="test", parts=Parts(ols_start=ols_start), limit=limit)


# ------------------------------------------------------------------------------------------ spectral norm


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0])
def test_clipping_cuts_the_singular_values(limit: float) -> None:
    matrices = torch.eye(30) + 0.3 * torch.randn(4, 30, 30, generator=generator())
    matrices[0] = 0.1 * torch.eye(30)  # within every limit
    matrices[1, :, 3] = 0  # of rank 29
    left, values, right = torch.linalg.svd(matrices.double())
    expected = left @ torch.diag_embed(values.clamp_max(limit)) @ right
    clipped = clip_spectral_norm(matrices, limit)
    torch.testing.assert_close(clipped, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(clipped[0], matrices[0].double(), rtol=0, atol=1e-14)


def test_clipping_is_the_nearest_point_of_the_ball() -> None:
    matrix = torch.eye(12) + torch.randn(1, 12, 12, generator=generator())
    nearest = clip_spectral_norm(matrix, 1.0)
    for seed in range(20):  # a projection on a convex set: ⟨A − P, X − P⟩ ≤ 0 for every X in it
        other = torch.randn(1, 12, 12, generator=generator(seed + 1), dtype=torch.float64)
        other = other / torch.linalg.matrix_norm(other, 2)
        assert float(((matrix - nearest) * (other - nearest)).sum()) <= 1e-9


def test_operators_are_brought_back_to_the_limit_and_left_alone_within_it() -> None:
    dynamics = LinearDynamics(2, 10, limit=1.0)
    dynamics.start(torch.eye(10) + 0.4 * torch.randn(2, 10, 10, generator=generator()))
    assert float(torch.linalg.svdvals(dynamics.matrices().detach().double()).max()) <= 1 + 1e-5
    with torch.no_grad():
        dynamics.gamma += 0.3
    assert float(dynamics.spectral_norms().max()) > 1.05
    dynamics.hold()
    assert float(torch.linalg.svdvals(dynamics.matrices().detach().double()).max()) <= 1 + 1e-5
    with torch.no_grad():
        dynamics.gamma.zero_()
    before = dynamics.direction.clone()
    dynamics.hold()
    assert torch.equal(before, dynamics.direction)  # at I, where a restart would forget B


@pytest.mark.parametrize("ols_start", [True, False])
def test_the_limit_holds_at_every_start_and_at_the_end(ols_start: bool) -> None:
    [free], [held] = (learned([growing_path()], limit, ols_start) for limit in (None, 1.0))
    assert max(free.curves["spectral_norm"]) > 1.01
    assert max(held.curves["spectral_norm"]) <= 1 + 1e-5
    assert float(torch.linalg.svdvals(held.dynamics.matrices().detach().double()).max()) <= 1 + 1e-5
    if ols_start:
        solution = torch.stack(list(solve_operators(held.features, growing_path(), 1e-4)))
        left, values, right = torch.linalg.svd(solution)
        nearest = left @ torch.diag_embed(values.clamp_max(1)) @ right
        torch.testing.assert_close(held.dynamics.matrices().detach().double(), nearest, rtol=0, atol=1e-5)


def test_a_limit_that_is_never_met_changes_nothing() -> None:
    [free], [held] = learned([growing_path()]), learned([growing_path()], 1e3)
    torch.testing.assert_close(free.dynamics.matrices(), held.dynamics.matrices(), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------ one kernel for all


def test_blocks_that_are_the_same_share_the_kernel_of_one() -> None:
    path = growing_path()
    [alone] = learned([path])
    first, second = learned([path, path])
    assert first.features is second.features
    # The mean over twice the operators is the mean over one block's; Adam does not see the size of a gradient.
    torch.testing.assert_close(first.features.frequencies(), alone.features.frequencies(), rtol=0, atol=5e-3)
    torch.testing.assert_close(first.dynamics.matrices(), second.dynamics.matrices(), rtol=0, atol=1e-6)
    assert first.curves["loss"] == pytest.approx(alone.curves["loss"], rel=1e-3)


def test_blocks_of_different_lengths_keep_their_own_operators() -> None:
    paths = [growing_path(3), growing_path(2, seed=3)]
    found = learned(paths)
    for step1, path in zip(found, paths, strict=True):
        torch.testing.assert_close(
            step1.dynamics.matrices().detach().double(), torch.stack(list(solve_operators(step1.features, path, 1e-4))),
            rtol=0, atol=1e-5)
        assert {"loss", "cosine", "spectral_norm", "feature_norm", "unexplained"} == set(step1.curves)
        assert len(step1.curves["unexplained"]) == 4
    assert found[0].curves["unexplained"] != found[1].curves["unexplained"]


def stand_ins(model: PreTrainedModel, **options: Any) -> list[Substitute]:
    method = KDP(**{**QUICK, "context": "none", "refine": False, "blocks": TWO_BLOCKS, **options})
    return list(method(model, random_tokens(), None, seed=3, batch_size=4).edits)  # type: ignore[arg-type]


def test_a_shared_kernel_is_the_same_in_every_stand_in_and_refined_apart() -> None:
    model = build("llama3")
    first, second = (edit.stand_in.state_dict() for edit in stand_ins(model, share_kernel=True))
    assert torch.equal(first["phase.weight"], second["phase.weight"])
    assert not torch.equal(first["readout.weight"], second["readout.weight"])
    refined = [edit.stand_in.state_dict()["phase.weight"] for edit in stand_ins(
        model, share_kernel=True, refine=True, rate=1e-3)]
    assert not torch.equal(refined[0], refined[1])
    # The shared kernel is that of the dense model's states, however later blocks are fitted.
    later = [edit.stand_in.state_dict()["phase.weight"] for edit in stand_ins(
        model, share_kernel=True, sequential=True)]
    assert torch.equal(later[0], later[1])
    own = [edit.stand_in.state_dict()["phase.weight"] for edit in stand_ins(model)]
    assert not torch.equal(own[0], own[1])


def test_with_one_block_shared_and_own_are_the_same() -> None:
    model = build("llama3")
    pairs = zip(stand_ins(model, blocks=((1, 4),)), stand_ins(model, blocks=((1, 4),), share_kernel=True), strict=True)
    for own, shared in pairs:
        for name, value in own.stand_in.state_dict().items():
            assert torch.equal(value, shared.stand_in.state_dict()[name]), name


def test_theory_taken_in_chunks_is_theory_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    path, held = growing_path(3, 300), growing_path(3, 90, seed=4)
    [step1] = learned([path])
    states = SimpleNamespace(path=path, path_held=held)
    site = cast(Site, SimpleNamespace(states=states, device=torch.device("cpu"), to_kernel=lambda value: value))
    for module in ("kdprune.methods.common.diagnostics.CHUNK", "kdprune.kernel.bounds._CHUNK"):
        monkeypatch.setattr(module, 64)
    found = theory(site, step1)
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


# ------------------------------------------------------------------------------------------ the method


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_pruned_with_operators_that_do_not_grow(name: str) -> None:
    model = build(name)
    method = KDP(blocks=TWO_BLOCKS, spectral_norm=1.0, share_kernel=True, **QUICK)
    result = method(model, random_tokens(), None, seed=1, batch_size=4)
    for entry in result.fit:
        assert entry["B_A"] <= 1 + 1e-5
        # Σ_{j<k} 1 = k: the bound of j steps is j times that of one.
        growth = [value / entry["bound"][0] for value in entry["bound"]]
        assert growth == pytest.approx([step + 1 for step in range(len(growth))], rel=1e-4 + 2 * abs(1 - entry["B_A"]))
    pruned = apply_edits(model, list(result.edits))
    assert pruned.config.num_hidden_layers < LAYERS
    assert torch.isfinite(pruned(random_tokens().ids).logits).all()


def test_options_in_recipe_and_variant_and_on_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("spectral-norm: 1.0\nshare-kernel: true\nmax-block: 6\n")
    assert load_recipe(recipe) == {"spectral_norm": 1.0, "share_kernel": True, "max_block": 6}
    method = parse_variant("kdp:spectral-norm=1:share-kernel=yes", 0.4).method
    assert isinstance(method, KDP)
    assert (method.spectral_norm, method.share_kernel) == (1.0, True)
    assert KDP().spectral_norm is None
    for value in (0.0, -1.0):
        with pytest.raises(KDPruneError, match="spectral_norm"):
            KDP(spectral_norm=value)


def test_options_are_in_the_help() -> None:
    shown = command("prune", "--help").out
    assert "--spectral-norm" in shown
    assert "--share-kernel" in shown


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
    method = KDP(ratio=ratio)
    budget = Budget(bundled, method.shape(bundled.config.hidden_size), ratio)
    blocks = choose_blocks(method, {"rbf_cka": similarity}, budget)
    removed = sum(budget.removal(block) for block in blocks)
    assert budget.target <= removed <= 1.1 * budget.target
    assert all(2 <= len(block) <= layers // 2 for block in blocks)


def test_a_ratio_out_of_reach_names_the_largest(bundled: PreTrainedModel) -> None:
    method = KDP(ratio=0.5, max_block=4)
    budget = Budget(bundled, method.shape(bundled.config.hidden_size), method.ratio)
    with pytest.raises(KDPruneError, match=r"ratio 0\.5, expected at most 0\.4\d+, .*blocks of at most 4.*max_block="):
        possible_blocks(method, budget)
