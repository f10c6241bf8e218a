"""What two models make of the same prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating, longest_context
from kdprune.model.placement import input_device
from kdprune.runtime.machine import quiet_libraries

NEW_TOKENS = 60  # of a continuation, where the context has room


@dataclass(frozen=True)
class TextSample:
    """A prompt and its greedy continuations, without the prompt."""

    prompt: str
    dense: str
    pruned: str


@torch.no_grad()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int | None = None
) -> str:
    """The greedy continuation of a prompt, at most `new_tokens` tokens, special tokens left out.

    new_tokens: 60 unless given, or what the context leaves.

    Raises KDPruneError for a prompt without a token and for one longer than the model's context.
    """
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = encoded["input_ids"].shape[1]
    longest = longest_context(model)
    if new_tokens is None:
        new_tokens = max(1, min(NEW_TOKENS, (longest or length + NEW_TOKENS) - length))
    if not length or (longest and length + new_tokens > longest):
        raise KDPruneError(
            f"got a prompt of {length} tokens and {new_tokens} new ones, expected at least 1 "
            f"and together at most {longest or 'the context'}; change the prompt"
        )
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    generate: Any = model.generate
    with evaluating(model), quiet_libraries():
        ids = generate(**encoded.to(input_device(model)), generation_config=settings)
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))


def compare_samples(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int | None = None,
) -> list[TextSample]:
    """Greedy continuations of every prompt by both models; errors as :func:`continuation`'s."""
    return [
        TextSample(
            prompt,
            continuation(dense, tokenizer, prompt, new_tokens),
            continuation(pruned, tokenizer, prompt, new_tokens),
        )
        for prompt in prompts
    ]
