"""The part "data" of a stand-in's kernel: the block's own MLP channels as landmarks."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.kernel.operators import Moments
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.model.families import decoder_layers, norm_before_mlp
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.structures import Channels, mlp_channels, norm_affine
from kdprune.model.surgery import plain_copy
from kdprune.runtime.distributed import world

CHUNK = 1024  # tokens a chunk: bounds the memory of all the block's channels
# Tokens that landmarks are chosen on: so many for every input of the regression, or so many if that is more. Their
# read-out is solved for on all there are.
PER_INPUT, LEAST_TOKENS = 16, 65_536
POOL = 4  # times the channels wanted are regressed on before most of them go, …
WIDE = (2, 4)  # … at most 4 d, or twice as many if that is more: work and memory go with the square


@torch.no_grad()
def place_landmarks(model: PreTrainedModel, fitting: StandInFit, ridge: float) -> None:
    """Puts the ``channels`` of the block that are of most use into the stand-in's part "data", in place.

        k_ψ(x, y) = ψ(x)ᵀψ(y),   ψ_j(x̂) = act(g_jᵀx̂ + a_j) (u_jᵀx̂ + b_j)

    with g, a, u, b those of the dense model's channels of *all* layers of the block, re-scaled for the norm that the
    stand-in reads them through. ``POOL`` times as many as are wanted, or as ``WIDE`` allows, are taken by

        rms(ψ_j) ‖w_j‖

    with ψ over the fitted tokens as the stand-in will read them, and w_j what one unit of channel j adds to the state
    (where a norm stands behind the MLP, in front of that: with its gain counted in, Gemma-3's choice was no better).
    On these, and on x̂ where the kernel has a linear part, what the stand-in has to add is regressed; those stay
    without which the error would grow most,

        ΔE_j = ‖m_j‖² / [C⁻¹]_jj,   M C = Σ (y − ȳ)(z − z̄)ᵀ,   C = Σ (z − z̄)(z − z̄)ᵀ + ρI,   m_j a column of M,

    ρ = ridge · tr/D: the exact cost of leaving out one. The choice is made on as many tokens as :func:`tokens_for`
    says; their read-out is solved for afterwards, with all other parts, on all of them.

    Layers that an earlier pruning put in have the channels of their stand-ins, or none: what a block lacks stays as it
    was drawn.

    Source: a data-dependent kernel with landmarks (Nyström), of the block's neurons; KDP has random features alone.
    """
    stand_in = fitting.stand_in
    linear = stand_in.width if "linear" in stand_in.parts else 0
    most = tokens_for(inputs_of(stand_in))
    pool = _pool(model, fitting, most)
    if len(pool.lines) > stand_in.channels:
        moments = Moments(linear + len(pool.lines), stand_in.width, fitting.device)
        for rows in fitting.passes(most=most):
            probe = fitting.probe(rows)
            x = probe.kernel_input
            z = pool.of(x, stand_in.act)
            moments.update(torch.cat((x, z), dim=1) if linear else z, fitting.wanted(probe))
        cost = moments.add_processes().cost_of_leaving_out(ridge, fitting.intercept)
        pool = pool.select(cost[linear:].topk(stand_in.channels).indices)
    maps = [stand_in.gate, stand_in.up] if stand_in.gated else [stand_in.up]
    found = len(pool.lines)
    for number, projection in enumerate(maps):
        projection.weight[:found].copy_(pool.lines[:, number])
        if fitting.intercept:
            projection.bias[:found].copy_(pool.biases[:, number])


def _pool(model: PreTrainedModel, fitting: StandInFit, most: int) -> Channels:
    """The channels of greatest rms(ψ_j) ‖w_j‖ among all of the block, over so many tokens."""
    stand_in, own = fitting.stand_in, _read_through(model, fitting)
    layers = [mlp_channels(model, index).through(*own) for index in fitting.states.block]
    fields = ("lines", "biases", "outgoing")
    every = Channels(*(torch.cat([getattr(layer, name) for layer in layers]) for name in fields))
    layers.clear()  # as much again
    if not fitting.intercept:  # an MLP without biases cannot hold the shifts of its block's norms
        every.biases.zero_()
    squares = torch.zeros(len(every.lines), dtype=torch.float64, device=fitting.device)
    for rows in fitting.passes(most=most):
        for x in fitting.probe(rows).kernel_input.split(CHUNK):
            squares += every.of(x, stand_in.act).square().sum(0, dtype=torch.float64)
    world().sum(squares)
    size = min(pool_size(stand_in), len(squares))
    return every.select((squares.sqrt() * every.outgoing).topk(size).indices)


def pool_size(shape: Shape | StandIn) -> int:
    """How many channels are regressed on to find as many as this stand-in has, where the block has them."""
    times, widths = WIDE
    return min(POOL * shape.channels, max(times * shape.channels, widths * shape.width))


def inputs_of(shape: Shape | StandIn) -> int:
    """P, the inputs of the regression by which landmarks are chosen: of the pool and of the linear part; 0 without
    landmarks."""
    if "data" not in shape.parts:
        return 0
    return pool_size(shape) + (shape.width if "linear" in shape.parts else 0)


def tokens_for(inputs: int) -> int:
    """How many tokens landmarks are chosen on, by a regression with so many inputs."""
    return max(LEAST_TOKENS, PER_INPUT * inputs)


def _read_through(model: PreTrainedModel, fitting: StandInFit) -> tuple[Tensor, Tensor]:
    """(γ, β) of what the stand-in reads, x̂ = γ ∘ n + β: of its layer's norm, or 1 and 0 where it stands alone."""
    width = model.config.hidden_size
    if fitting.context is None:
        return torch.ones(width, device=fitting.device), torch.zeros(width, device=fitting.device)
    norm = plain_copy(norm_before_mlp(model, decoder_layers(model)[fitting.context])).float()
    scale, shift = norm_affine(norm, width)
    return scale.to(fitting.device), shift.to(fitting.device)
