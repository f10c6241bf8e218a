"""Step 2: the inverse network, and folding everything into one module (KDP, sections 5 and 6)."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from kdprune.kernel.features import FourierFeatures
from kdprune.kernel.operators import LinearDynamics, Moments
from kdprune.model.modeling_kdp import StandIn


class InverseNetwork(nn.Module):
    """I(z) = α · MLP(z): R^D → R^d, two layers (or one linear layer when ``hidden`` is 0).

    α compensates the norm decay of repeated operators: a least-squares operator shrinks what it cannot predict,
    so φ̂ = A_k ⋯ A_1 φ(h_s) is shorter than φ(h_e). It starts at E‖φ(h_e)‖ / E‖φ̂‖. Source: KDP, section 5.
    """

    def __init__(self, size: int, hidden: int, width: int):
        super().__init__()
        self.lift = nn.Linear(size, hidden) if hidden else None
        self.readout = nn.Linear(hidden or size, width)
        self.alpha = nn.Parameter(torch.ones(()))

    def hidden(self, z: Tensor) -> Tensor:
        """What the read-out sees: (…, D) → (…, hidden or D)."""
        return z if self.lift is None else gelu(self.lift(z))

    def forward(self, z: Tensor) -> Tensor:
        """(…, D) → (…, d)."""
        return self.alpha * self.readout(self.hidden(z))


def decay_compensation(predicted: Tensor, true: Tensor) -> float:
    """α's start, E‖φ(h_e)‖ / E‖φ̂‖; shapes (n, D)."""
    return float(true.norm(dim=-1).mean() / predicted.norm(dim=-1).mean().clamp_min(1e-12))


@torch.no_grad()
def solve_readout(inverse: InverseNetwork, moments: Moments, ridge: float) -> None:
    """Sets the read-out (and its bias) to the ridge solution, from moments of (hidden(z), target)."""
    matrix, offset = moments.solve_affine(ridge)
    inverse.readout.weight.copy_(matrix / inverse.alpha)
    inverse.readout.bias.copy_(offset / inverse.alpha)


@torch.no_grad()
def fold(features: FourierFeatures, dynamics: LinearDynamics, inverse: InverseNetwork, stand_in: StandIn) -> None:
    """S(x) = I([x̂; A_k ⋯ A_1 φ(x̂); ψ(x̂)]) as one module, equal to the unfolded one up to rounding, into ``stand_in``.

    W and b become the phase layer; the operator product and 1/√m go into those columns of the inverse network's first
    matrix that read the Fourier part, α into its last. What the stand-in has of the other parts stays.
    """
    stand_in.phase.weight.copy_(features.frequencies().T)
    stand_in.phase.bias.copy_(features.offset)
    product = dynamics.product().double() / math.sqrt(features.features)
    first = inverse.readout if inverse.lift is None else inverse.lift
    start = features.width if "linear" in stand_in.parts else 0
    columns = slice(start, start + len(product))
    weight = first.weight.double()
    weight[:, columns] = weight[:, columns] @ product
    if inverse.lift is None:
        stand_in.readout.weight.copy_(inverse.alpha * weight)
    else:
        stand_in.lift.weight.copy_(weight)
        stand_in.lift.bias.copy_(inverse.lift.bias)
        stand_in.readout.weight.copy_(inverse.alpha * inverse.readout.weight)
    stand_in.readout.bias.copy_(inverse.alpha * inverse.readout.bias)
