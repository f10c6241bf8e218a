"""The one training loop, ``fit``, for all gradient fits. It survives kills, non-finite losses and little memory."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdprune.errors import Diverged
from kdprune.runtime.distributed import world
from kdprune.store.checkpoints import Checkpoint
from kdprune.store.files import Notify, tell
from kdprune.train.gradients import Gradients, LossFunction, Sums

KEEP = 8  # steps from one good state kept to the next
HALVINGS = 3  # of the rate, before a fit gives up

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of AdamW's group; the annealing reads the last three at every step

OnEpoch = Callable[[int], Mapping[str, float] | None]


@dataclass(frozen=True)
class Progress:
    """How far a fit is: the share of its steps, the seconds the others will take, and the watched figure, if any."""

    share: float
    seconds_left: float
    watched: float | None


def advancing(progress: Callable[[int], None]) -> Callable[[int], None]:
    """An ``on_epoch`` that moves a progress bar by one epoch."""
    return lambda _: progress(1)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        epochs: passes over the rows.
        batch: rows a step.
        rate: peak learning rate of AdamW, reached after ``warmup``
        of the steps and annealed to zero by a cosine.
        clip: largest norm of a step's gradient, all parameters together; None: as it comes.
        weight_decay: share, times the rate, by which a step shrinks the weights.
        stretch: steps of an epoch that make a point of the curves; None: all.
        patience: points without a better watched figure, one after the other, after which the fit ends; None: never.
    """

    epochs: int
    batch: int
    rate: float
    warmup: float = 0.05
    clip: float | None = None
    weight_decay: float = 0.0
    stretch: int | None = None
    patience: int | None = None


def fit(
    parameters: Iterable[torch.nn.Parameter],
    loss_function: LossFunction,
    rows: int,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    name: str,
    on_epoch: OnEpoch | None = None,
    local_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
    checkpoint: Checkpoint | None = None,
    notify: Notify = tell,
    watch: Callable[[], float] | None = None,
    on_point: Callable[[Progress], None] = lambda _: None,
    part: int | None = None,
) -> dict[str, list[float]]:
    """Minimises the mean of ``loss_function(rows)``'s ``"loss"`` over mini-batches of row numbers.

    A loss or gradient that is not finite sends the fit back to the last good state kept, and halves the rate from there
    on. A mini-batch too large for the memory is worked off in halves, to the same result up to rounding.

    Args:
        parameters: what is trained; gradients of nothing else are touched.
        loss_function: row numbers (b,) → sums over their tokens, ``"loss"`` among them; the others are only recorded.
            Calls for rows that could not be used are repeated: the curves are right, what it counts itself may not be.
        rows: N, how many rows there are; every epoch visits each once in an order drawn from ``generator``.
        name: what is being fitted, for messages.
        on_epoch: called with the epoch's number before it starts; what it returns is put into the curves. It may change
            ``parameters`` and draw from ``generator``, and leaves no other trace in the fit.
        local_rows: the rows of a mini-batch that this process works on; sums and gradients are added up over processes.
        checkpoint: a fit that was stopped goes on from there and ends in the same bits; a finished one gives its
            parameters, generator and curves at once.
        notify: is told in one line what went wrong and was mended.
        watch: a figure of the parameters as they are, the smaller the better and the same in every process, taken
            before the first step and at every point of the curves: the parameters end as they were when it was best.
        on_point: told at every point how far the fit is.
        part: most rows of a mini-batch that are measured at once; None: all.

    Returns:
        Mean of every measure over an epoch's tokens, by name, one value an epoch (or stretch); ``"watched"``, with the
        value before the first step in front.

    Raises:
        Diverged: the loss stayed NaN or infinite (says where and what to try).
        KDPruneError: one row alone is too large.
    """
    gradients = Gradients(
        list(parameters), loss_function, local_rows, min(part or schedule.batch, schedule.batch), name, notify)
    fit_state = _FitState(gradients, rows, schedule, generator, watch, on_point)
    checkpoint = checkpoint or Checkpoint(None)
    _resume(fit_state, checkpoint)
    if fit_state.finished:
        return fit_state.place.curves
    if fit_state.best.parameters is None:
        fit_state.look()
    fit_state.keep()
    while not fit_state.finished:
        if not fit_state.place.begun:
            fit_state.begin(on_epoch)
        if fit_state.place.step < fit_state.steps:
            _step(fit_state, checkpoint)
        else:
            fit_state.end()
    fit_state.take_best()
    checkpoint.save(fit_state.state(), force=True)
    return fit_state.place.curves


def _step(fit_state: "_FitState", checkpoint: Checkpoint) -> None:
    """One step forwards, or back to the last state kept."""
    seen = fit_state.gradients(fit_state.chosen())
    norm = fit_state.gradients.norm()
    if not (math.isfinite(seen.means()["loss"]) and math.isfinite(norm)):
        _go_back(fit_state, seen.means()["loss"], norm)
        return
    # The parameters are known to be good now, before the step and not after it.
    if fit_state.annealing.last_epoch % KEEP == 0:  # which is the number of steps made
        fit_state.keep()
        checkpoint.save(fit_state.kept)
    fit_state.update(seen, norm)


def _go_back(fit_state: "_FitState", loss: float, norm: float) -> None:
    """To the state kept last, with half its rate.

    Raises:
        Diverged: that was done ``HALVINGS`` times already.
    """
    place, rate, gradients = fit_state.place, fit_state.schedule.rate, fit_state.gradients
    what = f"{norm} gradient" if math.isfinite(loss) else f"{loss} loss"
    where = (f"got a {what} while fitting {gradients.name} in epoch {place.epoch + 1}, step {place.step + 1} of "
             f"{fit_state.steps}")
    if fit_state.halvings == HALVINGS:
        raise Diverged(
            f"{where}; expected a finite one, if not at once then at half the rate, which was tried {HALVINGS} times "
            f"(down to {rate / 2**HALVINGS:g}): lower the learning rate (now {rate:g}), or look for NaN and infinite "
            "values in what is fitted")
    fit_state.restart_slower()
    if world().first:
        gradients.notify(
            f"{where}; going on from epoch {fit_state.place.epoch + 1}, step {fit_state.place.step + 1} at half the "
            f"rate (peak {rate / 2**fit_state.halvings:g})")


def _resume(fit_state: "_FitState", checkpoint: Checkpoint) -> None:
    """Puts every process where the first one's checkpoint says, or at the first one's parameters."""
    state = world().broadcast(checkpoint.load())
    if state is not None and state["of"] == fit_state.identity:
        fit_state.restore(state)
        return
    if state is not None and world().first:
        fit_state.gradients.notify(
            f"the checkpoint of {fit_state.gradients.name} has another schedule or size: left unread")
    fit_state.align()


@dataclass
class _Place:
    """How far a fit has come. ``step`` is the next one of its epoch; sums are those of a curve's next point."""

    epoch: int = 0
    begun: bool = False
    step: int = 0
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    curves: dict[str, list[float]] = field(default_factory=dict)
    since: int = 0  # points since the best one
    stopped: bool = False


@dataclass(frozen=True)
class _Best:
    """The least watched figure so far, and the parameters it was taken with."""

    value: float = math.inf
    parameters: list[Tensor] | None = None


class _FitState:
    """What is trained, how fast, and how far it has come. ``state`` is all that the rest of the fit follows from."""

    def __init__(
        self, gradients: Gradients, rows: int, schedule: Schedule, generator: torch.Generator,
        watch: Callable[[], float] | None, on_point: Callable[[Progress], None],
    ):
        self.watch, self.on_point, self.best = watch, on_point, _Best()
        self.began, self.made = time.perf_counter(), 0  # steps of this process
        self.gradients, self.rows, self.schedule, self.generator = gradients, rows, schedule, generator
        self.parameters = gradients.parameters
        self.steps = -(-rows // schedule.batch)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
        total = schedule.epochs * self.steps + 1
        # A warm-up of one step exactly would be divided by its length, which torch takes for 0: none then.
        warmup = 0.0 if schedule.warmup * total == 1 else schedule.warmup
        self.annealing = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, schedule.rate, total_steps=total, pct_start=warmup, cycle_momentum=False,
            final_div_factor=1e4)
        self.place = _Place()
        self.halvings = 0
        self.kept: dict[str, Any] = {}
        self.identity = f"{rows} rows, {schedule}, parameters {[list(one.shape) for one in self.parameters]}"

    @property
    def finished(self) -> bool:
        return self.place.stopped or self.place.epoch == self.schedule.epochs

    def chosen(self) -> Tensor:
        """Row numbers of the next mini-batch."""
        return self.place.order.split(self.schedule.batch)[self.place.step]

    def begin(self, on_epoch: OnEpoch | None) -> None:
        """Starts an epoch."""
        if on_epoch is not None:
            for key, value in (on_epoch(self.place.epoch) or {}).items():
                self.place.curves.setdefault(key, []).append(value)
            self.align()  # what it solved for may differ in the last bits from host to host
        self.place.order = torch.randperm(self.rows, generator=self.generator)
        self.place.begun, self.place.step = True, 0

    def end(self) -> None:
        """Ends an epoch."""
        self._point()
        self.place.epoch, self.place.begun, self.place.step = self.place.epoch + 1, False, 0

    def update(self, seen: Sums, norm: float) -> None:
        """Makes a step with the gradients at hand, of norm ``norm``, whose mini-batch showed ``seen``."""
        if self.schedule.clip is not None:
            self.gradients.clip(self.schedule.clip, norm)
        self.optimizer.step()
        self.annealing.step()
        place = self.place
        for key, total in seen.values.items():
            place.sums[key] = place.sums.get(key, 0.0) + float(total)
        place.count += seen.count
        place.step += 1
        self.made += 1
        if self.schedule.stretch is not None and place.step % self.schedule.stretch == 0:
            self._point()

    def _point(self) -> None:
        """Adds a point to the curves."""
        place = self.place
        if not place.sums:  # the last stretch ended with its epoch
            return
        for key, summed in place.sums.items():
            place.curves.setdefault(key, []).append(summed / max(place.count, 1))
        place.sums, place.count = {}, 0
        self.look()
        done, total = self.annealing.last_epoch, self.schedule.epochs * self.steps
        pace = (time.perf_counter() - self.began) / max(self.made, 1)
        self.on_point(Progress(
            done / total, pace * (total - done), place.curves["watched"][-1] if self.watch is not None else None))

    def look(self) -> None:
        """Takes the watched figure, keeps the parameters where it is the best so far, and ends a fit without gain."""
        if self.watch is None:
            return
        place, value = self.place, self.watch()
        value = math.inf if math.isnan(value) else value  # which nothing would ever be less than
        place.curves.setdefault("watched", []).append(value)
        if self.best.parameters is None or value < self.best.value:
            self.best = _Best(value, [parameter.detach().clone() for parameter in self.parameters])
            place.since = 0
        else:
            place.since += 1
        place.stopped = self.schedule.patience is not None and place.since >= self.schedule.patience

    @torch.no_grad()
    def take_best(self) -> None:
        """Ends with the parameters that the watched figure was best with."""
        for parameter, value in zip(self.parameters, self.best.parameters or self.parameters, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def align(self) -> None:
        """Gives every process the first one's parameters."""
        if not world().first:
            for parameter in self.parameters:
                parameter.zero_()
        world().sum(*self.parameters)

    def state(self) -> dict[str, Any]:
        """All that the rest of the fit follows from. Its tensors are the live ones."""
        [group] = self.optimizer.param_groups
        moments = [] if self.finished else [dict(self.optimizer.state.get(one, {})) for one in self.parameters]
        return {
            "of": self.identity, "halvings": self.halvings, "part": self.gradients.part,
            "place": dict(vars(self.place)), "parameters": [parameter.detach() for parameter in self.parameters],
            "moments": moments, "rates": {key: group[key] for key in _RATES},
            "annealing": self.annealing.state_dict(), "generator": self.generator.get_state(),
            "best": [self.best.value, self.best.parameters if not self.finished else None],
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Puts the fit where ``state`` was taken; takes no tensor of it."""
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        moments = {number: _copy(own) for number, own in enumerate(state["moments"]) if own}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.optimizer.param_groups[0].update(state["rates"])
        self.annealing.load_state_dict(_copy(state["annealing"]))
        self.generator.set_state(state["generator"])
        self.place, self.halvings = _Place(**_copy(state["place"])), state["halvings"]
        self.best = _Best(*_copy(state["best"]))
        self.gradients.part = min(self.gradients.part, state["part"])

    def keep(self) -> None:
        """Keeps the state, to go back to."""
        state = self.state()
        best = state.pop("best")  # which is put anew where it is, and never written into
        self.kept = {**_copy(state, self.kept), "best": best}

    def restart_slower(self) -> None:
        """Goes back to the state kept last, at half its rate."""
        self.kept["rates"] = {key: rate / 2 for key, rate in self.kept["rates"].items()}
        self.kept["halvings"] += 1
        self.restore(self.kept)


def _copy(value: Any, into: Any = None) -> Any:
    """A copy of tensors in dicts and lists, written into those of an earlier copy where they have the same shape."""
    if isinstance(value, Tensor):
        return into.copy_(value) if isinstance(into, Tensor) and into.shape == value.shape else value.detach().clone()
    if isinstance(value, dict):
        old = into if isinstance(into, dict) else {}
        return {key: _copy(one, old.get(key)) for key, one in value.items()}
    if isinstance(value, list):
        olds = into if isinstance(into, list) and len(into) == len(value) else [None] * len(value)
        return [_copy(one, old) for one, old in zip(value, olds, strict=True)]
    return value
