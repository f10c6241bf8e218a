"""The language-model loss of a batch, for methods that prune by it and for healing."""

import inspect

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.placement import input_device

IGNORED = -100  # target of a position that is not scored
SLICE = 2**25  # most logits turned into float32 at once


def next_tokens(batch: TokenSet) -> Tensor:
    """The token that follows each position, shape (B, T); ``IGNORED`` where it or its predecessor is padding."""
    targets = torch.full_like(batch.ids, IGNORED)
    real = batch.mask[:, 1:] & batch.mask[:, :-1]
    targets[:, :-1][real] = batch.ids[:, 1:][real]
    return targets


def last_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """What a forward pass is given for the head to see the last ``count`` positions alone; nothing where the model's
    code cannot be told, and gives the logits of all."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def batch_logits(model: PreTrainedModel, batch: TokenSet, last: int | None = None) -> Tensor:
    """Logits (B, T, V) of a batch, in the model's dtype, with gradients where the caller asks for them.

    Args:
        model: the model.
        batch: rows of T tokens.
        last: of how many positions at the rows' end, (B, last, V); None: all.
    """
    device = input_device(model)
    mask = None if batch.mask.all() else batch.mask.to(device).long()
    options = {} if last is None else last_logits(model, last)
    logits = model(input_ids=batch.ids.to(device), attention_mask=mask, use_cache=False, **options).logits
    return logits if last is None else logits[:, -last:]  # a slice of all would have a gradient of its own, (B, T, V)


def language_loss(model: PreTrainedModel, batch: TokenSet) -> tuple[Tensor, int]:
    """Summed next-token cross-entropy in nats over a batch's real tokens, in float32, and how many were scored."""
    return language_loss_of(batch_logits(model, batch), batch)


def language_loss_of(logits: Tensor, batch: TokenSet) -> tuple[Tensor, int]:
    """The same of logits (B, T, V) that are there already."""
    targets = next_tokens(batch)
    loss = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten().to(logits.device), ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum())


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: TokenSet, batch_size: int) -> float:
    """Mean next-token loss in nats over a token set, added up in float64; rows are scored as they are, no windows."""
    total, count = 0.0, 0
    for batch in tokens.batches(batch_size):
        loss, scored = language_loss(model, batch)
        total, count = total + float(loss), count + scored
    return total / max(count, 1)
