"""Pruned tiny models with random stand-ins, one per place that a stand-in can have."""

import torch
from transformers import PreTrainedModel

from kdprune.model.modeling_kdp import StandIn, key_value_heads
from kdprune.model.surgery import Drop, Edit, Substitute, apply_edits, context_layer

# The first full and the first sliding layer of every pattern in tests/families.py is taken out by one of these.
# "last" and "heads" are as "mlp": the context made from the block's last layer, or with half of its key-value heads.
PLACES = ("after", "before", "mlp", "mixed", "last", "heads")


def stand_in(seed: int = 0, scale: float = 0.3, **options: object) -> StandIn:
    """A stand-in of width 32 whose weights are large enough to matter."""
    module = StandIn(32, **{"features": 16, **options})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def in_context(
    model: PreTrainedModel, block: range, source: int | None = None, groups: int | None = None, **options: object
) -> Substitute:
    """A substitute for ``block`` with one attention sublayer, made from layer ``source`` with its first ``groups``
    key-value heads, in front of its stand-in."""
    inner = stand_in(7, residual=False, normalize=False, **options)
    context = context_layer(model, block.start if source is None else source, inner, groups)
    return Substitute(block, inner, context, source, groups)


def edits(model: PreTrainedModel, place: str) -> list[Edit]:
    """Edits of a six-layer model that put stand-ins into ``place``."""
    mlp = stand_in(3, kind="mlp", residual=False, normalize=False, activation="silu")
    fourier = stand_in(2, hidden=24)
    return {
        "after": [Substitute(range(2, 4), fourier), Substitute(range(5, 6), stand_in(1, kind="linear"))],
        "before": [Substitute(range(2), fourier)],
        "mlp": [in_context(model, range(2, 4))],
        "last": [in_context(model, range(2, 4), 3)],
        "heads": [in_context(model, range(2, 4), groups=key_value_heads(model.config) // 2)],
        "mixed": [
            Substitute(range(1), mlp),
            in_context(model, range(2, 3), hidden=8),
            Drop(range(3, 4)),
            Substitute(range(5, 6), fourier),
        ],
    }[place]


def prune(model: PreTrainedModel, place: str) -> PreTrainedModel:
    """``model`` with the edits of ``place`` applied."""
    return apply_edits(model, edits(model, place))
