"""A real llama.cpp on exported results: greedy tokens equal to transformers', log-probabilities to rounding.

    pip install xllamacpp 'kdprune[gguf]' && pytest -m serving tests/serving/test_llama_cpp.py

Skipped where either is missing.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from families import _COMMON, CONFIGS
from tiny_checkpoint import WORDS, Bench
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kdprune.model.checkpoint import save_model
from kdprune.model.llama_cpp import export_gguf
from kdprune.model.surgery import Drop, apply_edits
from kdprune.testing import edits_of, with_random_weights

MISSING = [name for name in ("xllamacpp", "conversion", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.serving, pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install xllamacpp "
                                             "'kdprune[gguf]')")]
NEW = 12
PROMPTS = ("The", "the cat sat on the mat", "a = 12345 + 6 * 78 - 9", "It's the\n\n  end, isn't it?", "Größe — naïve ✓")
# Stock results of every family that llama.cpp knows and whose tokenizer may be byte-level, and layers of other widths.
STOCK = ("llama2", "llama3.1", "qwen3", "gpt_neox", "gpt_neox-sequential", "gpt2", "granite", "olmo2",
         "stablelm", "phi", "bloom", "falcon", "falcon-7b")
CASES = [*((name, "drop") for name in STOCK), ("llama3", "rewrite"), ("llama3", "whole"), ("gemma3", "period"),
         *((name, kind) for name in ("llama2", "llama3", "llama3.1", "mistral") for kind in ("channels", "layer"))]


def tiny(name: str) -> PreTrainedModel:
    """A model of tests/families.py with the vocabulary of the byte-level tokenizer, and no window."""
    model_type, options = CONFIGS[name]
    options = {**_COMMON, **options, "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if model_type == "mistral":
        options["sliding_window"] = None
    if name in ("gpt2", "phi"):
        options |= {"num_key_value_heads": 4, "intermediate_size": 96, "n_inner": 96}
    if model_type == "gpt_neox":
        options["tie_word_embeddings"] = False
    if name == "gemma3":
        options |= {"sliding_window_pattern": 6, "num_hidden_layers": 12}
    config = AutoConfig.for_model(model_type, **options)
    if model_type in ("gpt_neox", "phi", "stablelm", "falcon"):  # of which the converter says no base
        config.rope_parameters["rope_theta"] = 500.0
        if "partial_rotary_factor" in config.rope_parameters:  # more dimensions than the two that have no base
            config.rope_parameters["partial_rotary_factor"] = 0.5
    return with_random_weights(AutoModelForCausalLM.from_config(config))


def server(file: Path) -> Any:
    """llama.cpp on this file, with a cache in float32."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.n_ctx, options.n_parallel, options.warmup = 64, 1, False
    options.cpuparams.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(options)


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(name: str, kind: str, bench: Bench, tmp_path: Path) -> None:
    dense = tiny(name)
    pruned = apply_edits(dense, [Drop(range(6))] if kind == "period" else edits_of(dense, kind))
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    save_model(pruned, tmp_path / "model", tokenizer)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    running = server(tmp_path / "model.gguf")
    # Its answers leave out tokens that are a part of a character, of which a random model writes many.
    parts = [number for number in range(WORDS) if "\ufffd" in tokenizer.decode([number])]
    for prompt in PROMPTS:
        found = running.handle_completions({
            "prompt": prompt, "max_tokens": NEW, "temperature": 0.0, "logprobs": 1, "cache_prompt": False,
            "logit_bias": [[number, False] for number in parts]})
        tokens = found["choices"][0]["logprobs"]["content"]
        ids = tokenizer(prompt).input_ids
        assert found["usage"]["prompt_tokens"] == len(ids)
        assert tokens
        for token in tokens:  # along llama.cpp's own path, so that a tie in rounding is one
            scores = pruned(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            assert token["logprob"] == pytest.approx(float(scores[token["id"]]), abs=2e-3)
            scores[parts] = -torch.inf
            assert scores.max() - scores[token["id"]] < 1e-3
            ids.append(token["id"])
