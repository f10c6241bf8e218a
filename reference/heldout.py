"""Perplexity on held-out text with a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from corpus import documents, encode, text_files
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def held_out_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, torch.Tensor]:
    """The first `limit` token ids of every file of a folder (or of one file), by file name."""
    ids = {path.name: encode(documents(path), tokenizer)[:limit] for path in text_files(folder)}
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in ids.items()}


def spread(ids: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """`count` windows (count, length + 1) spread evenly over the ids."""
    last = len(ids) - length - 1
    if last < 0:
        raise ValueError(f"held-out text of {len(ids)} tokens is shorter than a window of {length}")
    return torch.stack([ids[int(start) :][: length + 1] for start in np.linspace(0, last, count)])


@torch.inference_mode()
def token_losses(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Loss (batch, length) of ids (batch, length + 1): position t predicts id t + 1."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")


def quick_loss(model: PreTrainedModel, windows: torch.Tensor, batch: int = 16) -> float:
    """Mean loss over fixed windows, for the curve drawn while training."""
    was_training = model.training
    model.eval()
    losses = [token_losses(model, part.to(model.device)).mean(1).cpu() for part in windows.split(batch)]
    model.train(was_training)
    return torch.cat(losses).mean().item()


def perplexity(model: PreTrainedModel, ids: torch.Tensor, window: int, stride: int) -> dict[str, float]:
    """Every id but the first scored once, with at least window - stride ids of context after the start."""
    model.eval()
    total, scored, done = 0.0, 0, 0
    for start in range(0, max(len(ids) - 1, 1), stride):
        part = ids[start : start + window + 1]
        losses = token_losses(model, part[None].to(model.device))[0]
        fresh = losses[done - start :]
        total, scored, done = total + fresh.sum().item(), scored + len(fresh), start + len(losses)
        if done >= len(ids) - 1:
            break
    loss = total / scored
    return {"perplexity": float(np.exp(loss)), "loss": loss, "tokens": scored}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folders: Sequence[Path],
    *,
    window: int,
    stride: int,
    limit: int,
) -> dict[str, object]:
    """Perplexity on every file of the folders, with the protocol it was measured by."""
    files = {
        name: perplexity(model, ids, window, stride)
        for folder in folders
        for name, ids in held_out_ids(folder, tokenizer, limit).items()
    }
    return {"window": window, "stride": stride, "limit": limit, "files": files}
