"""Memory that a gradient needs: how much activations take, and layers that are run again instead of keeping them."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import BoolTensor, LongTensor, Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kdprune.data.tokens import TokenSet
from kdprune.model.losses import batch_logits

PROBE = 64  # tokens on which the memory of activations is measured


def activation_bytes(model: PreTrainedModel, tokens: TokenSet) -> int:
    """Bytes that a token leaves for the gradient, weights left out: measured on one short row."""
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = tokens.select(slice(1))
    ids = cast(LongTensor, row.ids[:, :PROBE])
    row = dataclasses.replace(row, ids=ids, mask=cast(BoolTensor, torch.ones_like(ids, dtype=torch.bool)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph has to live until all is counted: memory that is freed is used again under the same address.
        logits = batch_logits(model, row)
    found.pop(logits.untyped_storage().data_ptr(), None)
    return sum(found.values()) // row.ids.numel()


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Layers keep their input alone, and are run again for the gradient (activation checkpointing)."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    _quietly(lambda: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))
    for layer in layers:
        layer.training = True  # it asks this of itself alone; dropout inside it stays off
    try:
        yield
    finally:
        _quietly(model.gradient_checkpointing_disable)
        for layer in layers:
            layer.training = False


def _quietly(switch: Callable[[], None]) -> None:
    """Newer releases of transformers have another name for it, which older ones do not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)
        switch()
