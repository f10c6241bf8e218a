"""What is reported of a fitted kernel: theory beside measurement, on held-out tokens (KDP, section 7)."""

from typing import Any

import torch
from torch import Tensor

from kdprune.kernel.bounds import k_step_errors, relative_risk, theorem1_bound
from kdprune.kernel.operators import Moments
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.kdp.step1_dynamics import CHUNK, Step1, endpoint_statistics


@torch.no_grad()
def theory(fitting: StandInFit, step1: Step1) -> dict[str, Any]:
    """Theorem 1's figures and bound, measured k-step errors, Theorem 2's two risks, of the kernel as step 1 left it.

    L_ERM, R_φ and the effective rank are those of the fitted tokens, everything else is taken on held-out ones.

    Returns:
        The fields of the same names in ``results.json``'s ``fit``.
    """
    features, matrices = step1.features, step1.dynamics.matrices()
    fit_path, held_path = fitting.states.path, fitting.states.path_held

    def mapped(states: Tensor) -> Tensor:
        return features(fitting.to_kernel(states.to(fitting.device)))

    # In chunks of tokens: φ of the whole path would take several times the path's memory.
    squared, feature_norm = torch.zeros(len(matrices), dtype=torch.float64, device=fitting.device), 0.0
    for chunk in fit_path.split(CHUNK, dim=1):
        lifted = mapped(chunk)
        squared += (lifted[:-1] @ matrices.mT - lifted[1:]).square().sum(-1).sum(-1, dtype=torch.float64)
        feature_norm = max(feature_norm, float(lifted.norm(dim=-1).max()))
    tokens, spectral = fit_path.shape[1], float(step1.dynamics.spectral_norms().max())
    empirical = float(squared.max()) / tokens
    steps = range(1, len(matrices) + 1)
    kernel, original = ([
        relative_risk((fit_path[0], fit_path[step]), (held_path[0], held_path[step]), lift=lift) for step in steps
    ] for lift in (mapped, lambda states: states.to(fitting.device)))
    held = endpoint_statistics(features, step1.dynamics.product(), fitting.to_kernel(held_path.to(fitting.device)))
    return {
        "effective_rank": step1.effective_rank,
        "explained_variance": 1 - held["unexplained"],
        "gamma": step1.dynamics.gamma.tolist(),
        "B_A": spectral,
        "R_phi": feature_norm,
        "k_step_error": k_step_errors(matrices, mapped(held_path)),
        "bound": [
            theorem1_bound(empirical, spectral, feature_norm, features.features, tokens, step) for step in steps
        ],
        "kernel_risk": kernel[-1],
        "original_risk": original[-1],
        "kernel_risk_by_step": kernel,
        "original_risk_by_step": original,
    }


@torch.no_grad()
def norm_decay(step1: Step1, alpha: float, fit_path: Tensor, held_path: Tensor, ridge: float) -> dict[str, Any]:
    """How much repeated operators shrink the state, and what α restores (KDP, section 5), on held-out tokens.

    Features: mean ‖φ(h_{s+j})‖ beside ‖A_j ⋯ A_1 φ(h_s)‖, j = 0 … k. Outputs: a linear read-out is fitted on *true*
    features, φ(h_e) → h_e; applied to the advanced ones it gives outputs that are too short, and ``alpha``, the ratio
    of the feature norms on fitted tokens (``decay_compensation``), scales them back. (An inverse network fitted on
    advanced features, as step 2 does, takes α into its weights.)

    Args:
        fit_path: fitted states as the kernel map sees them, shape (k+1, n, d).
        held_path: held-out ones, shape (k+1, n', d).
    """
    features = step1.features
    true = features(fit_path[-1])
    moments = Moments(true.shape[-1], fit_path.shape[-1], true.device)
    moments.update(true, fit_path[-1])
    readout = moments.solve(ridge).float()
    mapped = features(held_path)
    state, predicted = mapped[0], [float(mapped[0].norm(dim=-1).mean())]
    for matrix in step1.dynamics.matrices():
        state = state @ matrix.T
        predicted.append(float(state.norm(dim=-1).mean()))
    given = float((state @ readout.T).norm(dim=-1).mean())
    return {
        "feature_true": mapped.norm(dim=-1).mean(-1).tolist(), "feature_predicted": predicted,
        "output_true": float(held_path[-1].norm(dim=-1).mean()),
        "output_without_alpha": given, "output_with_alpha": alpha * given,
    }
