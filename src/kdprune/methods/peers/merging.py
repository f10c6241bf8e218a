"""What LaCo does to weights, and how it compares a merged model with the dense one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.methods.peers.drop import runs
from kdprune.model.activations import recorded
from kdprune.model.families import decoder_layers, family_of, final_norm
from kdprune.model.modeling_kdp import FoldedLayer
from kdprune.model.passes import run_layers
from kdprune.model.surgery import Drop, Edit, Rewrite

Weights: TypeAlias = Mapping[str, Tensor]
Form: TypeAlias = Literal["paper", "code"]


@dataclass(frozen=True)
class Slot:
    """A layer as it is after some merges: its index in the dense model and, where merged, new weights by name."""

    index: int
    weights: Weights | None = None


def merged_names(model: PreTrainedModel, merged: str, index: int = 0) -> list[str]:
    """Names, within layer ``index``, of the parameters that are merged: of its projections, biases with them, or all
    but those of what an earlier pruning folded into it, which leaves with its layer."""
    layer: nn.Module = decoder_layers(model)[index]
    inside = [stand_in for stand_in, _ in layer.kdp_folded()] if isinstance(layer, FoldedLayer) else []
    apart = {id(weight) for stand_in in inside for weight in stand_in.parameters()}
    names = [name for name, weight in layer.named_parameters() if id(weight) not in apart]
    if merged == "all":
        return names
    family = family_of(model)
    paths = (*family.qkv, family.attention_out, *family.mlp_in, family.mlp_out)
    return [name for name in names if name.rpartition(".")[0] in paths]


def rdsc_merge(layers: Sequence[Weights], form: Form) -> dict[str, Tensor]:
    """θ_l* of layers l … l+m (given in order): their sum of differences, or its telescoped form θ_{l+m}.

    Sums are taken in float32 at least; shapes stay.
    """
    if form == "code":
        return dict(layers[-1])
    result = {}
    for name, base in layers[0].items():
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        result[name] = wide + sum(other[name].to(wide.dtype) - wide for other in layers[1:])
    return result


@dataclass(frozen=True)
class Merger:
    """Merges layers of ``model``, which stays as it is: the parameters ``names``, in this form."""

    model: PreTrainedModel
    form: Form
    names: Sequence[str]

    def dense(self) -> tuple[Slot, ...]:
        """The layers before any merge."""
        return tuple(Slot(index) for index in range(len(decoder_layers(self.model))))

    @torch.no_grad()
    def merge(self, slots: Sequence[Slot], base: int, count: int) -> tuple[Slot, ...]:
        """The ``count`` slots behind position ``base`` go into it."""
        group = slots[base : base + count + 1]
        assert len(group) == count + 1 > 1
        merged = replace(group[0], weights=rdsc_merge([self._weights(slot) for slot in group], self.form))
        return (*slots[:base], merged, *slots[base + count + 1 :])

    def _weights(self, slot: Slot) -> Weights:
        if slot.weights is not None:
            return slot.weights
        parameters = dict(decoder_layers(self.model)[slot.index].named_parameters())
        return {name: parameters[name].detach() for name in self.names}


def edits_of(slots: Sequence[Slot], layers: int) -> list[Edit]:
    """What turns the dense model of so many layers into these slots."""
    kept = {slot.index for slot in slots}
    rewrites: list[Edit] = [Rewrite(slot.index, slot.weights) for slot in slots if slot.weights is not None]
    return [*rewrites, *(Drop(block) for block in runs(set(range(layers)) - kept))]


def first_tokens(tokens: TokenSet, count: int) -> TokenSet:
    """The first ``count`` real tokens of every row, padded on the right where there are fewer."""
    order = tokens.mask.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    ids, mask = tokens.ids.gather(1, order), tokens.mask.gather(1, order)
    return TokenSet(ids, mask, tokens.source, tokens.bos)  # type: ignore[arg-type]


@torch.no_grad()
def final_states(model: PreTrainedModel, rows: TokenSet, batch_size: int) -> list[Tensor]:
    """States behind the final norm, (B, T, d) a batch, zero where there is padding."""
    depth, found = len(decoder_layers(model)), []
    with recorded(model, [depth]) as seen:
        for batch in rows.batches(batch_size):
            run_layers(model, batch)
            # Before the norm a few tokens of huge norm would decide the cosine of a whole row alone.
            state = final_norm(model)(seen[depth])
            found.append(state.masked_fill(~batch.mask.to(state.device)[..., None], 0))
    return found


def mean_cosine(dense: Sequence[Tensor], candidate: Sequence[Tensor]) -> float:
    """Mean over rows of the cosine of the flattened states; −∞ where it is not a number."""
    flat = [[batch.flatten(1).double() for batch in side] for side in (dense, candidate)]
    cosines = torch.cat([_row_cosines(first, second) for first, second in zip(*flat, strict=True)])
    value = float(cosines.mean())
    return value if math.isfinite(value) else -math.inf


def _row_cosines(first: Tensor, second: Tensor) -> Tensor:
    """(B, n), (B, n) → (B,)."""
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
