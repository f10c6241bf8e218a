"""The architectures that the scripts train: a row a family, from one shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama import LlamaConfig
from transformers.models.opt import OPTConfig
from transformers.models.qwen3 import Qwen3Config

Shape = Mapping[str, Any]     # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, …


@dataclass(frozen=True)
class Family:
    """What the card says of a family, its config for a shape, and the projections that write to the residual stream."""

    words: str
    config: Callable[[Shape], PretrainedConfig]
    writers: tuple[str, ...]


def opt_config(shape: Shape) -> OPTConfig:
    """OPT's names; each head has its own keys and values, and the feed-forward part is wider for want of a gate."""
    values = {name: value for name, value in shape.items()
              if name not in ("intermediate_size", "num_key_value_heads", "head_dim")}
    return OPTConfig(**values, ffn_dim=shape["intermediate_size"] * 3 // 2, word_embed_proj_dim=shape["hidden_size"],
                     dropout=0.0, attention_dropout=0.0)


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama architecture (RMSNorm, rotary positions, SwiGLU, grouped-query attention)",
                    lambda shape: LlamaConfig(**shape), ("o_proj", "down_proj")),
    "opt": Family("OPT architecture (LayerNorm, learned positions, ReLU, biases)", opt_config, ("out_proj", "fc2")),
    "qwen3": Family("Qwen3 architecture (RMSNorm, rotary positions, SwiGLU, grouped-query attention, normed queries "
                    "and keys)", lambda shape: Qwen3Config(**shape), ("o_proj", "down_proj")),
}


def new_model(
    family: str, shape: Shape, length: int, tokenizer: PreTrainedTokenizerBase, attention: str
) -> PreTrainedModel:
    """Newly drawn weights, tied embeddings; residual branches start small, so that depth does not add up."""
    row = FAMILIES[family]
    config = row.config({
        **shape, "vocab_size": len(tokenizer), "max_position_embeddings": length, "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in row.writers:
                module.weight.div_(math.sqrt(2 * config.num_hidden_layers))
    return model
