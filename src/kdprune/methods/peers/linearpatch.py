"""LinearPatch: channel scaling in a Hadamard basis at the interface of one cut (arXiv 2505.24680)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.methods.common.block_data import block_states, candidates, check_rows, choose, fit_record, fitted_error
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.stand_in_fit import PASS_ROWS, StandInFit
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Edit, check_model
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class LinearPatch(DepthMethod):
    """Drops one run of layers and puts one symmetric matrix at the interface.

        S(h) = P h,   P = H D Hᵀ,   D = diag(D_1 … D_d),   D_i = Σ|(Hᵀ h_e)_i| / Σ|(Hᵀ h_s)_i|

    over real calibration tokens; H, D, P of shape (d, d). H is the orthonormal Hadamard matrix: it spreads the
    outliers of single channels over all of them before they are scaled. Nothing is trained. The run [s, e) has the
    least length that meets the ratio and, of those, the greatest mean cosine of h_s and h_e. P costs d² parameters,
    and d for the bias, zero, of the module that holds it.

    Source: Chen et al., "A Simple Linear Patch Revives Layer-Pruned Large Language Models", NeurIPS 2025. Where d is
    no power of two, H is block-diagonal (:func:`hadamard`). The published code multiplies in float32 by a hook on
    the layer in front of the cut; here P is saved in the model's dtype as part of it. The paper's further training
    of P by distillation is left to healing.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "LinearPatch"
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        check_model(model, substitutes=True)
        candidates(self, model, _cost(model))
        check_rows(tokens)

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the run of layers, measures its scales and returns the edits."""
        blocks = choose(self, model, tokens, run, _cost(model))
        edits: list[Edit] = []
        records = []
        for states in block_states(model, tokens, blocks, self.held, run):
            stand_in = StandIn(
                model.config.hidden_size, kind="linear", features=0, residual=False, normalize=False)
            fitting = StandInFit(model, states, stand_in, None, run)
            with torch.no_grad():
                stand_in.readout.weight.copy_(patch_matrix(channel_scales(fitting)))
                stand_in.readout.bias.zero_()
            energy = fitting.update_energy(PASS_ROWS)
            edits.append(fitting.edit())
            records.append(fit_record(fitting, energy, fitted_error(fitting, energy)))
        return MethodResult(edits, records)


def hadamard(size: int) -> Tensor:
    """An orthonormal Hadamard matrix H of shape (size, size), float64: H Hᵀ = I.

    H_{2p} = [[H_p, H_p], [H_p, −H_p]]/√2, H_1 = 1. For size = q · p, p its largest power of two, it is I_q ⊗ H_p:
    every run of p channels is rotated by itself, and an odd size is not rotated at all.
    """
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1))) / 2**0.5
    return torch.block_diag(*[matrix] * (size // power))


def patch_matrix(scales: Tensor) -> Tensor:
    """P = H diag(scales) Hᵀ, shape (d, d), float64, from the scales of the d rotated channels."""
    rotation = hadamard(len(scales)).to(scales.device)
    return (rotation * scales.double()) @ rotation.T


@torch.no_grad()
def channel_scales(fitting: StandInFit) -> Tensor:
    """D_i, shape (d,), float64: mean |rotated channel| of h_e over that of h_s, fitted rows, real tokens."""
    rotation = hadamard(fitting.states.inputs.shape[-1]).to(fitting.device)
    before, after = torch.zeros(2, len(rotation), dtype=torch.float64, device=fitting.device)
    for rows in fitting.row_batches(PASS_ROWS):
        target, mask = fitting.target(rows)
        inputs = fitting.states.inputs[rows].to(fitting.device)
        before += (inputs[mask].double() @ rotation).abs().sum(0)
        after += (target[mask].double() @ rotation).abs().sum(0)
    world().sum(before, after)
    return after / before.clamp_min(1e-300)


def _cost(model: PreTrainedModel) -> int:
    width = model.config.hidden_size
    return width * width + width
