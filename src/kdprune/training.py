"""The one training loop: every gradient fit of the package goes through ``fit``."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdprune.errors import KDPruneError
from kdprune.world import world


@dataclass(frozen=True)
class Sums:
    """What a measure saw: sums over ``count`` tokens by name, ``"loss"`` among them. Sums of parts add up, means do not.
    """

    values: Mapping[str, Tensor]
    count: int

    def means(self) -> dict[str, float]:
        """The means, by name."""
        return {key: float(value.detach()) / max(self.count, 1) for key, value in self.values.items()}


Measure = Callable[[Tensor], Sums]


def advancing(advance: Callable[[int], None]) -> Callable[[int], None]:
    """An ``on_epoch`` that moves a progress bar by one epoch."""
    return lambda _: advance(1)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        epochs: passes over the rows. batch: rows a step. rate: peak learning rate of AdamW, reached after ``warmup``
        of the steps and annealed to zero by a cosine.
        clip: largest norm of a step's gradient, all parameters together; None: as it comes.
        weight_decay: share, times the rate, by which a step shrinks the weights.
    """

    epochs: int
    batch: int
    rate: float
    warmup: float = 0.05
    clip: float | None = None
    weight_decay: float = 0.0


def fit(
    parameters: Iterable[torch.nn.Parameter],
    measure: Measure,
    rows: int,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    name: str,
    on_epoch: Callable[[int], Mapping[str, float] | None] | None = None,
    mine: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, list[float]]:
    """Minimises the mean of ``measure(rows)``'s ``"loss"`` over mini-batches of row numbers.

    Args:
        parameters: what is trained; gradients of nothing else are touched.
        measure: row numbers (b,) → sums over their tokens, ``"loss"`` among them; the others are only recorded.
        rows: N, how many rows there are; every epoch visits each once in an order drawn from ``generator``.
        name: what is being fitted, for the error message.
        on_epoch: called with the epoch's number before it starts; what it returns is put into the curves.
        mine: the rows of a mini-batch that this process works on; sums and gradients are added up over processes.

    Returns:
        Mean of every measure over an epoch's tokens, by name, one value an epoch.

    Raises:
        KDPruneError: the loss became NaN or infinite (says where and what to try).
    """
    parameters = list(parameters)
    steps = -(-rows // schedule.batch)
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    annealing = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, total_steps=schedule.epochs * steps + 1, pct_start=schedule.warmup,
        cycle_momentum=False, final_div_factor=1e4,
    )
    curves: dict[str, list[float]] = {}
    for epoch in range(schedule.epochs):
        for key, value in (on_epoch(epoch) or {} if on_epoch is not None else {}).items():
            curves.setdefault(key, []).append(value)
        sums: dict[str, float] = {}
        count = 0
        for chosen in torch.randperm(rows, generator=generator).split(schedule.batch):
            seen = _gradients(parameters, measure, mine(chosen))
            loss = seen.means()["loss"]
            if not math.isfinite(loss):
                raise KDPruneError(
                    f"got a {loss} loss while fitting {name} in epoch {epoch + 1}; "
                    f"expected a finite one: lower the learning rate (now {schedule.rate:g})"
                )
            if schedule.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            annealing.step()
            for key, total in seen.values.items():
                sums[key] = sums.get(key, 0.0) + float(total)
            count += seen.count
        for key, summed in sums.items():
            curves.setdefault(key, []).append(summed / max(count, 1))
    return curves


def _gradients(parameters: list[torch.nn.Parameter], measure: Measure, rows: Tensor) -> Sums:
    """Sets ``grad`` to the gradient of the mean loss over the mini-batch, of which ``rows`` are this process's part.

    Returns:
        The sums over the whole mini-batch, detached.
    """
    gradients: list[Tensor | None] = [None] * len(parameters)
    local = Sums({}, 0)
    if len(rows):
        local = measure(rows)
        gradients = list(torch.autograd.grad(local.values["loss"], parameters, allow_unused=True))
    seen = _over_processes(local)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            # Another process may have one, and all have to send the same tensors.
            parameter.grad = torch.zeros_like(parameter) if world().size > 1 else None
        else:
            parameter.grad = gradient / max(seen.count, 1)
    world().sum(*(parameter.grad for parameter in parameters if parameter.grad is not None))
    return seen


def _over_processes(local: Sums) -> Sums:
    """The sums of all processes together; one without a row of its own adds nothing."""
    here = world()
    if here.size == 1:
        return Sums({key: value.detach() for key, value in local.values.items()}, local.count)
    parts = here.gather(({key: float(value.detach()) for key, value in local.values.items()}, local.count))
    names = dict.fromkeys(name for values, _ in parts for name in values)
    totals = {name: sum(values.get(name, 0.0) for values, _ in parts) for name in names}
    return Sums({name: torch.tensor(value, dtype=torch.float64) for name, value in totals.items()},
                sum(count for _, count in parts))
