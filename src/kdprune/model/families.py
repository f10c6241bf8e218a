"""Finds a model's row in the family table, and its parts by the row's paths."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import KDPruneError, one_line
from ..runtime.machine import quiet_libraries
from .modeling_kdp import FAMILIES, PREFIX, Family, NoMLP, PrunedModel, StandIn, columns_of, lacking

GUIDE = "docs/add-a-family.md in the sources"
NUMBERS = ("layer_idx", "layer_id")  # how modules call the number of their layer; the second is GPT-Neo's
TABLE = "python -m kdprune.cli.families_page"  # prints what works for which family
# By the class of the causal LM and its config's lists with an entry a layer.
_INFERRED: dict[tuple[type, tuple[str, ...]], Family] = {}
_FOUND_ALIKE: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose layers follow their config


def find_family(config: PreTrainedConfig) -> Family:
    """The row of the architecture that ``config`` describes, stock or pruned.

    Raises KDPruneError for an encoder-decoder and for an architecture without a row.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise KDPruneError(f"got an encoder-decoder ({config.model_type}), expected a decoder-only causal LM")
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    if family is None:
        raise KDPruneError(
            f"unknown model family {config.model_type!r}; known: {', '.join(sorted(FAMILIES))}. Layers of others can "
            f"go (kdprune prune --method shortgpt, uidl, sleb or evopress); what works for which: {TABLE}; to add a "
            f"family is one table row: {GUIDE}"
        )
    return family


def family_of(model: nn.Module) -> Family:
    """The row of ``model``, a stock or pruned causal LM; of a family without one what its modules show.

    Raises KDPruneError for anything else: a wrapper, an encoder-decoder, a model without one list of layers or without
    its language-modelling head.
    """
    if not isinstance(model, PreTrainedModel):
        raise KDPruneError(f"got {type(model).__name__}, expected a PreTrainedModel (merge adapters, unwrap first)")
    if model.config.model_type.startswith(PREFIX) and not isinstance(model, PrunedModel):
        raise KDPruneError(f"got {type(model).__name__} of the code beside its checkpoint, expected kdprune's own "
                           "class: load it again after `import kdprune`, or give its directory")
    known = model.config.model_type.removeprefix(PREFIX) in FAMILIES or model.config.is_encoder_decoder
    family = find_family(model.config) if known else _inferred(model)
    if family.causal_lm not in {base.__name__ for base in type(model).__mro__}:
        raise KDPruneError(
            f"got {type(model).__name__}, which is not a causal LM; load it with AutoModelForCausalLM "
            f"(expected {family.causal_lm})"
        )
    return family


def _inferred(model: PreTrainedModel) -> Family:
    """What can be known of a model without a row: its one list of as many layers as the config says.

    Raises KDPruneError as :func:`find_family` does where there is none.
    """
    key = type(model), lists_by_layer(model.config)
    if key not in _INFERRED:
        count, head, table = (getattr(model.config, "num_hidden_layers", 0), model.get_output_embeddings(),
                              model.get_input_embeddings())
        names = {id(module): name for name, module in model.named_modules()}
        lists = [name for name, module in model.named_modules()
                 if isinstance(module, nn.ModuleList) and len(module) == count]
        if not count or head is None or len(lists) != 1:
            find_family(model.config)  # raises
        layers: Any = model.get_submodule(lists[0])
        kind = type(layers[0]).__name__
        found = Family(
            model.config.model_type, "", type(model).__name__, kind, "", layers=lists[0], norm="", attention_out="",
            embeddings=(names[id(table)],), returns_tuple=_gives_tuple(model, layers[0]), per_layer=key[1],
            inferred=True)
        if next(layers.parameters()).is_meta:  # nothing ran
            return found
        _INFERRED[key] = found
    return _INFERRED[key]


def lists_by_layer(config: PreTrainedConfig) -> tuple[str, ...]:
    """The fields of a config without a row that by their name and length have an entry a layer, but ``layer_types``."""
    count = getattr(config, "num_hidden_layers", 0)
    return tuple(name for name, value in vars(config).items()
                 if isinstance(value, list) and len(value) == count and "layer" in name and name != "layer_types")


@torch.no_grad()
def _gives_tuple(model: PreTrainedModel, layer: nn.Module) -> bool:
    """Whether the forward of this layer returns a tuple: one token is run; of an outline that cannot run, False.

    Raises KDPruneError where the model does not run so.
    """
    if next(layer.parameters()).is_meta and not hasattr(layer, "_hf_hook"):
        return False
    seen: list[bool] = []
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(isinstance(output, tuple)))
    try:
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:  # code of an architecture that nothing is known of
        raise KDPruneError(f"unknown model family {model.config.model_type!r}, which does not run on one token "
                           f"({one_line(error)}); expected one of {', '.join(sorted(FAMILIES))}: {GUIDE}") from error
    finally:
        hook.remove()
    return bool(seen) and seen[0]


def check_inferred(model: PreTrainedModel, drops: bool) -> None:
    """Raises KDPruneError for a model of a family without a row unless layers are but dropped, and what its config
    makes of the layers that stay is what they are."""
    family = family_of(model)
    if not family.inferred:
        return
    if not drops:
        find_family(model.config)  # raises
    if model in _FOUND_ALIKE:
        return
    layers, config = decoder_layers(model), model.config
    known = ("layer_types", "architectures", *family.per_layer)
    lists = [name for name, value in vars(config).items() if isinstance(value, list | tuple)
             and len(value) == len(layers) > 1 and name not in known and not name.endswith(("token_id", "token_ids"))]
    if lists:
        what = f"config.{lists[0]} has an entry a layer"
    elif not _follow_config(model, family):
        what = "whose layers differ by their number"
    else:
        _FOUND_ALIKE.add(model)
        return
    raise KDPruneError(
        f"unknown model family {config.model_type!r}, {what}: a checkpoint without some of them would not be the same "
        f"model; expected one of {', '.join(sorted(FAMILIES))}, or layers that are all alike. To add a family is one "
        f"table row: {GUIDE}")


@contextlib.contextmanager
def explained(model: PreTrainedModel) -> Iterator[None]:
    """While active, what the code of a family without a row raises is one line; of the families with one, a fault of
    the package, which stays what it is.

    Raises KDPruneError.
    """
    try:
        yield
    except (KDPruneError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not family_of(model).inferred:
            raise
        raise KDPruneError(f"unknown model family {model.config.model_type!r}, whose code says: {one_line(error)}; "
                           "expected a model that runs like others without some of its layers: take others out "
                           f"(--protect, --blocks), or add the family: {GUIDE}") from error


def _follow_config(model: PreTrainedModel, family: Family) -> bool:
    """Whether a model built from the config of one without its first layer, or its last, has the layers that are left,
    by class and by shapes of parameters: none of its weights are made."""
    own = [_form(layer) for layer in decoder_layers(model)]
    types = getattr(model.config, "layer_types", None)
    for kept in (range(1, len(own)), range(len(own) - 1)):
        config = copy.deepcopy(model.config)
        try:
            number_layers(config, family, kept)
            set_depth(config, len(kept), None if types is None else [types[index] for index in kept])
            with quiet_libraries(), torch.device("meta"):
                shorter = type(model)(config)
            found = [_form(layer) for layer in _descend(shorter, family.layers)]
        except Exception:  # of code that nothing is known of
            return False
        if found != [own[index] for index in kept]:
            return False
    return True


def _form(layer: nn.Module) -> tuple[Any, ...]:
    """Class and parameters of a layer, and what its parts know beside their own number: DiffLlama's attention, a
    constant of the layer's."""
    known = ((f"{name}.{key}", value) for name, part in layer.named_modules() for key, value in sorted(
        vars(part).items()) if isinstance(value, int | float | str) and not isinstance(value, bool)
        and key not in (*NUMBERS, "num_hidden_layers") and not key.startswith("_"))
    shapes = ((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
    return (type(layer).__name__, *shapes, *known)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The ModuleList of decoder layers of a causal LM, the list itself. Raises KDPruneError as family_of
    does."""
    return _descend(model, family_of(model).layers)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the head; Identity where a model has none (OPT with post-norm).

    Raises KDPruneError as family_of does.
    """
    norm = _descend(model, family_of(model).norm)
    return nn.Identity() if norm is None else norm


def outside_embeddings(model: PreTrainedModel) -> int:
    """Parameters outside the embeddings, stand-ins included: all but the tables whose sum enters layer 0, of positions
    too, and the head; tied ones count once.

    Raises KDPruneError as family_of does.
    """
    embeddings = [_descend(model, path) for path in family_of(model).embeddings]
    inside = {id(weight): weight for part in (*embeddings, model.get_output_embeddings())
              for weight in part.parameters()}
    return model.num_parameters() - sum(weight.numel() for weight in inside.values())


def normalises_behind(model: PreTrainedModel) -> bool:
    """Whether a norm stands between a sublayer and the residual sum it adds to, or behind that sum."""
    family = family_of(model)
    return bool(family.post_norms) or bool(family.pre_norm and not getattr(model.config, family.pre_norm))


def norm_before_mlp(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """The norm of ``layer`` whose output its MLP reads; where layers normalise behind a sum, that of attention.

    Identity where the MLP reads the stream itself (OLMo 2).
    """
    family = family_of(model)
    behind = family.pre_norm and not getattr(model.config, family.pre_norm)
    return _norm(layer, family, family.attention_norm if behind else family.mlp_norm)


def norms_from(model: PreTrainedModel, boundary: int) -> list[nn.Module]:
    """The norms through which the sublayers of layer ``boundary`` and of those behind it read the stream, or the final
    one where there are none; Identity where one reads the stream itself. A sublayer that was left out reads nothing."""
    family, found = family_of(model), []
    for layer in list(decoder_layers(model))[boundary:]:
        without = lacking(layer, family)
        if without != "attention":
            found.append(_norm(layer, family, family.attention_norm))
        if without != "mlp":
            found.append(norm_before_mlp(model, layer))
    return found or [final_norm(model)]


def _norm(layer: nn.Module, family: Family, names: str | tuple[str, ...]) -> nn.Module:
    name = family.norm_in(layer, names)
    return nn.Identity() if name is None else layer.get_submodule(name)


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the MLPs of this model are mixtures of experts."""
    return bool(family_of(model).experts)


def inactive_parameters(model: PreTrainedModel) -> int:
    """Parameters of the experts that a token does not go through; 0 for a dense model."""
    return sum(round(sum(p.numel() for p in experts.parameters()) * (1 - share))
               for experts, _, share in experts_of(model))


def experts_of(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module, float]]:
    """The experts of every layer that has some, its router, and the share of the experts that a token goes through."""
    family, found = family_of(model), []
    for layer in decoder_layers(model) if family.experts else ():
        modules = dict(layer.named_modules())
        if family.experts in modules:
            count = next(modules[family.experts].parameters()).shape[0]
            share = min(1.0, model.config.num_experts_per_tok / count)
            found.append((modules[family.experts], modules[family.router], share))
    return found


def norms_behind_mlp(family: Family) -> list[str]:
    """The attributes of a layer's MLP path that are norms between its output and the residual sum (Gemma)."""
    return [name for name in family.mlp if name in family.post_norms]


def own_channels(layer: nn.Module, family: Family) -> int | None:
    """The channels of a layer's own MLP; None where a stand-in has its place, or experts, or nothing."""
    if isinstance(getattr(layer, family.mlp[0]), StandIn | NoMLP) or not family.mlp_out:
        return None
    return columns_of(layer.get_submodule(family.mlp_out))


def widest(model: PreTrainedModel) -> int:
    """The layer with the most MLP channels, the first of equals.

    Raises KDPruneError where every layer has a stand-in in the place of its MLP.
    """
    family = family_of(model)
    found = [(own_channels(layer, family) or 0, -index) for index, layer in enumerate(decoder_layers(model))]
    channels, index = max(found)
    if not channels:
        raise KDPruneError("got a model whose MLPs are all stand-ins, expected one with a layer of its own left: prune "
                           "it with a method that takes layers whole, such as shortgpt, or prune the dense model anew")
    return -index


def mlp_source(model: PreTrainedModel, index: int, channels: int) -> int:
    """The layer whose MLP an ordinary layer made from layer ``index`` has, of so many channels: itself if it has them,
    else the widest."""
    own = own_channels(decoder_layers(model)[index], family_of(model))
    return index if own is not None and own >= channels else widest(model)


def layer_widths(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What ``config.kdp`` says of the width of every layer, ``{}`` for one that was never narrowed."""
    record = getattr(model.config, "kdp", None) or {}
    return [dict(width) for width in record.get("widths") or [{} for _ in decoder_layers(model)]]


def is_sliced(config: PreTrainedConfig) -> bool:
    """Whether the stream of the model that ``config`` describes was turned and cut (SliceGPT)."""
    record = getattr(config, "kdp", None) or {}
    return any("states" in width for width in record.get("widths", ()))


def lacks_sublayers(config: PreTrainedConfig) -> bool:
    """Whether some layers of the model that ``config`` describes were left without their attention or their MLP."""
    record = getattr(config, "kdp", None) or {}
    return any("without" in width for width in record.get("widths", ()))


def holds_stand_ins(config: PreTrainedConfig) -> bool:
    """Whether an earlier pruning put stand-ins into the model that ``config`` describes."""
    return bool((getattr(config, "kdp", None) or {}).get("stand_ins"))


def numbered_modules(layer: nn.Module) -> list[Any]:
    """The modules of ``layer`` that hold its number, the address of its KV-cache entry."""
    return [module for module in layer.modules() if any(name in module.__dict__ for name in NUMBERS)]


def number_of(module: Any) -> int:
    """The number that one of :func:`numbered_modules` holds."""
    return next(module.__dict__[name] for name in NUMBERS if name in module.__dict__)


def set_number(module: Any, number: int) -> None:
    """Gives one of :func:`numbered_modules` another number."""
    for name in NUMBERS:
        if name in module.__dict__:
            setattr(module, name, number)


def layer_types_of(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[str] | None:
    """The attention types ("full_attention", "sliding_attention", …) of ``layers``, None where the config
    lists none.

    The model's own layers have theirs by position; others, copies of them, say it themselves, or are numbered as the
    layer that they were made from. Raises KDPruneError for one that is neither.
    """
    types = getattr(model.config, "layer_types", None)
    if types is None:
        return None
    known = {id(layer): kind for layer, kind in zip(decoder_layers(model), types, strict=True)}
    found = [known.get(id(layer)) or _stated_type(layer) or _numbered_type(layer, types) for layer in layers]
    if None in found:
        raise KDPruneError(f"layer {found.index(None)} does not say its attention type; give layer_types")
    return [str(kind) for kind in found]


def install_layers(own: nn.ModuleList, layers: Sequence[nn.Module]) -> None:
    """Make ``layers`` the content of ``own``, a model's list of layers, numbered 0, 1, 2, …"""
    own._modules.clear()
    own._modules.update((str(index), layer) for index, layer in enumerate(layers))
    for index, layer in enumerate(layers):
        for part in numbered_modules(layer):
            set_number(part, index)


def layer_output(layer: nn.Module, state: Tensor) -> Any:
    """``state`` as the model expects it of ``layer``, stock or pruned: alone, or first in a tuple."""
    names, rows = {base.__name__ for base in type(layer).__mro__}, (*FAMILIES.values(), *_INFERRED.values())
    return (state, None) if any(row.returns_tuple and row.layer in names for row in rows) else state


def state_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The state (B, T, d) of what a layer, or an attention or MLP, gives: alone, or first in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def number_layers(config: Any, family: Family, sources: Sequence[int]) -> None:
    """Make what ``config`` says of single layers true of a model that has those with these numbers in the dense one."""
    for name in family.per_layer:
        if (values := getattr(config, name, None)) is not None:
            setattr(config, name, [values[source] for source in sources])
    for name in family.layer_numbers:
        if (numbers := getattr(config, name, None)) is not None:
            setattr(config, name, [number for number, source in enumerate(sources) if source in numbers])


def set_depth(config: Any, count: int, types: list[str] | None) -> None:
    """Make ``config`` say that the model has ``count`` layers, of these attention types if they are given."""
    config.num_hidden_layers = count
    derived = getattr(type(config), "layer_types", None)  # Mamba: a property, which follows from the count
    if types is not None and not (isinstance(derived, property) and derived.fset is None):
        config.layer_types = types


def restore_rotations(model: PreTrainedModel) -> None:
    """Recompute rotary frequencies that a cast of the whole model, as by ``model.half()``, has rounded.

    They are not saved, and loading computes them in float32: without this a checkpoint of such a model would not
    compute what the model does. The tensors are replaced, so that a model that shares them keeps its own.
    """
    for module in model.modules():
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if b.dtype in (torch.float16, torch.bfloat16)}
        if buffers and "RotaryEmbedding" in type(module).__name__:
            module._buffers.update((name, buffer.float()) for name, buffer in buffers.items())
            model._init_weights(module)


def _stated_type(layer: nn.Module) -> Any:
    """The ``layer_type`` that a part of ``layer``, its attention, says it has, or None."""
    return next((part.layer_type for part in layer.modules() if "layer_type" in part.__dict__), None)


def _numbered_type(layer: nn.Module, types: Sequence[str]) -> str | None:
    """Of these the type at the number of ``layer``, None where it has none."""
    numbers = {number_of(part) for part in numbered_modules(layer)}
    number = numbers.pop() if len(numbers) == 1 else None
    return types[number] if number is not None and 0 <= number < len(types) else None


def _descend(model: nn.Module, path: str) -> Any:
    """The attribute at a dotted ``path``; unlike get_submodule it may be None."""
    part: Any = model
    for name in path.split("."):
        part = getattr(part, name)
    return part
