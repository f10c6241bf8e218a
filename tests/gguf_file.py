"""A tiny Llama with its byte-level tokenizer as a GGUF file, written with the format's own library."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: Path, file: Path) -> None:
    """The checkpoint of a Llama at ``model``, weights in 8 bits where the format's blocks of 32 allow."""
    import gguf

    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    words = sorted(vocabulary, key=lambda word: int(vocabulary[word]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*words, *(f"[unused{i}]" for i in range(config["vocab_size"] - len(words)))])
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words]
                           + [5] * (config["vocab_size"] - len(words)))
    writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in load_file(model / "model.safetensors").items():
        weights = tensor.float()
        if "q_proj" in name or "k_proj" in name:  # the format turns pairs of the rotation, not halves
            count = heads if "q_proj" in name else groups
            weights = weights.view(count, 2, -1, weights.shape[1]).transpose(1, 2).reshape(weights.shape)
        eight = weights.dim() > 1 and weights.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if eight else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weights.numpy(), kind)
        writer.add_tensor(_renamed(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, index, *rest = name.split(".")
        return f"blk.{index}.{NAMES['.'.join(rest[:-1])]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight"}[name]


def near(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square difference relative to what was expected."""
    return float((found - expected).norm() / expected.norm())
