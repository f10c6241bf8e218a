"""Tokens per second for reading a prompt and for writing with a KV cache; bytes the cache takes per token."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating, longest_context, vocabulary_size
from kdprune.model.losses import last_logits
from kdprune.model.placement import input_device
from kdprune.model.streaming import is_streamed
from kdprune.model.surgery import sharing_copy

PROMPT = 128  # tokens read, and tokens written, unless told otherwise; less where the context is shorter
NEW_TOKENS = 32
REPEATS = 3  # that count, behind one that warms up


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the whole batch: prefill reads prompts, decode writes token by token."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class SpeedComparison:
    """Two models measured in turns, so that both meet the same state of the machine.

    batch: sequences at once; prompt, new_tokens: tokens per sequence; device: where it was measured.
    """

    dense: Speed
    pruned: Speed
    batch: int
    prompt: int
    new_tokens: int
    device: str


def speed(
    model: PreTrainedModel,
    batch: int = 1,
    prompt: int | None = None,
    new_tokens: int | None = None,
    *,
    repeats: int | None = None,
    seed: int = 0,
) -> Speed:
    """Median speed of one model over `repeats` runs (3) after a warm-up, on random token ids.

    batch: sequences at once; prompt, new_tokens: tokens per sequence (128 and 32, or what the context allows).
    Raises KDPruneError for counts below 1 and for more tokens than the model's context.
    """
    prompt, new_tokens = _counts(model, prompt, new_tokens)
    return _measure([model], batch, prompt, new_tokens, repeats, seed)[0]


def compare_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    batch: int = 1,
    prompt: int | None = None,
    new_tokens: int | None = None,
    *,
    repeats: int | None = None,
    seed: int = 0,
) -> SpeedComparison:
    """Median speeds of two models that take turns: the ratio compares runs of the same minute.

    Arguments and errors as in :func:`speed`.
    """
    prompt, new_tokens = _counts(dense, prompt, new_tokens)
    first, second = _measure([dense, pruned], batch, prompt, new_tokens, repeats, seed)
    return SpeedComparison(first, second, batch, prompt, new_tokens, str(input_device(dense)))


@torch.no_grad()
def kv_cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of keys and values a sequence adds to the cache per token, over all layers, as measured.

    A layer with a sliding window counts as it does below its window, one that keeps a state of fixed size (linear
    attention, state spaces) not at all. For a model streamed from disk the cache of a copy without weights is measured:
    sizes need none. Raises KDPruneError if the model keeps no cache.
    """
    if is_streamed(model):
        model = sharing_copy(model).to("meta")  # type: ignore[arg-type]  # mypy reads the decorator of PreTrainedModel.to
    with evaluating(model):
        ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
        # Not input_ids: transformers looks whether they hold padding, and without weights there is nothing to look at.
        embedded = model.get_input_embeddings()(ids)
        kept = carried(model(inputs_embeds=embedded, use_cache=True))
    layers = getattr(next(iter(kept.values()), None), "layers", None)
    if layers is None:
        raise KDPruneError(
            f"got {type(model).__name__}, which returned no KV cache; expected a decoder with one"
        )
    states: list[Tensor] = [state for layer in layers if getattr(layer, "keys", None) is not None
                            for state in (layer.keys, layer.values)]
    return sum(state.numel() // state.shape[-2] * state.element_size() for state in states)


def _counts(model: PreTrainedModel, prompt: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Tokens to read and to write; a count left open fits the context beside the other."""
    longest = longest_context(model) or PROMPT + NEW_TOKENS
    if new_tokens is None:
        new_tokens = max(1, min(NEW_TOKENS, longest // 4 if prompt is None else longest - prompt))
    return max(1, min(PROMPT, longest - new_tokens)) if prompt is None else prompt, new_tokens


@torch.no_grad()
def _measure(
    models: list[PreTrainedModel], batch: int, prompt: int, new_tokens: int, repeats: int | None, seed: int
) -> list[Speed]:
    repeats = REPEATS if repeats is None else repeats
    for name, value in (
        ("batch", batch),
        ("prompt", prompt),
        ("new_tokens", new_tokens),
        ("repeats", repeats),
    ):
        if value < 1:
            raise KDPruneError(f"got {name} {value}, expected at least 1")
    ids = [_prompts(model, batch, prompt, new_tokens, seed) for model in models]
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(repeats + 1):
        # Who goes first alternates: neither model always runs on the warmer machine. Turn 0 warms up.
        order = range(len(models)) if turn % 2 else reversed(range(len(models)))
        for index in order:
            with evaluating(models[index]):
                taken = _run(models[index], ids[index], new_tokens)
            if turn:
                seconds[index].append(taken)
    return [
        Speed(
            prefill=batch * prompt / statistics.median(read for read, _ in runs),
            decode=batch * new_tokens / statistics.median(write for _, write in runs),
        )
        for runs in seconds
    ]


def _prompts(model: PreTrainedModel, batch: int, prompt: int, new_tokens: int, seed: int) -> Tensor:
    """Random token ids (batch, prompt) on the model's device."""
    longest = longest_context(model)
    if longest and prompt + new_tokens > longest:
        raise KDPruneError(
            f"got {prompt} + {new_tokens} tokens, expected at most {longest}, the model's context"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary_size(model), (batch, prompt), generator=generator).to(input_device(model))


def _run(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to read the prompts (B, T), and to write `new_tokens` after them, greedily."""
    wait = _synchroniser(input_device(model))
    options = last_logits(model, 1)
    wait()
    start = time.perf_counter()
    output: Any = model(input_ids=ids, use_cache=True, **options)
    token = output.logits[:, -1:].argmax(-1)
    wait()
    read = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, **carried(output), use_cache=True, **options)
        token = output.logits[:, -1:].argmax(-1)
    wait()
    return read - start, time.perf_counter() - read


def carried(output: Any) -> dict[str, Any]:
    """What a model gave to be handed back with the next token: keys and values, or the states of a state space model
    (Mamba), under the name by which it takes them."""
    return {name: value for name in ("past_key_values", "cache_params")
            if (value := getattr(output, name, None)) is not None}


def _synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits for the work queued on a device."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
