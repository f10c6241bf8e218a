"""Coupled structures of a layer, and what a model's loss says of them (LLM-Pruner, NeurIPS 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.families import family_of
from kdprune.model.losses import language_loss
from kdprune.model.modeling_kdp import key_value_heads

Order: TypeAlias = Literal["first", "second", "mixed"]


@dataclass(frozen=True)
class StructurePart:
    """What the structures of one kind have in one projection.

    ``path`` of the projection within its layer; ``inputs``: its columns, else its rows and their biases;
    ``members`` (n, k): which k of them belong to each of the n structures.
    """

    path: str
    inputs: bool
    members: Tensor

    def select(self, layer: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        """The projection's parameters by name with the structures ``kept`` (indices) alone, in their old order."""
        module = layer.get_submodule(self.path)
        index = self.members[kept].flatten().sort().values.to(_weight(module).device)
        found = {f"{self.path}.weight": _weight(module).detach().index_select(_axis(module, self.inputs), index)}
        if (bias := getattr(module, "bias", None)) is not None:
            found[f"{self.path}.bias"] = bias.detach() if self.inputs else bias.detach()[index]
        return found

    def total(self, layer: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
        """Sums over each structure, (n,), of ``values``, which have the shapes of the projection's parameters."""
        module = layer.get_submodule(self.path)
        values_of = values[f"{self.path}.weight"]
        line = values_of.sum(1 - _axis(module, self.inputs), dtype=torch.float64)
        if not self.inputs and (bias := values.get(f"{self.path}.bias")) is not None:
            line = line + bias.double()
        return line[self.members.to(line.device)].sum(1)

    def size(self, layer: nn.Module) -> int:
        """Parameters that one structure has in the projection."""
        module, lines = layer.get_submodule(self.path), self.members.shape[1]
        biases = 0 if self.inputs or getattr(module, "bias", None) is None else lines
        return lines * _weight(module).shape[1 - _axis(module, self.inputs)] + biases

    def lines(self, layer: nn.Module) -> Tensor:
        """Each structure's rows, or columns, of the projection's weight, (n, k, length of one), float64."""
        module = layer.get_submodule(self.path)
        weight = _weight(module).detach().double()
        return (weight.T if _axis(module, self.inputs) else weight)[self.members.to(weight.device)]


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _axis(module: nn.Module, inputs: bool) -> int:
    """The axis of a projection's weight along which its inputs, or its outputs, lie; Conv1D stores (in, out)."""
    return int(inputs) if isinstance(module, nn.Linear) else int(not inputs)


def attention_parts(model: PreTrainedModel, layer: nn.Module) -> list[StructurePart]:
    """Key-value heads with all their queries: rows of the projections for q, k and v, columns of the one out of it."""
    family, config = family_of(model), model.config
    groups, queries = key_value_heads(config), config.num_attention_heads
    out = layer.get_submodule(family.attention_out)
    columns = _weight(out).shape[_axis(out, inputs=True)]
    width = columns // queries
    query, key = torch.arange(columns).view(groups, -1), torch.arange(groups * width).view(groups, -1)
    if len(family.qkv) > 1:
        parts = [StructurePart(path, False, rows) for path, rows in zip(family.qkv, (query, key, key), strict=True)]
    else:
        blocks = torch.cat((query, columns + key, columns + key.numel() + key), dim=1)
        heads = torch.arange(3 * columns).view(groups, -1)  # each head's query, key and value in turn
        parts = [StructurePart(family.qkv[0], False, heads if family.fused == "heads" else blocks)]
    return [*parts, StructurePart(family.attention_out, True, query)]


def mlp_parts(model: PreTrainedModel, layer: nn.Module) -> list[StructurePart]:
    """MLP channels: rows of the projections into the MLP (gate and up, fused or not), columns of the one out of it."""
    family = family_of(model)
    out = layer.get_submodule(family.mlp_out)
    channels = _weight(out).shape[_axis(out, inputs=True)]
    parts = []
    for path in family.mlp_in:
        module = layer.get_submodule(path)
        rows = _weight(module).shape[_axis(module, inputs=False)]
        parts.append(StructurePart(path, False, torch.arange(rows).view(-1, channels).T))
    return [*parts, StructurePart(family.mlp_out, True, torch.arange(channels)[:, None])]


def random_slices(tokens: TokenSet, count: int, length: int, generator: torch.Generator) -> list[TokenSet]:
    """``count`` runs of at most ``length`` real tokens from random places of random rows; one row each, no padding."""
    rows = (tokens.mask.sum(1) > 1).nonzero().flatten()
    found = []
    for pick in torch.randint(len(rows), (count,), generator=generator).tolist():
        row = tokens.select(rows[pick : pick + 1])
        real = row.mask[0].nonzero().flatten()
        spare = len(real) - min(length, len(real))
        start = int(torch.randint(spare + 1, (1,), generator=generator))
        chosen = real[start : start + length]
        found.append(TokenSet(row.ids[:, chosen], row.mask[:, chosen], row.source, row.bos))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class Gradient:
    """Of one parameter, over the slices: ``mean`` of the loss gradient g, and ``square``, the mean of g²; float32."""

    mean: Tensor
    square: Tensor


def loss_gradients(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], slices: Sequence[TokenSet],
) -> dict[str, Gradient]:
    """Gradients of the mean next-token loss of each slice, averaged over slices; ``.grad`` fields stay as they are."""
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    sums = {name: Gradient(torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32))
            for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in slices:
            with torch.enable_grad():
                loss, scored = language_loss(model, batch)
                gradients = torch.autograd.grad(loss / scored, list(parameters.values()))
            for found, gradient in zip(sums.values(), gradients, strict=True):
                found.mean.add_(gradient.float() / len(slices))
                found.square.add_(gradient.float().square() / len(slices))
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
    return sums


def weight_saliency(weight: Tensor, gradient: Gradient, order: Order) -> Tensor:
    """The change of the loss, estimated, when a weight w becomes 0; elementwise, in float32.

        first  |w g|        second  |w² a|        mixed  |w g − ½ w² a|,   g mean gradient, a mean of its square
    """
    weight = weight.detach().float()
    first, second = weight * gradient.mean, weight.square() * gradient.square
    return {"first": first, "second": second, "mixed": first - second / 2}[order].abs()
