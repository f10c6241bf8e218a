"""The effect of edits by other means: hooks and zeros on a copy of the dense model, all of whose layers stay."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.model.edits import Drop, Edit, Resize, Rewrite, Substitute
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.structures import StructurePart, attention_parts, mlp_parts
from kdprune.testing.kinds import kept_channels, kept_heads
from kdprune.testing.models import logits_of


def reference_logits(dense: PreTrainedModel, edits: list[Edit]) -> Tensor:
    """Logits (B, T, V) that a model with ``edits`` of :func:`kdprune.testing.edits_of` must have, "stream" excepted.

    No layer is taken out: dropped ones hand their input on, a stand-in's block computes it in its first layer, heads
    and channels that are gone add zero.
    """
    model = copy.deepcopy(dense)
    layers = decoder_layers(model)
    for edit in edits:
        if isinstance(edit, Rewrite):
            layers[edit.layer].load_state_dict(dict(edit.weights), strict=False)
        elif isinstance(edit, Resize):
            assert edit.layer is not None
            layer = layers[edit.layer]
            if "without" in edit.width:
                _without(model, layer, edit.width["without"])
                continue
            _silence(layer, attention_parts(model, layer)[-1], kept_heads(model))
            _silence(layer, mlp_parts(model, layer)[-1], kept_channels(model))
        else:
            _bypass(model, edit)
    return logits_of(model, use_cache=False)


def _bypass(model: PreTrainedModel, edit: Drop | Substitute) -> None:
    """Layers of the block hand on their input, or what the stand-in makes of it."""
    layers = decoder_layers(model)
    stand_in = edit.stand_in if isinstance(edit, Substitute) else None
    context = edit.context if isinstance(edit, Substitute) else None
    for index in edit.block:
        if isinstance(edit, Substitute) and context is not None and index == edit.origin:
            _in_context(model, layers[index], edit)
        elif stand_in is not None and context is None and index == edit.block.start:
            _answer(layers[index], stand_in)
        else:
            _answer(layers[index], nn.Identity())


def _without(model: PreTrainedModel, layer: nn.Module, sublayer: str) -> None:
    """All weights of a sublayer become zero, so that it adds nothing; a norm behind the sum passes it on."""
    family, which = family_of(model), ("attention", "mlp").index(sublayer)
    with torch.no_grad():
        for name in family.mlp if which else (family.attention, *family.post_norms[:1]):
            for parameter in layer.get_submodule(name).parameters():
                parameter.zero_()
    if family.pre_norm and not getattr(model.config, family.pre_norm):
        setattr(layer, family.norm_in(layer, (family.attention_norm, family.mlp_norm)[which]) or "", nn.Identity())


def _answer(layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """The layer's output becomes ``function`` of its input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = function(args[0] if args else kwargs["hidden_states"])
        return (state, *output[1:]) if isinstance(output, tuple) else state

    layer.register_forward_hook(hook, with_kwargs=True)


def _in_context(model: PreTrainedModel, layer: nn.Module, edit: Substitute) -> None:
    """The layer's MLP path becomes the stand-in, or the layer the ordinary one of its size; heads and channels that are
    gone are silent."""
    family, seen, stand_in = family_of(model), list[Any](), edit.stand_in
    if edit.groups is not None:
        _silence(layer, attention_parts(model, layer)[-1], kept_heads(model))
    if stand_in is not None:
        first, last = (getattr(layer, family.mlp[end]) for end in (0, -1))
        first.register_forward_pre_hook(lambda module, args: seen.append(args))
        last.register_forward_hook(lambda module, args, output: stand_in(*seen.pop()))
    elif edit.groups is None and edit.context is not None:
        layer.load_state_dict(edit.context.state_dict())
    else:
        _silence(layer, mlp_parts(model, layer)[-1], kept_channels(model))


def _silence(layer: nn.Module, out: StructurePart, kept: Tensor) -> None:
    """Sets the columns of a projection that read structures other than ``kept`` to zero."""
    module = layer.get_submodule(out.path)
    with torch.no_grad():
        for columns in _others(out.members, kept):
            weight: Any = module.weight.T if isinstance(module, nn.Linear) else module.weight
            weight[columns] = 0.0


def _others(members: Tensor, kept: Tensor) -> Iterator[Tensor]:
    return (row for index, row in enumerate(members) if index not in kept.tolist())
