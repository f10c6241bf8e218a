"""One tiny config per family, and variants where surgery must take care: d = 32, 6 layers, 64 tokens."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdprune.testing import with_random_weights

WIDTH, LAYERS, VOCABULARY = 32, 6, 64
_COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"] * 2
_FALCON = {"ffn_hidden_size": 48}
_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}

# name: (model_type, what differs from _COMMON)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"tie_word_embeddings": False}),
    "llama3": ("llama", {**_GQA, "tie_word_embeddings": False}),
    "llama3.1": ("llama", {**_GQA, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {**_GQA, "sliding_window": 4}),
    "qwen2": ("qwen2", {**_GQA, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**_GQA, **_WINDOW}),
    "qwen3": ("qwen3", {**_GQA}),
    "qwen3-window": ("qwen3", {**_GQA, **_WINDOW}),
    "gemma2": ("gemma2", {**_GQA, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "gemma3_text",
        {**_GQA, "sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
    ),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "opt": ("opt", {"ffn_dim": 48, "dropout": 0.0}),
    "opt-350m": (
        "opt",
        {"ffn_dim": 48, "dropout": 0.0, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "gpt2": ("gpt2", {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "phi": ("phi", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "gemma": ("gemma", {**_GQA}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "stablelm", {"num_key_value_heads": 2, "use_parallel_residual": True, "qk_layernorm": True}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2, "intermediate_size": 60}),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, **_WINDOW, "no_rope_layers": [1, 0, 1, 0, 1, 1]}),
    "granite": ("granite", {
        "num_key_value_heads": 2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.4,
        "logits_scaling": 2.0}),
    "ministral": ("ministral", {**_GQA, "sliding_window": 4, "layer_types": _TYPES}),
    "falcon": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, **_FALCON}),
    "falcon-7b": ("falcon", {**_FALCON}),
    "falcon-sequential": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True, **_FALCON}),
    "bloom": ("bloom", {}),
    "gptj": ("gptj", {"n_inner": 48, "rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "cohere2": ("cohere2", {**_GQA, "sliding_window": 4, "layer_types": _TYPES}),
    "olmo": ("olmo", {"num_key_value_heads": 2, "clip_qkv": 0.5}),
    "nemotron": ("nemotron", {**_GQA}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {
        **_GQA, "moe_intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
        "mlp_only_layers": [3, 5]}),
}

# Wired as another config of their family but in one point. The others stand for one family each.
VARIANTS = (
    "llama2", "llama3", "qwen2-window", "qwen3-window", "gpt_neox-sequential", "opt-350m", "stablelm-parallel",
    "falcon-7b", "falcon-sequential")
REPRESENTATIVES = tuple(name for name in CONFIGS if name not in VARIANTS)
NORMS_BEHIND = ("gemma2", "gemma3", "opt-350m", "olmo2")  # a norm between a sublayer and its sum, or behind the sum
# Later families. Every method that makes something of how layers are wired prunes those that differ in that: no norm in
# front of a sublayer; a multiplier of what sublayers put out; tuples, grouped queries in a fused projection, an MLP
# without biases behind a norm with one; sublayers that add the residual, ALiBi. The others stand under the contract.
WIRED = ("olmo2", "granite", "falcon", "bloom")
ALIKE = (
    "phi", "gemma", "stablelm", "stablelm-parallel", "smollm3", "ministral", "falcon-7b", "falcon-sequential", "gptj",
    "cohere2", "olmo", "nemotron")
EXPERTS = ("mixtral", "qwen3_moe")
EARLIER = tuple(name for name in CONFIGS if name not in (*WIRED, *ALIKE, *EXPERTS))
TRIED = (*EARLIER, *WIRED)
EARLIER_FAMILIES = tuple(name for name in EARLIER if name not in VARIANTS)
# For what is not about a family but reads the table of families; every way of wiring is in one of them: tied
# embeddings and scaled rotations, layers with and without a window, norms behind, parallel sublayers and fused
# attention, a fused MLP, projected embeddings, Conv1D and learned positions.
WIRINGS = ("llama3.1", "qwen3-window", "gemma3", "gpt_neox", "phi3", "opt-350m", "gpt2")


def build(name: str, seed: int = 0, std: float = 0.15) -> PreTrainedModel:
    """The tiny model ``name`` with seeded normal weights, large enough that every layer changes the logits."""
    model_type, options = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **options})
    return with_random_weights(AutoModelForCausalLM.from_config(config), seed, std)
