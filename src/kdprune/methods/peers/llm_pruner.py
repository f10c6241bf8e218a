"""LLM-Pruner: whole attention heads and MLP channels go, those whose loss gradient says they matter least."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.method import Method
from kdprune.methods.common.result import MethodResult
from kdprune.methods.peers.saliency import loss_gradients, random_slices, weight_saliency
from kdprune.model.families import decoder_layers
from kdprune.model.structures import StructurePart, attention_parts, has_joined_heads, mlp_parts
from kdprune.model.surgery import Resize, check_model
from kdprune.options import option
from kdprune.runtime.run import Run


@dataclass(frozen=True)
class Widths:
    """How much of which layers stays: ``groups`` key-value heads each, and ``channels`` MLP channels by layer."""

    layers: range
    groups: int
    channels: list[int]


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
    ratio; channels make up the rest, which few heads leave coarse, evenly over the layers up to one channel. So the
    net ratio is met from above by less than one channel. Every layer keeps at least one head group and one channel.
    Biases count as weights of their structure.
    """

    title: ClassVar[str] = "LLM-Pruner"

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
        check_model(model, substitutes=True)
        self.plan(model)
        if not (tokens.fitted(self.held).mask.sum(1) > 1).any():
            raise KDPruneError(f"got no row of two tokens or more from {tokens.source}, expected one: give more text")

    def protected(self, model: PreTrainedModel) -> tuple[int, int]:
        """Layers kept whole at the start and at the end."""
        depth = len(decoder_layers(model))
        first = round(depth * 4 / 32) if self.keep_first is None else self.keep_first
        last = round(depth * 2 / 32) if self.keep_last is None else self.keep_last
        return first, last

    def plan(self, model: PreTrainedModel) -> Widths:
        """What stays of every layer; raises KDPruneError for a ratio out of reach (says the largest)."""
        layers = decoder_layers(model)
        depth, wanted = len(layers), self.target(model)
        first, last = self.protected(model)
        pruned = range(first, depth - last)
        if not pruned:
            raise KDPruneError(
                f"got {first} + {last} layers kept whole of {depth}, expected at least one pruned: lower keep_first "
                f"or keep_last")
        parts = attention_parts(model, layers[first]), mlp_parts(model, layers[first])
        (groups, head_cost), (channels, channel_cost) = (_cost(model, first, kind) for kind in parts)
        target = wanted.parameters
        whole = len(pruned) * (groups * head_cost + channels * channel_cost)
        least = groups if has_joined_heads(model) else 1  # then channels go alone
        kept = max(least, math.floor(groups * (1 - min(target / whole, 1))))
        while kept < groups and len(pruned) * (groups - kept) * head_cost > target:
            kept += 1
        most = len(pruned) * (channels - 1)
        while kept > least and len(pruned) * (groups - kept) * head_cost + most * channel_cost < target:
            kept -= 1
        removed = len(pruned) * (groups - kept) * head_cost
        spare = max(0, math.ceil((target - removed) / channel_cost))
        wanted.check(
            removed + most * channel_cost, f"that layers {pruned.start} to {pruned.stop - 1} allow",
            "lower the ratio or keep fewer layers whole (keep_first=…, keep_last=…)")
        each, more = divmod(spare, len(pruned))
        return Widths(pruned, kept, [channels - each - (number < more) for number in range(len(pruned))])

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Ranks the structures of every layer and returns the narrower layers."""
        plan = self.plan(model)
        slices = random_slices(tokens.fitted(self.held), self.sequences, self.slice_length, run.generator(1))
        with run.stage("saliency"):
            saliencies = self.saliencies(model, plan.layers, slices)
        edits = []
        for index, channels in zip(plan.layers, plan.channels, strict=True):
            layer = decoder_layers(model)[index]
            weights: dict[str, Tensor] = {}
            for parts, count in ((attention_parts(model, layer), plan.groups), (mlp_parts(model, layer), channels)):
                score = torch.stack([part.total(layer, saliencies[index]) for part in parts]).sum(0)
                kept = score.argsort(descending=True, stable=True)[:count].cpu()
                for part in parts:
                    weights |= part.select(layer, kept)
            edits.append(Resize(index, {"groups": plan.groups, "channels": channels}, weights))
        return MethodResult(edits, tokens=sum(batch.tokens for batch in slices))

    def saliencies(
        self, model: PreTrainedModel, layers: range, slices: list[TokenSet],
    ) -> dict[int, dict[str, Tensor]]:
        """Saliency of every weight of the structures, by layer and by the parameter's name within it."""
        parameters: dict[tuple[int, str], nn.Parameter] = {}
        for index in layers:
            layer = decoder_layers(model)[index]
            paths = {part.path for part in (*attention_parts(model, layer), *mlp_parts(model, layer))}
            parameters |= {(index, name): p for name, p in layer.named_parameters() if name.rpartition(".")[0] in paths}
        names = {f"{index}.{name}": (index, name) for index, name in parameters}
        gradients = loss_gradients(model, {key: parameters[place] for key, place in names.items()}, slices)
        found: dict[int, dict[str, Tensor]] = {index: {} for index in layers}
        for key, (index, name) in names.items():
            found[index][name] = weight_saliency(parameters[index, name], gradients[key], self.order)
        return found


def _cost(model: PreTrainedModel, index: int, parts: list[StructurePart]) -> tuple[int, int]:
    """How many structures of a kind a layer has, and the parameters of one."""
    layer = decoder_layers(model)[index]
    return len(parts[0].members), sum(part.size(layer) for part in parts)
