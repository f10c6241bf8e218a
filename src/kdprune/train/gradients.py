"""The gradient of a mean loss over a mini-batch, in parts that fit into memory and over all processes of the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from kdprune.errors import KDPruneError
from kdprune.runtime.distributed import world
from kdprune.store.files import Notify


@dataclass(frozen=True)
class Sums:
    """What a measure saw: sums over ``count`` tokens by name, ``"loss"`` among them. Sums of parts add up."""

    values: Mapping[str, Tensor]
    count: int

    def means(self) -> dict[str, float]:
        """The means, by name."""
        return {key: float(value.detach()) / max(self.count, 1) for key, value in self.values.items()}

    def __add__(self, other: "Sums") -> "Sums":
        zero = torch.zeros(())
        return Sums({name: self.values.get(name, zero) + other.values.get(name, zero)
                     for name in (*self.values, *other.values)}, self.count + other.count)


LossFunction = Callable[[Tensor], Sums]


class Gradients:
    """Sets gradients of the mean loss over the tokens of mini-batches.

    Rows that do not fit into memory at once are halved, and halved again down to one row; sums and summed gradients of
    the parts add up, so that the result is the same to rounding. Processes talk when all have done their parts.

    Args:
        parameters: what is trained.
        loss_function: as of :func:`kdprune.train.loop.fit`, like the following.
        local_rows: rows of a mini-batch that this process works on.
        name: what is being fitted, for messages.
        notify: is told in one line what was mended.
        part: most rows that are measured at once; it only ever falls.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], loss_function: LossFunction,
        local_rows: Callable[[Tensor], Tensor], part: int, name: str, notify: Notify,
    ):
        self.parameters, self.loss_function, self.local_rows, self.part = parameters, loss_function, local_rows, part
        self.name, self.notify = name, notify
        self._names: list[str] = []  # of the sums, the same in every process

    def __call__(self, rows: Tensor) -> Sums:
        """Sets every parameter's ``grad``, None where no row reaches it; returns the sums over all ``rows``, detached.

        Raises:
            KDPruneError: one row alone is too large.
        """
        part = self.part
        local, gradients = self._in_parts(self.local_rows(rows))
        if self.part < part:
            self.notify(f"out of memory with {part} rows at once while fitting {self.name}; going on with {self.part}, "
                        "to the same result up to rounding")
        seen, reached = self._over_processes(local, [gradient is not None for gradient in gradients])
        for parameter, gradient, anywhere in zip(self.parameters, gradients, reached, strict=True):
            if gradient is not None:
                parameter.grad = gradient / max(seen.count, 1)
            else:
                parameter.grad = torch.zeros_like(parameter) if anywhere else None
        world().sum(*(parameter.grad for parameter in self.parameters if parameter.grad is not None))
        return seen

    def norm(self) -> float:
        """Norm of the gradient, all parameters together; not finite where any entry is not."""
        return float(nn.utils.get_total_norm([one.grad for one in self.parameters if one.grad is not None]))

    def clip(self, most: float, norm: float) -> None:
        """Scales the gradient, of this norm, to one of at most ``most``."""
        nn.utils.clip_grads_with_norm_(self.parameters, most, torch.tensor(norm))

    def _in_parts(self, rows: Tensor) -> tuple[Sums, list[Tensor | None]]:
        """Sums and summed gradients of this process's rows."""
        total = Sums({}, 0)
        gradients: list[Tensor | None] = [None] * len(self.parameters)
        while len(rows):
            piece = rows[: self.part]
            found = self._piece(piece)
            if found is None:
                clear_device_cache(garbage_collection=True)
                self.part = -(-len(piece) // 2)
                continue
            total += found[0]
            gradients = [old if new is None else new if old is None else old + new
                         for old, new in zip(gradients, found[1], strict=True)]
            rows = rows[len(piece) :]
        return total, gradients

    def _piece(self, rows: Tensor) -> tuple[Sums, tuple[Tensor | None, ...]] | None:
        """Sums and gradients of some rows; None where memory does not hold what that takes."""
        try:
            seen = self.loss_function(rows)
            gradients = torch.autograd.grad(seen.values["loss"], self.parameters, allow_unused=True)
            return Sums({key: value.detach() for key, value in seen.values.items()}, seen.count), gradients
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            if len(rows) == 1:
                raise KDPruneError(
                    f"got too little memory on {self.parameters[0].device} for one row while fitting {self.name}, "
                    "expected room for it: give shorter rows (--length), or use --device cpu"
                ) from error
        return None

    def _over_processes(self, local: Sums, reached: list[bool]) -> tuple[Sums, list[bool]]:
        """The sums of all processes together, in one message; and which parameters a gradient reaches in any."""
        if not self._names:
            self._names = list(dict.fromkeys(name for names in world().gather(list(local.values)) for name in names))
        totals = torch.zeros(len(self._names), dtype=torch.float64)
        if local.values:
            totals = torch.stack([local.values[name].double() for name in self._names]).cpu()
        message = torch.cat((totals, torch.tensor([local.count, *reached], dtype=torch.float64)))
        world().sum(message)
        totals, count, anywhere = message.split([len(self._names), 1, len(reached)])
        return Sums(dict(zip(self._names, totals, strict=True)), int(count)), (anywhere > 0).tolist()
