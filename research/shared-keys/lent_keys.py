"""Attention that takes its keys and values from the layer in front of it, for benchmarks/shared_keys.py.

In a context layer the projections of keys and values give way to :class:`Borrowed`, which has no weights and returns
what the lender's, layer s − 1's, last put out. While a stand-in is fitted the lender's outputs come from its own input
states (:class:`Paired`), in the pruned model from its own forward pass (:func:`connected`). Norms of keys and rotary
positions are applied behind the projections, by the attention that borrows. Without a KV cache alone: a cache would
hold the lent keys a second time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.methods.blocks import Budget
from kdprune.methods.shape import Shape
from kdprune.model.families import decoder_layers, family_of, normalises_behind
from kdprune.model.surgery import plain_copy
from kdprune.states import States


class Purse:
    """What the lender's projections last put out, (B, T, keys) each, by their path in a layer; copies are the same."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Purse":
        return self


class Borrowed(nn.Module):
    """A projection without weights: what the lender's of the same path put out for the same tokens."""

    def __init__(self, purse: Purse, path: str):
        super().__init__()
        self.purse, self.path = purse, path

    def forward(self, states: Tensor) -> Tensor:
        return self.purse.held[self.path].to(states.dtype)


class Paired:
    """The states entering a block, whose every read leaves the lender's keys and values for these rows in a purse.

    Args:
        inputs: h_s. near: h_{s−1}. purse: of the attention that is being fitted, which runs right after a read.
        lender: layer s − 1 of the dense model.
    """

    def __init__(self, inputs: States, near: States, purse: Purse, model: PreTrainedModel, lender: int):
        family, layer = family_of(model), decoder_layers(model)[lender]
        self.inputs, self.near, self.purse, self.shape = inputs, near, purse, inputs.shape
        self.norm = plain_copy(getattr(layer, family.attention_norm)).float()
        self.projections = {path: plain_copy(layer.get_submodule(path)).float() for path in family.qkv[1:]}

    def __getitem__(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            normed = self.norm(self.near[rows].float())
            self.purse.held = {path: projection(normed) for path, projection in self.projections.items()}
        return self.inputs[rows]


class LentBudget(Budget):
    """A budget in which a context layer keeps no projections of keys and values."""

    def __init__(self, model: PreTrainedModel, shape: Shape, ratio: float):
        super().__init__(model, shape, ratio)
        self.kept_by_context = [
            kept - projections(model, index) for index, kept in enumerate(self.kept_by_context)]


def projections(model: PreTrainedModel, index: int) -> int:
    """Parameters of a layer's projections of keys and values."""
    layer = decoder_layers(model)[index]
    return sum(parameter.numel() for path in family_of(model).qkv[1:]
               for parameter in layer.get_submodule(path).parameters())


def check_lending(model: PreTrainedModel, blocks: list[range]) -> None:
    """Raises KDPruneError where a block has no layer in front of it, or one whose keys do not fit."""
    family, layers = family_of(model), decoder_layers(model)
    if len(family.qkv) < 3 or normalises_behind(model):
        raise KDPruneError(f"got a model of type {model.config.model_type}, expected one with projections of keys and "
                           "values apart from each other, and a norm in front of its attention alone")
    for block in blocks:
        if not block.start:
            raise KDPruneError("got a block that starts at layer 0, expected a layer in front of it")
        for path in family.qkv[1:]:
            weights: list[Any] = [layers[index].get_submodule(path).weight for index in (block.start - 1, block.start)]
            if weights[0].shape != weights[1].shape:
                raise KDPruneError(f"got layers {block.start - 1} and {block.start} whose {path} differ in shape, "
                                   f"expected the same: {list(weights[0].shape)} and {list(weights[1].shape)}")


@contextlib.contextmanager
def lending(model: PreTrainedModel, block: range, aligned: bool) -> Iterator[Purse]:
    """While active, the attention of a block's first layer, of which stand-ins take copies, borrows from the purse.

    Args:
        aligned: what is left of that attention starts as the lender's, whose queries fit the lent keys.
    """
    family, layers = family_of(model), decoder_layers(model)
    layer, lender = layers[block.start], layers[block.start - 1]
    own = {name: getattr(layer, name) for name in (family.attention, family.attention_norm)}
    purse = Purse()
    try:
        for name, module in own.items():
            stand = plain_copy(module, {id(model.config): model.config})
            if aligned:
                stand.load_state_dict(getattr(lender, name).state_dict())
            setattr(layer, name, stand)
        for path in family.qkv[1:]:
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, Borrowed(purse, path))
        yield purse
    finally:
        for name, module in own.items():
            setattr(layer, name, module)


@contextlib.contextmanager
def connected(pruned: PreTrainedModel) -> Iterator[None]:
    """While active, layers that borrow get what the layer in front of them projected in the same pass."""
    layers = decoder_layers(pruned)
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):
            for part in layer.modules():
                if isinstance(part, Borrowed):
                    lender = layers[index - 1].get_submodule(part.path)
                    hooks.callback(lender.register_forward_hook(_into(part)).remove)
        yield


def _into(part: Borrowed) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        part.purse.held[part.path] = output
    return hook
