"""Blocks and stand-ins chosen by what they cost, measured with stand-ins that are only solved for."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.kernel.operators import Moments
from kdprune.methods.common.budget import Budget, filled
from kdprune.methods.common.selection import reachable
from kdprune.methods.common.shape import Candidate, Shape
from kdprune.methods.kdp.fit_block import Fit, FitSettings, fit_closed_form
from kdprune.model.block_states import boundary_states, states_between
from kdprune.model.edits import Edit, Substitute
from kdprune.model.families import decoder_layers
from kdprune.model.losses import batch_logits
from kdprune.model.surgery import apply_edits, folded, running_from
from kdprune.model.teacher import Teacher
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.store.cache import JsonCodec
from kdprune.store.states import States

FIT_TOKENS = 4_096  # of the calibration rows that a candidate's stand-in is fitted to, …
PER_INPUT = 4  # … or so many for every input of its read-out, if that is more
DAMAGE_TOKENS = 4_096  # of the held-out rows that its damage is taken over
TOP = 128  # most probable tokens of the dense model's distribution that are told apart
PASSES = 1.5  # passes of the calibration rows through the model that measuring may cost, …
MOST = 4  # … and the most blocks of every length that are measured
# What one block more counts, in nats, in the programme that proposes sets: damages do not add up, and which way they
# do not is found by measuring a set of many short blocks beside one of few long ones.
PRICES = (-0.1, -0.03, 0.0, 0.03, 0.1)


@dataclass(frozen=True)
class Trial:
    """How stand-ins are fitted while they are only tried.

    Attributes:
        settings: ridge, kernel and parts of the fit; schedules are not looked at.
        held: share of the calibration rows that no fit sees.
        path: rows that the operators are solved from, at most; 0: none are.
    """

    settings: FitSettings
    held: float
    path: int


@dataclass(frozen=True)
class Damage:
    """What was measured: Δ, KL(dense‖pruned) in nats a token, of every candidate alone and of the sets tried together.

    Attributes:
        alone: by candidate.
        together: the sets, best first, with the Δ of all their stand-ins at once.
    """

    alone: Mapping[Candidate, float]
    together: Sequence[tuple[tuple[Candidate, ...], float]]

    @property
    def by_block(self) -> dict[range, float]:
        """The least Δ of every block that was measured, whichever form of stand-in has it."""
        return {block: min(value for candidate, value in self.alone.items() if candidate.block == block)
                for block in {candidate.block for candidate in self.alone}}


def damage_rows(tokens: TokenSet, held: float) -> TokenSet:
    """The rows that damage is taken over: the first that no fit sees, of ``DAMAGE_TOKENS`` real tokens or less."""
    return tokens.watching(held).first(DAMAGE_TOKENS)


def fit_rows(tokens: TokenSet, held: float, width: int) -> TokenSet:
    """The rows that trial stand-ins are fitted to."""
    return tokens.fitted(held).first(max(FIT_TOKENS, 2 * PER_INPUT * width))


def trials(
    tokens: TokenSet, candidates: Sequence[Candidate], held: float, model: PreTrainedModel
) -> tuple[int, float]:
    """How many blocks of every length are measured, and what all of it costs in tokens that pass the whole model."""
    forms = len({candidate.shape for candidate in candidates})
    lengths = len({len(candidate.block) for candidate in candidates})
    fitted, scored = fit_rows(tokens, held, model.config.hidden_size).tokens, damage_rows(tokens, held).tokens
    # A trial runs the layers behind the block, half of all on average, and the block's MLPs over the fitted rows.
    cost = forms * (scored / 2 + fitted * (1 + lengths / 2) / len(decoder_layers(model)))
    most = min(max(round(PASSES * tokens.tokens / cost / lengths), 1), MOST)
    return most, most * lengths * cost + len(PRICES) * scored + fitted + scored


def check_damage() -> None:
    """Raises KDPruneError where damage cannot be measured: the model has to run whole, many times, in one process."""
    if world().size > 1:
        raise KDPruneError(
            f"got ranking 'damage' in {world().size} processes, expected one: start it without launcher, or rank "
            "by similarity (ranking=similarity)")


def choose_by_damage(
    model: PreTrainedModel, tokens: TokenSet, candidates: Sequence[Candidate], budget: Budget, trial: Trial, run: Run,
    fill: bool,
) -> tuple[list[Candidate], Damage]:
    """The set of separated candidates that meets the budget and, all in place at once, does the least damage found.

    1. Of every length the blocks, as many as ``PASSES`` allow, that a linear map of the state models best, held out,
       and which are half a length apart.
    2. Δ of each of these alone, with every form of stand-in:

           Δ = E[ KL(p‖q) ],  p(x_t | x_<t) of the dense model, q of the one with the closed-form stand-in

       over held-out tokens; of p the ``TOP`` most probable tokens are told apart. A difference of next-token losses
       would be as much as twenty times noisier, and says little of a model that is unsure of the text.
    3. Sets of least Σ Δ + price · blocks within the budget, one for every of ``PRICES``.
    4. Δ of these sets, their spare parameters spent: damages do not add up, so that the sum only proposes.

    Args:
        candidates: blocks with forms of stand-ins; none of them over a layer that must stay.
        budget: what has to go, and its slack.
        trial: how stand-ins are fitted.
        fill: whether a set's spare parameters are spent before it is measured.
    """
    follows_from = [
        dataclasses.asdict(trial), [(c.start, c.stop, dataclasses.asdict(c.shape)) for c in candidates],
        budget.target.parameters, budget.slack, fill,
        [FIT_TOKENS, PER_INPUT, DAMAGE_TOKENS, TOP, PASSES, MOST, PRICES]]
    measured = run.cached(
        "damage", follows_from, lambda: _plain(_measure(model, tokens, candidates, budget, trial, run, fill)),
        JsonCodec(dict))
    alone = {_candidate(item): value for item, value in measured["alone"]}
    together = [(tuple(map(_candidate, items)), value) for items, value in measured["together"]]
    return list(together[0][0]), Damage(alone, together)


def _plain(damage: Damage) -> dict[str, Any]:
    def item(candidate: Candidate) -> list[Any]:
        return [candidate.start, candidate.stop, dataclasses.asdict(candidate.shape)]

    return {"alone": [[item(candidate), value] for candidate, value in damage.alone.items()],
            "together": [[[item(candidate) for candidate in chosen], value] for chosen, value in damage.together]}


def _candidate(item: Sequence[Any]) -> Candidate:
    start, stop, shape = item
    return Candidate(range(start, stop), Shape(**shape))


def _measure(
    model: PreTrainedModel, tokens: TokenSet, candidates: Sequence[Candidate], budget: Budget, trial: Trial, run: Run,
    fill: bool,
) -> Damage:
    rows, scored = fit_rows(tokens, trial.held, model.config.hidden_size), damage_rows(tokens, trial.held)
    blocks = sorted({candidate.block for candidate in candidates}, key=lambda block: (block.start, block.stop))
    needed = sorted({index for block in blocks for index in range(max(block.start - 1, 0), block.stop + 1)})
    measuring = _Measuring(
        model, rows, scored, trial, run, boundary_states(model, rows, needed, run, stage="damage states"),
        boundary_states(model, scored, needed, run, stage="held-out states"),
        Teacher(model, scored, TOP, keep=True))
    most, _ = trials(tokens, candidates, trial.held, model)
    promising = set(measuring.promising(blocks, most))
    tried = [candidate for candidate in candidates if candidate.block in promising]
    if budget.most_removed(tried) < budget.target.parameters:
        tried = list(candidates)  # the ratio is near the largest that any blocks reach
    with run.stage("damage", len(tried)) as progress:
        alone = {}
        for candidate in tried:
            alone[candidate] = measuring.damage_of(candidate)
            progress(1)
    sets = proposed(alone, budget)
    with run.stage("damage of sets", len(sets)) as progress:
        together = []
        for chosen in sets:
            together.append((tuple(chosen), measuring.damage_together(filled(chosen, budget) if fill else chosen)))
            progress(1)
    return Damage(alone, sorted(together, key=lambda entry: entry[1]))


def proposed(alone: Mapping[Candidate, float], budget: Budget) -> list[list[Candidate]]:
    """The sets of separated candidates within the budget and its slack of least Σ Δ + price · blocks, by price."""
    found: list[list[Candidate]] = []
    for price in PRICES:
        cost = {candidate: min(value, 1e3) + price for candidate, value in alone.items()}
        table = reachable(list(cost), lambda candidate, cost=cost: -cost[candidate], budget.removed_by)  # type: ignore[misc]
        enough = [removed for removed in table if removed >= budget.target.parameters]
        near = [removed for removed in enough if removed <= max(min(enough), budget.target.parameters + budget.slack)]
        chosen = list(table[max(near, key=lambda removed: table[removed][0])][1])
        if chosen not in found:
            found.append(chosen)
    return found


@dataclass
class _Measuring:
    """A dense model with the states at its boundaries, of rows to fit on and of rows to measure damage on."""

    model: PreTrainedModel
    rows: TokenSet
    scored: TokenSet
    trial: Trial
    run: Run
    states: Mapping[int, States]
    scored_states: Mapping[int, States]
    teacher: Teacher

    def promising(self, blocks: Sequence[range], most: int) -> list[range]:
        """The blocks worth a measurement: of every length those of least :meth:`_linear_errors`, half a length apart,
        at most so many."""
        errors: dict[range, float] = {}
        starts = sorted({block.start for block in blocks})
        with self.run.stage("linear maps", len(starts)) as progress:
            for start in starts:
                errors |= self._linear_errors([block for block in blocks if block.start == start])
                progress(1)
        found: list[range] = []
        for length in sorted({len(block) for block in blocks}):
            taken: list[range] = []
            for block in sorted((b for b in blocks if len(b) == length), key=lambda b: errors[b]):
                if len(taken) < most and all(abs(block.start - other.start) * 2 >= length for other in taken):
                    taken.append(block)
            found += taken
        return found

    def _linear_errors(self, blocks: Sequence[range]) -> dict[range, float]:
        """Of blocks with one start the mean of ‖h_s + M h_s + c − h_e‖² / ‖h_e‖² over the scored tokens, with M and c
        of the fitted ones: relative, because what reads the state next divides by its size."""
        start = blocks[0].start
        inputs, tested = _real(self.states[start], self.rows), _real(self.scored_states[start], self.scored)
        width = inputs.shape[1]
        moments = Moments(width, len(blocks) * width)
        moments.update(inputs, torch.cat([_real(self.states[b.stop], self.rows) - inputs for b in blocks], dim=1))
        matrix, offset = (value.float() for value in moments.solve_affine(self.trial.settings.ridge))
        predicted = (tested @ matrix.T + offset).split(width, dim=1)
        found = {}
        for block, update in zip(blocks, predicted, strict=True):
            true = _real(self.scored_states[block.stop], self.scored)
            found[block] = float(((tested + update - true).square().sum(-1) / true.square().sum(-1)).mean())
        return found

    def fitted(self, candidate: Candidate) -> Substitute:
        """The candidate's stand-in, solved for, with the draws that a fit of it alone would start from."""
        states = states_between(self.states, candidate.block, self.rows, min(self.trial.path, len(self.rows)))
        this = Fit.of(self.model, states, candidate.shape, self.trial.settings, 0, self.run)
        fit_closed_form(self.model, this)
        return this.fitting.edit()

    def damage_of(self, candidate: Candidate) -> float:
        """Mean KL(dense‖pruned) with the candidate alone in place; infinite where it is not a number.

        What enters the block is known, so that only what is behind it is run.
        """
        edit = self.fitted(candidate)
        layers = layers_with(self.model, edit)
        first = candidate.start if edit.context is not None else max(candidate.start - 1, 0)  # folded into that layer
        known = self.scored_states[first]
        return self._mean(self.model, lambda numbers: running_from(
            self.model, layers, first, known[numbers].to(self.model.device)))

    def damage_together(self, candidates: Sequence[Candidate]) -> float:
        """The same with all of them in place."""
        edits: list[Edit] = [self.fitted(candidate) for candidate in candidates]
        return self._mean(apply_edits(self.model, edits), lambda _: nullcontext())

    @torch.no_grad()
    def _mean(self, model: PreTrainedModel, running: Callable[[Tensor], AbstractContextManager[Any]]) -> float:
        """Mean divergence over the scored rows; the teacher speaks before anything runs in its layers' place."""
        total = 0.0
        for numbers in torch.arange(len(self.scored)).split(self.run.batch_size):
            batch = self.scored.select(numbers)
            targets = self.teacher(numbers, batch.mask)
            with running(numbers):
                logits = batch_logits(model, batch)
            total += float(targets.divergence(logits[batch.mask.to(logits.device)]))
        return total / self.scored.tokens if math.isfinite(total) else math.inf


def _real(states: States, tokens: TokenSet) -> Tensor:
    """The states of the real tokens, (n, d), float32."""
    return states[torch.arange(len(tokens))][tokens.mask].float()


def layers_with(model: PreTrainedModel, edit: Substitute) -> list[nn.Module]:
    """The layers that :func:`apply_edits` would leave of ``model`` with this edit alone, for :func:`layers_replaced`.

    The stand-in and its context are not copied: they are cast to the model's dtype.
    """
    layers, block = list(decoder_layers(model)), edit.block
    front, back = layers[: block.start], layers[block.stop :]
    if edit.context is not None:
        return [*front, edit.context.to(model.dtype), *back]
    assert edit.stand_in is not None
    stand_in = edit.stand_in.to(model.dtype)
    if front:
        return [*front[:-1], folded(model, front[-1], stand_in), *back]
    return [folded(model, back[0], stand_in, "before"), *back[1:]]
