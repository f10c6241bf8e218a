"""LLM-Pruner: whole attention heads and MLP channels go, those whose loss gradient says they matter least."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.method import Method
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.units import unit_of
from kdprune.methods.peers.saliency import loss_gradients, random_slices, weight_saliency
from kdprune.model.families import decoder_layers, family_of, own_channels
from kdprune.model.structures import StructurePart, attention_parts, has_joined_heads, mlp_parts, refuse_experts
from kdprune.model.surgery import Resize, check_model
from kdprune.options import option
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run


@dataclass(frozen=True)
class Kept:
    """What stays of a layer: key-value heads with their queries, and MLP channels; None: it has none of its own, but a
    stand-in of an earlier pruning in their place, which stays whole."""

    groups: int
    channels: int | None


@dataclass(frozen=True)
class _Structures:
    """What a layer has to give: how many structures of each kind, the parameters of one, and in what steps channels go.
    """

    groups: int
    head_cost: int
    channels: int
    channel_cost: int
    unit: int

    @property
    def spare_channels(self) -> int:
        """All but the last step."""
        return max(self.channels - self.unit, 0)


@dataclass(frozen=True, kw_only=True)
class LLMPruner(Method):
    """LLM-Pruner (NeurIPS 2023, arXiv 2305.11627), one shot, without its fine-tuning.

    Coupled structures are an attention head (rows of q, k, v, columns of the output projection; with grouped queries
    the whole key-value group) and an MLP channel (rows of gate and up, columns of down). A weight's saliency is
    |w g|, |w² a| or |w g − ½ w² a| with g the gradient of the language-model loss and a the mean of g² over ten random
    slices of 64 tokens; a structure's is the sum over its weights, and the lowest go. The layers pruned are the
    paper's 4 to 29 of 32, scaled to the model's depth; embeddings, head and norms stay whole.

    The paper removes n − ⌊n(1 − r)⌋ of n structures a layer at one nominal rate r. Here the rate follows from the net
    ratio: heads go by that rule at r = the share of the prunable parameters, fewer where they alone would exceed the
    ratio; channels make up the rest, which few heads leave coarse, in units of 64 (16 in models narrower than 512),
    evenly over the layers up to one unit. So the net ratio is met from above by less than one unit in one layer. Every
    layer keeps at least one head group and one unit. Biases count as weights of their structure.
    """

    title: ClassVar[str] = "LLM-Pruner"
    narrows: ClassVar[bool] = True

    order: Literal["first", "second", "mixed"] = option(
        "first", "terms of the loss's expansion that a weight's saliency takes in")
    sequences: int = option(10, "random slices of the calibration text whose gradient is taken", least=1,
                            group="data")
    slice_length: int = option(64, "tokens of a slice", least=2, group="data", rare=True)
    keep_first: int | None = option(None, "layers kept whole at the start (4 of 32)", least=0, group="size")
    keep_last: int | None = option(None, "layers kept whole at the end (2 of 32)", least=0, group="size")

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        check_model(model, substitutes=True, narrows=True)
        self.plan(model)
        if not (tokens.fitted(self.held).mask.sum(1) > 1).any():
            raise KDPruneError(f"got no row of two tokens or more from {tokens.source}, expected one: give more text")

    def protected(self, model: PreTrainedModel) -> tuple[int, int]:
        """Layers kept whole at the start and at the end."""
        depth = len(decoder_layers(model))
        first = round(depth * 4 / 32) if self.keep_first is None else self.keep_first
        last = round(depth * 2 / 32) if self.keep_last is None else self.keep_last
        return first, last

    def plan(self, model: PreTrainedModel) -> dict[int, Kept]:
        """What stays of every layer that is pruned; raises KDPruneError for a ratio out of reach (says the largest)."""
        refuse_experts(model)
        depth, wanted = len(decoder_layers(model)), self.target(model)
        first, last = self.protected(model)
        pruned = range(first, depth - last)
        if not pruned:
            raise KDPruneError(
                f"got {first} + {last} layers kept whole of {depth}, expected at least one pruned: lower keep_first "
                f"or keep_last")
        has, target = [_structures(model, index) for index in pruned], wanted.parameters
        least = [own.groups if has_joined_heads(model) else 1 for own in has]  # joined, channels go alone

        def gone(kept: list[int]) -> int:
            return sum((own.groups - groups) * own.head_cost for own, groups in zip(has, kept, strict=True))

        whole = sum(own.groups * own.head_cost + own.channels * own.channel_cost for own in has)
        share = 1 - min(target / whole, 1)
        kept = [max(low, math.floor(own.groups * share)) for own, low in zip(has, least, strict=True)]
        while gone(kept) > target:
            kept = [min(own.groups, groups + 1) for own, groups in zip(has, kept, strict=True)]
        most = sum(own.spare_channels * own.channel_cost for own in has)
        while kept != least and gone(kept) + most < target:
            kept = [max(low, groups - 1) for low, groups in zip(least, kept, strict=True)]
        wanted.check(
            gone(kept) + most, f"that layers {pruned.start} to {pruned.stop - 1} allow",
            "lower the ratio or keep fewer layers whole (keep_first=…, keep_last=…)")
        cut = _evenly(has, target - gone(kept))
        return {index: Kept(groups, own.channels - number if own.channels else None)
                for index, own, groups, number in zip(pruned, has, kept, cut, strict=True)}

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Ranks the structures of every layer and returns the narrower layers."""
        plan = self.plan(model)
        slices = random_slices(tokens.fitted(self.held), self.sequences, self.slice_length, run.generator(1))
        edits = []
        with run.stage("saliency"):
            for index, saliency in self.saliencies(model, plan, slices):
                layer, kept = decoder_layers(model)[index], plan[index]
                weights: dict[str, Tensor] = {}
                width = {"groups": kept.groups} if kept.channels is None else dataclasses.asdict(kept)
                for parts, count in zip(_parts(model, layer), width.values(), strict=True):
                    score = torch.stack([part.total(layer, saliency) for part in parts]).sum(0)
                    # The first process's: gradients may differ in their last bits from one to the next.
                    chosen = world().broadcast(score.argsort(descending=True, stable=True)[:count].cpu())
                    for part in parts:
                        weights |= part.select(layer, chosen)
                edits.append(Resize(index, width, weights))
        return MethodResult(edits, tokens=sum(batch.tokens for batch in slices))

    def saliencies(
        self, model: PreTrainedModel, layers: Iterable[int], slices: list[TokenSet],
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Saliency of every weight of a layer's structures, by the parameter's name within it, layer after layer:
        float32 gradients of all of them are as large as the model, and go as they are used."""
        parameters: dict[tuple[int, str], nn.Parameter] = {}
        for index in layers:
            layer = decoder_layers(model)[index]
            paths = {part.path for parts in _parts(model, layer) for part in parts}
            parameters |= {(index, name): p for name, p in layer.named_parameters() if name.rpartition(".")[0] in paths}
        names = {f"{index}.{name}": (index, name) for index, name in parameters}
        gradients = loss_gradients(model, {key: parameters[place] for key, place in names.items()}, slices, self.order)
        for index, own in itertools.groupby(names.items(), key=lambda item: item[1][0]):
            yield index, {name: weight_saliency(parameters[index, name], gradients.pop(key), self.order)
                          for key, (_, name) in own}


def _parts(model: PreTrainedModel, layer: nn.Module) -> list[list[StructurePart]]:
    """The structures of a layer: its heads, and its channels if it has some of its own."""
    heads = attention_parts(model, layer)
    return [heads] if own_channels(layer, family_of(model)) is None else [heads, mlp_parts(model, layer)]


def _structures(model: PreTrainedModel, index: int) -> _Structures:
    layer = decoder_layers(model)[index]
    sizes = [(len(parts[0].members), sum(part.size(layer) for part in parts)) for parts in _parts(model, layer)]
    (groups, head), (channels, channel) = [*sizes, (0, 0)][:2]
    return _Structures(groups, head, channels, channel, unit_of(model.config.hidden_size, channels or None))


def _evenly(has: list[_Structures], parameters: int) -> list[int]:
    """How many channels go of every layer, alike up to one step, so that they have at least so many parameters."""

    def gone(cut: list[int]) -> int:
        return sum(number * own.channel_cost for number, own in zip(cut, has, strict=True))

    def at(steps: int) -> list[int]:
        return [min(steps * own.unit, own.spare_channels) for own in has]

    low, high = 0, max(own.spare_channels // own.unit for own in has)  # the most steps that are not too much
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if gone(at(middle)) <= parameters else (low, middle - 1)
    cut = at(low)
    for number, own in enumerate(has):
        if gone(cut) < parameters and cut[number] < own.spare_channels:
            cut[number] += own.unit
    return cut
