"""How far layer states lie from each other over a calibration set: what ShortGPT and UIDL rank layers by."""

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.activations import behind_norm, layer_states, rows_at_once
from kdprune.model.families import decoder_layers
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run

UNDEFINED = 0.5  # counts as the cosine with a zero state, as in ShortGPT's code
_CHUNK = 256     # tokens at a time of all L + 1 states in float64


@dataclass(frozen=True)
class Distances:
    """Of all pairs of the L + 1 states; both (L+1, L+1), float64, on the CPU.

    Attributes:
        cosine: mean of cos(h_s, h_e) over all real tokens.
        angular: mean of arccos(cos(h_s, h_e))/π, between 0 and 1, over the last real token of every row.
        tokens: how many real tokens were looked at.
    """

    cosine: Tensor
    angular: Tensor
    tokens: int


@torch.no_grad()
def measure_distances(model: PreTrainedModel, tokens: TokenSet, run: Run, *, normed: bool = False) -> Distances:
    """One pass over the calibration rows; no states are kept beyond a batch, and padding is left out.

    Args:
        model: the dense model.
        tokens: the calibration rows.
        run: gives the model that runs, and the size of batches.
        normed: whether h_L is taken behind the final norm, as the last of ``hidden_states``; else as it leaves the
            last layer.

    Raises:
        KDPruneError: a state is NaN or infinite.
    """
    states = len(decoder_layers(model)) + 1
    cosine, angular = (torch.zeros(states, states, dtype=torch.float64) for _ in range(2))
    rows, size = 0, rows_at_once(model, tokens.ids.shape[1], run.batch_size)
    with run.stage("distances", len(tokens)) as progress:
        for batch, found in layer_states(run.running(model), tokens.local(size), range(states), size):
            if normed:
                found[states - 1] = behind_norm(run.running(model), batch, found[states - 1])
            row, column = batch.mask.nonzero(as_tuple=True)
            for part in torch.arange(len(row)).split(_CHUNK):
                cosine += _cosines(_gather(found, row[part], column[part])).sum(-1).cpu()
            row, column = last_tokens(batch)
            for part in torch.arange(len(row)).split(_CHUNK):
                angular += (_cosines(_gather(found, row[part], column[part])).arccos() / pi).sum(-1).cpu()
            rows += len(row)
            found.clear()  # before the next batch's are there too
            progress(len(batch))
    world().sum(cosine, angular)
    rows = int(world().total([rows])[0])
    return Distances(cosine / max(tokens.tokens, 1), angular / max(rows, 1), tokens.tokens)


@torch.no_grad()
def measure_channel_cosine(model: PreTrainedModel, tokens: TokenSet, run: Run) -> Tensor:
    """Cosine over the tokens of a row, channel by channel: of all pairs of states, (L+1, L+1), float64, on the CPU.

        c(s, e) = E_rows E_channels[ Σ_t h_s,t,i h_e,t,i / (‖h_s,·,i‖ ‖h_e,·,i‖) ]

    over real tokens t; 0 for a channel that is zero throughout a row. h_L is what leaves the last layer. What
    ``torch.cosine_similarity`` gives of (1, T, d) with its default, the dimension of tokens.

    Raises:
        KDPruneError: a state is NaN or infinite.
    """
    states = len(decoder_layers(model)) + 1
    total = torch.zeros(states, states, dtype=torch.float64)
    size = rows_at_once(model, tokens.ids.shape[1], run.batch_size)
    with run.stage("distances", len(tokens)) as progress:
        for batch, found in layer_states(run.running(model), tokens.local(size), range(states), size):
            for row in batch.mask.any(1).nonzero().flatten():
                column = batch.mask[row].nonzero().flatten()
                over = _gather(found, row.expand_as(column), column)
                unit = over / over.norm(dim=1, keepdim=True).clamp_min(torch.finfo(over.dtype).tiny)
                total += torch.einsum("sti,eti->se", unit, unit).cpu() / unit.shape[-1]
            found.clear()
            progress(len(batch))
    world().sum(total)
    return total / max(int(tokens.mask.any(1).sum()), 1)


def last_tokens(batch: TokenSet) -> tuple[Tensor, Tensor]:
    """Row and column of the last real token of every row that has one, whichever side the padding is on."""
    position = torch.arange(batch.mask.shape[1]).expand_as(batch.mask)
    last = position.masked_fill(~batch.mask, -1).amax(1)
    rows = (last >= 0).nonzero()[:, 0]
    return rows, last[rows]


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """cos of every pair of states, (…, d) → (…), float64; ``UNDEFINED`` where one is zero."""
    first, second = first.double(), second.double()
    sizes = first.norm(dim=-1) * second.norm(dim=-1)
    return torch.where(sizes > 0, (first * second).sum(-1) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), UNDEFINED)


def _gather(states: dict[int, Tensor], row: Tensor, column: Tensor) -> Tensor:
    """Chosen tokens of all states: (S, n, d), float64."""
    devices = {state.device for state in states.values()}
    places = {device: (row.to(device), column.to(device)) for device in devices}
    return torch.stack([state[places[state.device]].double() for _, state in sorted(states.items())])


def _cosines(states: Tensor) -> Tensor:
    """Cosine of every pair of states at every token: (S, n, d) → (S, S, n), ``UNDEFINED`` where a state is zero."""
    norms = states.norm(dim=-1)
    unit = (states / norms.clamp_min(torch.finfo(norms.dtype).tiny)[..., None]).transpose(0, 1)
    cosines = (unit @ unit.transpose(1, 2)).permute(1, 2, 0).clamp(-1, 1)
    nonzero = norms > 0
    return cosines.where(nonzero[:, None] & nonzero[None, :], UNDEFINED)
