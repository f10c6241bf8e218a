"""Loading a causal LM and its tokenizer, with errors a person can act on.

A directory is checked before transformers opens it, and every weight the architecture asks for must be in the
checkpoint: a model that is silently initialised at random is impossible.
"""

import contextlib
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from kdprune.errors import KDPruneError, one_line, shortened
from kdprune.model.families import family_of
from kdprune.model.forms import (
    WEIGHTS,
    check_adapter,
    check_loaded,
    check_quantised,
    dequantised,
    load_tower,
    located,
    quantised_by,
    text_tower,
)
from kdprune.model.placement import is_dispatched
from kdprune.runtime.distributed import world
from kdprune.runtime.machine import quiet_libraries, resolve_device
from kdprune.store.files import is_there, tell

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    known_family: bool = True,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> PreTrainedModel:
    """A causal LM in eval mode from a directory, a hub id, or a loaded model (which is returned itself).

    device: "auto" takes the accelerator if there is one and leaves a loaded model where it is; dtype: None or
    "auto" keeps the checkpoint's; known_family: refuse an architecture without a row in the family table.
    device_map, max_memory, offload_folder: as in transformers, instead of ``device``, for a model that one device does
    not hold: "auto" fills the accelerators, then the host's memory, then the disk. A model that is placed so already
    stays where it is.
    Raises KDPruneError, in one line, for whatever is wrong with the checkpoint.
    """
    wanted = resolve_dtype(dtype)
    target = resolve_device(device)
    placed = {} if device_map is None else _placed(model, device, device_map, max_memory, offload_folder)
    if isinstance(model, PreTrainedModel):
        found = model
        target = found.device if device == "auto" else target
    elif isinstance(model, str | Path):
        found = from_checkpoint(model, wanted, trust_remote_code, full=known_family, **placed)
    else:
        check_loaded(model)
        raise AssertionError("unreachable: it is no PreTrainedModel")
    if known_family:
        check_loaded(found)
        family_of(found)
    if is_dispatched(found) or placed:
        if found.dtype != (wanted or found.dtype) or (device != "auto" and not placed):
            raise KDPruneError(
                f"got device {str(device)!r} and dtype {str(dtype)!r} with a model placed by device_map, expected "
                f"neither: load it as it is wanted")
        return found.eval()
    module: torch.nn.Module = found
    if (target, wanted or found.dtype) != (found.device, found.dtype):
        module.to(device=target, dtype=wanted)
    return found.eval()


def _placed(
    model: Any, device: str | torch.device, device_map: str | Mapping[str, Any],
    max_memory: Mapping[int | str, int | str] | None, offload_folder: str | Path | None,
) -> dict[str, Any]:
    """What ``from_pretrained`` is told of the placement. Raises KDPruneError for what cannot be."""
    if isinstance(model, PreTrainedModel) or device != "auto":
        given = "a loaded model" if isinstance(model, PreTrainedModel) else f"device {str(device)!r}"
        raise KDPruneError(f"got device_map with {given}, expected it alone, with a directory or hub id")
    if importlib.util.find_spec("accelerate") is None:
        raise KDPruneError("device_map needs accelerate, which is not installed: pip install accelerate")
    wanted = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    return {name: value if isinstance(value, str | Path | None) else dict(value) for name, value in wanted.items()}


def load_tokenizer(
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer given (an object, a directory or a hub id), else the one beside the model, or None.

    Raises KDPruneError for a tokenizer that is there but damaged, or was asked for by name and is missing.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        raise KDPruneError(
            f"got a tokenizer of type {type(tokenizer).__name__}, expected a name or a transformers tokenizer"
        )
    beside = str(model.name_or_path if isinstance(model, PreTrainedModel) else model)
    name = str(tokenizer) if tokenizer is not None else beside
    place, file = located(name) if name else (name, {})
    local = is_there(place) and Path(place).is_dir()
    if tokenizer is None and not file and (
        not name or (local and not any((Path(name) / file).exists() for file in TOKENIZER_FILES))
    ):
        return None
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **file)
    except Exception as error:  # OSError, ValueError, KeyError, JSON and Rust errors, by kind of damage
        if tokenizer is None and not local and not _has_tokenizer(place):
            return None
        raise KDPruneError(
            f"cannot load the tokenizer of {shortened(name)} ({one_line(error)}); "
            "give another one, or save or download it again"
        ) from error


def _has_tokenizer(name: str | Path) -> bool:
    """Whether a hub repository, as far as it can be reached, holds any file of a tokenizer."""
    quietly: Any = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_gated_repo",
                                  "_raise_exceptions_for_connection_errors"), False)
    try:
        return any(cached_file(name, file, **quietly) is not None for file in TOKENIZER_FILES)
    except (OSError, ValueError):  # no such repository, or no name of one
        return False


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``"bfloat16"`` → torch.bfloat16; None and "auto" → None, which keeps the checkpoint's.

    Raises KDPruneError for a name that is no floating-point dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or found.itemsize < 2 or not found.is_floating_point:
        raise KDPruneError(f"got dtype {str(dtype)!r}, expected auto, float32, bfloat16 or float16")
    return found


# ---------------------------------------------------------------------------------- from a checkpoint


def from_checkpoint(
    name: str | Path, dtype: torch.dtype | None, trust_remote_code: bool, full: bool = False, **options: Any
) -> PreTrainedModel:
    """A causal LM from a directory, GGUF file or hub id, every weight accounted for; options as of ``from_pretrained``.

    Of a multimodal model it is the text tower. With ``full`` quantised weights are turned back into full precision,
    which is told. Raises KDPruneError as :func:`load_model` does.
    """
    with checkpoint_errors(name, trust_remote_code):
        place, file = located(name)
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **file)
        how, method = check_quantised(config, name) if full else None, quantised_by(config)
        if how is not None and how.options:
            config.quantization_config = {**_plain(config.quantization_config), **how.options}
        options |= {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code, **file}
        if text_tower(config, name) is not None:
            found, info = load_tower(place, config, **options)
        else:
            _check_causal(config, str(name), trust_remote_code)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, config=config, output_loading_info=True, **options)
            found, info = loaded
        check_weights(info, name)
        if how is not None or file:
            found = dequantised(found)
            found.name_or_path = found.config.name_or_path = str(name)
        if how is not None:
            _say(f"{name} is quantised with {method}: turned back into full precision, in which it is pruned and saved")
        if file:
            _say(f"{name} is a GGUF file: its weights are read into full precision, in which they are pruned and saved")
        if text_tower(config, name) is not None:
            _say(f"{name} is a multimodal model ({config.model_type}): its text part is taken, a "
                 f"{type(found).__name__}; the result is a model of text alone")
    return found


def _say(line: str) -> None:
    if world().first:
        tell(line)


def _plain(about: Any) -> dict[str, Any]:
    return dict(about) if isinstance(about, Mapping) else about.to_dict()


@contextlib.contextmanager
def checkpoint_errors(name: str | Path, trust_remote_code: bool) -> Iterator[None]:
    """While a checkpoint is read: libraries are quiet, and whatever they raise becomes a KDPruneError of one line.

    A directory is checked first; KDPruneError also for a name that is neither a directory nor a hub id.
    """
    path, there = Path(name), is_there(name)
    file = located(name)[1]
    local = there and (path.is_dir() or bool(file))
    if local and not file:
        check_adapter(path)
        _check_directory(path)
    elif not local and (there or not HUB_ID.fullmatch(str(name))):
        kind = "a file" if there else "no such directory"
        raise KDPruneError(
            f"got model {shortened(name)}, which is {kind}; expected a directory with config.json, a .gguf file or a "
            "hub id"
        )
    try:
        with quiet_libraries(progress=not local and sys.stderr.isatty()):
            yield
    except KDPruneError:
        raise
    except Exception as error:  # transformers, the hub client and safetensors raise many kinds
        raise KDPruneError(_explain(error, name, local, trust_remote_code)) from error


def read_config(name: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a checkpoint, of a multimodal one its text tower's. Raises KDPruneError unless it describes a
    causal LM."""
    place, file = located(name)
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **file)
    if (text := text_tower(config, name)) is not None:
        if getattr(config, "quantization_config", None) is not None:
            text.quantization_config = config.quantization_config
        text.dtype = text.dtype or config.dtype
        return text
    _check_causal(config, str(name), trust_remote_code)
    return config


def _explain(error: Exception, name: str | Path, local: bool, trust_remote_code: bool) -> str:
    text = one_line(error)
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return (
            f"model {str(name)!r} needs code of its own, which is not run; read it, then --trust-remote-code"
        )
    if local:
        return (
            f"cannot load the model in {name} ({text}); expected a whole causal LM, download or save it again"
        )
    return (
        f"got model {str(name)!r}: no such directory here, and the hub did not give it ({text}); "
        "check the name, the network and your access, or give a local directory"
    )


def _check_directory(path: Path) -> None:
    """A directory holds a readable config.json and all its weight files whole."""
    config = path / "config.json"
    if not config.is_file():
        raise KDPruneError(
            f"got {path} without config.json, expected a Hugging Face checkpoint; check the path"
        )
    entries = _read_json(config)
    if not isinstance(entries.get("model_type"), str):
        raise KDPruneError(f"got {config} without model_type, expected a transformers model; save it again")
    _check_shards(path)
    if not any(found for pattern in WEIGHTS for found in path.glob(pattern)):
        raise KDPruneError(f"got {path} without weights, expected *.safetensors in it; copy them there")
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise KDPruneError(
                f"got {file}, which is truncated or damaged ({one_line(error)}); "
                "expected a whole safetensors file, download or save it again"
            ) from error


def _check_shards(path: Path) -> None:
    index = path / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise KDPruneError(f"got {index} without weight_map, expected names and files; save the model again")
    missing = sorted({str(file) for file in listed.values() if not (path / str(file)).is_file()})
    if missing:
        raise KDPruneError(
            f"got {path} without {missing[0]} ({len(missing)} missing in all), expected the shards "
            f"that {SAFE_WEIGHTS_INDEX_NAME} names; download them"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KDPruneError(f"cannot read {path} ({one_line(error)}); expected JSON, save it again") from error
    if not isinstance(entries, dict):
        raise KDPruneError(f"got a {type(entries).__name__} in {path}, expected a JSON object; save it again")
    return entries


def _check_causal(config: PreTrainedConfig, name: str, trust_remote_code: bool) -> None:
    """The checkpoint is of a decoder-only model with a language-modelling head."""
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    saved = getattr(config, "architectures", None) or []
    if config.is_encoder_decoder:
        problem = f"an encoder-decoder ({config.model_type})"
    elif getattr(config, "num_hidden_layers", 1) == 0:
        problem = "a model without layers"
    elif own_code:
        return
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = f"a model of type {config.model_type}, which has no causal LM"
    else:
        known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        names = {
            getattr(entry, "__name__", "") for entry in (known if isinstance(known, tuple) else (known,))
        }
        if not saved or names & set(saved):
            return
        problem = f"{saved[0]}, which has no causal language-modelling head"
    raise KDPruneError(f"got {name}, {problem}; expected a causal LM such as LlamaForCausalLM")


def check_weights(info: dict[str, Any], name: str | Path) -> None:
    """Nothing was initialised at random, and no stand-in was left out."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise KDPruneError(
            f"got {name} without the weight {missing[0]} ({len(missing)} missing in all); "
            "expected every weight of the architecture, save or download the model again"
        )
    stray = sorted(key for key in info["unexpected_keys"] if ".kdp." in key or ".kdp_" in key)
    if stray:
        raise KDPruneError(
            f"got {name} with stand-in {stray[0]} under a stock model_type; "
            "expected kdp_<family> in its config.json, restore it"
        )
    if info["unexpected_keys"]:
        logging.getLogger(__name__).warning(
            "%s holds %d weights the architecture does not use, e.g. %s",
            name,
            len(info["unexpected_keys"]),
            sorted(info["unexpected_keys"])[0],
        )
