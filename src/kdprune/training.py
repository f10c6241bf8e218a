"""The one training loop: every gradient fit of the package goes through ``fit``."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdprune.errors import KDPruneError

Measures = dict[str, Tensor]


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
    measure: Callable[[Tensor], Measures],
    rows: int,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    name: str,
    on_epoch: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Minimises ``measure(rows)["loss"]`` over mini-batches of row numbers.

    Args:
        parameters: what is trained; gradients of nothing else are touched.
        measure: row numbers (b,) → scalars by name, ``"loss"`` among them; the others are only recorded.
        rows: N, how many rows there are; every epoch visits each once in an order drawn from ``generator``.
        name: what is being fitted, for the error message.
        on_epoch: called with the epoch's number before it starts.

    Returns:
        Mean of every measure, by name, one value an epoch.

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
        if on_epoch is not None:
            on_epoch(epoch)
        sums: dict[str, float] = {}
        for chosen in torch.randperm(rows, generator=generator).split(schedule.batch):
            measured = measure(chosen)
            loss = float(measured["loss"].detach())
            if not math.isfinite(loss):
                raise KDPruneError(
                    f"got a {loss} loss while fitting {name} in epoch {epoch + 1}; "
                    f"expected a finite one: lower the learning rate (now {schedule.rate:g})"
                )
            gradients = torch.autograd.grad(measured["loss"], parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            if schedule.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            annealing.step()
            for key, value in measured.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach()) * len(chosen)
        for key, total in sums.items():
            curves.setdefault(key, []).append(total / rows)
    return curves
