"""What is reported of a fitted kernel: theory beside measurement, on held-out tokens (KDP, section 7)."""

from typing import Any

import torch
from torch import Tensor

from kdprune.kernel.bounds import k_step_errors, relative_risk, theorem1_bound
from kdprune.kernel.features import CHUNK
from kdprune.kernel.operators import Moments
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.kdp.step1_dynamics import Step1, endpoint_statistics


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
        "k_step_error": k_step_errors(matrices, held_path, mapped),
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
    features, matrices = step1.features, step1.dynamics.matrices()
    moments = Moments(2 * features.features, fit_path.shape[-1], fit_path.device)
    for ends in fit_path[-1].split(CHUNK):
        moments.update(features(ends), ends)
    readout = moments.solve(ridge).float()
    true, predicted = (torch.zeros(len(held_path), dtype=torch.float64) for _ in range(2))
    given = 0.0
    for chunk in held_path.split(CHUNK, dim=1):
        mapped = features(chunk)
        true += mapped.norm(dim=-1).sum(-1).cpu()
        advanced = [mapped[0]]
        for matrix in matrices:
            advanced.append(advanced[-1] @ matrix.T)
        predicted += torch.stack(advanced).norm(dim=-1).sum(-1).cpu()
        given += float((advanced[-1] @ readout.T).norm(dim=-1).sum())
    tokens = held_path.shape[1]
    return {
        "feature_true": (true / tokens).tolist(), "feature_predicted": (predicted / tokens).tolist(),
        "output_true": float(held_path[-1].norm(dim=-1).mean()),
        "output_without_alpha": given / tokens, "output_with_alpha": alpha * given / tokens,
    }
