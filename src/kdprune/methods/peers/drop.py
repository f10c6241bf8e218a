"""Methods that take layers out by a score and put nothing in their place: ShortGPT, UIDL, SLEB."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.perplexity import default_batch
from kdprune.methods.common.block_data import nearest
from kdprune.methods.common.budget import check_blocks, layer_sizes, shortest_blocks
from kdprune.methods.common.distance import measure_distances
from kdprune.methods.common.method import ComparingMethod, DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.target import Target
from kdprune.model.activations import recorded
from kdprune.model.families import decoder_layers
from kdprune.model.losses import IGNORED, language_loss, next_tokens
from kdprune.model.passes import let_pass, run_layers, standing_in
from kdprune.model.surgery import Drop, layers_replaced, running_from
from kdprune.options import option
from kdprune.runtime.run import Run

Key = TypeVar("Key")
Change: TypeAlias = tuple[int, nn.Module | None]  # a place among layers, and what stands there instead; None: nothing


def runs(layers: Iterable[int]) -> list[range]:
    """Layer indices as blocks, in order, neighbours joined: {7, 3, 4} → [3, 5), [7, 8)."""
    groups = itertools.groupby(enumerate(sorted(layers)), key=lambda item: item[1] - item[0])
    members = [[layer for _, layer in group] for _, group in groups]
    return [range(group[0], group[-1] + 1) for group in members]


def cheapest_layers(order: Sequence[int], sizes: Sequence[int], target: int) -> list[int]:
    """The first layers of ``order`` that together have at least ``target`` parameters, as few as it takes."""
    chosen, removed = [], 0
    for layer in order:
        if removed >= target:
            break
        chosen.append(layer)
        removed += sizes[layer]
    return chosen


def check_reach(target: Target, reachable: int) -> None:
    """Raises KDPruneError where the layers that may go, with ``reachable`` parameters, do not meet the target."""
    target.check(reachable, "the layers that may be taken out allow",
                 "lower the ratio or protect fewer layers (protect=…)")


@dataclass(frozen=True, kw_only=True)
class DropMethod(DepthMethod):
    """A depth method whose edits are drops alone; what it picks is stock architecture with fewer layers."""

    drops = True

    @property
    def takes_apart(self) -> bool:
        """Layers go whole."""
        return False

    @property
    def puts_in(self) -> bool:
        """Nothing."""
        return False

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError for impossible blocks, or a ratio that the allowed layers do not reach."""
        super().check(model, tokens)
        if self.blocks is not None:
            check_blocks([range(*block) for block in self.blocks], len(decoder_layers(model)))
        else:
            self.check_ratio(model)

    def check_ratio(self, model: PreTrainedModel) -> None:
        """Raises KDPruneError for a ratio out of reach, with the largest that is not."""
        sizes, allowed = layer_sizes(model), self.allowed(model)
        reachable = sum(sizes[layer] for layer in allowed)
        # At least one layer of the model has to stay.
        if len(allowed) == len(sizes):
            reachable -= max(sizes)
        check_reach(self.target(model), reachable)

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Takes out the named blocks, or what :meth:`choose` finds."""
        return self.choose(model, tokens, run) if self.blocks is None else self.named(model)

    def named(self, model: PreTrainedModel) -> MethodResult:
        """The named blocks taken out."""
        return dropped([range(*block) for block in sorted(self.blocks or ())], 0)

    @abstractmethod
    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> MethodResult:
        """Finds what to take out; arguments as of a call. Nothing is drawn at random unless it says so."""


def dropped(blocks: Iterable[range], tokens: int) -> MethodResult:
    """These blocks taken out, in order, for which so many calibration tokens were looked at."""
    return MethodResult([Drop(block) for block in blocks], tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class LossDrop(DropMethod):
    """A drop that asks for the loss of the model without what may go, on some of the calibration rows."""

    sequences: int = option(
        128, "calibration rows the loss is measured on, fewer if there are not as many", least=1, group="data")

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError as other drops do, and for rows in which no token follows another."""
        super().check(model, tokens)
        if self.asks_for_losses and not (next_tokens(self.rows(tokens)) != IGNORED).any():
            raise KDPruneError(f"got calibration rows without two tokens in a row from {tokens.source}, expected text "
                               f"to take a loss on: give longer rows (length=…)")

    @property
    def asks_for_losses(self) -> bool:
        """Whether it does, as it is set."""
        return self.blocks is None

    def rows(self, tokens: TokenSet) -> TokenSet:
        """The rows the loss is measured on."""
        return tokens.select(slice(0, self.sequences))


def least_loss(losses: Mapping[Key, float], what: str) -> Key:
    """Without which the loss is least; raises KDPruneError where it is infinite without any ``what``."""
    best = min(losses, key=losses.__getitem__)
    if math.isinf(losses[best]):
        raise KDPruneError(f"got no finite loss after removing any one {what} more, expected one: load the model in "
                           "another dtype (--dtype float32)")
    return best


@dataclass(frozen=True, kw_only=True)
class ShortGPT(DropMethod, ComparingMethod):
    """Takes out the layers that change the state least, wherever they stand. Source: Men et al. 2024, section 3.

        BI_l = 1 − E_t[ cos(h_l,t, h_{l+1},t) ]

    over the real tokens t of the calibration rows; the fewest layers of lowest Block Influence that meet the ratio
    go, no layer excluded. A cosine with a zero state counts 0.5.

    As in the published code h_L stands behind the final norm (the last entry of ``hidden_states``), which makes the
    last layer's influence another; with ``last_state`` "plain" it is what leaves the last layer.
    """

    title: ClassVar[str] = "ShortGPT"
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> MethodResult:
        """Layers of lowest Block Influence; arguments as in :meth:`DropMethod.choose`."""
        distances = measure_distances(model, tokens, run, normed=self.last_state == "normed")
        influence = block_influence(distances.cosine)
        order = sorted(self.allowed(model), key=lambda layer: (influence[layer], layer))
        chosen = cheapest_layers(order, layer_sizes(model), self.target(model).parameters)
        return dropped(runs(chosen), distances.tokens)


def block_influence(cosine: Tensor) -> list[float]:
    """BI of every layer from the mean cosines of all pairs of states, (L+1, L+1) → L values."""
    values: list[float] = (1 - cosine.diagonal(1)).tolist()
    return values


@dataclass(frozen=True, kw_only=True)
class UIDL(DropMethod, ComparingMethod):
    """Takes out one run of layers, the one whose ends are nearest. Source: Gromov et al. 2024, section 3.

        l* = argmin_l  E_rows[ arccos(cos(h_l, h_{l+n})) / π ]

    at the last real token of every row; n is the shortest length that meets the ratio, and layers l* … l*+n−1 go.

    As in the published code l starts at 1, and h_L stands behind the final norm; with ``last_state`` "plain" it is what
    leaves the last layer. The paper heals with QLoRA afterwards (``--heal``).
    """

    title: ClassVar[str] = "UIDL"
    ends: ClassVar[tuple[int, int]] = (1, 0)
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    def check_ratio(self, model: PreTrainedModel) -> None:
        """Raises KDPruneError for a ratio out of reach, with the largest that is not."""
        shortest_blocks(model, self.target(model), self.allowed(model))

    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> MethodResult:
        """The block of least angular distance; arguments as in :meth:`DropMethod.choose`."""
        candidates = shortest_blocks(model, self.target(model), self.allowed(model))
        distances = measure_distances(model, tokens, run, normed=self.last_state == "normed")
        return dropped([nearest(candidates, distances.angular)], distances.tokens)


@dataclass(frozen=True, kw_only=True)
class SLEB(LossDrop):
    """Takes out, again and again, the layer whose removal costs least loss. Source: Song et al. 2024, section 4.

        l* = argmin_{l alive, not first or last}  E[ −log p(x_t | x_<t) ]  of the model without l and without those gone

    in nats over the real tokens of the calibration rows, until the ratio is met. Greedy: each step is the best one
    given those before it; for one layer this is the exhaustive optimum, for more it need not be.

    What enters a candidate is found once a round, so only the layers behind it are run for its loss.

    The paper takes 128 sequences of 2048 tokens of WikiText-2; the published code joins 128 shuffled *rows* of that
    data set, about four such sequences. Here ``sequences`` calibration rows are taken, of whatever length they have.
    """

    title: ClassVar[str] = "SLEB"
    spreads: ClassVar[bool] = True
    ends: ClassVar[tuple[int, int]] = (1, 1)

    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> MethodResult:
        """Greedy search over whole layers; arguments as in :meth:`DropMethod.choose`."""
        rows, sizes, allowed = self.rows(tokens), layer_sizes(model), list(self.allowed(model))
        target = self.target(model).parameters
        gone: list[int] = []
        rounds = len(cheapest_layers(allowed, sizes, target))
        evaluations = sum(len(allowed) - number for number in range(rounds))
        with run.stage("greedy search", evaluations * math.ceil(len(rows) / run.batch_size)) as progress:
            while sum(sizes[layer] for layer in gone) < target:
                candidates = [layer for layer in allowed if layer not in gone]
                losses = losses_without(model, rows, gone, candidates, run.batch_size, progress)
                gone.append(least_loss(losses, "layer"))
        return dropped(runs(gone), rows.tokens)


def losses_without(
    model: PreTrainedModel, tokens: TokenSet, gone: Iterable[int], candidates: Sequence[int], batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[int, float]:
    """For each candidate the mean next-token loss in nats of ``model`` without it and the layers ``gone``; infinite
    where it is not a number.

    Args:
        progress: told of every batch of every candidate.
    """
    gone = set(gone)
    alive = [index for index in range(len(decoder_layers(model))) if index not in gone]
    changes: dict[int, Change] = {layer: (alive.index(layer), None) for layer in candidates}
    return losses_changed(
        model, tokens, [decoder_layers(model)[index] for index in alive], changes, batch_size, progress)


@torch.no_grad()
def losses_changed(
    model: PreTrainedModel, tokens: TokenSet, layers: Sequence[nn.Module], changes: Mapping[Key, Change],
    batch_size: int, progress: Callable[[int], None] = lambda _: None,
) -> dict[Key, float]:
    """For each of several changes of one layer the mean next-token loss in nats of ``model``; infinite where it is not
    a number.

    What enters a layer is the same whether it is changed or not, so one pass through ``layers`` gives the states in
    front of all changes, and of each model only the layers from the changed one on are run, and the head. Held are the
    states of one batch, of fewer rows where the logits of ``batch_size`` would be many.

    Args:
        layers: that the model is run with, in place of its own.
        changes: by a key, a place among ``layers`` and what stands there; None: nothing.
        progress: told of every batch of every change.
    """
    places = {place for place, _ in changes.values()}
    totals, scored = dict.fromkeys(changes, 0.0), 0
    for batch in tokens.batches(default_batch(model, tokens.ids.shape[1], most=batch_size)):
        # recorded() comes last: inside, places are the layers' indices.
        with (layers_replaced(model, layers), standing_in(layers[max(places):], let_pass),
              recorded(model, places) as states):
            run_layers(model, batch)
        for key, (place, new) in changes.items():
            others = [*layers[:place], *([] if new is None else [new]), *layers[place + 1 :]]
            with running_from(model, others, place, states[place]):
                loss, count = language_loss(model, batch)
            totals[key] += float(loss)
            progress(1)
        scored += count
    means = {key: total / max(scored, 1) for key, total in totals.items()}
    return {key: mean if math.isfinite(mean) else math.inf for key, mean in means.items()}
