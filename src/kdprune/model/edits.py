"""Edits of a model as data: methods return them, :func:`kdprune.model.surgery.apply_edits` applies them.

A block is a half-open ``range(s, e)`` of layer indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..errors import KDPruneError
from .modeling_kdp import StandIn


@dataclass(frozen=True)
class Drop:
    """Take the layers of ``block`` out and put nothing in their place."""

    block: range


@dataclass(frozen=True)
class Substitute:
    """Put ``stand_in``, or an ordinary layer, in the place of the layers of ``block``.

    Without ``context`` the stand-in acts token by token and is folded into a layer beside the block.
    ``context`` is an ordinary decoder layer (made by :func:`context_layer` from a layer of the block) that
    holds ``stand_in`` in its MLP place; it gets a slot and a KV-cache entry of its own. ``source`` is that layer, whose
    attention type the slot has; None: ``block.start``. ``groups`` are the key-value heads, with their queries, that are
    left of its attention; None: all.
    With a context and no stand-in, ``context`` is an ordinary decoder layer of the family
    (:func:`kdprune.model.surgery.ordinary_layer`), with its own MLP, of as many channels as it has.
    """

    block: range
    stand_in: StandIn | None
    context: nn.Module | None = None
    source: int | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        """Raises KDPruneError for a source outside the block, and for nothing to put there."""
        if self.stand_in is None and self.context is None:
            raise KDPruneError("got neither a stand-in nor a layer for a block, expected one: use Drop for nothing")
        if self.source is not None and self.source not in self.block:
            raise KDPruneError(f"got a context made from layer {self.source}, expected a layer of its block "
                               f"[{self.block.start}, {self.block.stop}): make it from one of those")

    @property
    def origin(self) -> int:
        """The dense layer that the context was made from."""
        return self.block.start if self.source is None else self.source


@dataclass(frozen=True)
class Rewrite:
    """Give the kept layer ``layer`` (its index in the dense model) new weights; the architecture stays.

    ``weights`` are tensors by the name of a parameter within the layer ("mlp.down_proj.weight"), of its shape.
    """

    layer: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Resize:
    """Make layer ``layer`` narrower, or with ``layer`` None what stands around the layers.

    ``width`` is the layer's entry of ``config.kdp["widths"]`` (:func:`kdprune.model.modeling_kdp.narrow`); ``weights``
    are tensors by the name of a parameter within the layer, or within the causal LM, in their new shapes: every
    parameter that the new width cuts or adds; of a layer without a sublayer there is none. Stream widths go to all
    layers and the parts around them together. ``layer`` is the index in the dense model.
    """

    layer: int | None
    width: Mapping[str, Any]
    weights: Mapping[str, Tensor]


Edit: TypeAlias = Drop | Substitute | Rewrite | Resize
