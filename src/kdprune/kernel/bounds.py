"""Theorem 1's bound and Theorem 2's two risks, to be reported beside what is measured (KDP, section 7)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdprune.kernel.features import CHUNK
from kdprune.kernel.operators import Moments


def error_growth(spectral_norm: float, steps: int) -> float:
    """Σ_{j<k} B_A^{k−1−j}: by how much one step's error is multiplied over k steps."""
    return sum(spectral_norm**power for power in range(steps))


def theorem1_bound(
    empirical_risk: float, spectral_norm: float, feature_norm: float, features: int, samples: int, steps: int,
    delta: float = 0.05, constant: float = 1.0,
) -> float:
    """E_{k,l} ≤ √(L_ERM + C B_A² R_φ² √(2m log(2m/δ)/n)) · Σ_{j<k} B_A^{k−1−j}.

    Args:
        empirical_risk: L_ERM, mean ‖A φ(h) − φ(h')‖² of one step on the n fitted tokens.
        spectral_norm: B_A = max_i ‖A_i‖₂.
        feature_norm: R_φ = max ‖φ‖ (1 for these features).
        features: m.
        samples: n.
        steps: k.
        delta: 1 − confidence.
        constant: the theorem's unnamed C; the paper gives no value, so 1 is used and stated.

    Returns:
        A bound on the k-step error ‖A_k ⋯ A_1 φ(h_s) − φ(h_{s+k})‖ (root mean square over tokens).
    """
    complexity = math.sqrt(2 * features * math.log(2 * features / delta) / samples)
    inner = empirical_risk + constant * spectral_norm**2 * feature_norm**2 * complexity
    return math.sqrt(inner) * error_growth(spectral_norm, steps)


def relative_risk(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], ridge: float = 1e-6,
    lift: Callable[[Tensor], Tensor] = lambda states: states,
) -> float:
    """Held-out risk of an affine least-squares map x → y, as a share of the target's variance.

    Theorem 2 compares this in kernel space (x = φ(h_s), y = φ(h_e)) with the original space (x = h_s, y = h_e);
    dividing by Σ‖y − mean‖² makes the two spaces, which have different units, comparable.

    Args:
        train: the pair (x, y) that is fitted, shapes (n, p), (n, q).
        test: the held-out pair.
        lift: applied to both, chunk by chunk, so that what it makes of all tokens is never there at once.
    """
    fit, held = _moments(train, lift), _moments(test, lift)
    matrix, offset = fit.solve_affine(ridge)
    return held.residual(matrix, offset) / max(held.variance(), 1e-300)


def _moments(pair: tuple[Tensor, Tensor], lift: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of lifted pairs."""
    sums = None
    for first, second in zip(*(states.split(CHUNK) for states in pair), strict=True):
        x, y = lift(first), lift(second)
        sums = sums or Moments(x.shape[-1], y.shape[-1], x.device)
        sums.update(x, y)
    assert sums is not None, "no tokens"
    return sums


@torch.no_grad()
def k_step_errors(
    matrices: Tensor, path: Tensor, lift: Callable[[Tensor], Tensor] = lambda states: states
) -> list[float]:
    """Root mean square of ‖A_j ⋯ A_1 φ(h_s) − φ(h_{s+j})‖ over tokens, for j = 1 … k.

    Args:
        matrices: A, shape (k, D, D).
        path: the block's k+1 states, shape (k+1, n, d).
        lift: φ, applied chunk by chunk, (…, d) → (…, D).
    """
    squares = torch.zeros(len(matrices), dtype=torch.float64)
    for chunk in path.split(CHUNK, dim=1):
        lifted = lift(chunk)
        state = lifted[0]
        for step, (matrix, target) in enumerate(zip(matrices, lifted[1:], strict=True)):
            state = state @ matrix.T
            squares[step] += float((state - target).square().sum(dtype=torch.float64))
    return [float(error) for error in (squares / path.shape[1]).sqrt()]
