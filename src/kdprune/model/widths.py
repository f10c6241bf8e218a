"""Makes the layers of a model narrower, as Resize edits say, and gives parts of it new weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import KDPruneError
from .edits import Drop, Resize, Rewrite, Substitute
from .families import decoder_layers, family_of
from .modeling_kdp import narrow
from .placement import SOURCE, device_of, settle


def resize_layers(
    model: PreTrainedModel, edits: Sequence[Resize], places: Mapping[int, int]
) -> list[dict[str, Any]]:
    """Apply ``edits`` to ``model``, a sharing copy, in place; returns its entry of ``config.kdp["widths"]``.

    ``places``: the index here of every layer that is left, by the index that the edits call it by.

    Raises KDPruneError for layers that do not exist or are given twice, for widths that the model cannot have, and
    for weights that do not fit them or are missing.
    """
    layers = decoder_layers(model)
    targets = [edit.layer for edit in edits]
    if len(set(targets)) < len(targets) or any(t not in places for t in targets if t is not None):
        raise KDPruneError(f"got widths for layers {targets}, expected each of 0 to {max(places)} once at most, none "
                           "that is taken out")
    edits = [edit if edit.layer is None else dataclasses.replace(edit, layer=places[edit.layer]) for edit in edits]
    targets = [edit.layer for edit in edits]
    by_layer = {edit.layer: dict(edit.width) for edit in edits if edit.layer is not None}
    widths = [by_layer.get(index, {}) for index in range(len(layers))]
    sliced = sum("states" in width for width in widths)
    if sliced not in (0, len(layers)) or (None in targets) != bool(sliced):
        raise KDPruneError("got stream widths for a part of the model, expected them for all layers and what is around")
    before = {id(parameter) for parameter in model.parameters()}
    if sliced:  # the table and the head part ways: the table is narrower
        _untie(model)
    try:
        narrow(model, widths, family_of(model))
    except ValueError as error:
        raise KDPruneError(str(error)) from error
    for edit in edits:
        place = "the model" if edit.layer is None else f"layer {edit.layer}"
        set_weights(model if edit.layer is None else layers[edit.layer], edit.weights, place)
        before |= {id(p) for name, p in _part(model, edit).named_parameters() if name in edit.weights}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in before]
    if missing:
        raise KDPruneError(f"got new widths without weights for {', '.join(missing[:3])}, expected all that change")
    return widths


def joined_widths(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's entry of ``config.kdp["widths"]`` behind a further pruning: what is not there any more has no width."""
    width = {**old, **new}
    for lacks, name in (("attention", "groups"), ("mlp", "channels")):
        if width.get("without") == lacks:
            width.pop(name, None)
    return width


def set_weights(module: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Give ``module`` new parameters by name, in the dtype and on the device of the old ones, which stay as they are.

    Raises KDPruneError for a name that it does not have and for another shape; ``place`` says where.
    """
    known = dict(module.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        if name not in known or known[name].shape != weight.shape:
            shape = list(known[name].shape) if name in known else "no such parameter"
            raise KDPruneError(f"got {name} of shape {list(weight.shape)} for {place}, expected {shape}")
        owner, _, leaf = name.rpartition(".")
        old, holder = known[name], module.get_submodule(owner)
        settle(holder)
        nowhere = old.is_meta and not hasattr(old, SOURCE)  # narrowed without having been read
        # Row by row, as a loaded one lies: products of the other order may differ in their last bits.
        weight = weight.detach().to(device=device_of(module if nowhere else holder), dtype=old.dtype).clone(
            memory_format=torch.contiguous_format)
        setattr(holder, leaf, nn.Parameter(weight, old.requires_grad))


def rewrite(layers: nn.ModuleList, edit: Rewrite, cuts: Sequence[Drop | Substitute]) -> None:
    """Give one of ``layers``, of a sharing copy, weights of its own. Raises KDPruneError where they do not fit."""
    if not 0 <= edit.layer < len(layers) or any(edit.layer in cut.block for cut in cuts):
        raise KDPruneError(f"got new weights for layer {edit.layer}, expected one of the layers that stay")
    set_weights(layers[edit.layer], edit.weights, f"layer {edit.layer}")


def _part(model: PreTrainedModel, edit: Resize) -> nn.Module:
    return model if edit.layer is None else decoder_layers(model)[edit.layer]


def _untie(model: PreTrainedModel) -> None:
    """Config and bookkeeping of a model whose head has a weight of its own."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
