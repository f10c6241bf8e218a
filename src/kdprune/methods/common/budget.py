"""From scores and a net-parameter budget to blocks, and from a budget's slack to wider stand-ins."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.analysis import massive_layers, score_layers
from kdprune.methods.common.method import RankedMethod
from kdprune.methods.common.selection import candidate_blocks, open_layers, out_of_reach, reachable, select_blocks
from kdprune.methods.common.shape import Candidate, Shape
from kdprune.methods.common.target import Target
from kdprune.model.families import decoder_layers, family_of, norms_behind_mlp
from kdprune.model.modeling_kdp import FoldedLayer
from kdprune.runtime.run import Run

# A stand-in wider than this many times d gains little for its size (KDP.md, section 10: four times the
# parameters bring a residual MLP from .192 to .177).
WIDEST = 4


class Budget:
    """Parameters of a model, layer by layer, against what a block's stand-in costs.

    Args:
        model: the dense model.
        shape: the stand-in.
        target: parameters to remove.
        slack: mean layers by which the blocks may remove more than they have to.

    Attributes:
        target: parameters that are to be gone in the end.
        slack: parameters that the selection may remove beyond that, for wider stand-ins.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape, target: Target, slack: float = 0.0):
        family = family_of(model)
        self.shape, self.target = shape, target
        self.layers = layer_sizes(model)
        # A context layer keeps everything but the MLP path; where its stand-in becomes its MLP, the norm behind too.
        mlp, norms = (
            [sum(_count(getattr(layer, name)) for name in names) for layer in decoder_layers(model)]
            for names in (family.mlp, norms_behind_mlp(family)))
        folded = [sum(_count(stand_in) for stand_in, _ in layer.kdp_folded()) if isinstance(layer, FoldedLayer) else 0
                  for layer in decoder_layers(model)]  # by an earlier pruning
        self.kept_by_context = [
            size - part - others for size, part, others in zip(self.layers, mlp, folded, strict=True)]
        self.norm_behind = max(norms)
        self.slack = round(slack * sum(self.layers) / len(self.layers))

    def candidates(self, blocks: Sequence[range], fill: bool = False) -> list[Candidate]:
        """These blocks, each with the stand-in; with ``fill``, where it can be wider, widened evenly by what all remove
        beyond the target.

        The count grows by the shape's unit while the target is still met, up to ``WIDEST`` · d or the shape's most;
        where units are more than one, the first blocks' grow by one more as long as there is that much left. The net
        ratio ends above the target by less than one unit of features, or channels, or one of them a block, unless that
        cap is reached.
        """
        shape, each, left = self.shape, 0, 0
        spare, cost = sum(map(self.removal, blocks)) - self.target.parameters, shape.unit * shape.parameters_per_unit()
        if fill and cost and spare > 0:
            each, left = divmod(spare // cost, len(blocks))
        most = max((shape.most or WIDEST * shape.width) - shape.units, 0)
        return [Candidate(block, shape.wider(min((each + (shape.unit > 1 and place < left)) * shape.unit, most)))
                for place, block in enumerate(blocks)]

    def removal(self, block: range, shape: Shape | None = None) -> int:
        """Net parameters removed by replacing a block: its layers minus its stand-in."""
        shape = shape or self.shape
        source = shape.source(block)
        context = 0 if source is None else self.kept_by_context[source] + shape.ordinary * self.norm_behind
        return sum(self.layers[index] for index in block) - shape.parameters() - context

    def most_removed(self, blocks: Sequence[range]) -> int:
        """The most parameters that a set of separated ones removes."""
        return max(reachable(blocks, lambda _: 0.0, self.removal))


def layer_sizes(model: PreTrainedModel) -> list[int]:
    """Parameters of every decoder layer."""
    return [_count(layer) for layer in decoder_layers(model)]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_budget(options: RankedMethod, budget: Budget) -> None:
    """Refuses what no scores could make possible, before any work.

    Raises:
        KDPruneError: too few layers, impossible blocks, or a ratio out of reach (says the largest possible).
    """
    candidates = possible_blocks(options, budget)
    if options.blocks is None:
        most = budget.most_removed(candidates)
        budget.target.check(most, *out_of_reach(candidates))


def possible_blocks(options: RankedMethod, budget: Budget) -> list[range]:
    """The explicit blocks, or every candidate of the selection.

    Raises:
        KDPruneError: too few layers, or impossible blocks.
    """
    layers = len(budget.layers)
    if options.blocks is not None:
        return check_blocks([range(*block) for block in options.blocks], layers)
    allowed = open_layers(layers, options.protect)
    longest = options.max_block or min(8, layers // 2)
    if options.max_block is not None and not 2 <= longest <= layers // 2:
        raise KDPruneError(
            f"got max_block {longest}, expected 2 to {layers // 2}, half of this model's {layers} layers: choose one "
            f"in that range, or name longer blocks (blocks=…)")
    shortest = options.block_length or options.shortest
    longest = options.block_length or longest
    candidates = candidate_blocks(allowed, shortest, longest)
    if not candidates:
        raise KDPruneError(
            f"got a model of {layers} layers, {len(allowed)} of them unprotected; expected at least {max(shortest, 2)} "
            f"unprotected layers: protect fewer (protect=…) or name the blocks (blocks=…)"
        )
    return candidates


def blocks_to_rank(
    options: RankedMethod, model: PreTrainedModel, tokens: TokenSet, run: Run, budget: Budget,
) -> tuple[list[range], Mapping[str, Any]]:
    """The candidates over no layer that writes or erases massive tokens, and the scores, which say which those are.

    Layers are scored where they have not been. Explicit blocks are taken as they are, without scores.

    Raises:
        KDPruneError: as :func:`possible_blocks`; or the candidates left do not reach the ratio (says what they reach).
    """
    if options.blocks is not None:
        return possible_blocks(options, budget), {}
    scores = score_layers(model, tokens, run, protect=options.protect) if run.scores is None else run.scores
    return blocks_beside([*itertools.chain(*massive_layers(scores))], options, budget), scores


def blocks_beside(layers: list[int], options: RankedMethod, budget: Budget) -> list[range]:
    """The candidates of the selection that hold none of these layers, which write or erase massive tokens.

    Raises KDPruneError as :func:`blocks_to_rank` does.
    """
    candidates = possible_blocks(options, budget)
    beside = [block for block in candidates if not any(layer in block for layer in layers)]
    if len(beside) < len(candidates):
        names = ", ".join(map(str, sorted(layers)))
        budget.target.check(
            budget.most_removed(beside),
            f"that blocks beside layers {names} allow, which write or erase massive tokens",
            "lower the ratio, protect fewer layers (protect=…), allow longer blocks (max_block=…), or name the blocks "
            "(blocks=…) to remove those layers")
    return beside


def choose_blocks(
    options: RankedMethod, model: PreTrainedModel, tokens: TokenSet, run: Run, budget: Budget,
) -> list[range]:
    """The explicit blocks, or the selection of section 2, for which the layers are scored where they have not been.

    Raises KDPruneError as :func:`blocks_to_rank` does.
    """
    candidates, scores = blocks_to_rank(options, model, tokens, run, budget)
    if options.blocks is not None:
        return candidates
    return select_by_similarity(options, torch.as_tensor(scores[options.similarity]), budget, candidates)


def select_by_similarity(
    options: RankedMethod, similarity: Tensor, budget: Budget, candidates: list[range] | None = None,
) -> list[range]:
    """The explicit blocks, or those of greatest similarity, (L+1, L+1) between the states, that meet the budget.

    Args:
        options: the method.
        similarity: between states.
        budget: what has to go.
        candidates: blocks to choose from; None: all possible ones.
    """
    candidates = possible_blocks(options, budget) if candidates is None else candidates
    if options.blocks is not None:
        return candidates
    if options.endpoints == "output":
        # The paper's ranking: outputs of the first and the last layer, h_{s+1} and h_e.
        similarity = torch.cat((similarity[1:], similarity[-1:]))
    return select_blocks(similarity, candidates, budget.removal, budget.target, budget.slack)


def check_blocks(blocks: list[range], layers: int) -> list[range]:
    """Explicit blocks in order, each inside the model and separated from the next by a kept layer."""
    blocks = sorted(blocks, key=lambda block: block.start)
    for block in blocks:
        if not 0 <= block.start < block.stop <= layers:
            raise KDPruneError(
                f"got block [{block.start}, {block.stop}), expected 0 <= start < end <= {layers}, the model's layers")
    for first, second in itertools.pairwise(blocks):
        if second.start <= first.stop:
            raise KDPruneError(
                f"got blocks [{first.start}, {first.stop}) and [{second.start}, {second.stop}), expected at least one "
                f"kept layer between them: move or join them")
    if not blocks or sum(map(len, blocks)) >= layers:
        raise KDPruneError(f"got blocks over {sum(map(len, blocks))} of {layers} layers, expected at least one kept")
    return blocks


def shortest_blocks(model: PreTrainedModel, target: Target, allowed: range, cost: int = 0) -> list[range]:
    """For every start within ``allowed`` the shortest block whose removal meets the target.

    For the methods that take out one run of layers. Where layers differ in size, blocks may differ in length,
    and remove less than their last layer too much.

    Args:
        target: parameters to remove, net of ``cost``.
        cost: parameters put in the block's place.

    Raises:
        KDPruneError: no block inside ``allowed`` removes that much (says the largest ratio that can be reached).
    """
    sizes = layer_sizes(model)
    blocks = [range(start, stop) for start in allowed for stop in range(start + 1, allowed.stop + 1)]
    # At least one layer of the model has to stay.
    removed = {block: sum(sizes[block.start : block.stop]) - cost for block in blocks if len(block) < len(sizes)}
    target.check(max(removed.values(), default=0), f"that the layers from {allowed.start} to {allowed.stop - 1} allow",
                 "lower the ratio or protect fewer layers (protect=…)")
    enough: dict[int, range] = {}
    for block, size in removed.items():  # of one start the shorter come first
        if size >= target.parameters:
            enough.setdefault(block.start, block)
    return list(enough.values())
