"""How near a pruned model stays to the dense one: divergence and agreement of their next-token distributions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.evaluation.perplexity import (
    Forward,
    Perplexity,
    checked,
    default_batch,
    perplexity_of,
    window_sums,
)
from kdprune.model.activations import logits_and_final
from kdprune.model.layerwise import forward_streamed, logits_behind
from kdprune.model.losses import IGNORED, SLICE
from kdprune.model.streaming import is_streamed
from kdprune.runtime.stages import Advance

KEPT = 2**31  # bytes of the dense model's last states that are kept for the next pruned model


@dataclass(frozen=True)
class HeldOut:
    """What models are measured on.

    Attributes:
        texts: token sets; the first is the one that is named first everywhere.
        windows: tokens a window, likewise.
    """

    texts: tuple[TokenSet, ...]
    windows: tuple[int, ...]

    def pairs(self) -> list[tuple[TokenSet, int]]:
        """Every text at every window."""
        return [(text, window) for text in self.texts for window in self.windows]

    def identity(self) -> list[Any]:
        """What makes two of them the same, as plain data."""
        return [[text.identity() for text in self.texts], list(self.windows)]


@dataclass
class DenseStates:
    """The dense model's last states on held-out windows, for several pruned models to be held against.

    The first pass of a window leaves h_L (B, T, d) behind the last layer, on the host, while there is room; of those
    that are there, only the final norm and the head are run, with the same logits to the bit.

    Attributes:
        room: bytes that may be kept.
    """

    room: int = KEPT
    _states: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(states.nbytes for states in self._states.values())

    def forward(self, *about: Any) -> Forward:
        """A model's forward pass over batches, those of one text, window and stride."""
        return lambda model, batches, last: self._logits(model, batches, last, about)

    def _logits(
        self, model: PreTrainedModel, batches: Sequence[TokenSet], last: Sequence[int], about: tuple[Any, ...],
    ) -> Iterator[Tensor]:
        if is_streamed(model):  # which reads a layer once for all batches
            yield from forward_streamed(model, batches, last)
            return
        for number, (batch, count) in enumerate(zip(batches, last, strict=True)):
            key = (*about, number)
            if key in self._states:
                yield logits_behind(model, batch, self._states[key], count)
                continue
            logits, final = logits_and_final(model, batch, count)
            if self.nbytes + final.nbytes <= self.room:
                self._states[key] = final.cpu()
            yield logits


@dataclass(frozen=True)
class Fidelity:
    """Both models on the same windows of one text.

    Attributes:
        dataset: the text.
        dense: perplexity of the dense model.
        pruned: of the pruned one.
        divergence: mean over scored positions of KL(p‖q) = Σ_v p(v) (log p(v) − log q(v)), p the dense model's
            distribution of the next token and q the pruned one's, in nats.
        agreement: share of the positions at which both hold the same token for the most probable one.
    """

    dataset: str
    dense: Perplexity
    pruned: Perplexity
    divergence: float
    agreement: float


@torch.no_grad()
def fidelity(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokens: TokenSet, window: int | None = None,
    stride: int | None = None, *, batch_size: int | None = None, known: DenseStates | None = None,
) -> Fidelity:
    """Perplexity of both models, divergence and agreement, from one pass of each; windows as of ``perplexity``.

    Args:
        dense: the dense model.
        pruned: what was made of it; it has the same vocabulary.
        tokens: the text.
        window: tokens a window; None: the dense model's context, at most 2048.
        stride: by which it moves on; None: half the window.
        batch_size: windows a forward pass.
        known: the dense model's last states, where several models are held against it.

    Raises:
        KDPruneError: as of ``perplexity``.
    """
    window, stride = checked(dense, window, stride)
    size = batch_size or default_batch(dense, window, copies=2)
    forward = [known.forward(tokens.identity(), window, stride, size), forward_streamed] if known else []
    count, sums = window_sums([dense, pruned], tokens, window, stride, size, _compared, forward)
    means = (sums.sum(0) / count).tolist()
    before, after = (
        Perplexity(perplexity_of(means[number]), means[number], count, window, stride, tuple(sums[:, number].tolist()))
        for number in (0, 1))
    return Fidelity(tokens.source, before, after, divergence=means[2], agreement=means[3])


def fidelities(
    dense: PreTrainedModel, pruned: PreTrainedModel, heldout: HeldOut, progress: Advance,
    known: DenseStates | None = None,
) -> list[Fidelity]:
    """The same on every text at every window, in the order of :meth:`HeldOut.pairs`."""
    found = []
    for text, window in heldout.pairs():
        found.append(fidelity(dense, pruned, text, window, known=known))
        progress(1)
    return found


def _compared(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Sums (B, 4) over the scored positions: loss of the dense model and of the pruned one, divergence, agreement."""
    flat, size = targets.flatten().cpu(), max(1, SLICE // logits[0].shape[-1])
    found = torch.zeros(4, len(flat), dtype=torch.float64)
    for rows in (flat != IGNORED).nonzero()[:, 0].split(size):
        p, q = (functional.log_softmax(one.flatten(0, 1)[rows.to(one.device)].float(), -1).to(logits[0].device)
                for one in logits)
        wanted = flat[rows, None].to(p.device)
        measures = (-p.gather(-1, wanted)[:, 0], -q.gather(-1, wanted)[:, 0],
                    functional.kl_div(q, p, log_target=True, reduction="none").sum(-1), p.argmax(-1) == q.argmax(-1))
        found[:, rows] = torch.stack([one.cpu().double() for one in measures])
    return found.view(4, *targets.shape).sum(-1).T
