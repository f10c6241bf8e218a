"""Accelerators that are none, for tests: devices whose tensors are computed on the host.

As on a GPU, an operation refuses operands of two devices (but for numbers, copies, and indices on the host), and a draw
a generator of another one. What is not as on a GPU: no memory of its own (nothing can be saved from it), no autocast,
no kernels that differ in the last bits. To import it changes torch for good: for processes of their own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.backend_registration as registration
from accelerate import dispatch_model
from device_maps import device_map
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from kdprune.run import heal_training


class _Module(registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """It has no generator of its own."""


NAME = "other"
registration._setup_privateuseone_for_python_backend(NAME, _Module())
PLACE = torch.device(NAME, 0)
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # what it registers goes with it
_autocast.fallback(torch.library.fallthrough_kernel)
torch.accelerator.synchronize = lambda *_: None
heal_training.activation_bytes = lambda *_: 1000  # looks at addresses
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class There(Tensor):
    """A tensor of a device, around the one of the host that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> "There":
        return Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=place, requires_grad=held.requires_grad)

    def __init__(self, held: Tensor, place: torch.device):
        self.held = held

    def __repr__(self) -> str:
        return f"There({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the operation gives, of the host's tensors, put where it belongs."""
    leaves = tree_flatten((args, kwargs))[0]
    there = next((leaf.device for leaf in leaves if isinstance(leaf, There)), None)
    onto = there if kwargs.get("device") is None else _place(kwargs["device"])
    if there and function not in COPIES:
        _check(function, args, leaves)
    if onto and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{function}: expected a generator of the device {onto}, got one of the host")
    host_args, host_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, There) else leaf, (args, kwargs))
    if kwargs.get("device") is not None:
        host_kwargs["device"] = torch.device("cpu")
    if function is aten.histc.default:  # of integers it counts on accelerators alone
        return There(function(host_args[0].float(), *host_args[1:], **host_kwargs).to(host_args[0].dtype), onto)
    found = function(*host_args, **host_kwargs)
    if function is aten.copy_.default:
        return args[0]
    if onto is None:
        return found
    made = tree_map(lambda value: There(value, onto) if type(value) is Tensor else value, found)
    return return_and_correct_aliasing(function, args, kwargs, made) if there and function not in COPIES else made


def _place(device: Any) -> torch.device | None:
    """Which of the devices; None: the host."""
    found = torch.device(device)
    return torch.device(NAME, found.index or 0) if found.type == NAME else None


def _check(function: Any, args: Any, leaves: list[Any]) -> None:
    """Raises RuntimeError for tensors of two devices, those of the host that are one number left out."""
    if function in INDEXED:
        indices = tree_flatten(args[1])[0]
        if any(isinstance(one, There) and one.device != args[0].device for one in indices):
            raise RuntimeError(f"{function}: a tensor on {args[0].device} indexed by one of another device")
        leaves = [args[0], *args[2:]]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    places = {str(leaf.device) for leaf in tensors if leaf.dim() or isinstance(leaf, There)}
    if len(places) > 1:
        raise RuntimeError(f"{function}: expected all tensors on one device, got some on {', '.join(sorted(places))}")


class _Operations(TorchDispatchMode):
    """Operations that make tensors there of nothing, or of the host's."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Functions that look for a kernel of the device by themselves."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is Tensor.__getitem__ and isinstance(args[0], There):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(one) if isinstance(one, list) else one for one in index))
        return function(*args, **kwargs)


@contextlib.contextmanager
def accelerator() -> Iterator[None]:
    """Inside there is the device."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Functions(), _Operations():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """The model under accelerate's hooks, every second layer on a second device."""
    places = [f"{NAME}:0", f"{NAME}:1"]
    return dispatch_model(model, device_map(model, lambda index: places[index % 2], *places))


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model, on the device."""
    model.to(PLACE)  # type: ignore[arg-type]
    model.tie_weights()  # moving made two parameters of one
    return model
