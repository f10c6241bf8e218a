"""Application of edits to a model.

A block is a half-open ``range(s, e)`` of layer indices. :func:`apply_edits` builds a new model;
``layers_replaced`` and ``running_from`` change one for a while. None of them copies a weight that stays.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import KDPruneError
from .edits import Drop, Edit, Resize, Rewrite, Substitute
from .families import (
    check_inferred,
    decoder_layers,
    family_of,
    install_layers,
    is_sliced,
    layer_types_of,
    layer_widths,
    mlp_source,
    number_layers,
    number_of,
    numbered_modules,
    own_channels,
    restore_rotations,
    set_depth,
    set_number,
)
from .modeling_kdp import (
    NARROWED_VERSION,
    PREFIX,
    SUM_VERSION,
    VERSION,
    Family,
    FoldedLayer,
    OwnConfig,
    StandIn,
    auto_map,
    columns_of,
    generated,
    groups_of,
    key_value_heads,
    lacking,
    leave_out,
    place_stand_in,
    stock_class,
    thin_attention,
    thin_mlp,
    unfold,
)
from .passes import standing_in
from .placement import device_of, follow, free, hooks_of, is_meta_model, release, renumber, unhooked
from .streaming import resident
from .widths import joined_widths, resize_layers, rewrite

__all__ = [
    "Drop", "Edit", "Resize", "Rewrite", "Substitute", "apply_edits", "check_model", "context_layer",
    "earlier_blocks", "layers_replaced", "ordinary_layer", "plain_copy", "running_from", "without_sublayer",
]  # fmt: skip


@dataclass
class _Slot:
    """A layer of the pruned model, with the index that it, or the layer it is a copy of, has in the dense
    one; ``width``: its entry of ``config.kdp["widths"]``."""

    layer: nn.Module
    source: int
    width: dict[str, Any] = field(default_factory=dict)


def apply_edits(model: PreTrainedModel, edits: Sequence[Edit]) -> PreTrainedModel:
    """A new model with ``edits`` applied. It shares every kept parameter and buffer with ``model``, which
    stays as it was. Stand-ins, context layers and new weights are copied, to the model's dtype and the device of the
    layers around them.

    With Drops, Rewrites and ordinary layers of the model's own sizes alone the result is of the stock class, else of
    the family's ``KDP<X>ForCausalLM``.

    Raises KDPruneError for blocks that are empty, out of range or overlap, for edits that leave no layer, for
    two token-wise stand-ins without a layer between them, for weights that do not fit, for Resizes beside Substitutes,
    for changes of the stream beside Drops, and for models that cannot be edited. A model may be pruned already:
    stand-ins of earlier prunings leave with their layers, widths stay with those that stay.
    """
    family = family_of(model)
    cuts = sorted((edit for edit in edits if isinstance(edit, Drop | Substitute)), key=lambda cut: cut.block.start)
    substitutes = any(isinstance(edit, Substitute) for edit in edits)
    resizes = [edit for edit in edits if isinstance(edit, Resize)]
    if resizes and substitutes:
        raise KDPruneError("got edits that narrow layers beside edits that replace layers, expected one kind")
    if cuts and any("states" in edit.width for edit in resizes):
        raise KDPruneError("got edits that change the stream beside edits that take layers out, expected one kind")
    narrows = bool(resizes) and not any("without" in edit.width for edit in resizes)
    check_model(model, substitutes or bool(resizes), drops=all(isinstance(edit, Drop) for edit in edits),
                narrows=narrows and not cuts)
    _check_blocks([cut.block for cut in cuts], len(decoder_layers(model)))
    pruned = sharing_copy(model)
    config: Any = pruned.config
    for edit in edits:
        if isinstance(edit, Rewrite):
            rewrite(decoder_layers(pruned), edit, cuts)
    slots = _slots(pruned, cuts, family)
    _shorten_config(config, family, [slot.source for slot in slots])
    layers = [slot.layer for slot in slots]
    install_layers(decoder_layers(pruned), layers)
    renumber(pruned, family.layers, [slot.source for slot in slots])
    widths = [slot.width for slot in slots]
    if resizes:
        places = {slot.source: place for place, slot in enumerate(slots)}
        widths = [joined_widths(*both) for both in zip(widths, resize_layers(pruned, resizes, places), strict=True)]
    holds = any(isinstance(cut, Substitute) and cut.stand_in is not None for cut in cuts)
    if any(widths) or resizes or holds or config.model_type.startswith(PREFIX):
        with unhooked(pruned):
            _become_kdp(pruned, family, [cut.block for cut in cuts], layers, widths)
    config.architectures = [type(pruned).__name__]
    if type(pruned).__module__.startswith("transformers."):  # whatever code came with the checkpoint, it is not saved
        config.__dict__.pop("auto_map", None)
    restore_rotations(pruned)
    for module in pruned.modules():  # a context layer came with the config of the dense model
        own: Any = module.__dict__.get("config")
        if isinstance(own, PreTrainedConfig):
            module.config = config
        elif isinstance(own, OwnConfig):  # with fewer heads
            own.base = config
    return pruned


@contextmanager
def layers_replaced(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[None]:
    """``model`` runs just ``layers`` inside the context, with count, attention types and layer numbers in
    step. Afterwards all is as before, also after an exception.

    ``layers`` may mix the model's own layers, in any order, with others, such as :func:`context_layer` makes; each
    keeps its attention type. A KV cache must not be carried across the border of the context.

    Raises KDPruneError for no layers, and for one that occurs twice.
    """
    own, config = decoder_layers(model), model.config
    layers, before = list(layers), list(own)
    if not layers or len({id(layer) for layer in layers}) < len(layers):
        raise KDPruneError(f"got {len(layers)} layers to run, expected at least one, and each of them once")
    types = layer_types_of(model, layers)
    types_before = getattr(config, "layer_types", None)
    numbers = [(part, number_of(part)) for layer in {*before, *layers} for part in numbered_modules(layer)]
    try:
        install_layers(own, layers)
        set_depth(config, len(layers), None if types_before is None else types)
        yield
    finally:
        install_layers(own, before)
        for part, number in numbers:
            set_number(part, number)
        set_depth(config, len(before), types_before)


@contextmanager
def running_from(model: PreTrainedModel, layers: Sequence[nn.Module], start: int, state: Tensor) -> Iterator[None]:
    """``model`` runs just ``layers`` inside the context, from number ``start`` of them on, which is given ``state``
    (B, T, d): those in front of it compute nothing. As :func:`layers_replaced` otherwise."""
    with layers_replaced(model, layers), standing_in(layers[:start], lambda *_: state):
        yield


def ordinary_layer(
    model: PreTrainedModel, index: int, groups: int | None = None, channels: int | None = None
) -> nn.Module:
    """A copy of layer ``index``, with weights of its own, of which the first ``groups`` key-value heads, with their
    queries, and the first ``channels`` MLP channels are left; None: all. Others' weights can be put there.

    What an earlier pruning folded into the layer is left out; where the layer has fewer channels than asked for, or a
    stand-in in the place of its MLP, it gets a copy of that of :func:`mlp_source`. It is the ``context`` of a
    :class:`Substitute` without stand-in. Raises KDPruneError for an index, heads or channels that the model does not
    have.
    """
    family, layers = family_of(model), decoder_layers(model)
    if not 0 <= index < len(layers):
        raise KDPruneError(f"got layer index {index}, expected one from 0 to {len(layers) - 1}")
    _refuse_lacking(layers[index], index, family)
    layer = _unfolded_copy(model, index)
    donor = index if channels is None else mlp_source(model, index, channels)
    if donor != index:
        other = _unfolded_copy(model, donor)
        for name in family.mlp:
            setattr(layer, name, getattr(other, name))
    try:
        if groups is not None:
            thin_attention(layer, groups, family, model.config)
        if channels is not None:
            thin_mlp(layer, channels, family)
    except ValueError as error:
        raise KDPruneError(str(error)) from error
    return layer


def _refuse_lacking(layer: nn.Module, index: int, family: Family) -> None:
    """Raise KDPruneError for a layer that no other can be made of, because it lacks a sublayer."""
    if lacks := lacking(layer, family):
        raise KDPruneError(f"got layer {index}, which has no {lacks} any more, to make another layer of; expected one "
                           "that has attention and MLP")


def _unfolded_copy(model: PreTrainedModel, index: int) -> nn.Module:
    """A copy of layer ``index``, with weights of its own, without what is folded into it."""
    layer = plain_copy(decoder_layers(model)[index], {id(model.config): model.config})
    unfold(layer)
    return layer


def without_sublayer(model: PreTrainedModel, layer: nn.Module, sublayer: str) -> nn.Module:
    """``layer`` without its "attention" or its "mlp", for :func:`layers_replaced`: a new module that shares what is
    left with ``layer``, which stays as it was. Raises ValueError for another sublayer."""
    result = sharing_copy(layer, {id(model.config): model.config})
    leave_out(result, sublayer, family_of(model))
    return result


def context_layer(model: PreTrainedModel, index: int, stand_in: StandIn, groups: int | None = None) -> nn.Module:
    """A copy of layer ``index``, with weights of its own, whose MLP place holds ``stand_in`` (itself, no
    copy).

    It is the ``context`` of a :class:`Substitute`. The layer normalises and adds, so build the stand-in with
    ``residual=False, normalize=False``. With ``groups`` only the first so many key-value heads are left, with their
    queries: others' weights can be put there. Raises KDPruneError for an index or heads that the model does not have.
    """
    layer = ordinary_layer(model, index, groups)
    place_stand_in(layer, stand_in, "mlp", family_of(model))
    return layer


Module = TypeVar("Module", bound=nn.Module)


def plain_copy(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """A copy of ``module`` with real weights of its own, streamed or offloaded ones read, on the device it computes
    on, without accelerate's hooks; of an outline another outline. What ``memo`` holds by id is shared."""
    if is_meta_model(module):
        return copy.deepcopy(module, memo)
    with resident(module):
        return free(copy.deepcopy(module, {**(memo or {}), **hooks_of(module)}))


def sharing_copy(module: Module, memo: dict[int, Any] | None = None, own: Collection[str] = ()) -> Module:
    """A copy of ``module`` that shares its parameters and buffers, but those named in ``own``, and what ``memo`` holds
    by id."""
    memo = dict(memo or {}) | hooks_of(module) | _empty_dicts(module)
    memo.update((id(tensor), tensor) for name, tensor in module.named_parameters() if name not in own)
    memo.update((id(tensor), tensor) for tensor in module.buffers())
    result = copy.deepcopy(module, memo)
    release(result)
    return result


def _empty_dicts(module: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy``: a module has a dozen dicts for hooks, most of them empty, whose copies would take
    more than half of the time."""
    return {
        id(value): type(value)()
        for part in module.modules() for value in vars(part).values()
        if type(value) in (dict, OrderedDict) and not value
    }


def check_model(model: PreTrainedModel, substitutes: bool, drops: bool = False, narrows: bool = False) -> None:
    """Raise KDPruneError for a model that cannot be shortened or subclassed, or whose stream was turned: its layers can
    be narrowed further (``narrows``), but none taken out, replaced or changed."""
    family = family_of(model)
    check_inferred(model, drops)
    if is_sliced(model.config) and not narrows:
        raise KDPruneError(
            "got a model that slicegpt made narrower, whose stream has coordinates of its own at every layer: none can "
            "be taken out or replaced; expected another. Take layers out first and run slicegpt on that stock result, "
            "or narrow this one further with llm-pruner")
    numbered, usual = family.numbered or ("", None)
    if numbered and getattr(model.config, numbered, usual) != usual:
        raise KDPruneError(
            f"config.{numbered} makes every layer depend on its number: "
            "a checkpoint without some of its layers would not compute the same"
        )
    own = {family.causal_lm, f"KDP{family.name}ForCausalLM"}
    if substitutes and type(model).__name__ not in own:
        raise KDPruneError(f"got {type(model).__name__}, expected {family.causal_lm} itself, not a subclass")


def _check_blocks(blocks: Sequence[range], count: int) -> None:
    """Raise KDPruneError unless ``blocks``, in order, are non-empty, within ``count`` layers and disjoint."""
    end = 0
    for block in blocks:
        shown = f"[{block.start}, {block.stop})"
        if block.step != 1 or not block:
            raise KDPruneError(f"got block {shown} with step {block.step}, expected a non-empty run of layers")
        if block.start < 0 or block.stop > count:
            raise KDPruneError(f"block {shown} is out of range: the model has {count} layers")
        if block.start < end:
            raise KDPruneError(f"block {shown} overlaps the block before it, which ends at {end}")
        end = block.stop


def _slots(pruned: PreTrainedModel, edits: Sequence[Drop | Substitute], family: Family) -> list[_Slot]:
    """The layers that ``pruned``, still of full depth, is to have: token-wise stand-ins folded, context in
    place."""
    layers, widths = list(decoder_layers(pruned)), layer_widths(pruned)
    covered = {index: edit for edit in edits for index in edit.block}
    sequence: list[_Slot | StandIn] = []
    for index, layer in enumerate(layers):
        edit = covered.get(index)
        if edit is None:
            sequence.append(_Slot(layer, index, widths[index]))
        elif isinstance(edit, Substitute) and index == edit.block.start:
            if edit.context is not None:
                sequence.append(_context_slot(edit.context, pruned, edit))
            elif edit.stand_in is not None:
                sequence.append(edit.stand_in)
    slots = [item for item in sequence if isinstance(item, _Slot)]
    if not slots:
        raise KDPruneError("the blocks take out every layer; keep at least one")
    _fold_all(sequence, pruned, family)
    return slots


def _fold_all(sequence: Sequence[_Slot | StandIn], model: PreTrainedModel, family: Family) -> None:
    """Fold a copy of every stand-in of ``sequence`` into the layer before it, or into the next if only that one holds
    none yet; if both hold some, around those of the layer before it."""
    ends: list[_Slot | StandIn | None] = [None, *sequence, None]
    for before, item, after in zip(ends, sequence, ends[2:], strict=False):
        if isinstance(item, _Slot):
            continue
        if isinstance(before, StandIn) or isinstance(after, StandIn):
            raise KDPruneError("two blocks with token-wise stand-ins touch; join them or keep a layer between")
        sides = [(slot, place) for slot, place in ((before, "after"), (after, "before")) if slot is not None]
        slot, place = next((side for side in sides if not isinstance(side[0].layer, FoldedLayer)), sides[0])
        stand_in = _adapted(item, model, slot.layer)  # the block may have been on another device
        _fold(slot.layer, stand_in, place, family)
        follow(stand_in, slot.layer)


def _fold(layer: nn.Module, stand_in: StandIn, place: str, family: Family) -> None:
    """Fold ``stand_in`` into ``layer`` in place. Raises KDPruneError where its forward cannot be extended."""
    with unhooked(layer):
        if "forward" in layer.__dict__:
            raise KDPruneError("a layer's forward is patched, expected that of its class; load the model anew")
        try:
            place_stand_in(layer, stand_in, place, family)
        except ValueError as error:
            raise KDPruneError(str(error)) from error


def _adapted(module: Module, model: PreTrainedModel, beside: nn.Module) -> Module:
    """A copy of ``module`` in the dtype and mode of ``model``, on the device of layer ``beside``."""
    result = copy.deepcopy(module, {id(model.config): model.config})
    device = torch.device("meta") if is_meta_model(beside) else device_of(beside)
    return result.to(device=device, dtype=model.dtype).train(model.training)


def _context_slot(context: nn.Module, model: PreTrainedModel, edit: Substitute) -> _Slot:
    """A copy of ``context`` in the slot of the layer it was made from, whose output-capturing hooks it takes over."""
    family, source = family_of(model), decoder_layers(model)[edit.origin]
    _refuse_lacking(source, edit.origin, family)
    heads = groups_of(source, family, model.config)
    groups = edit.groups
    ordinary = edit.stand_in is None
    if type(context) is not stock_class(source) or isinstance(getattr(context, family.mlp[0]), StandIn) is ordinary:
        what = "its own MLP" if ordinary else "a stand-in in its MLP place"
        raise KDPruneError(f"got a context layer that is not a {family.layer} with {what}")
    out, whole = (part.get_parameter(f"{family.attention_out}.weight") for part in (context, source))
    if out.numel() * heads != whole.numel() * (groups or heads):
        raise KDPruneError(
            f"got a context layer of other heads than the edit says, expected {groups or heads} key-value heads of "
            f"{heads}: make it by context_layer, and say how many are left (groups=…)")
    result = _adapted(context, model, source)
    follow(result, source)
    twins = dict(result.named_modules())
    for name, part in source.named_modules():
        if name in twins:
            twins[name]._forward_hooks = copy.copy(part._forward_hooks)
            twins[name]._forward_hooks_with_kwargs = copy.copy(part._forward_hooks_with_kwargs)
    left = heads if groups is None else groups
    width: dict[str, Any] = {} if groups is None and left == key_value_heads(model.config) else {"groups": left}
    if ordinary and family.mlp_out:
        channels = columns_of(context.get_submodule(family.mlp_out))
        if width or channels != _whole_channels(model):
            width = {"groups": left, "channels": channels}
    return _Slot(result, edit.origin, width)


def _whole_channels(model: PreTrainedModel) -> int | None:
    """MLP channels of the layers that were never narrowed; None where none is left of those."""
    family = family_of(model)
    layers = zip(decoder_layers(model), layer_widths(model), strict=True)
    found = (own_channels(layer, family) for layer, width in layers if "channels" not in width)
    return next((channels for channels in found if channels is not None), None)


def _become_kdp(
    model: PreTrainedModel, family: Family, blocks: Sequence[range], layers: Iterable[nn.Module],
    widths: Sequence[dict[str, Any]],
) -> None:
    """Turn ``model`` and its config, in place, into the generated classes, with the record of its stand-ins and
    widths."""
    found: list[dict[str, Any]] = []
    for index, layer in enumerate(layers):
        if isinstance(layer, FoldedLayer):
            found += [{"layer": index, "place": place, **folded.spec()} for folded, place in layer.kdp_folded()]
        if isinstance(mlp := getattr(layer, family.mlp[0]), StandIn):
            found.append({"layer": index, "place": "mlp", **mlp.spec()})
    config: Any = model.config
    earlier = earlier_blocks(config)
    object.__setattr__(config, "__class__", generated(family, "Config"))
    config.__dict__.pop("model_type", None)  # of the stock class, where the config was read from a file
    config.kdp = {"version": VERSION, "blocks": [[b.start, b.stop] for b in blocks], "stand_ins": found}
    if any(earlier):
        config.kdp["earlier"] = earlier
    if any(widths):
        config.kdp |= {"version": NARROWED_VERSION, "widths": list(widths)}
    if any("+" in item["kind"] or "channels" in item for item in found):
        config.kdp["version"] = SUM_VERSION
    config.auto_map = auto_map(config.model_type)
    model.__class__ = generated(family, "ForCausalLM")
    # How loading renamed the stock checkpoint's weights (GPT-NeoX) is undone by saving, but is not known of this class.
    model.__dict__.pop("_weight_conversions", None)
    own = (generated(family, role).__name__ for role in ("Layer", "SlicedLayer"))
    model._no_split_modules = {*(model._no_split_modules or ()), *own}


def earlier_blocks(config: Any) -> list[list[list[int]]]:
    """The blocks that prunings took out of a model on the way to this config, one list a step, each in the layers that
    it found; those before the first stand-in are not known."""
    record = getattr(config, "kdp", None)
    if record is None:
        return []
    if "chain" in record:
        return [step.get("blocks", []) for step in record["chain"]]
    return [*record.get("earlier", ()), record["blocks"]]


def _shorten_config(config: Any, family: Family, sources: Sequence[int]) -> None:
    """Make ``config`` describe a model that has the layers with these indices of the dense model's."""
    number_layers(config, family, sources)
    types = getattr(config, "layer_types", None)
    set_depth(config, len(sources), None if types is None else [types[index] for index in sources])
    full = getattr(config, "max_window_layers", None)  # Qwen: the layers from this one on have a sliding window
    if full is not None:
        config.max_window_layers = sum(index < full for index in sources)
