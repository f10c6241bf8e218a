"""FlattenGPT: neighbouring layers become one wide parallel layer, which is pruned back to the width of one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.block_data import block_states, check_rows
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.common.distance import measure_distances
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.peers.drop import runs
from kdprune.methods.peers.flattening import FlattenFit, Refit, Towards
from kdprune.model.edits import Drop, Edit, Rewrite
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import FoldedLayer, StandIn
from kdprune.model.structures import refuse_experts
from kdprune.options import option
from kdprune.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class FlattenGPT(DepthMethod):
    """Makes one layer of two or more neighbours, with the heads and channels of all that matter most.

    Which: layers begin as groups of one. Again and again two neighbouring groups [a, b) and [b, c) are joined, those of
    greatest S_{a, c−1}, the mean cosine of the states that enter their first and their last layer, until the groups,
    but for the layer that stays of each, have the parameters to remove. Nothing is drawn at random.

    What becomes of a group is said by :class:`kdprune.methods.peers.flattening.FlattenFit`: its layers' attentions side
    by side, all on the state that enters the group, then its MLPs, all on that state plus what attention added. The
    scales of the norms go into the projections behind them. As many heads stay as a layer has, those of greatest

        f_i = E_t ‖z_i,t ∘ ρ_i‖,   z_i the head's output, ρ_i the norms of its rows of the output projection

    and as many channels, those of greatest ridge leverage [C (C + λI)⁻¹]_jj, C = Σ ψψᵀ over the real tokens. The down
    projection W is solved for anew,

        W_S + (C_SS + λI)⁻¹ C_SR W_R,   S what stays, R the rest

    The layer is of the model's own sizes: a stock architecture.

    Source: Xu et al., "FlattenGPT: Depth Compression for Transformer with Layer Flattening", ICML 2026, arXiv
    2602.08858. No code is published; the method is written from accounts of the paper. Assumed here: E is a root mean
    square; with grouped queries a key-value head goes with its queries; C is taken where the layer will read it, behind
    the heads that stayed, on the dense model's states in front of the group. ``refit`` and ``towards`` are not in it.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "FlattenGPT"

    towards: Towards = option(
        "sum", "what projections are solved towards: the sum of the layers side by side, or the state that leaves the "
        "last of them in the dense model")
    refit: Refit = option("mlp", "projections solved for anew: that out of the MLP, or out of attention too")
    ridge: float = option(10.0, "λ of leverages and solves, in units of the mean eigenvalue", above=0, rare=True)

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        refuse_experts(model)
        family = family_of(model)
        if family.pre_norm and not getattr(model.config, family.pre_norm):
            raise KDPruneError(
                f"got a {family.model_type} model with a norm behind each residual sum, expected one in front of each "
                "sublayer: the layers' updates cannot be added up there. Take whole layers out (shortgpt, sleb)")
        if self.blocks is not None:
            self._check_blocks(model)
        else:
            # At least one layer of a run stays.
            sizes = layer_sizes(model)
            most = sum(_removed(run, sizes) for run in self._runs(model))
            self.target(model).check(
                most, "that one layer for each run of those that may be joined allows",
                "lower the ratio or protect fewer layers (protect=…)")
        check_rows(tokens)

    def _check_blocks(self, model: PreTrainedModel) -> None:
        """Raises KDPruneError for blocks that are none, or hold layers that cannot be joined."""
        layers, end = len(decoder_layers(model)), 0
        for start, stop in sorted(self.blocks or ()):
            if not end <= start < stop - 1 < layers:
                raise KDPruneError(
                    f"got block [{start}, {stop}), expected two layers or more of {layers}, none in two blocks: one "
                    "layer of a block stays. Give longer blocks, or none")
            odd = [index for index in range(start, stop) if not _is_plain(model, index)]
            if odd:
                raise KDPruneError(
                    f"got layer {odd[0]} in a block, which holds a stand-in of an earlier pruning; expected layers "
                    "with attention and MLP of their own: name others (blocks=…)")
            end = stop

    def _runs(self, model: PreTrainedModel) -> list[range]:
        """The longest runs of layers that may be joined."""
        return runs(index for index in self.allowed(model) if _is_plain(model, index))

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the groups, flattens each and returns the edits."""
        if self.blocks is not None:
            blocks = [range(*block) for block in sorted(self.blocks)]
        else:
            cosine = measure_distances(model, tokens, run).cosine
            blocks = groups(cosine, self._runs(model), layer_sizes(model), self.target(model).parameters)
        edits: list[Edit] = []
        for states in block_states(model, tokens, blocks, self.held, run):
            with run.stage(f"flatten {states.name}"):
                fit = FlattenFit(model, states, run)
                weights = fit.solve(self.towards, self.refit, self.ridge)  # finds the source, too
            edits.append(Rewrite(fit.source, weights))
            beside = (range(states.block.start, fit.source), range(fit.source + 1, states.block.stop))
            edits += [Drop(block) for block in beside if block]
        return MethodResult(edits, replaced=blocks)


def groups(cosine: Tensor, runs: Sequence[range], sizes: Sequence[int], target: int) -> list[range]:
    """The groups of two layers or more that are joined when so many parameters are gone, in order.

    Args:
        cosine: of all pairs of the states h_0 … h_L, (L+1, L+1).
        runs: the layers that may be joined.
        sizes: parameters of every layer.
        target: parameters to remove; a group removes all but its largest layer's at least.
    """
    found = [[range(layer, layer + 1) for layer in run] for run in runs]
    while sum(_removed(group, sizes) for run in found for group in run) < target:
        pairs = [(float(cosine[first.start, second.stop - 1]), -first.start, run)
                 for run in found for first, second in itertools.pairwise(run)]
        _, start, run = max(pairs, key=lambda pair: pair[:2])
        place = next(place for place, group in enumerate(run) if group.start == -start)
        run[place : place + 2] = [range(run[place].start, run[place + 1].stop)]
    return [group for run in found for group in run if len(group) > 1]


def _removed(group: range, sizes: Sequence[int]) -> int:
    """The fewest parameters that go when one of a group's layers stays."""
    own = [sizes[index] for index in group]
    return sum(own) - max(own)


def _is_plain(model: PreTrainedModel, index: int) -> bool:
    """Whether a layer has attention and MLP of its own, and no stand-in."""
    layer = decoder_layers(model)[index]
    return not isinstance(layer, FoldedLayer) and not isinstance(getattr(layer, family_of(model).mlp[0]), StandIn)
