"""The forms that checkpoints have beside a plain causal LM in full precision, and what becomes of each before any work.

Quantised weights and GGUF files are turned back into full precision where transformers can; of a multimodal model the
text tower is taken; adapters and wrappers have to be taken off first. What cannot be is told in one line.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.model.modeling_kdp import FAMILIES, PREFIX
from kdprune.store.files import is_there

GGUF = ".gguf"
ADAPTER = "adapter_config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Quantisation:
    """What transformers needs to turn weights of one method back into full precision.

    Attributes:
        package: has to be installed.
        options: of the quantisation config, with which they are turned back as they are read.
    """

    package: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


# By quant_method. Methods without a row leave nothing that full precision could be had from (GPTQ, AWQ, …).
DEQUANTISED: dict[str, Quantisation] = {
    "bitsandbytes": Quantisation("bitsandbytes"),
    "torchao": Quantisation("torchao"),
    "fp8": Quantisation(options={"dequantize": True}),
    "mxfp4": Quantisation(options={"dequantize": True}),
    "compressed-tensors": Quantisation("compressed_tensors", {"run_compressed": False}),
}
# What modules that hold a model are called, and how to get it out.
WRAPPERS = {
    "PeftModel": "merge it: model.merge_and_unload()", "OptimizedModule": "give model._orig_mod",
    "DataParallel": "give model.module", "DistributedDataParallel": "give model.module",
    "FullyShardedDataParallel": "give a model that is not sharded",
}
MERGE = "merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory)"


# ------------------------------------------------------------------------------------------ where it lies


def located(name: str | Path) -> tuple[str | Path, dict[str, str]]:
    """What ``from_pretrained`` is given for a name: the name, or of a GGUF file its directory and ``gguf_file``.

    Raises:
        KDPruneError: a directory with several GGUF files and nothing else.
    """
    path = Path(name)
    if not is_there(name):
        return name, {}
    if path.is_file() and path.suffix.lower() == GGUF:
        return path.parent, {"gguf_file": path.name}
    if not path.is_dir() or any(found for pattern in WEIGHTS for found in path.glob(pattern)):
        return name, {}
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == GGUF)
    if len(files) > 1:
        raise KDPruneError(f"got {path} with {len(files)} GGUF files, expected one; give one of them, as {files[0]}")
    return (path, {"gguf_file": files[0].name}) if files else (name, {})


def check_adapter(name: str | Path) -> None:
    """Raises KDPruneError for a directory with an adapter, alone or beside a model."""
    if is_there(name) and (Path(name) / ADAPTER).is_file():
        raise KDPruneError(f"got {name}, which holds an adapter (LoRA); {MERGE}, and give that directory")


# ------------------------------------------------------------------------------------------ how it is stored


def quantised_by(config: PreTrainedConfig | PreTrainedModel) -> str | None:
    """The quantisation method of a checkpoint's config or a loaded model, as transformers calls it."""
    config = config.config if isinstance(config, PreTrainedModel) else config
    about: Any = getattr(config, "quantization_config", None)
    if about is None:
        text = getattr(config, "text_config", None)
        return None if text is None else quantised_by(text)
    method = about.get("quant_method") if isinstance(about, Mapping) else getattr(about, "quant_method", None)
    if method is None and isinstance(about, Mapping) and (about.get("load_in_4bit") or about.get("load_in_8bit")):
        method = "bitsandbytes"  # as older checkpoints say it
    return str(getattr(method, "value", method) or "an unknown method")


def check_quantised(config: PreTrainedConfig, name: str | Path, packages: bool = True) -> Quantisation | None:
    """How the weights become full precision again; None where they are. Raises KDPruneError where they cannot, or where
    (``packages``) that needs a package which is not installed."""
    method = quantised_by(config)
    if method is None:
        return None
    how = DEQUANTISED.get(method)
    if how is None:
        raise KDPruneError(f"got {name}, which is quantised with {method} and cannot be turned back; expected weights "
                           f"in full precision, or quantised with {', '.join(DEQUANTISED)}: give the model it was made "
                           "from")
    if packages and how.package is not None and importlib.util.find_spec(how.package) is None:
        package = how.package.replace("_", "-")
        raise KDPruneError(f"got {name}, which is quantised with {method}; to turn it back: pip install {package}, or "
                           "give the model it was made from")
    return how


@torch.no_grad()
def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The loaded model in full precision, in the dtype of its config."""
    dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantised_by(model) == "bitsandbytes":
        model.dequantize(dtype)
    else:  # weights are tensors that know what they stand for
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and type(parameter.data) is not torch.Tensor:
                    setattr(module, name, nn.Parameter(parameter.dequantize().to(dtype), requires_grad=False))
        if quantiser is not None:
            quantiser.remove_quantization_config(model)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    # How the names and forms of weights were changed as they were read, which saving does backwards: the architecture's
    # own changes are found again by transformers, those of the quantisation are no more.
    vars(model).pop("_weight_conversions", None)
    return model


# ------------------------------------------------------------------------------------------ what is in it


def text_tower(config: PreTrainedConfig, name: str | Path) -> PreTrainedConfig | None:
    """The config of the text tower of a multimodal model, None where the model is one of text.

    Raises:
        KDPruneError: its text tower is of no known family.
    """
    text = getattr(config, "text_config", None)
    if not isinstance(text, PreTrainedConfig) or config.model_type.removeprefix(PREFIX) in FAMILIES:
        return None
    if text.model_type not in FAMILIES:
        raise KDPruneError(f"got {name}, a model of type {config.model_type} whose text part is a {text.model_type}, "
                           f"of no known family; expected one of {', '.join(sorted(FAMILIES))}")
    return text


def load_tower(name: str | Path, config: PreTrainedConfig, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The text tower with its head as a causal LM, and what was found while loading; options as of ``from_pretrained``.

    The whole model is read; its other parts are let go.
    """
    loaded: Any = AutoModelForImageTextToText.from_pretrained(name, config=config, output_loading_info=True, **options)
    whole, info = loaded
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    with torch.device("meta"):
        found: Any = AutoModelForCausalLM.from_config(decoder.config)
    if type(found.base_model) is not type(decoder):
        raise KDPruneError(f"got {name}, whose text part is a {type(decoder).__name__}, expected a "
                           f"{type(found.base_model).__name__}; save it as a causal LM of its own first")
    setattr(found, found.base_model_prefix, decoder)
    found.set_output_embeddings(head)
    decoder.config.tie_word_embeddings = head.weight is found.get_input_embeddings().weight
    found.config = decoder.config
    found.config.dtype = decoder.dtype
    found.name_or_path = found.config.name_or_path = str(name)
    found.generation_config = whole.generation_config
    return found, info


def check_loaded(model: Any) -> None:
    """Raises KDPruneError for what is no plain transformer: a wrapper, one with an adapter in it, a quantised one."""
    for kind in type(model).__mro__:
        if kind.__name__ in WRAPPERS:
            raise KDPruneError(f"got a model of type {type(model).__name__}, expected a transformers PreTrainedModel; "
                               f"{WRAPPERS[kind.__name__]}")
    if not isinstance(model, PreTrainedModel):
        raise KDPruneError(f"got a model of type {type(model).__name__}, expected a directory, a hub id "
                           "or a transformers PreTrainedModel")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise KDPruneError("got a model that holds an adapter (LoRA), expected plain weights; merge it first: "
                           "PeftModel.merge_and_unload(), or model.delete_adapter(name)")
    if "flash" in (attention := str(getattr(model.config, "_attn_implementation", None))):
        raise KDPruneError(f"got a model with attention by {attention}, which has no float32, in which layers are "
                           "fitted; expected torch's: load it with attn_implementation='sdpa'")
    if (method := quantised_by(model)) is not None:
        raise KDPruneError(f"got a loaded model that is quantised with {method}, expected full precision; give its "
                           "directory or hub id, which is turned back where that can be, or the model it was made from")
