"""Where a model's weights are: spread over devices and offloaded by ``device_map``.

Accelerate places a model by hooks: each replaces the ``forward`` of one module, brings inputs to the module's device
and, for an offloaded module, brings its weights there for the time of the call. A hook knows its weights by their names
in the dense model and keeps no tie to the module's place, so that it goes with its layer into an edited model: nothing
is loaded, moved or written again. torch's own hooks run in front of accelerate's.
"""

import contextlib
import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.errors import KDPruneError

SOURCE = "kdp_source"  # attribute of a meta parameter that knows where its weights are (streaming.py)
Module = TypeVar("Module", bound=nn.Module)
_ADDED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")  # that accelerate guards on a dispatched model

# ------------------------------------------------------------------ a second model that hidden states come from


def check_states_model(model: PreTrainedModel, states_model: PreTrainedModel) -> None:
    """Refuses a model in fewer bits whose hidden states are to stand for those of ``model``, but cannot.

    Raises:
        KDPruneError: the two differ in depth, width or vocabulary.
    """
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        wanted, found = (getattr(part.config, name) for part in (model, states_model))
        if wanted != found:
            raise KDPruneError(f"got a model to collect states from with {name} {found}, expected {wanted}")


# ----------------------------------------------------------------------------------------------- devices


def device_of(module: nn.Module) -> torch.device:
    """The device ``module`` computes on: of its first hook, else of its first parameter, or the one that is read to."""
    for part in module.modules():
        device = getattr(_hook(part), "execution_device", None)
        if device is not None:
            return torch.device(device)
    for parameter in module.parameters():
        found: Any = getattr(parameter, SOURCE, parameter)
        if found.device.type != "meta":  # one that was narrowed without having been read is nowhere
            return torch.device(found.device)
    return torch.device("cpu")


def input_device(model: PreTrainedModel) -> torch.device:
    """The device token ids go to."""
    return device_of(model.get_input_embeddings())


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks run ``model``: over several devices, or from memory or disk it is offloaded to."""
    return any(_hook(module) is not None for module in model.modules())


def is_meta_model(module: nn.Module) -> bool:
    """Whether ``module`` has no weights anywhere: made on the meta device, neither streamed nor offloaded."""
    found = list(module.parameters())
    return bool(found) and not is_dispatched(module) and all(
        parameter.is_meta and not hasattr(parameter, SOURCE) for parameter in found)


def reads_weights(model: nn.Module) -> bool:
    """Whether weights are brought to the device anew in every pass, because the model is streamed or offloaded."""
    return any(parameter.is_meta for parameter in model.parameters())


# ---------------------------------------------------------------------------------------- weights under hooks


def offloaded(module: nn.Module, name: str) -> Tensor | None:
    """The weights of the module's own parameter ``name``, on the module's device; None where no hook holds them."""
    hook = _hook(module)
    weights = getattr(hook, "weights_map", None)
    if not getattr(hook, "offload", False) or weights is None:
        return None
    found: Tensor = weights[name]
    return found.to(torch.device(hook.execution_device))


@dataclass(frozen=True)
class Held:
    """Where an offloaded parameter's weights are, as a streamed model's parameters say it: with their module's hook."""

    module: nn.Module
    name: str

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return device_of(self.module)

    def read(self) -> Tensor:
        """The weights."""
        found = offloaded(self.module, self.name)
        assert found is not None
        return found


@contextlib.contextmanager
def sourced(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the offloaded parameters of ``model`` say where their weights are, and tied ones are one object.

    For saving; ``model`` cannot run inside.
    """
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta and getattr(_hook(module), "offload", False):
                    before.append((module, name, parameter))
                    stand_for = nn.Parameter(parameter.data, parameter.requires_grad)
                    setattr(stand_for, SOURCE, Held(module, name))
                    module._parameters[name] = stand_for
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            (holder, name), kept = _place(model, target), model.get_parameter(source)
            if hasattr(holder._parameters[name], SOURCE) and hasattr(kept, SOURCE):
                holder._parameters[name] = kept
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter ``path``, and its name there."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def settle(module: nn.Module) -> None:
    """Makes the offloaded parameters of ``module`` (not those of its children) real, on its device, for good.

    Of a copy whose weights are to be written: its hook keeps moving inputs and lets go of the weights. The module that
    the copy was made from stays as it was.
    """
    hook = _hook(module)
    if not getattr(hook, "offload", False):
        return
    for name, parameter in list(module._parameters.items()):
        weights = offloaded(module, name) if parameter is not None and parameter.is_meta else None
        if parameter is not None and weights is not None:
            module._parameters[name] = nn.Parameter(weights, parameter.requires_grad)
    hook.offload, hook.weights_map = False, None


# ------------------------------------------------------------------------------------------- copies and edits


def hooks_of(module: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy``: copies of modules get hooks of their own, which share the weights they hold."""
    found: dict[int, Any] = {}
    for part in module.modules():
        hook: Any = part.__dict__.get("_hf_hook")
        if hook is not None:
            found |= {id(one): copy.copy(one) for one in getattr(hook, "hooks", (hook,))}  # several in a row are one
    return found


def free(module: Module) -> Module:
    """Takes accelerate's hooks off a copy, in place; its parameters stay what and where they are."""
    for part in module.modules():
        _unhook(part)
    return module


def release(model: nn.Module) -> None:
    """Takes off a copied model the guards of ``to`` and the like, which would move the model it was copied from."""
    for name in _ADDED:
        model.__dict__.pop(name, None)


@contextlib.contextmanager
def unhooked(layer: nn.Module) -> Iterator[None]:
    """The layer itself, not its parts, stands without its hook inside: its class may be changed there."""
    hook = _unhook(layer)
    try:
        yield
    finally:
        if hook is not None:
            _hang(layer, hook)


def follow(module: nn.Module, beside: nn.Module) -> None:
    """Gives ``module``, new in a dispatched model, hooks that bring inputs to where layer ``beside`` computes.

    The module's parameters are real and on that device already.
    """
    pattern = next((hook for part in beside.modules() if (hook := _hook(part)) is not None), None)
    if pattern is not None:
        twin = copy.copy(pattern)
        twin.offload, twin.weights_map, twin.io_same_device = False, None, False
        _hang(module, twin)


def renumber(model: PreTrainedModel, path: str, sources: list[int]) -> None:
    """Makes ``hf_device_map`` name layers by their new numbers; ``sources`` has the dense number of each.

    Args:
        path: of the list of layers, "model.layers".
    """
    before: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    if before is None:
        return
    after: dict[str, Any] = {}
    for name, device in before.items():
        if not name.startswith(f"{path}."):
            after[name] = device
            continue
        number, _, rest = name[len(path) + 1 :].partition(".")
        for new, source in enumerate(sources):
            if source == int(number):
                after[f"{path}.{new}" + (f".{rest}" if rest else "")] = device
    model.__dict__["hf_device_map"] = after


def _hook(module: nn.Module) -> Any:
    """The hook that places ``module``, or None; of several the one that holds its weights, else the last."""
    hook: Any = module.__dict__.get("_hf_hook")
    several = getattr(hook, "hooks", (hook,))
    return next((one for one in several if getattr(one, "offload", False)), several[-1])


def _unhook(module: nn.Module) -> Any:
    """Takes the hook off ``module`` without moving a weight; returns it."""
    hook = module.__dict__.pop("_hf_hook", None)
    forward = module.__dict__.pop("_old_forward", None)
    if forward is not None:
        module.__dict__.pop("forward", None)
        if getattr(forward, "__func__", None) is not type(module).forward:  # somebody had replaced it before
            module.__dict__["forward"] = forward
    return hook


def _hang(module: nn.Module, hook: Any) -> None:
    """Puts a hook on ``module`` as accelerate does, but without moving a weight."""
    hooks: Any = importlib.import_module("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())  # its wrapper looks the hook up at every call
    module._hf_hook = hook
