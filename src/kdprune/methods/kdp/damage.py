"""Blocks and stand-ins chosen by what they cost, measured with stand-ins that are only solved for."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.evaluation.perplexity import default_batch
from kdprune.kernel.operators import Moments
from kdprune.methods.common.budget import Budget, filled
from kdprune.methods.common.selection import reachable
from kdprune.methods.common.shape import Candidate, Shape
from kdprune.methods.kdp.fit_block import Fit, FitSettings, fit_closed_form
from kdprune.model.block_states import boundary_states, local_rows, states_between
from kdprune.model.edits import Substitute
from kdprune.model.families import decoder_layers
from kdprune.model.layerwise import logits_behind, states_by_ways
from kdprune.model.streaming import is_streamed, scratch_of
from kdprune.model.teacher import Teacher
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance
from kdprune.store.cache import JsonCodec
from kdprune.store.states import States

FIT_TOKENS = 4_096  # of the calibration rows that a candidate's stand-in is fitted to, …
PER_INPUT = 4  # … or so many for every input of its read-out, if that is more
DAMAGE_TOKENS = 4_096  # of the held-out rows that the damage of sets is taken over, …
ALONE = 2  # … and one in so many of these rows for a candidate alone
TOP = 128  # most probable tokens of the dense model's distribution that are told apart
PASSES = 2.0  # passes of the calibration rows through the model that measuring candidates alone may cost, …
SET_PASSES = 1.0  # … and measuring sets
MOST = 4  # most candidates alone for every length and form of stand-in, and most sets for every price
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
) -> tuple[int, int, float]:
    """From how many candidates alone on no more are measured, but those that a set still lacks; how many sets at most;
    and what that costs in tokens that pass the whole model, the sets' own fits not counted."""
    forms = len({candidate.shape for candidate in candidates})
    blocks = {candidate.block for candidate in candidates}
    lengths = len({len(block) for block in blocks})
    fitted, scored = fit_rows(tokens, held, model.config.hidden_size).tokens, damage_rows(tokens, held).tokens
    # A trial runs the layers behind the block, half of all on average, and the block's MLPs over the fitted rows.
    cost = scored / ALONE / 2 + fitted * (1 + lengths / 2) / len(decoder_layers(model))
    most = max(min(round(PASSES * tokens.tokens / cost), MOST * lengths * forms), len(_first_lengths(blocks)) * forms)
    sets = max(min(round(SET_PASSES * tokens.tokens / max(scored, 1)), MOST * len(PRICES)), len(PRICES))
    return most, sets, most * cost + sets * scored + fitted + scored


def choose_by_damage(
    model: PreTrainedModel, tokens: TokenSet, candidates: Sequence[Candidate], budget: Budget, trial: Trial, run: Run,
    fill: bool,
) -> tuple[list[Candidate], Damage]:
    """The set of separated candidates that meets the budget and, all in place at once, does the least damage found.

    1. The relative error of a linear map of the state, held out, for every block.
    2. Δ alone of the blocks of least error of some lengths, with every form of stand-in:

           Δ = E[ KL(p‖q) ],  p(x_t | x_<t) of the dense model, q of the one with the closed-form stand-in

       over held-out tokens, half of those that sets are measured on; of p the ``TOP`` most probable tokens are told
       apart. A difference of next-token losses would be as much as twenty times noisier, and says little of a model
       that is unsure of the text.
    3. Sets of least Σ Δ + price · blocks within the budget, one for every of ``PRICES``, Δ as :func:`guessed` where it
       is not known; what of these is only guessed is measured alone, and so on until nothing in them is, or as often
       as :func:`trials` allows; of one set at least everything is.
    4. Δ of these sets, their spare parameters spent: damages do not add up, so that the sum only proposes. Around the
       best, what the price that proposed it gives without one or another of its candidates, until none of these is
       better.

    Args:
        candidates: blocks with forms of stand-ins; none of them over a layer that must stay.
        budget: what has to go, and its slack.
        trial: how stand-ins are fitted.
        fill: whether a set's spare parameters are spent before it is measured.
    """
    follows_from = [
        dataclasses.asdict(trial), [(c.start, c.stop, dataclasses.asdict(c.shape)) for c in candidates],
        budget.target.parameters, budget.slack, fill,
        [FIT_TOKENS, PER_INPUT, DAMAGE_TOKENS, ALONE, TOP, PASSES, SET_PASSES, MOST, PRICES]]
    measured = run.cached(
        "damage", follows_from, lambda: _plain(_measure(model, tokens, candidates, budget, trial, run, fill)),
        JsonCodec(dict))
    alone = {_candidate(item): _value(value) for item, value in measured["alone"]}
    together = [(tuple(map(_candidate, items)), _value(value)) for items, value in measured["together"]]
    return list(together[0][0]), Damage(alone, together)


def _plain(damage: Damage) -> dict[str, Any]:
    def item(candidate: Candidate) -> list[Any]:
        return [candidate.start, candidate.stop, dataclasses.asdict(candidate.shape)]

    return {"alone": [[item(candidate), value] for candidate, value in damage.alone.items()],
            "together": [[[item(candidate) for candidate in chosen], value] for chosen, value in damage.together]}


def _candidate(item: Sequence[Any]) -> Candidate:
    start, stop, shape = item
    return Candidate(range(start, stop), Shape(**shape))


def _value(value: float | None) -> float:
    """A Δ that was kept: what is no number has no place in JSON."""
    return math.inf if value is None else value


def _measure(
    model: PreTrainedModel, tokens: TokenSet, candidates: Sequence[Candidate], budget: Budget, trial: Trial, run: Run,
    fill: bool,
) -> Damage:
    blocks = sorted({candidate.block for candidate in candidates}, key=lambda block: (block.start, block.stop))
    measuring = _Measuring.of(model, tokens, blocks, trial, run)
    most, sets, _ = trials(tokens, candidates, trial.held, model)
    errors = measuring.linear_errors(blocks)

    def damages(new: Sequence[Candidate]) -> dict[Candidate, float]:
        return dict(zip(new, measuring.damages([[one] for one in new], "damage", ALONE), strict=True))

    alone = damages(_first(candidates, errors))
    chosen = proposed(guessed(candidates, alone, errors), budget)
    while len(alone) < most and (new := _unknown(chosen, alone)):
        alone |= damages(new[: most - len(alone)])
        chosen = proposed(guessed(candidates, alone, errors), budget)
    # Else what is known might meet the target with one long block alone, far beyond it.
    if lacking := min((_unknown([one], alone) for one in chosen), key=len):
        alone |= damages(lacking)
    together: dict[tuple[Candidate, ...], float] = {}
    price_of = proposed(alone, budget)
    while new_sets := [one for one in price_of if one not in together][: max(sets - len(together), 0)]:
        values = measuring.damages([filled(one, budget) if fill else one for one in new_sets], "damage of sets")
        together |= zip(new_sets, values, strict=True)
        best = min(together, key=together.__getitem__)
        price_of = beside(best, alone, budget, price_of[best]) | price_of
    measuring.forget()
    return Damage(alone, sorted(together.items(), key=lambda entry: entry[1]))


def _unknown(sets: Iterable[Sequence[Candidate]], known: Mapping[Candidate, float]) -> list[Candidate]:
    """The candidates of these sets whose Δ is not known, each once."""
    return list(dict.fromkeys(candidate for chosen in sets for candidate in chosen if candidate not in known))


def _first(candidates: Sequence[Candidate], errors: Mapping[range, float]) -> list[Candidate]:
    """The block of least error of some lengths, behind all its forms of stand-in."""
    blocks = [min((block for block in errors if len(block) == length), key=errors.__getitem__)
              for length in _first_lengths(errors)]
    return [candidate for block in blocks for candidate in candidates if candidate.block == block]


def _first_lengths(blocks: Iterable[range]) -> list[int]:
    """1, 2, 4, …, those of them that there are; or the shortest."""
    lengths = sorted(set(map(len, blocks)))
    return [length for length in lengths if length & (length - 1) == 0] or lengths[:1]


def guessed(
    candidates: Sequence[Candidate], alone: Mapping[Candidate, float], errors: Mapping[range, float]
) -> dict[Candidate, float]:
    """Δ of every candidate: as measured, or of what has been measured of its form, or of all forms,

        log Δ = a + b log error,   b = (Σ xy + ε) / (Σ x² + ε)

    with x and y the logarithms less their means, and ε = .1 for one measurement in which Δ goes with the error. Where
    nothing has a finite Δ, the error itself.
    """
    def logarithm(value: float) -> float:
        return math.log(min(max(value, 1e-12), 1e3))

    lines, finite = {}, [candidate for candidate in alone if math.isfinite(alone[candidate])]
    for shape in {candidate.shape for candidate in candidates}:
        own = [candidate for candidate in finite if candidate.shape == shape] or finite
        if not own:
            lines[shape] = 0.0, 0.0, 1.0
            continue
        x, y = ([logarithm(value) for value in values] for values in (
            [errors[candidate.block] for candidate in own], [alone[candidate] for candidate in own]))
        middle, height = sum(x) / len(x), sum(y) / len(y)
        products = sum((one - middle) * (other - height) for one, other in zip(x, y, strict=True))
        lines[shape] = middle, height, (products + 0.1) / (sum((one - middle) ** 2 for one in x) + 0.1)
    found = dict(alone)
    for candidate in candidates:
        middle, height, slope = lines[candidate.shape]
        found.setdefault(candidate, math.exp(height + slope * (logarithm(errors[candidate.block]) - middle)))
    return found


def beside(
    best: Sequence[Candidate], alone: Mapping[Candidate, float], budget: Budget, price: float
) -> dict[tuple[Candidate, ...], float]:
    """The sets that this price proposes without one of the best set's candidates, where there are any, → the price."""
    found: dict[tuple[Candidate, ...], float] = {}
    for candidate in best:
        others = {other: value for other, value in alone.items() if other != candidate}
        if others and budget.most_removed(list(others)) >= budget.target.parameters:
            found |= proposed(others, budget, (price,))
    return found


def proposed(
    alone: Mapping[Candidate, float], budget: Budget, prices: Sequence[float] = PRICES
) -> dict[tuple[Candidate, ...], float]:
    """The sets of separated candidates within the budget and its slack of least Σ Δ + price · blocks → the price, that
    nearest to none of those that propose it."""
    found: dict[tuple[Candidate, ...], float] = {}
    target, sizes = budget.target.parameters, [budget.removed_by(candidate) for candidate in alone]
    # A set beyond this still meets the target when it lacks any one of its blocks.
    most = target + budget.slack + max(sizes) - sum(min(size, 0) for size in sizes)
    for price in sorted(prices, key=abs):
        cost = {candidate: min(value, 1e3) + price for candidate, value in alone.items()}
        table = reachable(list(cost), lambda one, cost=cost: -cost[one], budget.removed_by, most)  # type: ignore[misc]
        enough = [removed for removed in table if removed >= target]
        near = [removed for removed in enough if removed <= max(min(enough), target + budget.slack)]
        found.setdefault(table[max(near, key=lambda removed: table[removed][0])][1], price)
    return found


@dataclass(frozen=True)
class _Measuring:
    """A dense model with the states at its boundaries, of rows to fit on and, behind them, of rows to measure on.

    Attributes:
        model: the dense model, which stand-ins are made from.
        running: the one that is run: itself, or its copy in fewer bits.
        rows: both kinds of rows.
        scored: how many at the end damage is measured on.
        trial: how stand-ins are fitted.
        run: with batches so small that of several processes each has rows to measure on, where these suffice.
        states: by boundary; this process's share of the rows.
        teacher: the dense model's distributions, by number among ``rows``.
    """

    model: PreTrainedModel
    running: PreTrainedModel
    rows: TokenSet
    scored: int
    trial: Trial
    run: Run
    states: Mapping[int, States]
    teacher: Teacher

    @staticmethod
    def of(
        model: PreTrainedModel, tokens: TokenSet, blocks: Sequence[range], trial: Trial, run: Run
    ) -> "_Measuring":
        """The states of all boundaries from one pass over both kinds of rows; a streamed model's lie on the disk."""
        running, last = run.running(model), len(decoder_layers(model))
        fitted = len(fit_rows(tokens, trial.held, model.config.hidden_size))
        scored, behind = len(damage_rows(tokens, trial.held)), len(tokens.fitted(trial.held))
        rows = tokens.select(torch.cat([torch.arange(fitted), torch.arange(behind, behind + scored)]))
        share = scored if world().size == 1 else -(-scored // (ALONE * world().size))
        run = dataclasses.replace(run, batch_size=min(run.batch_size, share))
        needed = sorted({index for block in blocks for index in range(block.start, block.stop + 1)} | {last})
        follows_from = ["damage", fitted, behind, scored, run.batch_size]
        spill = (lambda index: run.spill_directory(index, follows_from)) if is_streamed(running) else lambda _: None
        states = boundary_states(running, rows, needed, run, stage="damage states", spill=spill)
        teacher = Teacher(running, rows, TOP, keep=torch.arange(fitted, fitted + scored), final=states[last])
        return _Measuring(model, running, rows, scored, trial, run, states, teacher)

    def forget(self) -> None:
        """Lets go of the states."""
        for states in self.states.values():
            states.forget()

    def batches(self, scored: bool, one_in: int = 1) -> list[Tensor]:
        """Numbers of this process's rows of one kind, the first of them where not all are wanted, in batches."""
        behind = len(self.rows) - self.scored
        first, last = (behind, behind + -(-self.scored // one_in)) if scored else (0, behind)
        numbers = torch.arange(first, last)
        return [part for part in numbers[local_rows(self.rows, self.run)[first:last]].split(self.run.batch_size)
                if len(part)]

    def real(self, boundary: int, numbers: Tensor) -> Tensor:
        """States of the real tokens of some rows, (n, d), float32."""
        return self.states[boundary][numbers][self.rows.mask[numbers]].float()

    def linear_errors(self, blocks: Sequence[range]) -> dict[range, float]:
        """:meth:`_linear_errors` of all blocks."""
        errors: dict[range, float] = {}
        starts = sorted({block.start for block in blocks})
        with self.run.stage("linear maps", len(starts)) as progress:
            for start in starts:
                errors |= self._linear_errors([block for block in blocks if block.start == start])
                progress(1)
        return errors

    def _linear_errors(self, blocks: Sequence[range]) -> dict[range, float]:
        """Of blocks with one start the mean of ‖h_s + M h_s + c − h_e‖² / ‖h_e‖² over the scored tokens, with M and c
        of the fitted ones: relative, because what reads the state next divides by its size."""
        start, width = blocks[0].start, self.model.config.hidden_size
        moments = Moments(width, len(blocks) * width)
        for numbers in self.batches(scored=False):
            inputs = self.real(start, numbers)
            moments.update(inputs, torch.cat([self.real(b.stop, numbers) - inputs for b in blocks], dim=1))
        solved = moments.add_processes().solve_affine(self.trial.settings.ridge)
        matrix, offset = (value.float() for value in solved)
        sums, count = [0.0] * len(blocks), 0
        for numbers in self.batches(scored=True):
            tested = self.real(start, numbers)
            count += len(tested)
            predicted = (tested @ matrix.T + offset).split(width, dim=1)
            for place, (block, update) in enumerate(zip(blocks, predicted, strict=True)):
                true = self.real(block.stop, numbers)
                sums[place] += float(((tested + update - true).square().sum(-1) / true.square().sum(-1)).sum())
        *sums, tokens = world().total([*sums, count])
        return {block: total / tokens for block, total in zip(blocks, sums, strict=True)}

    def fitted(self, candidate: Candidate) -> Substitute:
        """The candidate's stand-in, solved for, with the draws that a fit of it alone would start from."""
        path = min(self.trial.path, len(self.rows) - self.scored)
        states = states_between(self.states, candidate.block, self.rows, self.scored, path, self.run)
        this = Fit.of(self.model, states, candidate.shape, self.trial.settings, 0, self.run)
        fit_closed_form(self.model, this)
        return this.fitting.edit()

    def damages(self, sets: Sequence[Sequence[Candidate]], stage: str, one_in: int = 1) -> list[float]:
        """Mean KL(dense‖pruned) of each set of candidates, all of it in place, over one in so many of the scored rows;
        infinite where it is not a number.

        What enters a set's first block is known, so that only what is behind that is run.
        """
        found: list[float] = []
        abreast = self._abreast(one_in)
        with self.run.stage(stage, len(sets)) as progress:
            for first in range(0, len(sets), abreast):
                found += self._together(sets[first : first + abreast], one_in, progress)
        return found

    def _abreast(self, one_in: int) -> int:
        """How many ways pass the layers side by side, the same in all processes: of a streamed model, to read them
        once for all, as many as there is room for; else one."""
        if not is_streamed(self.running):
            return 1
        tokens = max(sum(map(len, self.batches(True, one_in))), 1) * self.rows.ids.shape[1]
        one = tokens * self.model.config.hidden_size * self.running.dtype.itemsize
        return max(min(world().gather(scratch_of(self.running).host_bytes // one)), 1)

    def _rows_of_logits(self) -> int:
        """Rows whose logits are held at once."""
        # Half, as those of real tokens are copied.
        return max(1, default_batch(self.running, self.rows.ids.shape[1]) // 2)

    def _together(self, sets: Sequence[Sequence[Candidate]], one_in: int, progress: Advance) -> list[float]:
        """The same of sets whose states are held at once."""
        numbers = self.batches(True, one_in)
        batches = [self.rows.select(part) for part in numbers]
        ways = [{c.start: functools.partial(self.fitted, c) for c in chosen} for chosen in sets]
        finals = states_by_ways(self.running, batches, ways, lambda index, batch: self.states[index][numbers[batch]])
        found = []
        for states in finals:
            total, count = 0.0, 0
            for part, batch, state in zip(numbers, batches, states, strict=True):
                for rows in torch.arange(len(batch)).split(self._rows_of_logits()):
                    few = batch.select(rows)
                    targets = self.teacher(part[rows], few.mask)
                    logits = logits_behind(self.running, few, state[rows.to(state.device)])
                    total += float(targets.divergence(logits[few.mask.to(logits.device)]))
                count += batch.tokens
            total, tokens = world().total([total, count])
            found.append(total / tokens if math.isfinite(total) else math.inf)
            progress(1)
        return found
