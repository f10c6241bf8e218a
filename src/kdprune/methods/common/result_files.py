"""Edits and records of a method as plain data and tensors, as the cache holds them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.methods.common.result import MethodResult
from kdprune.model.families import family_of
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Drop, Edit, Resize, Rewrite, Substitute, context_layer, ordinary_layer

Plain = dict[str, Any]


class ResultCodec:
    """Results of methods in the cache; tensors are named ``"3.mlp.readout.weight"``, 3 the number of the edit.

    Args:
        model: the dense model, of whose layers contexts are made again.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def pack(self, value: MethodResult) -> tuple[Plain, dict[str, Tensor]]:
        """Edits and records; what was measured to choose the blocks is a stage of its own."""
        plain: list[Plain] = []
        tensors: dict[str, Tensor] = {}
        for number, edit in enumerate(value.edits):
            entry, own = _pack_edit(edit)
            plain.append(entry)
            tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        replaced = None if value.replaced is None else [_ends(block) for block in value.replaced]
        search = None if value.search is None else dict(value.search)
        return {"edits": plain, "fit": list(value.fit), "tokens": value.tokens, "replaced": replaced,
                "rates": list(value.rates), "trained": value.trained, "search": search}, tensors

    def unpack(self, plain: Plain, tensors: Mapping[str, Tensor]) -> MethodResult:
        """The result again."""
        edits = []
        for number, entry in enumerate(plain["edits"]):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            edits.append(_unpack_edit(self.model, entry, own))
        replaced = None if plain["replaced"] is None else [range(*ends) for ends in plain["replaced"]]
        return MethodResult(edits, plain["fit"], plain["tokens"], replaced, rates=plain["rates"],
                            trained=plain["trained"], search=plain["search"])


def joined(parts: Iterable[MethodResult]) -> MethodResult:
    """The results of several blocks as one."""
    parts = list(parts)
    return MethodResult(
        [edit for part in parts for edit in part.edits], [entry for part in parts for entry in part.fit],
        rates=[rate for part in parts for rate in part.rates])


def _pack_edit(edit: Edit) -> tuple[Plain, Mapping[str, Tensor]]:
    match edit:
        case Drop(block):
            return {"kind": "drop", "block": _ends(block)}, {}
        case Substitute(block, stand_in, context, source, groups):
            entry = {"kind": "substitute", "block": _ends(block), "width": stand_in and stand_in.width,
                     "stand_in": stand_in and stand_in.spec(), "context": context is not None, "source": source,
                     "groups": groups}
            module: Any = stand_in if context is None else context
            return entry, module.state_dict()
        case Rewrite(layer, weights):
            return {"kind": "rewrite", "layer": layer}, weights
        case Resize(layer, width, weights):
            return {"kind": "resize", "layer": layer, "width": dict(width)}, weights


def _unpack_edit(model: PreTrainedModel, entry: Plain, tensors: Mapping[str, Tensor]) -> Edit:
    match entry["kind"]:
        case "drop":
            return Drop(range(*entry["block"]))
        case "substitute":
            return _substitute(model, entry, tensors)
        case "rewrite":
            return Rewrite(entry["layer"], tensors)
        case kind:
            assert kind == "resize", kind
            return Resize(entry["layer"], entry["width"], tensors)


def _substitute(model: PreTrainedModel, entry: Plain, tensors: Mapping[str, Tensor]) -> Substitute:
    block = range(*entry["block"])
    if entry["stand_in"] is None:
        return _ordinary(model, block, entry, tensors)
    stand_in = StandIn(entry["width"], **entry["stand_in"])
    if not entry["context"]:
        stand_in.load_state_dict(tensors)
        return Substitute(block, stand_in)
    # Fits leave float32, whatever the model's dtype; apply_edits casts.
    edit = Substitute(block, stand_in, source=entry["source"], groups=entry["groups"])
    context = context_layer(model, edit.origin, stand_in, edit.groups).to(_dtype(tensors))
    context.load_state_dict(tensors)
    return dataclasses.replace(edit, context=context)


def _ordinary(
    model: PreTrainedModel, block: range, entry: Plain, tensors: Mapping[str, Tensor]
) -> Substitute:
    origin = block.start if entry["source"] is None else entry["source"]
    channels = tensors[f"{family_of(model).mlp_out}.weight"].numel() // model.config.hidden_size
    layer = ordinary_layer(model, origin, entry["groups"], channels).to(_dtype(tensors))
    layer.load_state_dict(tensors)
    return Substitute(block, None, layer, entry["source"], entry["groups"])


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())


def _ends(block: Sequence[int]) -> list[int]:
    assert isinstance(block, range)
    return [block.start, block.stop]
