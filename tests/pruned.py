"""Pruned tiny models with random stand-ins, one per place that a stand-in can have."""

from contextlib import AbstractContextManager
from functools import partial

from transformers import PreTrainedModel

from kdprune.model.families import decoder_layers
from kdprune.model.surgery import apply_edits, layers_replaced
from kdprune.testing import KINDS, context_edit, edits_of, random_stand_in

PLACES = ("after", "before", "mlp", "last", "heads", "mixed")
assert set(PLACES) <= set(KINDS)

stand_in = partial(random_stand_in, 32)
in_context, edits = context_edit, edits_of


def bypassed(model: PreTrainedModel, block: range) -> AbstractContextManager[None]:
    """A context in which ``model`` runs without the layers of ``block``."""
    return layers_replaced(model, [layer for index, layer in enumerate(decoder_layers(model)) if index not in block])


def prune(model: PreTrainedModel, place: str) -> PreTrainedModel:
    """``model`` with the edits of ``place`` applied."""
    return apply_edits(model, edits_of(model, place))
