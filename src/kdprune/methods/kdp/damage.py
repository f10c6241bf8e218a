"""Blocks ranked by what replacing them costs, measured with a stand-in that only solves, instead of by similarity."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.budget import Budget
from kdprune.methods.common.selection import select_blocks, useful_blocks
from kdprune.methods.common.shape import Shape
from kdprune.methods.kdp.fit_block import Fit, FitSettings, fit_closed_form
from kdprune.model.block_states import boundary_states, states_between
from kdprune.model.edits import Substitute
from kdprune.model.families import decoder_layers
from kdprune.model.losses import IGNORED, mean_loss, next_tokens
from kdprune.model.surgery import folded, layers_replaced
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.store.cache import JsonCodec

FIT_TOKENS = 16_384  # of the calibration rows that a candidate's stand-in is fitted to
LOSS_TOKENS = 8_192  # of the held-out rows that its loss is taken over


@dataclass(frozen=True)
class Trial:
    """What is put in the place of every candidate, one at a time.

    Attributes:
        shape: of the stand-in.
        settings: ridge, kernel and parts of its fit; schedules are not looked at.
        held: share of the calibration rows that no fit sees.
        path: rows that the operators are solved from, at most.
    """

    shape: Shape
    settings: FitSettings
    held: float
    path: int


def loss_rows(tokens: TokenSet, held: float) -> TokenSet:
    """The rows the loss is taken over: the first of those that no fit sees, ``LOSS_TOKENS`` real tokens or less."""
    return _first(tokens.select(slice(len(tokens) - tokens.held_out(held), None)), LOSS_TOKENS)


def _first(tokens: TokenSet, limit: int) -> TokenSet:
    """The first rows with at most ``limit`` real tokens, but one row at least."""
    count = int((tokens.mask.sum(1).cumsum(0) <= limit).sum())
    return tokens.select(slice(max(count, 1)))


def check_damage(model: PreTrainedModel, tokens: TokenSet, held: float) -> None:
    """Raises KDPruneError where damage cannot be measured: the model has to run whole, many times, in one process."""
    advice = "or rank by similarity (ranking=similarity)"
    if world().size > 1:
        raise KDPruneError(
            f"got ranking 'damage' in {world().size} processes, expected one: start it without launcher, {advice}")
    if not (next_tokens(loss_rows(tokens, held)) != IGNORED).any():
        raise KDPruneError(
            f"got held-out calibration rows without two tokens in a row from {tokens.source}, expected text to take a "
            f"loss on: give longer rows (length=…), {advice}")


def measure_damage(
    model: PreTrainedModel, tokens: TokenSet, blocks: Sequence[range], trial: Trial, run: Run,
) -> dict[range, float]:
    """Δ of every block: what the mean next-token loss grows by, in nats, with a stand-in in the place of it alone.

        Δ = E[ −log p(x_t | x_<t) ] of the model with the closed-form stand-in − the same of the dense model

    over held-out rows; infinite where the loss is not a number. The stand-in is fitted to at most ``FIT_TOKENS`` of the
    other rows by :func:`fit_closed_form`, and every block gets the draws that a fit of it alone would start from, so
    that they do not rank the blocks. States at all boundaries are held at once, after a single pass.

    Source: KDP ranks by similarity (section 2), a predictor of this.
    """
    follows_from = [
        dataclasses.asdict(trial), [(block.start, block.stop) for block in blocks], FIT_TOKENS, LOSS_TOKENS]
    values = run.cached(
        "damage", follows_from, lambda: _measure(model, tokens, blocks, trial, run), JsonCodec(list[float]))
    return dict(zip(blocks, values, strict=True))


def _measure(
    model: PreTrainedModel, tokens: TokenSet, blocks: Sequence[range], trial: Trial, run: Run,
) -> list[float]:
    rows, scored = _first(tokens.fitted(trial.held), FIT_TOKENS), loss_rows(tokens, trial.held)
    path = min(trial.path, len(rows)) if trial.shape.kind == "fourier" else 0
    needed = {index for block in blocks for index in (range(block.start, block.stop + 1) if path else _ends(block))}
    boundaries = boundary_states(model, rows, sorted(needed), run, stage="damage states")
    found = []
    with run.stage("damage", len(blocks)) as progress:
        dense = mean_loss(model, scored, run.batch_size)
        for block in blocks:
            states = states_between(boundaries, block, rows, path)
            this = Fit.of(model, states, trial.shape, trial.settings, 0, run)  # with the draws of a single block
            fit_closed_form(this)
            with layers_replaced(model, layers_with(model, this.fitting.edit())):
                loss = mean_loss(model, scored, run.batch_size)
            found.append(loss - dense if math.isfinite(loss) else math.inf)
            progress(1)
    return found


def _ends(block: range) -> tuple[int, int]:
    return block.start, block.stop


def layers_with(model: PreTrainedModel, edit: Substitute) -> list[nn.Module]:
    """The layers that :func:`apply_edits` would leave of ``model`` with this edit alone, for :func:`layers_replaced`.

    The stand-in and its context are not copied: they are cast to the model's dtype.
    """
    layers, block = list(decoder_layers(model)), edit.block
    front, back = layers[: block.start], layers[block.stop :]
    if edit.context is not None:
        return [*front, edit.context.to(model.dtype), *back]
    stand_in = edit.stand_in.to(model.dtype)
    if front:
        return [*front[:-1], folded(model, front[-1], stand_in), *back]
    return [folded(model, back[0], stand_in, "before"), *back[1:]]


def blocks_to_measure(candidates: Sequence[range], budget: Budget) -> list[range]:
    """The candidates that a set which meets the budget may contain; the others need no stand-in."""
    return useful_blocks(candidates, budget.removal, budget.target, budget.slack)


def select_by_damage(damage: Mapping[range, float], budget: Budget) -> list[range]:
    """Of the sets of separated blocks that meet the budget, and its slack, that of least Σ Δ.

    That damages add up is an assumption: a block is measured with all others in place. Raises KDPruneError as
    :func:`select_blocks` does.
    """
    # The programme sums logarithms: exp(−Δ) is the "similarity" whose logarithm is −Δ. A Δ beyond 27 nats counts as 27.
    score = torch.zeros(len(budget.layers) + 1, len(budget.layers) + 1, dtype=torch.float64)
    for block, value in damage.items():
        score[block.start, block.stop] = math.exp(-value)
    return select_blocks(score, list(damage), budget.removal, budget.target, budget.slack)
