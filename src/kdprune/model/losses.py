"""The language-model loss of a batch, for methods that prune by it and for healing."""

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


def batch_logits(model: PreTrainedModel, batch: TokenSet) -> Tensor:
    """Logits (B, T, V) of a batch, in the model's dtype, with gradients where the caller asks for them."""
    device = input_device(model)
    mask = None if batch.mask.all() else batch.mask.to(device).long()
    return model(input_ids=batch.ids.to(device), attention_mask=mask, use_cache=False).logits


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
