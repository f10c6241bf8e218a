"""Tiny checkpoints that a server takes: heads 32 wide, with a tokenizer, and what transformers says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import _COMMON, CONFIGS
from tiny_checkpoint import WORDS, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdprune.data.tokens import bundled_calibration
from kdprune.model.checkpoint import save_model
from kdprune.model.edits import Resize
from kdprune.model.surgery import apply_edits
from kdprune.testing import edits_of, with_random_weights

WIDTH, HEAD, CHANNELS, POSITIONS, WINDOW, NEW = 128, 32, 192, 512, 32, 12
# By what a config calls it: the sizes of tests/families.py are too small for a server's attention kernels. vLLM's own
# Falcon has four times the width in its MLP, whatever the config says.
_LARGER: dict[str, Any] = {
    "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "intermediate_size": CHANNELS, "ffn_dim": CHANNELS,
    "ffn_hidden_size": 4 * WIDTH, "n_inner": CHANNELS, "word_embed_proj_dim": WIDTH // 2, "rotary_dim": HEAD // 2,
    "sliding_window": WINDOW, "moe_intermediate_size": CHANNELS // 2,
}
# Of each length there is one, and of those of a length a pair with a common beginning, so that a prefix cache is hit.
LENGTHS = (3, 17, 40, 40, 129, 300, 300)


def prompts() -> list[list[int]]:
    """Seven texts as token ids; all begin alike, as far as the shorter ones go, but two."""
    ids = torch.randint(1, WORDS, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(7))
    common = ids[0].tolist()
    found = [common[:length] for length in LENGTHS]
    for index in (3, 6):
        length = LENGTHS[index]
        found[index] = common[: length // 2] + ids[1, length // 2 : length].tolist()
    return found


def build(name: str) -> PreTrainedModel:
    """The model ``name`` of tests/families.py at a size that is served."""
    model_type, options = CONFIGS[name]
    merged = {**_COMMON, **options, "hidden_size": WIDTH, "vocab_size": WORDS, "max_position_embeddings": POSITIONS}
    merged |= {key: _LARGER[key] for key in merged.keys() & _LARGER.keys()}
    merged |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return with_random_weights(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **merged)), std=0.06)


def save(name: str, kind: str, directory: Path) -> None:
    """Write the checkpoint of a family's model after the edits of a kind, with its tokenizer; "mlps": without two."""
    model = build(name)
    edits = [Resize(index, {"without": "mlp"}, {}) for index in (1, 3)] if kind == "mlps" else edits_of(model, kind)
    text = bundled_calibration().read_text(encoding="utf-8")
    save_model(apply_edits(model, edits), directory, tiny_tokenizer(text[:20_000]))


@torch.no_grad()
def expected(directory: Path) -> list[dict[str, list[Any]]]:
    """What transformers continues each prompt with, greedily: ids, and the log-probability of each."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in prompts():
        ids: Tensor = torch.tensor([prompt])
        chosen, logs = [], []
        for _ in range(NEW):
            scores = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
            chosen.append(int(scores.argmax()))
            logs.append(float(scores.max()))
            ids = torch.cat((ids, torch.tensor([[chosen[-1]]])), dim=1)
        found.append({"ids": chosen, "logs": logs})
    return found


def write_prompts(path: Path) -> None:
    """The prompts as JSON, for a process that cannot import this."""
    path.write_text(json.dumps(prompts()), encoding="utf-8")
