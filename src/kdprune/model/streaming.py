"""Models larger than memory: the decoder layers' weights stay in the checkpoint until a layer is at work.

A streamed model is an ordinary ``PreTrainedModel`` whose parameters outside the decoder layers are real. Those of the
layers are on the meta device, and each of them knows where in the checkpoint its weights are. Edits share parameter
objects with the model they start from, so that a pruned model knows it too.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.model.families import decoder_layers
from kdprune.model.forms import located, text_tower
from kdprune.model.loading import check_weights, checkpoint_errors, read_config, resolve_dtype
from kdprune.model.modeling_kdp import FAMILIES, PREFIX
from kdprune.model.placement import SOURCE, offloaded
from kdprune.model.weights import Source, Stored, stored_tensors
from kdprune.runtime.machine import resolve_device


def load_streamed(
    name: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM of a known family in eval mode whose decoder layers' parameters are on the meta device.

    What is around the layers, and every buffer, is real and on ``device``. Arguments as in
    :func:`kdprune.model.loading.load_model`. The model computes with the weights of :func:`resident` layers.

    Raises:
        KDPruneError: as ``load_model`` does; the checkpoint is quantised or is not in safetensors files.
    """
    wanted, target = resolve_dtype(dtype), resolve_device(device)
    with checkpoint_errors(name, trust_remote_code):
        place, file = located(name)
        if file:
            raise KDPruneError(f"got {name}, whose GGUF weights are not read layer by layer; give it more memory "
                               "(--host-memory), or the model it was made from")
        whole = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        if text_tower(whole, name) is not None:
            raise KDPruneError(f"got {name}, a multimodal model, which is not read layer by layer; give it more memory "
                               "(--host-memory), or save its text part as a model of its own")
        config: Any = read_config(name, trust_remote_code)
        if config.model_type.removeprefix(PREFIX) not in FAMILIES:
            raise KDPruneError(f"got {name}, a {config.model_type} model, whose family has no row in the table and is "
                               "not read layer by layer; give it more memory (--host-memory)")
        if getattr(config, "quantization_config", None) is not None:
            raise KDPruneError(f"got {name}, which is quantised; expected full-precision weights to stream")
        sources = _sources(stored_tensors(name), wanted or config.dtype, target)
        model, info, stood_for = _skeleton(name, config, sources, trust_remote_code)
    check_weights(info, name)
    _place(model, stood_for, target)
    return model.eval()


@dataclass(frozen=True)
class Scratch:
    """Where the states of a streamed model are between two layers.

    Attributes:
        folder: where they go, in files, when they take more than ``host_bytes``.
        None: only as many batches as fit pass together, and the layers are read again for the next ones.
        host_bytes: the most that they take in memory.
    """

    folder: Path | None = None
    host_bytes: int = 2**30


def set_scratch(model: PreTrainedModel, scratch: Scratch) -> None:
    """From now on this is what ``model``, and models made of it by edits, use where nothing else is said."""
    model.kdp_scratch = scratch  # type: ignore[assignment]


def scratch_of(model: PreTrainedModel) -> Scratch:
    """What :func:`set_scratch` has set."""
    found = model.__dict__.get("kdp_scratch")
    return found if isinstance(found, Scratch) else Scratch()


def is_streamed(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` is still in the checkpoint."""
    return any(parameter.is_meta and hasattr(parameter, SOURCE) for parameter in model.parameters())


@contextlib.contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """The parameters of ``modules`` that are in the checkpoint, or offloaded, have their weights inside the context.

    Afterwards the same meta parameters are back, also after an exception. Nothing happens to real parameters, so
    that contexts may nest and any module may be given. Changes made to the weights inside are lost.

    Raises:
        KDPruneError: the checkpoint cannot be read, or a meta parameter has no source.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    real: dict[int, nn.Parameter] = {}  # a parameter that stands in two places is read once
    try:
        for module in {part: None for whole in modules for part in whole.modules()}:
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                if id(parameter) not in real:
                    held = offloaded(module, name)
                    weights = source_of(parameter).read() if held is None else held
                    real[id(parameter)] = nn.Parameter(weights, parameter.requires_grad)
                replaced.append((module, name, parameter))
                module._parameters[name] = real[id(parameter)]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def source_of(parameter: nn.Parameter) -> Source:
    """Where the weights of a meta parameter are. Raises KDPruneError for one that was made by copying."""
    found = getattr(parameter, SOURCE, None)
    if found is None:
        raise KDPruneError(
            "got a parameter without weights that does not say where they are; expected those of a streamed model: "
            "load the model whole"
        )
    return found


def checkpoint_bytes(name: str | Path, dtype: str | torch.dtype | None = None) -> int:
    """Bytes of a checkpoint's weights in ``dtype`` (None: as they are stored), from the files' headers alone.

    The size of the files where they are not safetensors. Raises KDPruneError as ``load_model`` does.
    """
    wanted = resolve_dtype(dtype)
    with checkpoint_errors(name, trust_remote_code=False):
        place, file = located(name)
        if file:  # as if every weight took 8 bits there
            size = (Path(place) / file["gguf_file"]).stat().st_size
            return size * (wanted or torch.float32).itemsize
        if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
            return sum(file.stat().st_size for file in Path(name).glob("pytorch_model*.bin"))
        return sum(tensor.shape.numel() * (wanted or tensor.dtype).itemsize for tensor in stored_tensors(name))


# ------------------------------------------------------------------------------------- from a checkpoint


def _sources(stored: list[Stored], dtype: torch.dtype | None, device: torch.device) -> dict[str, Source]:
    """The tensors by name, floating-point ones in ``dtype``; None: that of the first of them."""
    floating = (tensor.dtype for tensor in stored if tensor.dtype.is_floating_point)
    wanted = dtype or next(floating, torch.float32)
    return {
        tensor.key: Source(tensor, wanted if tensor.dtype.is_floating_point else tensor.dtype, device)
        for tensor in stored
    }


def _skeleton(
    name: str | Path, config: PreTrainedConfig, sources: dict[str, Source], trust_remote_code: bool,
) -> tuple[PreTrainedModel, dict[str, Any], dict[int, Source]]:
    """The model loaded from placeholders that take no memory; what each one stands for, by the address of its storage.

    Loading is transformers' own, with its names, checks, buffers and tied weights. A placeholder is one number seen
    in the shape of the weights, and loading passes on what has the right dtype and device already.
    """
    placeholders: dict[str, Tensor] = {}
    stood_for: dict[int, Source] = {}
    for key, source in sources.items():
        number = torch.zeros((), dtype=source.dtype)
        placeholders[key] = number.expand(source.stored.shape)
        stood_for[number.untyped_storage().data_ptr()] = source
    dtype = next(source.dtype for source in sources.values() if source.dtype.is_floating_point)
    with torch.device("meta"):
        own_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    loaded: Any = own_class.from_pretrained(
        None, config=config, state_dict=placeholders, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    model.name_or_path = model.config.name_or_path = str(name)
    with contextlib.suppress(OSError):  # a checkpoint may have none
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model, info, stood_for


def _place(model: PreTrainedModel, stood_for: dict[int, Source], device: torch.device) -> None:
    """Put in place of each placeholder a meta parameter in the layers, and the weights everywhere else."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    saved = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    done: dict[int, tuple[Tensor, Tensor]] = {}  # by the old tensor: tied weights stay tied
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in list(table.items()):
                if old is None:
                    continue
                if id(old) not in done:
                    source = _source(old, saved[id(old)], stood_for) if id(old) in saved else None
                    streamed = id(module) in inside and isinstance(old, nn.Parameter)
                    done[id(old)] = (old, _final(old, source, streamed, device))
                table[name] = done[id(old)][1]  # type: ignore[assignment]


def _source(old: Tensor, key: str, stood_for: dict[int, Source]) -> Source:
    """What ``old``, called ``key`` in the model, stands for."""
    found = stood_for.get(old.untyped_storage().data_ptr())
    if found is not None:
        return found
    # Loading made a copy of the placeholder, in the dtype that the architecture wants for it.
    named = [source for source in stood_for.values() if source.stored.key == key]
    if not named and ".experts." in key:
        raise KDPruneError("got a checkpoint that holds its experts one by one, which is not read layer by layer; give "
                           "it more memory (--host-memory)")
    if not named:
        raise KDPruneError(f"cannot tell where {key} is in the checkpoint; load and save the model with transformers")
    return replace(named[0], dtype=old.dtype)


def _final(old: Tensor, source: Source | None, streamed: bool, device: torch.device) -> Tensor:
    """What stands in a streamed model where ``old`` stood in the one made of placeholders."""
    if source is None:  # computed when the model was made, as rotary frequencies are
        new = old.detach().to(device)
    else:
        new = torch.empty(old.shape, dtype=source.dtype, device="meta") if streamed else source.read()
    if not isinstance(old, nn.Parameter):
        return new
    result = nn.Parameter(new, old.requires_grad)
    if streamed:
        setattr(result, SOURCE, source)
    return result
