"""Writes a model as a Hugging Face checkpoint, and proves that what was written computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import KDPruneError
from .families import family_of


def save_model(model: PreTrainedModel, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write weights (safetensors), config, generation config and ``tokenizer`` to ``directory``.

    A model with stand-ins ships its code beside the weights, ``modeling_kdp.py``, named in the config's
    ``auto_map``; a stock model, dense or with layers dropped, stays a stock checkpoint.
    Raises KDPruneError for what is not a causal LM and where the directory cannot be written.
    """
    family_of(model)
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _save_weights(model, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        for weights in directory.glob("*.safetensors"):  # written for the owner alone
            weights.chmod((directory / "config.json").stat().st_mode)
    except (OSError, SafetensorError, ValueError) as error:
        raise KDPruneError(f"cannot write the checkpoint to {directory}: {error}") from error


def _save_weights(model: PreTrainedModel, directory: Path) -> None:
    """``save_pretrained``, with the generation config written as it is: some published ones are refused as new."""
    generation = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        model.save_pretrained(directory)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(directory / "generation_config.json")


@torch.no_grad()
def verify(directory: str | Path, model: PreTrainedModel, input_ids: Tensor) -> None:
    """Load ``directory`` as a user would, in the dtype of ``model``, and compare the logits of both.

    ``input_ids`` (B, T) are token ids. Both models run in evaluation mode on the device of ``model``.
    Raises KDPruneError if a weight is missing or left over, if logits are not finite, or if a bit differs.
    """
    result: Any = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        local_files_only=True,
        output_loading_info=True,
    )
    loaded, report = result
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = ", ".join(sorted(map(str, report[problem]))[:3])
            raise KDPruneError(f"the checkpoint in {directory} has {problem.replace('_', ' ')}: {names}")
    if type(loaded).__name__ != type(model).__name__:
        raise KDPruneError(f"{directory} loads as {type(loaded).__name__}, not as {type(model).__name__}")
    ids = input_ids.to(model.device)
    expected, found = _logits(model, ids), _logits(loaded.to(model.device), ids)
    if not torch.isfinite(expected).all():
        raise KDPruneError("the logits of the model in memory are not finite")
    if not torch.equal(expected, found):
        gap = (expected.double() - found.double()).abs().max().item()
        raise KDPruneError(
            f"the checkpoint in {directory} does not compute what was saved: logits differ by up to {gap:.3g}"
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (B, T, V) in evaluation mode; the mode of ``model`` is put back."""
    training = model.training
    try:
        return model.eval()(ids, use_cache=False).logits
    finally:
        model.train(training)
