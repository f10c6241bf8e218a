"""Which learning rate: short trainings on trial, judged on held-out rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kdprune.errors import Diverged
from kdprune.train.loop import Schedule

# Tried where none is given, from the highest down. What suits differs by a factor of ten from model to model, so that
# no rule of the width alone gives it: weights of the same width are five times as large in one as in another.
# SmolLM2's blocks are served best by 3e-3 to 7e-3; Gemma-3's by 1e-4, and they do not come back from 3e-3.
RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
LEAST_STEPS = 4  # of a trial
SHARE = 10  # of a training's steps one in so many makes a trial


def best_rate(
    parameters: Iterable[torch.nn.Parameter], rates: Sequence[float], trial: Callable[[float], float],
    say: Callable[[float, float], None] = lambda rate, value: None,
) -> float:
    """Of rates from the highest down the first that serves better than the next one; each starts where the first did.
    Those that diverge are passed over; where all do, it is the lowest.

    Args:
        parameters: what a trial trains; in the end they are as they were.
        rates: highest first.
        trial: trains at a rate and gives a figure, the smaller the better; one that diverges or gives no number counts
            as infinite.
        say: told of every trial: its rate and its figure.
    """
    parameters = list(parameters)
    start = [parameter.detach().clone() for parameter in parameters]
    best = math.inf, rates[-1]
    for rate in rates:
        try:
            value = trial(rate)
        except Diverged:
            value = math.inf
        value = math.inf if math.isnan(value) else value
        with torch.no_grad():
            for parameter, before in zip(parameters, start, strict=True):
                parameter.copy_(before)
        say(rate, value)
        if value < best[0]:
            best = value, rate
        elif math.isfinite(best[0]):
            break
    return best[1]


def rate_on_trial(
    parameters: Iterable[torch.nn.Parameter], train: Callable[[int, Schedule, torch.Generator], Any],
    look: Callable[[], float], rows: int, schedule: Schedule, draw: torch.Generator,
    say: Callable[[float, float], None] = lambda rate, value: None, rates: Sequence[float] = RATES,
) -> float:
    """The rate, of several, that serves best in trainings of a tenth of the steps, one pass at most.

    A trial is a whole training, warm-up and annealing and all, over the first rows.

    Args:
        parameters: what is trained; in the end they are as they were.
        train: trains over so many rows by a schedule, in the order that a generator draws.
        look: the figure of the parameters as they are, on rows that are not trained on; the smaller the better.
        rows: how many there are to train on.
        schedule: of the training that the rate is for; its own rate is not looked at.
        draw: its generator, which is left as it is.
        say: as of :func:`best_rate`.
        rates: those tried, highest first.
    """
    some = trial_rows(rows, schedule)

    def trial(rate: float) -> float:
        twin = torch.Generator(draw.device)
        twin.set_state(draw.get_state())
        train(some, replace(schedule, epochs=1, rate=rate, patience=None), twin)
        return look()

    return best_rate(parameters, rates, trial, say)


def trial_rows(rows: int, schedule: Schedule) -> int:
    """How many of so many rows a trial for such a training passes, once."""
    steps = max(-(-rows // schedule.batch) * schedule.epochs // SHARE, LEAST_STEPS)
    return min(rows, steps * schedule.batch)
