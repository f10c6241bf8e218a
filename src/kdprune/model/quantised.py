"""The dense model in 8 or 4 bits, to collect layer states where it does not fit whole.

Only the weights of linear maps inside decoder layers are quantised. What is pruned, fitted in and saved stays the
full-precision model: a quantised one is its run's ``states_model`` and nothing else.
"""

import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from kdprune.errors import KDPruneError
from kdprune.model.families import decoder_layers, family_of, find_family
from kdprune.model.forms import located, quantised_by, text_tower
from kdprune.model.loading import from_checkpoint, resolve_dtype
from kdprune.runtime.machine import only_errors, resolve_device

LOAD_IN: dict[str, int] = {"8bit": 8, "4bit": 4}  # what ``load_in`` may say, in bits
BACKEND, OLDEST = "bitsandbytes", "0.46.1"
GROUP = 64  # inputs that share a scale in 4 bits


def check_load_in(load_in: str, model: str | Path | PreTrainedModel) -> None:
    """Raises KDPruneError for a name that is not in ``LOAD_IN``, and where :func:`load_quantised` would: at once."""
    if load_in not in LOAD_IN:
        raise KDPruneError(f"got load_in {load_in!r}, expected one of {', '.join(LOAD_IN)}")
    _check(model, LOAD_IN[load_in])


def load_quantised(
    model: str | Path | PreTrainedModel,
    bits: int,
    device: str | torch.device = "auto",
    *,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM whose decoder layers hold their linear maps in 8 or 4 bits, in eval mode, whole on ``device``.

    By bitsandbytes: LLM.int8() (inputs are rounded too, outlier channels kept in float16) or NF4 with one scale for 64
    values. Embeddings, norms and the head stay as they are, and so does, in 4 bits, a linear map whose number of inputs
    is no multiple of 64: bitsandbytes 0.50 decodes such a matrix wrongly on a CPU.

    Args:
        model: a directory or hub id (weights are quantised while they are read).
        bits: 8 or 4.
        device: as in ``load_model``.
        dtype: of what is not quantised and of the hidden states; None keeps the checkpoint's.

    Raises:
        KDPruneError: a loaded model, a missing package, nothing to quantise, and as ``load_model`` does.
    """
    target, wanted = resolve_device(device), resolve_dtype(dtype)
    _check(model, bits)
    assert isinstance(model, str | Path)
    with only_errors():  # it tells at import which of its kernels it did not find; loading says what matters
        skipped = _kept_whole(model, bits, trust_remote_code)
        found = from_checkpoint(
            model, wanted, trust_remote_code, quantization_config=_config(bits, skipped),
            device_map={"": str(target)})
        family_of(found)
        module: Any
        for module in found.modules():
            # The fused kernel of some CPUs computes in bfloat16 and packs the weights at the first pass.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every layer and pass: inputs are float16
    return found.requires_grad_(False).eval()


def _check(model: Any, bits: int) -> None:
    if isinstance(model, PreTrainedModel):
        raise KDPruneError(
            "got a loaded model to load in fewer bits, expected a directory or hub id: save it and give that")
    if located(model)[1]:
        raise KDPruneError(f"got {model} to load in fewer bits, expected no GGUF file, which is quantised already; "
                           "leave load_in out")
    if bits not in LOAD_IN.values():
        raise KDPruneError(f"got {bits} bits, expected 8 or 4")
    if importlib.util.find_spec(BACKEND) is None:
        raise KDPruneError(f"{bits}-bit states need {BACKEND}, which is not installed: pip install {BACKEND}")
    version = importlib.metadata.version(BACKEND)
    if _numbers(version) < _numbers(OLDEST):
        raise KDPruneError(f"got {BACKEND} {version}, expected {OLDEST} or later: pip install -U {BACKEND}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def _kept_whole(model: str | Path, bits: int, trust_remote_code: bool) -> list[str]:
    """Names of the linear maps that are not quantised, from the architecture alone."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        text = text_tower(config, model)
        auto = AutoModelForCausalLM if text is None else AutoModelForImageTextToText
        with torch.device("meta"):
            skeleton = auto.from_config(config, trust_remote_code=trust_remote_code)
    except KDPruneError:
        raise
    except Exception:  # whatever it is, loading says it better
        return []
    if (method := quantised_by(config)) is not None:
        raise KDPruneError(f"got {model} to load in fewer bits, which is quantised with {method} already; leave "
                           "load_in out, or give the model it was made from")
    layers = decoder_layers(skeleton) if text is None else skeleton.get_decoder().get_submodule(
        find_family(text).layers.partition(".")[2])
    inside = {id(module) for module in layers.modules()}
    kept, quantised = [], 0
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            inputs = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            if id(module) in inside and (bits == 8 or inputs % GROUP == 0):
                quantised += 1
            else:
                kept.append(name)
    if not quantised:
        raise KDPruneError(f"got {model}, in whose layers there is nothing to hold in {bits} bits; expected linear maps"
                           + (f" with a multiple of {GROUP} inputs" if bits == 4 else ""))
    return kept


def _config(bits: int, skipped: list[str]) -> BitsAndBytesConfig:
    four = {"bnb_4bit_quant_type": "nf4"} if bits == 4 else {}
    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=skipped, **four)
