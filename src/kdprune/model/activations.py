"""Layer states of a calibration set, taken by hooks on the layers.

Never from ``output_hidden_states``: its last entry is taken after the final norm. State h_l is what enters layer l;
h_L is what leaves the last layer, before the final norm.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.model.families import decoder_layers
from kdprune.model.placement import collector_of, input_device
from kdprune.model.surgery import layers_replaced

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
        seen[len(layers)] = (output if isinstance(output, Tensor) else output[0]).detach()

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


def run(model: PreTrainedModel, batch: TokenSet) -> None:
    """One forward pass of the layer stack (no language-model head), for its hooks."""
    device = input_device(model)
    model.base_model(
        input_ids=batch.ids.to(device),
        attention_mask=None if batch.mask.all() else batch.mask.to(device).long(),
        use_cache=False,
    )


Indices = Iterable[int] | Callable[[int], Iterable[int]]


@torch.no_grad()
def layer_states(
    model: PreTrainedModel, tokens: TokenSet, indices: Indices, batch_size: int
) -> Iterator[tuple[TokenSet, dict[int, Tensor]]]:
    """Batches of the token set with their states {l: (B, T, d)}, layers above the highest wanted one not run.

    Args:
        indices: the wanted l, of all batches or by the number of a batch.

    Raises:
        KDPruneError: a state of a real (not padding) token is NaN or infinite; names the layer and the batch.
    """
    batches = -(-len(tokens) // batch_size)
    of_batch = indices if callable(indices) else (lambda _, fixed=tuple(indices): fixed)
    wanted = [sorted(set(of_batch(number))) for number in range(batches)]
    every = sorted({index for own in wanted for index in own})
    if not every:
        return
    model, device = collector_of(model), input_device(collector_of(model))
    # h_l enters layer l, so layer l itself has to stand there for its hook (h_L is the last layer's output).
    needed = list(decoder_layers(model))[: every[-1] + 1]
    with layers_replaced(model, needed), recorded(model, every) as seen:
        for number, batch in enumerate(tokens.batches(batch_size)):
            run(model, batch)
            states = {index: seen[index].to(device) for index in wanted[number]}
            for index, state in states.items():
                real = state[batch.mask.to(state.device)]
                if not torch.isfinite(real).all():
                    raise KDPruneError(
                        f"got NaN or infinite states {place(index, model)} in calibration batch {number}; expected "
                        f"finite ones: check the checkpoint, or load it in another dtype (--dtype float32)"
                    )
            yield batch, states


def place(index: int, model: PreTrainedModel) -> str:
    """Which state that is, for messages: "entering layer 5"."""
    last = model.config.num_hidden_layers
    return f"entering layer {index}" if index < last else f"leaving layer {index - 1}"


@torch.no_grad()
def layer_arguments(model: PreTrainedModel, index: int, batch: TokenSet) -> Arguments:
    """What the model hands layer ``index`` beside the hidden state for this batch: masks, rotary embeddings, ….

    Floating-point arguments come in float32, in which stand-ins are fitted.
    """
    model = collector_of(model)
    layer, seen, device = decoder_layers(model)[index], [], input_device(model)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        seen.append((_as_float(args[1:], device), _as_float(kwargs, device)))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with layers_replaced(model, [layer]):
            run(model, batch)
    finally:
        handle.remove()
    return seen[0]


def _as_float(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple):
        return tuple(_as_float(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _as_float(item, device) for name, item in value.items()}
    return value
