"""Every kind of edit, made for a given dense model of six layers or more with weights of its own."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.model.edits import Drop, Edit, Resize, Rewrite, Substitute
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import StandIn, key_value_heads, narrow
from kdprune.model.structures import StructurePart, attention_parts, has_joined_heads, mlp_parts
from kdprune.model.surgery import context_layer, ordinary_layer
from kdprune.model.widths import set_weights

NARROWED = range(2, 4)  # layers that the kind "channels" narrows


@dataclass(frozen=True)
class Kind:
    """One kind of edit: how it is made, and what it leaves of a model.

    ``gone``: layers that it takes out. ``new``: slots of the pruned model that have weights which the dense one has
    not, stand-ins apart. ``stock``: the result is of the stock class.
    """

    make: Callable[[PreTrainedModel], list[Edit]]
    gone: int = 0
    new: frozenset[int] = frozenset()
    stock: bool = False


def with_random_weights(model: PreTrainedModel, seed: int = 0, std: float = 0.15) -> PreTrainedModel:
    """``model``, in evaluation mode, with seeded normal weights so large that every layer changes the logits.

    At initialisation layers hardly do, and a check that compares logits sees nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.eval()


def random_stand_in(width: int, seed: int = 0, scale: float = 0.3, **options: Any) -> StandIn:
    """A stand-in whose seeded weights are large enough to matter; ``options`` go to :class:`StandIn`."""
    module = StandIn(width, **{"features": width // 2, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def kept_heads(model: PreTrainedModel) -> Tensor:
    """The key-value heads that narrowed layers keep: the second half, so that a cut to the first ones is wrong; all,
    where they cannot go one by one."""
    heads = key_value_heads(model.config)
    if has_joined_heads(model):
        return torch.arange(heads)
    return torch.arange(heads // 2, heads)


def kept_channels(model: PreTrainedModel) -> Tensor:
    """The MLP channels that narrowed layers keep: two of three."""
    channels = len(mlp_parts(model, decoder_layers(model)[0])[-1].members)
    return torch.tensor([channel for channel in range(channels) if channel % 3])


def context_edit(
    model: PreTrainedModel, block: range, source: int | None = None, heads: Tensor | None = None, **options: Any
) -> Substitute:
    """A substitute for ``block`` with one attention sublayer in front of its stand-in.

    Args:
        source: the layer that sublayer is made from; None: the first of the block.
        heads: its key-value heads that are kept; None: all.
        options: of the stand-in.
    """
    inner = random_stand_in(model.config.hidden_size, 7, residual=False, normalize=False, **options)
    origin = block.start if source is None else source
    groups = None if heads is None else len(heads)
    context = context_layer(model, origin, inner, groups)
    if heads is not None:
        layer = decoder_layers(model)[origin]
        set_weights(context, _selected(layer, attention_parts(model, layer), heads), "the context layer")
    return Substitute(block, inner, context, source, groups)


def _selected(layer: Any, parts: list[StructurePart], kept: Tensor) -> dict[str, Tensor]:
    return {name: weight for part in parts for name, weight in part.select(layer, kept).items()}


def _rewrite(model: PreTrainedModel) -> list[Edit]:
    """One layer's weights become those of another, and two layers go."""
    source = decoder_layers(model)[4]
    return [Rewrite(1, {name: weight.detach() for name, weight in source.named_parameters()}), Drop(range(2, 4))]


def _after(model: PreTrainedModel) -> list[Edit]:
    width = model.config.hidden_size
    return [Substitute(range(2, 4), random_stand_in(width, 2, hidden=3 * width // 4)),
            Substitute(range(5, 6), random_stand_in(width, 1, kind="linear"))]


def _before(model: PreTrainedModel) -> list[Edit]:
    width = model.config.hidden_size
    return [Substitute(range(2), random_stand_in(width, 2, hidden=3 * width // 4))]


def _mixed(model: PreTrainedModel) -> list[Edit]:
    width = model.config.hidden_size
    mlp = random_stand_in(
        width, 3, kind="linear+mlp+data", channels=width // 4, gated=False, residual=False, normalize=False,
        activation="silu")
    return [
        Substitute(range(1), mlp),
        context_edit(model, range(2, 3), hidden=width // 4),
        Drop(range(3, 4)),
        Substitute(range(5, 6), random_stand_in(width, 2, hidden=3 * width // 4)),
    ]


def _channels(model: PreTrainedModel) -> list[Edit]:
    heads, channels = kept_heads(model), kept_channels(model)
    found: list[Edit] = []
    for index in NARROWED:
        layer = decoder_layers(model)[index]
        weights = _selected(layer, attention_parts(model, layer), heads)
        weights |= _selected(layer, mlp_parts(model, layer), channels)
        found.append(Resize(index, {"groups": len(heads), "channels": len(channels)}, weights))
    return found


def _sublayers(model: PreTrainedModel) -> list[Edit]:
    """Two layers without attention, the first among them, one without an MLP, and one taken out."""
    return [*(Resize(index, {"without": kind}, {}) for index, kind in ((0, "attention"), (2, "mlp"), (4, "attention"))),
            Drop(range(3, 4))]


def _layer(model: PreTrainedModel) -> list[Edit]:
    """An ordinary layer for a block: its last one, with half of its heads and two of three channels."""
    heads, channels = kept_heads(model), kept_channels(model)
    source, narrower = decoder_layers(model)[3], ordinary_layer(model, 3, len(heads), len(channels))
    weights = _selected(source, attention_parts(model, source), heads)
    weights |= _selected(source, mlp_parts(model, source), channels)
    set_weights(narrower, weights, "the layer")
    return [Substitute(range(2, 4), None, narrower, 3, len(heads))]


def _whole(model: PreTrainedModel) -> list[Edit]:
    """An ordinary layer of the model's size for a block, with weights of another layer."""
    layer = ordinary_layer(model, 2)
    layer.load_state_dict(decoder_layers(model)[4].state_dict())
    return [Substitute(range(2, 4), None, layer)]


def _stream(model: PreTrainedModel) -> list[Edit]:
    """A residual stream of three quarters of the width, half of it within a layer; the first rows of every weight."""
    family, small, width = family_of(model), copy.deepcopy(model), model.config.hidden_size
    layers = decoder_layers(small)
    narrower, generator = 3 * width // 4, torch.Generator().manual_seed(4)
    parallel = family.is_parallel(layers[0])
    widths = [{"states": [narrower, narrower if parallel else width // 2, narrower]} for _ in layers]
    widths[-1]["states"][-1] = width
    narrow(small, widths, family)
    with torch.no_grad():
        for name, weight in small.named_parameters():
            if "shortcut" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
    inside = f"{family.layers}."
    around = {name: p.detach() for name, p in small.named_parameters() if not name.startswith(inside)}
    return [Resize(None, {}, around), *(
        Resize(index, states, {name: weight.detach() for name, weight in layer.named_parameters()})
        for index, (layer, states) in enumerate(zip(layers, widths, strict=True)))]


# The first full and the first sliding layer of a pattern of attention types is taken out by one of these.
KINDS: Mapping[str, Kind] = {
    "drop": Kind(lambda model: [Drop(range(1)), Drop(range(2, 4))], gone=3, stock=True),
    "rewrite": Kind(_rewrite, gone=2, new=frozenset({1}), stock=True),
    "after": Kind(_after, gone=3),
    "before": Kind(_before, gone=2),
    "mlp": Kind(lambda model: [context_edit(model, range(2, 4))], gone=1, new=frozenset({2})),
    "last": Kind(
        lambda model: [context_edit(model, range(2, 4), 3, kind="linear+fourier+data", channels=6)], gone=1,
        new=frozenset({2})),
    "heads": Kind(
        lambda model: [context_edit(model, range(2, 4), heads=kept_heads(model))], gone=1, new=frozenset({2})),
    "mixed": Kind(_mixed, gone=3, new=frozenset({1})),
    "layer": Kind(_layer, gone=1, new=frozenset({2})),
    "whole": Kind(_whole, gone=1, new=frozenset({2}), stock=True),
    "sublayers": Kind(_sublayers, gone=1),
    "channels": Kind(_channels, new=frozenset(NARROWED)),
    "stream": Kind(_stream, new=frozenset(range(1024))),
}


def edits_of(model: PreTrainedModel, kind: str) -> list[Edit]:
    """Edits of a dense model, of one kind.

    "drop", "rewrite" and "whole", an ordinary layer of the model's size, leave a stock model. "after", "before":
    stand-ins folded into the layer beside their block; "mlp": one in the MLP place of the block's first layer, "last":
    of its last, "heads": with half of the key-value heads; "layer": an ordinary layer with half of the heads and two of
    three channels; "sublayers": layers without attention, or without an MLP; "mixed": all stand-ins at once.
    "channels": two layers with fewer heads and channels; "stream": a narrower residual stream.
    """
    return KINDS[kind].make(model)
