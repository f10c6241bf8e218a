"""KDP without its kernel: an affine least-squares map in the original space (KDP, ablation "w/o kernel")."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.methods.common.block_data import block_states, check_rows, fit_record, fitted_error
from kdprune.methods.common.budget import Budget, check_budget, choose_blocks
from kdprune.methods.common.method import RankedMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.model.block_states import BlockStates
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Edit, check_model
from kdprune.options import option
from kdprune.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class Linear(RankedMethod):
    """Replaces blocks, chosen as KDP does with ranking="similarity", by linear maps of the state itself.

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

    @property
    def takes_apart(self) -> bool:
        """A map takes the place of whole layers."""
        return False

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, not after the analysis."""
        super().check(model, tokens)
        check_model(model, substitutes=True)
        check_budget(self, self._budget(model))
        check_rows(tokens)

    def _budget(self, model: PreTrainedModel) -> Budget:
        shape = Shape(model.config.hidden_size, kind="linear", features=0, hidden=0, residual=True, context=False)
        return Budget(model, shape, self.target(model))

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the blocks, solves for their maps and returns the edits."""
        blocks = choose_blocks(self, model, tokens, run, self._budget(model))
        edits: list[Edit] = []
        records = []
        for states in block_states(model, tokens, blocks, self.held, run):
            with run.stage("least squares", 1) as progress:
                fitting = fit_affine(model, states, self.ridge, run)
                energy = fitting.update_energy()
                records.append(fit_record(fitting, energy, fitted_error(fitting, energy)))
                progress(1)
            edits.append(fitting.edit())
        return MethodResult(edits, records)


@torch.no_grad()
def fit_affine(model: PreTrainedModel, states: BlockStates, ridge: float, run: Run) -> StandInFit:
    """The block's fitting with the affine least-squares map of h_e − h_s on h_s in its stand-in."""
    width = states.inputs.shape[-1]
    stand_in = StandIn(width, kind="linear", features=0, residual=True, normalize=False)
    fitting = StandInFit(model, states, stand_in, None, run)
    matrix, offset = fitting.affine(ridge)
    stand_in.readout.weight.copy_(matrix)
    stand_in.readout.bias.copy_(offset)
    return fitting
