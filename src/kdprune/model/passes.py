"""Single passes through a model's layers: what a layer is given, layers that let pass, batches that do not fit."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.model.families import decoder_layers, layer_output
from kdprune.model.placement import input_device
from kdprune.store.files import Notify, tell

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Forward = Callable[[int, Tensor, Arguments], Tensor]
Result = TypeVar("Result")


def run_layers(model: PreTrainedModel, batch: TokenSet) -> None:
    """One forward pass of the layer stack (no language-model head), for its hooks."""
    device = input_device(model)
    model.base_model(
        input_ids=batch.ids.to(device),
        attention_mask=None if batch.mask.all() else batch.mask.to(device).long(),
        use_cache=False,
    )


@contextlib.contextmanager
def standing_in(layers: Sequence[nn.Module], forward: Forward) -> Iterator[None]:
    """While active, layer i of ``layers`` gives ``forward(i, h, arguments)`` where it would compute; hooks are called.

    ``arguments`` are what the model gives the layer beside the hidden state h (B, T, d). Weights are not looked at.
    """
    missing = object()
    before = [layer.__dict__.get("forward", missing) for layer in layers]

    def substitute(index: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            return layer_output(layers[index], forward(index, hidden, (args[1:], kwargs)))
        return call

    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = substitute(index)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            if old is missing:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = old


def let_pass(index: int, hidden: Tensor, arguments: Arguments) -> Tensor:
    """A layer that does nothing, for :func:`standing_in`."""
    return hidden


@dataclass(frozen=True)
class Begin:
    """Where passes over batches begin: at a boundary whose states are known, so that no layer before it is run.

    Attributes:
        index: the boundary.
        states: number of a batch → its states there, (B, T, d), on whatever device.
    """

    index: int
    states: Callable[[int], Tensor]

    def of(self, batches: Sequence[int]) -> "Begin":
        """The same for some of the batches."""
        return Begin(self.index, lambda number: self.states(batches[number]))


@torch.no_grad()
def entering(model: PreTrainedModel, batch: TokenSet) -> tuple[Tensor, list[Arguments]]:
    """h_0 (B, T, d) of a batch, and for each layer what the model hands it beside the hidden state. No layer is run."""
    layers, seen = decoder_layers(model), []
    start: list[Tensor] = []

    def forward(index: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        if not start:
            start.append(hidden)
        seen.append(arguments)
        return hidden

    with standing_in(list(layers), forward):
        run_layers(model, batch)
    return start[0], seen


class RowLimit:
    """How many rows the device takes at once: half as many whenever its memory runs out, from then on."""

    def __init__(self, notify: Notify = tell) -> None:
        self.rows: int | None = None  # no limit yet
        self.notify = notify

    def over(self, batch: TokenSet, work: Callable[[TokenSet, slice], Result]) -> list[Result]:
        """What ``work`` gives for the parts of a batch, each with the rows of the batch it has: one part if it fits.

        Raises:
            KDPruneError: the memory does not suffice for a single row.
        """
        results: list[Result] = []
        start = 0
        while start < len(batch):
            stop = min(len(batch), start + (self.rows or len(batch)))
            try:
                results.append(work(batch.select(slice(start, stop)), slice(start, stop)))
                start = stop
            except torch.OutOfMemoryError as error:
                if stop - start == 1:
                    raise KDPruneError(
                        f"the device's memory does not suffice for one row of {batch.ids.shape[1]} tokens; give "
                        "shorter rows (--length), a smaller dtype or another device"
                    ) from error
                self.rows = (stop - start) // 2
                self.notify(f"out of memory on the device with {stop - start} rows; going on with {self.rows} at once")
            if torch.cuda.is_available() and start < stop:
                torch.cuda.empty_cache()
        return results


def joined(parts: list[Tensor], device: torch.device) -> Tensor:
    """Parts of a batch, one after the other: itself if it is one, else on ``device``, on the host if that is full."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.cat([part.cpu() for part in parts])
    with contextlib.suppress(torch.OutOfMemoryError):
        return whole.to(device)
    return whole
