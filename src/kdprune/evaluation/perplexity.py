"""Sliding-window perplexity: every token but the first of a row is scored once, padding never."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating, longest_context, vocabulary_size
from kdprune.model.layerwise import forward_streamed
from kdprune.model.losses import IGNORED, SLICE
from kdprune.runtime.distributed import world

LONGEST_WINDOW = 2048
# Logits (B, K, V) of each batch, of so many positions K at its end.
Forward = Callable[[PreTrainedModel, Sequence[TokenSet], Sequence[int]], Iterable[Tensor]]
LOGITS = 2**27  # most logits, B · T · V, a batch may hold when no batch size is given


@dataclass(frozen=True)
class Perplexity:
    """value = exp(loss); loss: mean next-token loss in nats; tokens: how many were scored.

    sums: the summed loss of each window's new positions, in order, in nats: their sum over `tokens` is the loss.
    """

    value: float
    loss: float
    tokens: int
    window: int
    stride: int
    sums: tuple[float, ...] = ()


def default_window(model: PreTrainedModel | PreTrainedConfig) -> int:
    """The longest context of the model, at most 2048 tokens."""
    return min(longest_context(model) or LONGEST_WINDOW, LONGEST_WINDOW)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokens: TokenSet,
    window: int | None = None,
    stride: int | None = None,
    *,
    batch_size: int | None = None,
) -> Perplexity:
    """Perplexity of a causal LM over the real tokens of every row.

    A window feeds `window` tokens and moves on by `stride`; only its new positions are scored, so each has at
    least window − stride tokens of context before it (fewer at the start of a row). Where the rows start with
    a beginning-of-text token, so does every window. Defaults: the model's context (at most 2048), half of it.
    Losses are taken in float32 and added in float64; the model's mode is as before afterwards. A streamed model gives
    the same bits. In a run of several processes each has to call this: batches are dealt out to them, and all get the
    same figures.
    Raises KDPruneError for a window or stride the model cannot use, and for a loss that is not finite.
    """
    window, stride = checked(model, window, stride)
    size = batch_size or default_batch(model, window)
    count, sums = window_sums([model], tokens, window, stride, size,
                              lambda logits, targets: _batch_loss(logits[0], targets)[:, None])
    mean = float(sums.sum()) / count
    return Perplexity(perplexity_of(mean), mean, count, window, stride, tuple(sums[:, 0].tolist()))


def default_stride(window: int) -> int:
    """Half the window."""
    return max(1, window // 2)


def default_batch(model: PreTrainedModel, window: int, copies: int = 1, most: int | None = None) -> int:
    """Windows a forward pass, so that their logits fit, or so many copies of them; no more than ``most``."""
    fit = max(1, LOGITS // (copies * window * vocabulary_size(model)))
    return fit if most is None else min(fit, most)


def window_sums(
    models: Sequence[PreTrainedModel], tokens: TokenSet, window: int, stride: int, batch_size: int,
    measured: Callable[[Sequence[Tensor], Tensor], Tensor], forward: Sequence[Forward] = (),
) -> tuple[int, Tensor]:
    """Sums over the scored positions of every window, of all processes of the run.

    Args:
        models: they see the same windows.
        tokens: the text.
        window: tokens a window.
        stride: by which it moves on.
        batch_size: windows a forward pass.
        measured: of a batch's logits, one (B, K, V) a model, and targets (B, K), those of the K last positions, among
            which all that are scored are → sums (B, M), the first column a loss.
        forward: how each model gives the logits of batches; none: by its forward pass.

    Returns:
        How many positions were scored, and the sums (windows, M) in float64, in order.

    Raises:
        KDPruneError: window or stride cannot be, nothing was scored, or a loss is not finite.
    """
    for model in models:
        checked(model, window, stride)
    batches = enumerate(_batches(tokens, window, stride, batch_size))
    own = [(number, *batch) for number, batch in batches if world().owner(number) == world().rank]
    # A window moves on by less than its length: the head need not see the positions that an earlier one scored.
    last = [targets.shape[1] - int((targets != IGNORED).any(0).int().argmax()) for _, _, targets in own]
    inputs = [TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), tokens.source) for _, ids, _ in own]  # type: ignore[arg-type]
    scored, wrong = 0, None
    sums: dict[int, list[list[float]]] = {}
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        passes = forward or [forward_streamed] * len(models)
        streams = zip(*(one(model, inputs, last) for one, model in zip(passes, models, strict=True)), strict=True)
        for (number, _, targets), count, logits in zip(own, last, streams, strict=True):
            # Plain numbers: small tensors that stay, made between large ones that go, hole the memory.
            sums[number] = measured(logits, targets[:, -count:]).tolist()
            scored += int((targets != IGNORED).sum())
            loss = sum(row[0] for row in sums[number])
            if not math.isfinite(loss):
                wrong = (number, loss)
                break
    # Whether to stop is decided together: a process that stopped alone would leave the others waiting for it.
    if found := [pair for pair in world().gather(wrong) if pair is not None]:
        number, loss = min(found)
        raise KDPruneError(
            f"got a loss of {loss} in batch {number} of {tokens.source}, expected a finite one; "
            "check the weights, or use --dtype float32"
        )
    every = {number: part for one in world().gather(sums) for number, part in one.items()}
    total = sum(world().gather(scored))
    if not total:
        raise KDPruneError(f"got no token to score in {tokens.source}, expected rows of at least 2 tokens")
    return total, torch.tensor([row for number in sorted(every) for row in every[number]], dtype=torch.float64)


def _batch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of each window's scored positions, float64 (B,): logits (B, W, V), targets (B, W)."""
    flat = targets.flatten().to(logits.device)
    losses = [
        functional.cross_entropy(part.float(), wanted, ignore_index=IGNORED, reduction="none").cpu().double()
        for part, wanted in zip(*(x.split(max(1, SLICE // logits.shape[-1])) for x in (logits.flatten(0, 1), flat)),
                                strict=True)]
    return torch.cat(losses).view(targets.shape).sum(1)


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats. Raises KDPruneError where that is no number."""
    value = math.exp(loss) if loss < 700 else math.inf
    if not math.isfinite(value):
        raise KDPruneError(f"got a mean loss of {loss:.4g} nats, too large for a perplexity; check the weights")
    return value


def check_window(model: PreTrainedModel | PreTrainedConfig, window: int) -> None:
    """Raises KDPruneError for a window that the model cannot use."""
    longest = longest_context(model)
    if window < 2 or (longest and window > longest):
        raise KDPruneError(f"got window {window}, expected 2 to {longest or 'the longest context'} tokens")


def checked(model: PreTrainedModel | PreTrainedConfig, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride with what is left at None filled in. Raises KDPruneError for those that cannot be."""
    window = default_window(model) if window is None else window
    stride = default_stride(window) if stride is None else stride
    check_window(model, window)
    if not 1 <= stride <= window:
        raise KDPruneError(f"got stride {stride}, expected 1 to {window}, the window")
    return window, stride


def _windows(row: Tensor, bos: int | None, window: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (W,) and targets (W,) of one row (T,) without padding, W ≤ window; each target stands once."""
    last = len(row) - 1  # positions 1 … last are predicted, each from those before it
    lead = row.new_tensor([] if bos is None else [bos])
    step = min(stride, window - len(lead))
    done = 0
    while done < last:
        end = min(last, window if done == 0 else done + step)
        start = max(0, end - window)
        if start and len(lead):
            start += 1  # room for the beginning-of-text token
        inputs, targets = row[start:end], row[start + 1 : end + 1].clone()
        targets[: max(0, done - start)] = IGNORED
        if start and len(lead):
            inputs = torch.cat([lead, inputs])
            targets = torch.cat([targets.new_tensor([IGNORED]), targets])
        yield inputs, targets
        done = end


def _batches(tokens: TokenSet, window: int, stride: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, W), windows of all rows in order, padded on the right to the batch's longest."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
        for entry in _windows(ids[mask], tokens.bos, window, stride):
            waiting.append(entry)
            if len(waiting) == size:
                yield _stack(waiting)
                waiting = []
    if waiting:
        yield _stack(waiting)


def _stack(entries: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    # Padding stands on the right of a causal model, where no scored position sees it: any id serves.
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([inputs for inputs, _ in entries], batch_first=True)
    return ids, pad([targets for _, targets in entries], batch_first=True, padding_value=IGNORED)
