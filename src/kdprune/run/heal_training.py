"""Training of a pruned model: the loop of healing, with an eye on held-out rows, in the memory there is."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import BoolTensor, Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.evaluation.models import vocabulary_size
from kdprune.model.placement import input_device
from kdprune.model.recompute import activation_bytes, recomputing
from kdprune.report.summary import duration
from kdprune.runtime.distributed import world
from kdprune.runtime.machine import mixed_precision
from kdprune.runtime.memory import total_memory
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance
from kdprune.store.checkpoints import Checkpoint
from kdprune.train.gradients import Sums
from kdprune.train.loop import Progress, Schedule, fit
from kdprune.train.trial import LEAST_STEPS, best_rate

PURPOSE = 1_000  # of the generator: its draws disturb no method's
POINTS = 20  # of the curve, each with a look at held-out rows
# Of a batch at work, on a CPU and on an accelerator; larger ones are made of parts whose gradients add up.
LOGITS, LOGITS_FAST = 2**27, 2**29
ACTIVATIONS = 0.4  # of the machine's memory that they may take; beyond, layers are run again for the gradient
CLIP = 1.0  # largest norm of a step's gradient

# Model, rows as they are trained on, and their numbers among all rows → summed loss, and of how many positions.
Objective = Callable[[PreTrainedModel, TokenSet, Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class Training:
    """One training of a pruned model: what is measured on which rows, and what watches.

    Attributes:
        model: what is trained.
        objective: what is made small.
        rows: in which order does not matter.
        numbers: of these rows, as the objective wants them.
        looked: the objective on the watched rows.
        watched: held-out rows.
        batch: rows a step.
        patience: looks at the watched rows without gain after which it ends.
        fast: whether matrix products are made in bfloat16.
        run: seed and stages.
        progress: moved by a row at a time.
    """

    model: PreTrainedModel
    objective: Objective
    rows: TokenSet
    numbers: Tensor
    looked: Objective
    watched: TokenSet
    batch: int
    patience: int
    fast: bool
    run: Run
    progress: Advance

    def loss_function(self, numbers: Tensor) -> Sums:
        """The summed loss of these rows."""
        with self._precision():
            total, count = self.objective(self.model, self.rows.select(numbers), self.numbers[numbers])
        return Sums({"loss": total}, count)

    def _moving(self, numbers: Tensor) -> Sums:
        self.progress(len(numbers) * world().size)
        return self.loss_function(numbers)

    def watch(self) -> float:
        """The mean loss of the watched rows."""
        with self._precision():
            return mean_objective(self.looked, self.model, self.watched, self.part)

    def say(self, progress: Progress) -> None:
        """A line for a look at held-out rows."""
        seen = round(progress.share * self.rows.tokens)
        left = f", about {duration(progress.seconds_left)} left" if progress.share < 1 else ""
        self.run.stages.tell(f"healing: loss {progress.watched:.4f} nats on held-out rows after {seen:,} tokens{left}")

    @property
    def stretch(self) -> int:
        """Steps from one look to the next."""
        return stretch_of(len(self.rows), self.batch)

    def seen(self, curves: Mapping[str, Sequence[float]]) -> int:
        """Tokens that were seen until these curves ended."""
        rows = len(curves["loss"]) * self.stretch * self.batch
        return round(self.rows.tokens * min(1.0, rows / len(self.rows)))

    @property
    def part(self) -> int:
        """Rows whose logits fit."""
        most = LOGITS if input_device(self.model).type == "cpu" else LOGITS_FAST
        return max(1, most // (self.rows.ids.shape[1] * vocabulary_size(self.model)))

    def _precision(self) -> torch.autocast:
        return mixed_precision(input_device(self.model), self.fast)

    def fit(
        self, parameters: list[nn.Parameter], rates: Sequence[float], checkpoint: Checkpoint
    ) -> tuple[float, dict[str, list[float]]]:
        """Trains these over the rows, once each.

        Returns:
            The rate, of several the one that served best in a trial, and curves of at most ``POINTS`` points, what was
            watched among them.
        """
        part = min(self.part, self.batch)
        with self._precision():
            size = part * self.rows.ids.shape[1] * activation_bytes(self.model, self.rows)
        memory = total_memory(input_device(self.model))
        with recomputing(self.model) if size > ACTIVATIONS * memory else nullcontext():
            rate = rates[0] if len(rates) == 1 else self._best_rate(parameters, rates, part)
            schedule = Schedule(1, self.batch, rate, clip=CLIP, stretch=self.stretch, patience=self.patience)
            return rate, fit(
                parameters, self._moving, len(self.rows), schedule, self.run.generator(PURPOSE), name="healing",
                local_rows=lambda rows: rows[world().share(len(rows))], checkpoint=checkpoint, watch=self.watch,
                on_point=self.say, part=part)

    def _best_rate(self, parameters: list[nn.Parameter], rates: Sequence[float], part: int) -> float:
        """Of rates from the highest down the first that serves better than the next one, as long trials show.

        A trial is a whole training, warm-up and annealing and all, on the rows up to the first look.
        """
        count = rows_on_trial(len(self.rows), self.batch)

        def trial(rate: float) -> float:
            curves = fit(
                parameters, self.loss_function, count, Schedule(1, self.batch, rate, clip=CLIP),
                self.run.generator(PURPOSE), name="healing, on trial", watch=self.watch, part=part,
                local_rows=lambda rows: rows[world().share(len(rows))], notify=lambda _: None)
            return curves["watched"][-1]

        return best_rate(parameters, rates, trial, lambda rate, value: self.run.stages.tell(
            f"healing: loss {value:.4f} nats on held-out rows after a trial at rate {rate:.2g}"))


def stretch_of(rows: int, batch: int) -> int:
    """Steps from one look to the next, of a training on so many rows, ``batch`` a step."""
    return -(-rows // (batch * POINTS))


def rows_on_trial(rows: int, batch: int) -> int:
    """How many of them, the first, a rate on trial is given: those up to the first look."""
    return min(rows, max(stretch_of(rows, batch), LEAST_STEPS) * batch)


@torch.no_grad()
def mean_objective(objective: Objective, model: PreTrainedModel, rows: TokenSet, batch: int) -> float:
    """The mean of an objective over rows, dealt out to the processes."""
    parts = torch.arange(len(rows)).split(batch)
    own = [parts[number] for number in world().share(len(parts)).tolist()]
    found = [objective(model, rows.select(numbers), numbers) for numbers in own]
    total, count = world().total([sum(float(total) for total, _ in found), sum(count for _, count in found)])
    return total / max(count, 1)


def budgeted(tokens: TokenSet, budget: int) -> tuple[TokenSet, Tensor]:
    """Rows with exactly ``budget`` real tokens, and their numbers among ``tokens``: in order, again from the first when
    all are used, the last one cut."""
    counts = tokens.mask.sum(1)
    total = max(int(counts.sum()), 1)
    numbers = torch.arange(-(-budget // total) * len(tokens)) % len(tokens)
    ends = counts[numbers].cumsum(0)
    numbers = numbers[: int(torch.searchsorted(ends, budget)) + 1]
    chosen = tokens.select(numbers)
    mask = chosen.mask.clone()
    mask[-1] &= mask[-1].cumsum(0) <= int(counts[numbers[-1]] - ends[len(chosen) - 1]) + budget
    return dataclasses.replace(chosen, mask=cast(BoolTensor, mask)), numbers
