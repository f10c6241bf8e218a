"""Layer states of a calibration set, taken by hooks on the layers.

Never from ``output_hidden_states``: its last entry is taken after the final norm. State h_l is what enters layer l;
h_L is what leaves the last layer, before the final norm.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data import TokenSet
from kdprune.errors import KDPruneError
from kdprune.model.families import decoder_layers
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
    device = next(model.get_input_embeddings().parameters()).device
    model.base_model(
        input_ids=batch.ids.to(device),
        attention_mask=None if batch.mask.all() else batch.mask.to(device).long(),
        use_cache=False,
    )


@torch.no_grad()
def layer_states(
    model: PreTrainedModel, tokens: TokenSet, indices: Iterable[int], batch_size: int
) -> Iterator[tuple[TokenSet, dict[int, Tensor]]]:
    """Batches of the token set with their states {l: (B, T, d)}, layers above the highest wanted one not run.

    Raises:
        KDPruneError: a state of a real (not padding) token is NaN or infinite; names the layer and the batch.
    """
    indices = sorted(set(indices))
    # h_l enters layer l, so layer l itself has to stand there for its hook (h_L is the last layer's output).
    needed = list(decoder_layers(model))[: indices[-1] + 1]
    with layers_replaced(model, needed), recorded(model, indices) as seen:
        for number, batch in enumerate(tokens.batches(batch_size)):
            run(model, batch)
            for index, state in seen.items():
                real = state[batch.mask.to(state.device)]
                if not torch.isfinite(real).all():
                    raise KDPruneError(
                        f"got NaN or infinite states {_place(index, model)} in calibration batch {number}; expected "
                        f"finite ones: check the checkpoint, or load it in another dtype (--dtype float32)"
                    )
            yield batch, dict(seen)


def _place(index: int, model: PreTrainedModel) -> str:
    last = model.config.num_hidden_layers
    return f"entering layer {index}" if index < last else f"leaving layer {index - 1}"


@torch.no_grad()
def layer_arguments(model: PreTrainedModel, index: int, batch: TokenSet) -> Arguments:
    """What the model hands layer ``index`` beside the hidden state for this batch: masks, rotary embeddings, ….

    Floating-point arguments come in float32, in which stand-ins are fitted.
    """
    layer, seen = decoder_layers(model)[index], []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        seen.append((_as_float(args[1:]), _as_float(kwargs)))

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with layers_replaced(model, [layer]):
            run(model, batch)
    finally:
        handle.remove()
    return seen[0]


def _as_float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_as_float(item) for item in value)
    if isinstance(value, dict):
        return {name: _as_float(item) for name, item in value.items()}
    return value


@dataclass(frozen=True)
class BlockStates:
    """What the fit of one block's stand-in is made from; padding is marked in ``tokens.mask``.

    Attributes:
        block: the layers replaced.
        tokens: the rows, (N, T); the last ``held`` of them are kept out of every fit.
        inputs, outputs: h_s and h_e, shape (N, T, d), in the model's dtype.
        path: all k+1 states h_s … h_e of the tokens of a few rows (step 1), shape (k+1, n, d), float32.
        path_position: position of those tokens in their row, shape (n,).
        path_held: the same states for tokens of held-out rows, shape (k+1, n', d).
    """

    block: range
    tokens: TokenSet
    held: int
    inputs: Tensor
    outputs: Tensor
    path: Tensor
    path_position: Tensor
    path_held: Tensor
    dealt: Tensor | None = None  # (N,), which rows this process holds; None: all

    def mine(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` whose states this process holds."""
        return rows if self.dealt is None else rows[self.dealt[rows]]


@dataclass(frozen=True)
class PathRows:
    """Which rows contribute all their states to step 1: the first ``fit`` rows and the last ``held``."""

    fit: int
    held: int


def collect_block_states(
    model: PreTrainedModel, tokens: TokenSet, blocks: list[range], *, held: int, path: PathRows, batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[BlockStates]:
    """States of all blocks in one pass over the calibration set.

    Args:
        held: how many rows at the end are kept out of fits. path: rows whose inner states are kept too; where there
            are none, only the ends of blocks leave the device.
        batch_size: rows a forward pass. advance: told the number of rows done.
    """
    inside = path.fit > 0 or path.held > 0
    wanted = sorted({index for block in blocks for index in (
        range(block.start, block.stop + 1) if inside else (block.start, block.stop))})
    shape = (*tokens.ids.shape, model.config.hidden_size)
    # Whole tensors from the start: joining parts at the end would need twice the memory.
    ends = {index: torch.empty(shape, dtype=model.dtype) for block in blocks for index in (block.start, block.stop)}
    fit_path: dict[int, list[Tensor]] = {index: [] for index in wanted}
    held_path: dict[int, list[Tensor]] = {index: [] for index in wanted}
    rows, row = len(tokens.ids), 0
    position = torch.arange(tokens.ids.shape[1]).expand(rows, -1)[: path.fit][tokens.mask[: path.fit]]
    for batch, states in layer_states(model, tokens, wanted, batch_size):
        size = len(batch.ids)
        number = torch.arange(row, row + size)
        for index in wanted:
            state = states[index].cpu()
            if index in ends:
                ends[index][row : row + size] = state
            for store, chosen in ((fit_path, number < path.fit), (held_path, number >= rows - path.held)):
                store[index].append(state[batch.mask & chosen[:, None]].float())
        row += size
        advance(size)
    return [
        BlockStates(
            block, tokens, held, ends[block.start], ends[block.stop],
            _stacked(fit_path, block), position, _stacked(held_path, block),
        )
        for block in blocks
    ]


def _stacked(states: dict[int, list[Tensor]], block: range) -> Tensor:
    """The states of a block that were kept, one above the other."""
    kept = [index for index in range(block.start, block.stop + 1) if index in states]
    return torch.stack([torch.cat(states[index]) for index in kept])
