"""Layer states of a calibration set, taken by hooks on the layers.

Never from ``output_hidden_states``: its last entry is taken after the final norm. State h_l is what enters layer l;
h_L is what leaves the last layer, before the final norm.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.model.families import decoder_layers, family_of, final_norm, state_of
from kdprune.model.layerwise import streamed_states
from kdprune.model.losses import batch_logits
from kdprune.model.passes import (
    Arguments,
    Begin,
    RowLimit,
    entering,
    joined,
    let_pass,
    run_layers,
    standing_in,
)
from kdprune.model.placement import input_device
from kdprune.model.streaming import Scratch, is_streamed
from kdprune.store.files import Notify, tell

STATES = 2**28  # bytes that the states of one batch at all layers may take: fewer rows pass at once where they are wide
Indices = Iterable[int] | Callable[[int], Iterable[int]]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def recorded(model: PreTrainedModel, indices: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """While active, every forward pass leaves h_l of shape (B, T, d) in the yielded dict, for each l in ``indices``."""
    layers, seen, hooks = decoder_layers(model), {}, []

    def before(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = _hidden(args, kwargs).detach()
        return hook

    def after(_: nn.Module, __: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen[len(layers)] = state_of(output).detach()

    try:
        for index in set(indices):
            if index == len(layers):
                hooks.append(layers[-1].register_forward_hook(after))
            else:
                hooks.append(layers[index].register_forward_pre_hook(before(index), with_kwargs=True))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logits_and_final(model: PreTrainedModel, batch: TokenSet, last: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) of a batch, or of ``last`` positions at its end, and h_L (B, T, d), from which ``logits_behind``
    gives the same logits again."""
    end = len(decoder_layers(model))
    with recorded(model, [end]) as seen:
        logits = batch_logits(model, batch, last)
    return logits, seen[end]


def rows_at_once(model: PreTrainedModel, length: int, most: int) -> int:
    """How many rows of so many tokens, at most ``most``, leave no more than ``STATES`` bytes at all layers."""
    row = length * model.config.hidden_size * model.dtype.itemsize * (len(decoder_layers(model)) + 1)
    return min(most, max(1, STATES // row))


@torch.no_grad()
def layer_states(
    model: PreTrainedModel, tokens: TokenSet, indices: Indices, batch_size: int, *,
    begin: Begin | None = None, scratch: Scratch | None = None, notify: Notify = tell,
) -> Iterator[tuple[TokenSet, dict[int, Tensor]]]:
    """Batches of the token set with their states {l: (B, T, d)}, layers from the highest wanted one on not run.

    Of a streamed model every layer is read once for as many batches as ``scratch`` has room for
    (:mod:`kdprune.model.layerwise`). Where the device's memory runs out, batches pass in halves; they are given whole,
    on the host if need be.

    Args:
        indices: the wanted l, of all batches or by the number of a batch. Nothing is given where no batch wants any.
        begin: the boundary, none of the wanted l before it, whose states are known; None: the embeddings.
        scratch: what a streamed model may hold of the states between layers; None: what it was given.
        notify: told in one line where batches are halved.

    Raises:
        KDPruneError: a state of a real (not padding) token is NaN or infinite; names the layer and the batch. Or the
            device does not hold one row, or the disk is full.
    """
    batches = list(tokens.batches(batch_size))
    of_batch = indices if callable(indices) else (lambda _, fixed=tuple(indices): fixed)
    wanted = [sorted(set(of_batch(number))) for number in range(len(batches))]
    if not any(wanted):
        return
    if is_streamed(model):
        passes = streamed_states(model, batches, wanted, begin=begin, scratch=scratch, notify=notify)
    else:
        passes = _resident_states(model, batches, wanted, begin, RowLimit(notify))
    for number, (batch, states) in enumerate(zip(batches, passes, strict=True)):
        for index, state in states.items():
            # A sum is not finite either then, and is asked for in a twentieth of the time.
            if torch.isfinite(state.sum(dtype=torch.float32)):
                continue
            if not torch.isfinite(state[batch.mask.to(state.device)]).all():
                raise KDPruneError(
                    f"got NaN or infinite states {place(index, model)} in calibration batch {number}; expected "
                    f"finite ones: check the checkpoint, or load it in another dtype (--dtype float32)"
                )
        yield batch, states


def _resident_states(
    model: PreTrainedModel, batches: Sequence[TokenSet], wanted: Sequence[Sequence[int]], begin: Begin | None,
    limit: RowLimit,
) -> Iterator[dict[int, Tensor]]:
    """For each batch its states on the device of the token ids, of a model whose layers are all there."""
    layers, device = list(decoder_layers(model)), input_device(model)
    for number, (batch, own) in enumerate(zip(batches, wanted, strict=True)):

        def work(
            part: TokenSet, place: slice, number: int = number, own: Sequence[int] = own, rows: int = len(batch)
        ) -> dict[int, Tensor]:
            with contextlib.ExitStack() as stack:
                if begin is not None:
                    state = begin.states(number)[place].to(device)
                    stack.enter_context(standing_in(layers[: begin.index], lambda *_: state))
                # h_l enters layer l, so layer l itself is called, for its hook, but need not compute (h_L leaves the
                # last).
                stack.enter_context(standing_in(layers[own[-1]:], let_pass))
                seen = stack.enter_context(recorded(model, own))
                run_layers(model, part)
            return {index: seen[index].to(device if len(part) == rows else "cpu") for index in own}

        yield _together(limit.over(batch, work) if own else [], own, device)  # no name here keeps them for longer


def _together(
    parts: Sequence[Mapping[int, Tensor]], own: Sequence[int], device: torch.device
) -> dict[int, Tensor]:
    """The states of a batch from those of its parts."""
    return {index: joined([part[index] for part in parts], device) for index in own}


@torch.no_grad()
def behind_norm(model: PreTrainedModel, batch: TokenSet, state: Tensor) -> Tensor:
    """The state that leaves the last layer, (B, T, d), behind the final norm: the last entry of ``hidden_states``.

    Of a family without a row the norm's name is not known: there the model runs with its layers giving ``state``.
    """
    if not family_of(model).inferred:
        norm = final_norm(model)
        weight = next(norm.parameters(), None)
        device = state.device if weight is None or weight.device.type == "meta" else weight.device
        return norm(state.to(device)).to(state.device)
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    try:
        with standing_in(list(decoder_layers(model)), lambda *_: state):
            run_layers(model, batch)
    finally:
        hook.remove()
    return seen[0]


def place(index: int, model: PreTrainedModel) -> str:
    """Which state that is, for messages: "entering layer 5"."""
    last = model.config.num_hidden_layers
    return f"entering layer {index}" if index < last else f"leaving layer {index - 1}"


@torch.no_grad()
def layer_arguments(model: PreTrainedModel, index: int, batch: TokenSet) -> Arguments:
    """What the model hands layer ``index`` beside the hidden state for this batch: masks, rotary embeddings, ….

    No layer is run. Floating-point arguments come in float32, in which stand-ins are fitted.
    """
    args, kwargs = entering(model, batch)[1][index]
    return _as_float(args, input_device(model)), _as_float(kwargs, input_device(model))


def _as_float(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple):
        return tuple(_as_float(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _as_float(item, device) for name, item in value.items()}
    return value
