"""What blocks behind stand-ins cost, measured with stand-ins that are only solved for."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.evaluation.perplexity import default_batch
from kdprune.kernel.operators import Moments
from kdprune.methods.common.shape import Candidate
from kdprune.methods.kdp.fit_block import Fit, FitSettings, fit_closed_form
from kdprune.model.block_states import boundary_states, local_rows, states_between
from kdprune.model.edits import Substitute
from kdprune.model.families import decoder_layers
from kdprune.model.layerwise import logits_behind, states_by_ways
from kdprune.model.placement import input_device
from kdprune.model.streaming import is_streamed, scratch_of
from kdprune.model.teacher import Teacher
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance
from kdprune.store.states import States

FIT_TOKENS = 4_096  # of the calibration rows that a candidate's stand-in is fitted to, …
PER_INPUT = 4  # … or so many for every input of its read-out, if that is more
DAMAGE_TOKENS = 4_096  # of the held-out rows that the damage of sets is taken over, …
ALONE = 2  # … and one in so many of these rows for a candidate alone
HELD = 2**31  # bytes of states that measuring keeps in memory; more go to the work directory, where there is one
TOP = 128  # most probable tokens of the dense model's distribution that are told apart


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


def damage_rows(tokens: TokenSet, held: float) -> TokenSet:
    """The rows that damage is taken over: the first that no fit sees, of ``DAMAGE_TOKENS`` real tokens or less."""
    return tokens.watching(held).first(DAMAGE_TOKENS)


def fit_rows(tokens: TokenSet, held: float, width: int) -> TokenSet:
    """The rows that trial stand-ins are fitted to."""
    return tokens.fitted(held).first(max(FIT_TOKENS, 2 * PER_INPUT * width))


def boundaries_of(blocks: Sequence[range], last: int) -> list[int]:
    """The boundaries whose states measuring these blocks reads: inside them all, and the last one."""
    return sorted({index for block in blocks for index in range(block.start, block.stop + 1)} | {last})


@dataclass(frozen=True)
class Measuring:
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
    ) -> "Measuring":
        """The states of all boundaries from one pass over both kinds of rows; a streamed model's lie on the disk, and
        so do more than ``HELD`` bytes."""
        running, last = run.running(model), len(decoder_layers(model))
        fitted = len(fit_rows(tokens, trial.held, model.config.hidden_size))
        scored, behind = len(damage_rows(tokens, trial.held)), len(tokens.fitted(trial.held))
        rows = tokens.select(torch.cat([torch.arange(fitted), torch.arange(behind, behind + scored)]))
        share = scored if world().size == 1 else -(-scored // (ALONE * world().size))
        run = dataclasses.replace(run, batch_size=min(run.batch_size, share))
        needed = boundaries_of(blocks, last)
        follows_from = ["damage", fitted, behind, scored, run.batch_size]
        much = rows.ids.numel() * model.config.hidden_size * running.dtype.itemsize * len(needed) > HELD
        spills = is_streamed(running) or much
        spill = (lambda index: run.spill_directory(index, follows_from)) if spills else lambda _: None
        states = boundary_states(running, rows, needed, run, stage="damage states", spill=spill)
        teacher = Teacher(running, rows, TOP, keep=torch.arange(fitted, fitted + scored), final=states[last])
        return Measuring(model, running, rows, scored, trial, run, states, teacher)

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
        """States of the real tokens of some rows, (n, d), float32, on the model's device."""
        return self.states[boundary][numbers][self.rows.mask[numbers]].to(input_device(self.running)).float()

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
        moments = Moments(width, len(blocks) * width, input_device(self.running))
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

    def _together(self, sets: Sequence[Sequence[Candidate]], one_in: int, progress: Advance) -> list[float]:
        """The same of sets whose states are held at once."""
        numbers = self.batches(True, one_in)
        batches = [self.rows.select(part) for part in numbers]
        ways = [{c.start: functools.partial(self.fitted, c) for c in chosen} for chosen in sets]
        most = default_batch(self.running, self.rows.ids.shape[1], copies=2)  # those of real tokens are copied
        finals = states_by_ways(self.running, batches, ways, lambda index, batch: self.states[index][numbers[batch]])
        found = []
        for states in finals:
            total, count = 0.0, 0
            for part, batch, state in zip(numbers, batches, states, strict=True):
                for rows in torch.arange(len(batch)).split(most):
                    few = batch.select(rows)
                    targets = self.teacher(part[rows], few.mask)
                    logits = logits_behind(self.running, few, state[rows.to(state.device)])
                    total += float(targets.divergence(logits[few.mask.to(logits.device)]))
                count += batch.tokens
            total, tokens = world().total([total, count])
            found.append(total / tokens if math.isfinite(total) else math.inf)
            progress(1)
        return found
