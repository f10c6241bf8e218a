"""What a model's loss says of the coupled structures of its layers (LLM-Pruner, NeurIPS 2023)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.losses import language_loss

Order: TypeAlias = Literal["first", "second", "mixed"]


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
    """Of one parameter, over the slices: ``mean`` of the loss gradient g, and ``square``, the mean of g², where it is
    wanted; float32."""

    mean: Tensor
    square: Tensor | None


def loss_gradients(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], slices: Sequence[TokenSet],
    order: Order,
) -> dict[str, Gradient]:
    """Gradients of the mean next-token loss of each slice, averaged over slices, as much of them as saliency of this
    order takes; ``.grad`` fields stay as they are."""
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    zero = functools.partial(torch.zeros_like, dtype=torch.float32)
    sums = {name: Gradient(zero(parameter), None if order == "first" else zero(parameter))
            for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in slices:
            with torch.enable_grad():
                loss, scored = language_loss(model, batch)
                gradients = torch.autograd.grad(loss / scored, list(parameters.values()))
            for found, gradient in zip(sums.values(), gradients, strict=True):
                found.mean.add_(gradient.float() / len(slices))
                if found.square is not None:
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
    first = weight * gradient.mean
    if order == "first":
        return first.abs()
    assert gradient.square is not None, "gradients of the first order alone"
    second = weight.square() * gradient.square
    return (second if order == "second" else first - second / 2).abs()
