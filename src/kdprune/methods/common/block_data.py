"""What the methods share that put something into the gap of one run of layers: blocks, states, the record of a fit."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.budget import check_blocks, shortest_blocks
from kdprune.methods.common.distance import measure_distances
from kdprune.methods.common.held_out import held_out
from kdprune.methods.common.method import ComparingMethod, DepthMethod
from kdprune.methods.common.stand_in_fit import StandInFit, average
from kdprune.model.block_states import BlockStates, PathRows, collect_block_states
from kdprune.model.families import decoder_layers
from kdprune.runtime.run import Run


def candidates(options: DepthMethod, model: PreTrainedModel, cost: int = 0) -> list[range]:
    """The explicit blocks; without them every shortest run of layers that meets the ratio, of which one is to be taken.

    Args:
        options: the method.
        model: the dense model.
        cost: parameters put in the block's place.

    Raises:
        KDPruneError: impossible blocks, or a ratio out of reach (says the largest possible).
    """
    layers = len(decoder_layers(model))
    if options.blocks is not None:
        return check_blocks([range(*block) for block in options.blocks], layers)
    return shortest_blocks(model, options.target(model), options.allowed(model), cost)


def choose(
    options: ComparingMethod, model: PreTrainedModel, tokens: TokenSet, run: Run, cost: int = 0,
) -> list[range]:
    """The explicit blocks, or of the :func:`candidates` the one whose ends have the greatest mean cosine."""
    blocks = candidates(options, model, cost)
    if options.blocks is not None:
        return blocks
    distances = measure_distances(model, tokens, run, normed=options.last_state == "normed")
    return [nearest(blocks, 1 - distances.cosine)]


def nearest(blocks: list[range], distance: Tensor) -> range:
    """The block [s, e) with the least entry [s, e] of ``distance``, shape (L+1, L+1); the first of equals."""
    return min(blocks, key=lambda block: float(distance[block.start, block.stop]))


def check_rows(tokens: TokenSet) -> None:
    """Raises KDPruneError for a token set too small to keep a row out of the fit."""
    if len(tokens) < 2:
        raise KDPruneError(
            f"got one row of calibration from {tokens.source}, expected 2 or more: one is held out. Give more text, or "
            f"shorter rows (length=…)")


def block_states(
    model: PreTrainedModel, tokens: TokenSet, blocks: list[range], held: float, run: Run,
) -> list[BlockStates]:
    """h_s and h_e of every block over all rows, a share ``held`` of which no fit may see; no states in between."""
    return collect_block_states(model, tokens, blocks, run, held=tokens.held_out(held), path=PathRows(0, 0))


def fit_record(fitting: StandInFit, energy: float, curves: dict[str, list[float]]) -> dict[str, Any]:
    """The entry of ``results.json``'s ``fit`` for a stand-in without a kernel, errors on the held-out rows.

    Args:
        energy: mean ‖h_e − h_s‖² over the fitted tokens, the unit of errors.
        curves: of the fit, by epoch.
    """
    block, stand_in = fitting.states.block, fitting.stand_in
    return {
        "block": (block.start, block.stop), "place": "beside",
        "kind": stand_in.kind, "features": stand_in.features, "hidden": stand_in.hidden, "context": "none",
        "parameters": sum(parameter.numel() for parameter in stand_in.parameters()), "step2": curves,
        "trained": fitting.trained,
        **held_out(fitting, energy),
    }


def fitted_error(fitting: StandInFit, energy: float) -> dict[str, list[float]]:
    """Loss and cosine over all fitted rows as curves of one value: what a closed form reaches at once."""
    return average(fitting.state_loss(energy), fitting)
