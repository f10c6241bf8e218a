"""KDP without its kernel: an affine least-squares map in the original space (KDP, ablation "w/o kernel")."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data import TokenSet
from kdprune.keeper import Keeper
from kdprune.kernel.operators import Moments
from kdprune.methods.block_data import block_states, check_rows, fit_record, fitted_error
from kdprune.methods.blocks import Budget, choose_blocks, possible_blocks
from kdprune.methods.method import RankedMethod
from kdprune.methods.result import MethodResult
from kdprune.methods.shape import Shape
from kdprune.methods.site import PASS_ROWS, Site
from kdprune.model.block_states import BlockStates
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.placement import work_device
from kdprune.model.surgery import Edit, check_model
from kdprune.options import option
from kdprune.runtime import Stages


@dataclass(frozen=True, kw_only=True)
class Linear(RankedMethod):
    """Replaces blocks, chosen as KDP chooses them, by linear maps of the state itself.

        S(h) = h + M h + c,   (M, c) = argmin Σ ‖M h_s + c − (h_e − h_s)‖² + ρ‖M‖²,   ρ = ridge · tr(Cov h_s · n)/d

    over real calibration tokens; M of shape (d, d), c (d,). Moments and solve are float64. The stand-in is folded
    into the layer beside the block and costs d² + d parameters.

    Source: KDP, ablation "w/o kernel". The ridge draws towards S(h) = h + c, that is, towards dropping the block.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "Linear (KDP w/o kernel)"
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    ridge: float = option(1e-4, "relative ridge of the least-squares solve", above=0, rare=True)

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, not after the analysis."""
        super().check(model, tokens)
        check_model(model, substitutes=True)
        possible_blocks(self, self._budget(model))
        check_rows(tokens)

    def _budget(self, model: PreTrainedModel) -> Budget:
        shape = Shape(model.config.hidden_size, kind="linear", features=0, hidden=0, residual=True, context=False)
        return Budget(model, shape, self.ratio)

    def __call__(
        self, model: PreTrainedModel, tokens: TokenSet, scores: Mapping[str, Tensor] | None, *, seed: int = 0,
        stages: Stages | None = None, batch_size: int = 16, keep: Keeper | None = None,
    ) -> MethodResult:
        """Chooses the blocks, solves for their maps and returns the edits; arguments as in :class:`Method`."""
        self.check(model, tokens)
        stages = stages or Stages()
        blocks = choose_blocks(self, scores, self._budget(model))
        edits: list[Edit] = []
        records = []
        for states in block_states(model, tokens, blocks, self.held, batch_size, stages, keep):
            with stages.stage("least squares", 1) as advance:
                site = fit_affine(model, states, self.ridge, work_device(model))
                energy = site.update_energy(PASS_ROWS)
                records.append(fit_record(site, energy, fitted_error(site, energy)))
                advance(1)
            edits.append(site.edit())
        return MethodResult(edits, records)


@torch.no_grad()
def fit_affine(model: PreTrainedModel, states: BlockStates, ridge: float, device: torch.device) -> Site:
    """The block's site with the affine least-squares map of h_e − h_s on h_s in its stand-in."""
    width = states.inputs.shape[-1]
    stand_in = StandIn(width, kind="linear", features=0, residual=True, normalize=False)
    site = Site(model, states, stand_in, None, device)
    moments = Moments(width, width, device)
    for rows in site.row_batches(PASS_ROWS):
        target, mask = site.target(rows)
        inputs = states.inputs[rows].to(device).float()[mask]
        moments.update(inputs, target[mask] - inputs)
    matrix, offset = moments.reduced().solve_affine(ridge)
    stand_in.readout.weight.copy_(matrix)
    stand_in.readout.bias.copy_(offset)
    return site
