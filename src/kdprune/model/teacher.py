"""The dense model as a teacher: its distributions of the next token, the most probable tokens of each."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.activations import logits_and_final
from kdprune.model.layerwise import logits_behind
from kdprune.model.losses import SLICE, batch_logits
from kdprune.model.placement import input_device
from kdprune.store.states import States, open_states

KEPT = 2**31  # bytes of distributions that are kept in memory; more go to disk, or are computed again


@dataclass(frozen=True)
class Targets:
    """Distributions at n positions.

    Attributes:
        log_probabilities: log p of the k most probable tokens, float32 (n, k).
        ids: these tokens, int64 (n, k); None: all of the vocabulary, in its order.
    """

    log_probabilities: Tensor
    ids: Tensor | None

    def divergence(self, logits: Tensor) -> Tensor:
        """Summed KL(p‖q) in nats, all tokens but the k most probable ones taken as one.

        Σ_{v ∈ top} p(v) (log p(v) − log q(v)) + p(rest) (log p(rest) − log q(rest)), q = softmax(logits): at most
        KL(p‖q), and equal to it where k is the vocabulary.

        Args:
            logits: of the other model at the same positions, (n, V).
        """
        logits = logits.float()
        known = logits if self.ids is None else logits.gather(-1, self.ids)
        found = known - logits.logsumexp(-1, keepdim=True)
        total = functional.kl_div(found, self.log_probabilities, log_target=True, reduction="sum")
        if self.ids is not None:
            p, q = _log_rest(self.log_probabilities), _log_rest(found)
            total = total + (p.exp() * (p - q)).sum()
        return total


def _log_rest(log_probabilities: Tensor) -> Tensor:
    """log(1 − Σ p), of sums that rounding brings to 1 at most by 10⁻⁶."""
    return torch.log1p(-log_probabilities.exp().sum(-1).clamp(max=1 - 1e-6))


class Teacher:
    """Next-token distributions of a set of rows, computed where they are asked for.

    Args:
        dense: the model.
        rows: the rows, N of T tokens.
        top: k, how many tokens of a distribution are told apart; None, or more than there are: the vocabulary.
        keep: numbers of the rows whose distributions are kept, because they are asked for again: T·k·8 bytes each,
            half of it for the whole vocabulary.
        folder: where they are kept if they are too much for memory; None: they are computed again then.
        final: the model's states behind its last layer. Of rows that are there no layer is run; those of the others are
            put there.
    """

    def __init__(
        self, dense: PreTrainedModel, rows: TokenSet, top: int | None = None, *, keep: Tensor | None = None,
        folder: Path | None = None, final: States | None = None,
    ):
        vocabulary = int(dense.get_output_embeddings().weight.shape[0])
        self.dense, self.rows, self.top = dense, rows, min(top or vocabulary, vocabulary)
        self.whole, self.final = self.top == vocabulary, final
        keep = torch.empty(0, dtype=torch.long) if keep is None else keep.unique()
        # Beside log p its tokens (float32 holds ids up to 2²⁴ as they are), but for the whole vocabulary's.
        shape = (len(keep), rows.ids.shape[1], self.top if self.whole else 2 * self.top)
        much = math.prod(shape) * 4 > KEPT
        self.place = torch.full((len(rows),), -1)  # of a row among those that are kept
        self.kept: States | None = None
        if len(keep) and (folder is not None or not much):
            self.place[keep] = torch.arange(len(keep))
            self.kept = open_states(
                shape, torch.float32, "the dense model's distributions", folder if much else None)

    def __call__(self, numbers: Tensor, mask: Tensor) -> Targets:
        """The distributions at the positions of ``mask`` (b, T) in the rows of these numbers (b,)."""
        places = self.place[numbers]
        if self.kept is None or bool((places < 0).all()):
            return self._targets(self._compute(numbers, mask))
        fresh = (places < 0) | torch.isin(places, self.kept.missing)
        values = torch.zeros(len(numbers), *self.kept.shape[1:])
        values[~fresh] = self.kept[places[~fresh]]
        if fresh.any():
            # Of a whole row, whatever part of it is wanted now.
            new, which = numbers[fresh].unique(return_inverse=True)
            found = torch.zeros(len(new), *self.kept.shape[1:])
            found[self.rows.mask[new]] = self._compute(new, self.rows.mask[new]).cpu()
            values[fresh], stays = found[which], self.place[new] >= 0
            self.kept.put(self.place[new[stays]], found[stays])
        return self._targets(values[mask.cpu()])

    def divergence(self, model: PreTrainedModel, batch: TokenSet, numbers: Tensor) -> tuple[Tensor, int]:
        """Summed KL(dense‖model), as :meth:`Targets.divergence`, at a batch's real tokens, and how many these are.

        Args:
            model: the other model.
            batch: rows as it sees them; what the mask leaves out does not count.
            numbers: of these rows.
        """
        targets = self(numbers, batch.mask)
        logits = batch_logits(model, batch)
        return targets.divergence(logits[batch.mask.to(logits.device)]), batch.tokens

    @torch.no_grad()
    def logits(self, numbers: Tensor) -> Tensor:
        """The model's logits (b, T, V) for some rows, from the states behind its last layer where these are there."""
        batch = self.rows.select(numbers)
        if self.final is None:
            return batch_logits(self.dense, batch)
        if torch.isin(numbers, self.final.missing).any():
            logits, final = logits_and_final(self.dense, batch)
            self.final.put(numbers, final)
            return logits
        return logits_behind(self.dense, batch, self.final[numbers])

    @torch.no_grad()
    def _compute(self, numbers: Tensor, mask: Tensor) -> Tensor:
        """log p and ids beside each other, (n, 2k); of the whole vocabulary log p, (n, k)."""
        logits = self.logits(numbers)
        rows = logits[mask.to(logits.device)]
        parts = []
        for part in rows.split(max(1, SLICE // rows.shape[-1])):
            log_probabilities = part.float().log_softmax(-1)
            if not self.whole:
                values, ids = log_probabilities.topk(self.top, -1)
                log_probabilities = torch.cat([values, ids.float()], -1)
            parts.append(log_probabilities)
        return torch.cat(parts)

    def _targets(self, packed: Tensor) -> Targets:
        packed = packed.to(input_device(self.dense))
        if self.whole:
            return Targets(packed, None)
        log_probabilities, ids = packed.split(self.top, -1)
        return Targets(log_probabilities, ids.long())
