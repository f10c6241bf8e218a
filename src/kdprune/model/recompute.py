"""Memory that a gradient needs: how much activations take, and layers that are run again instead of keeping them."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import BoolTensor, LongTensor, Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kdprune.data.tokens import TokenSet
from kdprune.model.losses import batch_logits

PROBE = 64  # tokens on which the memory of activations is measured


def activation_bytes(model: PreTrainedModel, tokens: TokenSet) -> int:
    """Bytes that one more token leaves for the gradient: measured on a short row and on its half, so that what does not
    grow with the row, weights and their copies in bfloat16, is left out."""
    ids = tokens.ids[:1, :PROBE]
    count, half = ids.shape[1], ids.shape[1] // 2
    return (_kept_bytes(model, tokens, count) - _kept_bytes(model, tokens, half)) // (count - half)


def _kept_bytes(model: PreTrainedModel, tokens: TokenSet, count: int) -> int:
    """Bytes kept for the gradient of so many tokens of the first row."""
    if not count:
        return 0
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = tokens.select(slice(1))
    ids = cast(LongTensor, row.ids[:, :count])
    row = dataclasses.replace(row, ids=ids, mask=cast(BoolTensor, torch.ones_like(ids, dtype=torch.bool)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph has to live until all is counted: memory that is freed is used again under the same address.
        logits = batch_logits(model, row)
    found.pop(logits.untyped_storage().data_ptr(), None)
    return sum(found.values())


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Layers keep their input alone, and are run again for the gradient (activation checkpointing)."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    _quietly(lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))
    for layer in layers:
        layer.training = True  # it asks this of itself, once, whether to be run again
        layer._gradient_checkpointing_func = _without_dropout(layer)
    try:
        yield
    finally:
        _quietly(model.gradient_checkpointing_disable)
        for layer in layers:
            layer.training = False


def _without_dropout(layer: Any) -> Callable[..., Any]:
    """What runs the layer again, with the layer in evaluation mode inside: OPT's and Falcon's ask it for dropout."""
    rerun = layer._gradient_checkpointing_func

    def checkpointed(forward: Callable[..., Any], *args: Any) -> Any:
        def inside(*args: Any) -> Any:
            before, layer.training = layer.training, False
            try:
                return forward(*args)
            finally:
                layer.training = before
        return rerun(inside, *args)

    return checkpointed


def _quietly(switch: Callable[[], None]) -> None:
    """Newer releases of transformers have another name for it, which older ones do not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)
        switch()
