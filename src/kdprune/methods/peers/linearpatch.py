"""LinearPatch: channel scaling in a Hadamard basis at the interface of one cut (arXiv 2505.24680)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.methods.common.block_data import (
    block_states,
    candidates,
    check_rows,
    fit_record,
    fitted_error,
    nearest,
)
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.common.distance import measure_channel_cosine, measure_distances
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.methods.peers.drop import block_influence, check_reach, runs
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Edit, check_model
from kdprune.options import option
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class LinearPatch(DepthMethod):
    """Drops one run of layers and puts one symmetric matrix at the interface.

        S(h) = P h,   P = H D Hᵀ,   D = diag(D_1 … D_d),   D_i = Σ|(Hᵀ h_e)_i| / Σ|(Hᵀ h_s)_i|

    over real calibration tokens; H, D, P of shape (d, d). H is an orthonormal Hadamard matrix (:func:`hadamard`): it
    spreads the outliers of single channels over all of them before they are scaled. Nothing is trained. P costs d²
    parameters, and d for the bias, zero, of the module that holds it. Neither layer 0 nor the last is taken, as in the
    published code. ``blocks_by`` says which of the others are:

    - "cosine": the run [s, e) of the least length that meets the ratio with the greatest E_t[cos(h_s,t, h_e,t)].
    - "channels": of the same runs the one with the greatest cosine over the tokens of a row, channel by channel
      (:func:`kdprune.methods.common.distance.measure_channel_cosine`), as the published code has it.
    - "influence": the fewest layers of lowest Block Influence (ShortGPT) that meet the ratio, a patch in every gap.

    Source: Chen et al., "A Simple Linear Patch Revives Layer-Pruned Large Language Models", NeurIPS 2025; its best
    rows take ShortGPT's layers. The published code multiplies in float32 by a hook on the layer in front of the cut;
    here P is saved in the model's dtype as part of it. It averages the ratio D_i over rows; here D_i is the ratio of
    the sums. The paper's further training of P by distillation is left to healing.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "LinearPatch"
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True
    ends: ClassVar[tuple[int, int]] = (1, 1)

    blocks_by: Literal["cosine", "channels", "influence"] = option(
        "cosine", "what chooses the layers: cosine of the states around a run, token by token or channel by channel "
        "(its code), or Block Influence (ShortGPT's layers)", group="size")

    @property
    def takes_apart(self) -> bool:
        """A scale takes the place of whole layers."""
        return False

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        check_model(model, substitutes=True)
        if self.blocks_by == "influence" and self.blocks is None:
            sizes, allowed = layer_sizes(model), self.allowed(model)
            check_reach(self.target(model), sum(sizes[layer] for layer in allowed) - _cost(model))
        else:
            candidates(self, model, _cost(model))
        check_rows(tokens)

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the layers, measures the scales of every gap and returns the edits."""
        blocks = self.choose(model, tokens, run)
        edits: list[Edit] = []
        records = []
        for states in block_states(model, tokens, blocks, self.held, run):
            stand_in = StandIn(
                model.config.hidden_size, kind="linear", features=0, residual=False, normalize=False)
            fitting = StandInFit(model, states, stand_in, None, run)
            with torch.no_grad():
                stand_in.readout.weight.copy_(patch_matrix(channel_scales(fitting)))
                stand_in.readout.bias.zero_()
            energy = fitting.update_energy()
            edits.append(fitting.edit())
            records.append(fit_record(fitting, energy, fitted_error(fitting, energy)))
        return MethodResult(edits, records)

    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> list[range]:
        """The explicit blocks, or those that ``blocks_by`` chooses."""
        if self.blocks is not None or self.blocks_by != "influence":
            blocks = candidates(self, model, _cost(model))
            if self.blocks is not None:
                return blocks
            similarity = (measure_channel_cosine(model, tokens, run) if self.blocks_by == "channels"
                          else measure_distances(model, tokens, run).cosine)
            return [nearest(blocks, 1 - similarity)]
        sizes, target = layer_sizes(model), self.target(model).parameters
        influence = block_influence(measure_distances(model, tokens, run).cosine)
        chosen: list[int] = []
        for layer in sorted(self.allowed(model), key=lambda layer: (influence[layer], layer)):
            chosen.append(layer)
            if sum(sizes[taken] for taken in chosen) - len(runs(chosen)) * _cost(model) >= target:
                break
        return runs(chosen)


def hadamard(size: int) -> Tensor:
    """An orthonormal Hadamard matrix H of shape (size, size), float64: H Hᵀ = I, all entries ±1/√size.

    For size = b · 2^k it is H_b ⊗ H_2 ⊗ … ⊗ H_2, H_2 = [[1, 1], [1, −1]]/√2, with H_b of the smallest order b that
    Paley's constructions give (:func:`paley`): 576 = 36 · 16, 640 = 20 · 32, 896 = 28 · 32. Where they give none, as
    for odd sizes, it is I ⊗ H_m with m the greatest divisor of size that they do: every run of m channels is rotated
    by itself.
    """
    whole = next(order for order in range(size, 0, -1) if size % order == 0 and _base(order))
    base = _base(whole)
    matrix = torch.ones(1, 1, dtype=torch.float64) if base == 1 else paley(base)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < whole:
        matrix = torch.kron(matrix, two)
    return torch.block_diag(*[matrix * whole**-0.5] * (size // whole))


def _base(order: int) -> int:
    """The smallest b = order / 2^k of which a Hadamard matrix is known here: 1, or one of Paley's; 0: there is none."""
    found, base = 0, order
    while True:
        if base == 1 or (base % 4 == 0 and _paley_prime(base)):
            found = base
        if base % 2:
            return found
        base //= 2


def _paley_prime(order: int) -> int:
    """The prime q that makes a matrix of this order: q = order − 1 ≡ 3, or q = order/2 − 1 ≡ 1 modulo 4; 0: neither."""
    for q, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == rest and q > 2 and all(q % divisor for divisor in range(2, math.isqrt(q) + 1)):
            return q
    return 0


def paley(order: int) -> Tensor:
    """A Hadamard matrix H by Paley (1933), entries ±1, shape (order, order), float64: H Hᵀ = order · I.

    With Q_ij = χ(i − j), χ the quadratic character of the integers modulo a prime q, and 1 a row of q ones:

        I,  q = order − 1 ≡ 3 (mod 4):    H = I + [[0, 1], [−1ᵀ, Q]]
        II, q = order/2 − 1 ≡ 1 (mod 4):  H = [[0, 1], [1ᵀ, Q]] ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]]

    Raises:
        ValueError: q is no such prime. The construction over fields of prime powers is left out.
    """
    q = _paley_prime(order)
    if not q:
        raise ValueError(f"got order {order}, expected q + 1 or 2(q + 1) for a prime q ≡ 3 or 1 modulo 4")
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = -1.0 if q % 4 == 3 else 1.0
    core[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    one = torch.eye(q + 1, dtype=torch.float64)
    if q % 4 == 3:
        return one + core
    sums, signs = (torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(core, sums) + torch.kron(one, signs)


def patch_matrix(scales: Tensor) -> Tensor:
    """P = H diag(scales) Hᵀ, shape (d, d), float64, from the scales of the d rotated channels."""
    rotation = hadamard(len(scales)).to(scales.device)
    return (rotation * scales.double()) @ rotation.T


@torch.no_grad()
def channel_scales(fitting: StandInFit) -> Tensor:
    """D_i, shape (d,), float64: mean |rotated channel| of h_e over that of h_s, fitted rows, real tokens."""
    rotation = hadamard(fitting.states.inputs.shape[-1]).to(fitting.device)
    before, after = torch.zeros(2, len(rotation), dtype=torch.float64, device=fitting.device)
    for rows in fitting.passes():
        target, mask = fitting.target(rows)
        inputs = fitting.states.inputs[rows].to(fitting.device)
        before += (inputs[mask].double() @ rotation).abs().sum(0)
        after += (target[mask].double() @ rotation).abs().sum(0)
    world().sum(before, after)
    return after / before.clamp_min(1e-300)


def _cost(model: PreTrainedModel) -> int:
    width = model.config.hidden_size
    return width * width + width
