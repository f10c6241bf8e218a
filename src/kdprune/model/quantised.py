"""The dense model in 8 or 4 bits, to collect layer states where it does not fit whole.

Only the weights of linear maps inside decoder layers are quantised. What is pruned, fitted in and saved stays the
full-precision model: a quantised one is a :func:`kdprune.model.placement.collecting` model for it and nothing else.
"""

import contextlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

from kdprune.errors import KDPruneError, one_line
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.loading import from_checkpoint, resolve_dtype
from kdprune.runtime import quiet_libraries, resolve_device

Backend = Literal["bitsandbytes", "torchao"]
# What ``load_in`` may say: (bits, backend).
LOAD_IN: dict[str, tuple[int, Backend]] = {
    "8bit": (8, "bitsandbytes"), "4bit": (4, "bitsandbytes"),
    "8bit-torchao": (8, "torchao"), "4bit-torchao": (4, "torchao"),
}  # fmt: skip
GROUP = 64       # inputs that share a scale in 4 bits
_OLDEST = {"bitsandbytes": "0.46.1", "torchao": "0.15.0"}


def check_load_in(load_in: str, model: str | Path | PreTrainedModel, device: str | torch.device = "auto") -> None:
    """Raises KDPruneError for a name that is not in ``LOAD_IN``, and where :func:`load_quantised` would: at once."""
    if load_in not in LOAD_IN:
        raise KDPruneError(f"got load_in {load_in!r}, expected one of {', '.join(LOAD_IN)}")
    bits, backend = LOAD_IN[load_in]
    _check(model, bits, backend, resolve_device(device))


def load_quantised(
    model: str | Path | PreTrainedModel,
    bits: int,
    backend: Backend = "bitsandbytes",
    device: str | torch.device = "auto",
    *,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM whose decoder layers hold their linear maps in 8 or 4 bits, in eval mode, whole on ``device``.

    bitsandbytes: LLM.int8() (inputs are rounded too, outlier channels kept in float16) or NF4 with one scale for 64
    values. torchao: 8-bit weights with a scale for each output; 4-bit ones with a scale for 64 inputs, on CUDA and in
    bfloat16 alone. Embeddings, norms and the head stay as they are, and so does, in 4 bits, a linear map whose number
    of inputs is no multiple of 64: bitsandbytes 0.50 decodes such a matrix wrongly on a CPU.

    Args:
        model: a directory or hub id (weights are quantised while they are read). device: as in ``load_model``.
        dtype: of what is not quantised and of the states; None keeps the checkpoint's.

    Raises:
        KDPruneError: a loaded model, a missing package, a device that the backend cannot use, nothing to quantise, and
            as ``load_model`` does.
    """
    target, wanted = resolve_device(device), resolve_dtype(dtype)
    _check(model, bits, backend, target)
    assert isinstance(model, str | Path)
    with _muted():
        skipped = _kept_whole(model, bits, backend, trust_remote_code)
        if bits == 4 and backend == "torchao":
            wanted = torch.bfloat16
        found = from_checkpoint(
            model, wanted, trust_remote_code, quantization_config=_config(bits, backend, skipped),
            device_map={"": str(target)})
        family_of(found)
        module: Any
        for module in found.modules():
            # The fused kernel of some CPUs computes in bfloat16 and packs the weights at the first pass.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every layer and pass: inputs are float16
    return found.requires_grad_(False).eval()


def quantised_share(model: PreTrainedModel) -> float:
    """Share of the decoder layers' parameters that are held in fewer bits than they stand for."""
    whole = held = 0
    for module in decoder_layers(model).modules():
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            size = parameter.numel() if state is None else int(torch.Size(state.shape).numel())
            low = type(parameter.data) is not torch.Tensor or not parameter.is_floating_point()
            whole, held = whole + size, held + size * low
    return held / whole


def _check(model: Any, bits: int, backend: str, device: torch.device) -> None:
    if isinstance(model, PreTrainedModel):
        raise KDPruneError(
            "got a loaded model to load in fewer bits, expected a directory or hub id: save it and give that")
    if (bits, backend) not in LOAD_IN.values():
        raise KDPruneError(f"got {bits} bits by {backend!r}, expected 8 or 4 by bitsandbytes or torchao")
    if importlib.util.find_spec(backend) is None:
        raise KDPruneError(
            f"{bits}-bit states need {backend}, which is not installed: pip install {backend}, or choose another of "
            f"{', '.join(LOAD_IN)}")
    version = importlib.metadata.version(backend)
    if _numbers(version) < _numbers(_OLDEST[backend]):
        raise KDPruneError(f"got {backend} {version}, expected {_OLDEST[backend]} or later: pip install -U {backend}")
    if backend == "torchao" and bits == 4 and device.type != "cuda":
        raise KDPruneError(
            f"torchao's 4-bit weights need a CUDA device, got {device}; expected load_in 4bit (bitsandbytes) or "
            f"8bit-torchao")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def _kept_whole(model: str | Path, bits: int, backend: str, trust_remote_code: bool) -> list[str]:
    """Names of the linear maps that are not quantised, from the architecture alone."""
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # whatever it is, loading says it better
        return []
    inside = f"{family_of(skeleton).layers}."
    kept, quantised = [], 0
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,) if backend == "torchao" else (nn.Linear, Conv1D)
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            inputs = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            if name.startswith(inside) and isinstance(module, kinds) and (bits == 8 or inputs % GROUP == 0):
                quantised += 1
            else:
                kept.append(name)
    if not quantised:
        raise KDPruneError(
            f"got {model}, in whose layers {backend} finds nothing to hold in {bits} bits; expected linear maps"
            + (f" with a multiple of {GROUP} inputs" if bits == 4 else ": choose bitsandbytes"))
    return kept


def _config(bits: int, backend: str, skipped: list[str]) -> Any:
    if backend == "bitsandbytes":
        four = {"bnb_4bit_quant_type": "nf4"} if bits == 4 else {}
        return BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=skipped, **four)
    try:
        quantization = importlib.import_module("torchao.quantization")
        if bits == 8:
            kind = quantization.Int8WeightOnlyConfig()
        else:
            kind = quantization.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    except (ImportError, AttributeError, TypeError, AssertionError) as error:
        raise KDPruneError(f"torchao cannot hold weights in {bits} bits here ({one_line(error)}): update it, or choose "
                           f"another of {', '.join(LOAD_IN)}") from error
    return TorchAoConfig(kind, modules_to_not_convert=skipped)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """The backends tell at import which of their kernels they did not find; loading says what matters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_libraries():
            yield
    finally:
        logging.disable(level)
