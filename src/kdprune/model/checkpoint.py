"""Writes a model as a Hugging Face checkpoint, and proves that what was written computes the same."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, TRANSFORMERS_DYNAMIC_MODULE_NAME

from ..data.tokens import TokenSet
from ..errors import KDPruneError, one_line
from ..runtime.machine import quiet_libraries
from .families import family_of, has_experts
from .layerwise import forward_streamed
from .placement import input_device, is_dispatched, sourced
from .streaming import is_streamed, load_streamed, source_of
from .weights import write_tensors

SHARD = "5GB"  # most of the weights that one file holds


def save_model(
    model: PreTrainedModel, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *,
    max_shard_size: int | str = SHARD,
) -> None:
    """Write weights (safetensors), config, generation config and ``tokenizer`` to ``directory``.

    A model with stand-ins ships its code beside the weights, ``modeling_kdp.py``, named in the config's
    ``auto_map``; a stock model, dense or with layers dropped, stays a stock checkpoint. The weights of a streamed
    model pass through memory one tensor at a time; what is written is the same, byte for byte.
    ``max_shard_size``: of one weight file, in bytes or as "5GB"; a larger tensor has a file of its own.
    Raises KDPruneError for what is not a causal LM and where the directory cannot be written.
    """
    family_of(model)
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _save_weights(model, directory, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        for weights in directory.glob("*.safetensors"):  # written for the owner alone
            weights.chmod((directory / "config.json").stat().st_mode)
    except KDPruneError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise KDPruneError(f"cannot write the checkpoint to {directory}: {reason}") from error


def _save_weights(model: PreTrainedModel, directory: Path, max_shard_size: int | str) -> None:
    """``save_pretrained``, with the generation config written as it is: some published ones are refused as new."""
    generation = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        with sourced(model), warnings.catch_warnings():
            # transformers writes offloaded weights under the names of the model in memory, and tied ones twice.
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            if is_streamed(model):
                model.save_pretrained(directory, state_dict={})  # all but weights
                _stream_weights(model, directory, max_shard_size)
            else:
                model.save_pretrained(directory, max_shard_size=max_shard_size)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")


def _stream_weights(model: PreTrainedModel, directory: Path, max_shard_size: int | str) -> None:
    """What ``save_pretrained`` does with weights, on tensors of which some are still in another checkpoint."""
    state = _state(model)
    shards = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        write_tensors({name: state[name] for name in names}, directory / file, _weights)
    if shards.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **shards.metadata}
        index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
        content = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(content, encoding="utf-8")


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """The tensors that ``save_pretrained`` writes, under the names it gives them."""
    # The parameters themselves, not detached: it is they that know where their weights are.
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    left_out = model._keys_to_ignore_on_save or ()
    # Experts are taken apart there, and parts of a parameter that is elsewhere would not know where.
    whole = has_experts(model)
    state = {name: _weights(tensor) if whole else tensor for name, tensor in state.items() if name not in left_out}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def _weights(tensor: Tensor) -> Tensor:
    """The values of a tensor, in memory."""
    if isinstance(tensor, nn.Parameter) and tensor.is_meta:
        tensor = source_of(tensor).read()
    return tensor.detach().cpu()


@torch.no_grad()
def verify(directory: str | Path, model: PreTrainedModel, input_ids: Tensor) -> None:
    """Load ``directory`` as a user would, in the dtype of ``model``, and compare the logits of both.

    ``input_ids`` (B, T) are token ids. Both models run in evaluation mode on the device of ``model``; what was saved
    from a streamed model is streamed too. Raises KDPruneError if a weight is missing or left over, if logits are not
    finite, or if a bit differs.

    Grouped products of experts give other last bits where weights lie at other offsets in memory, as those mapped from
    a file do: where logits differ, weights are moved to memory of their own and logits taken again.
    """
    if not is_dispatched(model):
        _compare(directory, model, input_ids)
        return
    # Experts, which are put together from a file's tensors, are offloaded to files of their own.
    with tempfile.TemporaryDirectory(prefix=".offloaded-", dir=directory) as folder:
        _compare(directory, model, input_ids, folder)


def _compare(directory: str | Path, model: PreTrainedModel, input_ids: Tensor, folder: str | None = None) -> None:
    """As :func:`verify`, with a ``folder`` for offloaded weights."""
    loaded: Any = _loaded_streamed(directory, model) if is_streamed(model) else _loaded(directory, model, folder)
    if type(loaded).__name__ != type(model).__name__:
        raise KDPruneError(f"{directory} loads as {type(loaded).__name__}, not as {type(model).__name__}")
    if has_experts(model):  # through the same of transformers' implementations, whose last bits differ
        loaded.set_experts_implementation(model.config._experts_implementation)
    if not is_dispatched(loaded) and not is_streamed(loaded):
        loaded.to(input_device(model))
    expected, found = _logits(model, input_ids), _logits(loaded, input_ids)
    if not torch.isfinite(expected).all():
        raise KDPruneError("the logits of the model in memory are not finite")
    if not torch.equal(expected, found):
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
        found = _logits(loaded, input_ids)
    if not torch.equal(expected, found):
        gap = (expected.double() - found.double()).abs().max().item()
        raise KDPruneError(
            f"the checkpoint in {directory} does not compute what was saved: logits differ by up to {gap:.3g}"
        )


def _loaded(directory: str | Path, model: PreTrainedModel, folder: str | None = None) -> Any:
    """What ``directory`` holds, in the dtype of ``model`` and placed as it is; refused unless its weights are those
    asked for."""
    where: Any = getattr(model, "hf_device_map", None) if is_dispatched(model) else None
    placed: dict[str, Any] = {} if where is None else {"device_map": dict(where), "offload_folder": folder}
    if runs_own_code(model):  # which the user let run, and which is what was written
        placed["trust_remote_code"] = True
    with quiet_libraries():
        result: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            local_files_only=True,
            output_loading_info=True,
            **placed,
        )
    loaded, report = result
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _refuse(directory, problem, map(str, report.get(problem) or ()))
    return loaded


def _loaded_streamed(directory: str | Path, model: PreTrainedModel) -> PreTrainedModel:
    """The same, streamed."""
    stored: dict[str, list[int]] = {}
    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
    expected = {name: list(tensor.shape) for name, tensor in _state(model).items()}
    _refuse(directory, "missing_keys", expected.keys() - stored.keys())
    _refuse(directory, "unexpected_keys", stored.keys() - expected.keys())
    _refuse(directory, "mismatched_keys", (name for name, shape in stored.items() if shape != expected[name]))
    loaded = load_streamed(
        directory, dtype=model.dtype, device=input_device(model), trust_remote_code=runs_own_code(model))
    loaded.set_attn_implementation(model.config._attn_implementation)
    return loaded


def runs_own_code(model: PreTrainedModel) -> bool:
    """Whether the model's class came with its checkpoint."""
    return type(model).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def _refuse(directory: str | Path, problem: str, found: Iterable[str]) -> None:
    """Raises KDPruneError if any weight was found to have this problem."""
    if names := sorted(found):
        raise KDPruneError(f"the checkpoint in {directory} has {problem.replace('_', ' ')}: {', '.join(names[:3])}")


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (B, T, V) in evaluation mode; the mode of ``model`` is put back."""
    training = model.training
    try:
        batch = TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), "probe")  # type: ignore[arg-type]
        return next(forward_streamed(model.eval(), [batch]))
    finally:
        model.train(training)
