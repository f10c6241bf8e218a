"""Models larger than memory: the decoder layers' weights stay in the checkpoint until a layer is at work.

A streamed model is an ordinary ``PreTrainedModel`` whose parameters outside the decoder layers are real. Those of the
layers are on the meta device, and each of them knows where in the checkpoint its weights are. Edits share parameter
objects with the model they start from, so that a pruned model knows it too.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from kdprune.errors import KDPruneError, one_line
from kdprune.model.families import decoder_layers, find_family
from kdprune.model.loading import check_weights, checkpoint_errors, read_config, resolve_dtype
from kdprune.model.placement import SOURCE, offloaded
from kdprune.runtime import resolve_device


@dataclass(frozen=True)
class Source:
    """Where a parameter's weights are: ``key`` in a safetensors ``file``; the dtype and device they are wanted in."""

    file: Path
    key: str
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        """A copy of the weights. Raises KDPruneError where the file is gone or damaged."""
        try:
            # Opened for each tensor: what was read of a memory-mapped file counts as resident until it is closed.
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(self.key).to(self.device, self.dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise KDPruneError(
                f"cannot read {self.key} of {self.file} ({one_line(error)}); expected the checkpoint that the run "
                "started with, put it back"
            ) from error


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
        config: Any = read_config(name, trust_remote_code)
        find_family(config)
        if getattr(config, "quantization_config", None) is not None:
            raise KDPruneError(f"got {name}, which is quantised; expected full-precision weights to stream")
        sources = _sources(_weight_files(name), wanted or config.dtype, target)
        model, info, stood_for = _skeleton(name, config, sources, trust_remote_code)
    check_weights(info, name)
    _place(model, stood_for, target)
    return model.eval()


@dataclass(frozen=True)
class Scratch:
    """Where the states of a streamed model are between two layers.

    Attributes:
        folder: where they go, in files, when they take more than ``host_bytes``. None: only as many batches as fit
            pass together, and the layers are read again for the next ones.
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


def home(parameter: Tensor) -> torch.device:
    """The device a parameter is on, or for one in the checkpoint the device it is read to."""
    found = getattr(parameter, SOURCE, None) if parameter.is_meta else None
    return parameter.device if found is None else found.device


def layer_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters of the largest decoder layer."""
    return max(sum(p.numel() * p.itemsize for p in layer.parameters()) for layer in decoder_layers(model))


def checkpoint_bytes(name: str | Path, dtype: str | torch.dtype | None = None) -> int:
    """Bytes of a checkpoint's weights in ``dtype`` (None: as they are stored), from the files' headers alone.

    The size of the files where they are not safetensors. Raises KDPruneError as ``load_model`` does.
    """
    wanted, total = resolve_dtype(dtype), 0
    with checkpoint_errors(name, trust_remote_code=False):
        if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
            return sum(file.stat().st_size for file in Path(name).glob("pytorch_model*.bin"))
        for file in _weight_files(name):
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(key)
                    size = (wanted or _stored_dtype(part.get_dtype())).itemsize
                    total += torch.Size(part.get_shape()).numel() * size
    return total


# ------------------------------------------------------------------------------------- from a checkpoint


def _weight_files(name: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, those of the hub downloaded. Raises KDPruneError if it has none."""
    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        listed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        return [Path(str(cached_file(name, file))) for file in sorted(set(listed))]
    whole = find(SAFE_WEIGHTS_NAME)
    if whole is None:
        raise KDPruneError(
            f"got {name} without {SAFE_WEIGHTS_NAME}, expected a safetensors checkpoint: no other can be streamed; "
            "load it with transformers and save it again"
        )
    return [Path(whole)]


def _sources(files: list[Path], dtype: torch.dtype | None, device: torch.device) -> list[tuple[Source, torch.Size]]:
    """Every tensor of ``files`` with its shape, floating-point ones in ``dtype``; None: that of the first of them."""
    found: list[tuple[Source, torch.Size]] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(key)
                stored = _stored_dtype(part.get_dtype())
                if stored.is_floating_point:
                    dtype = dtype or stored
                    stored = dtype
                found.append((Source(path, key, stored, device), torch.Size(part.get_shape())))
    return found


def _stored_dtype(name: str) -> torch.dtype:
    """What a safetensors header calls F32, BF16, … in torch."""
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
             "BOOL": torch.bool}
    if name not in known:
        raise KDPruneError(f"got weights of dtype {name}, expected floating point of 16 bits or more to stream")
    return known[name]


def _skeleton(
    name: str | Path, config: PreTrainedConfig, sources: list[tuple[Source, torch.Size]], trust_remote_code: bool,
) -> tuple[PreTrainedModel, dict[str, Any], dict[int, Source]]:
    """The model loaded from placeholders that take no memory; what each one stands for, by the address of its storage.

    Loading is transformers' own, with its names, checks, buffers and tied weights. A placeholder is one number seen
    in the shape of the weights, and loading passes on what has the right dtype and device already.
    """
    placeholders: dict[str, Tensor] = {}
    stood_for: dict[int, Source] = {}
    for source, shape in sources:
        number = torch.zeros((), dtype=source.dtype)
        placeholders[source.key] = number.expand(shape)
        stood_for[number.untyped_storage().data_ptr()] = source
    dtype = next(source.dtype for source, _ in sources if source.dtype.is_floating_point)
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
    named = [source for source in stood_for.values() if source.key == key]
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
