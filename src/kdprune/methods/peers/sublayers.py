"""Sublayer dropping: attention sublayers and MLPs are left out one by one (LLM-Drop, BlockPruner)."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.common.distance import cosine
from kdprune.methods.common.result import MethodResult
from kdprune.methods.peers.drop import LossDrop, check_reach, least_loss, losses_changed, runs
from kdprune.model.edits import Drop, Edit, Resize
from kdprune.model.families import decoder_layers, family_of, state_of
from kdprune.model.modeling_kdp import SUBLAYERS, FoldedLayer, lacking, sublayer_parts, unfold
from kdprune.model.passes import run_layers
from kdprune.model.surgery import check_model, sharing_copy, without_sublayer
from kdprune.options import option
from kdprune.runtime.run import Run

Sublayer: TypeAlias = tuple[int, str]  # a layer, and "attention" or "mlp"


@dataclass(frozen=True, kw_only=True)
class Sublayers(LossDrop):
    """Leaves out sublayers, attention or MLP, each with the norms that nothing else reads, until the ratio is met.

    ``ranking``:

    - "loss": again and again the sublayer s without which the loss of the model is least,
          s* = argmin_s  E[ −log p(x_t | x_<t) ]  without s and those gone,
      in nats over the real tokens of ``sequences`` calibration rows. Source: Zhong et al., "BlockPruner", 2024,
      whose measure is perplexity, exp of this. The state in front of a candidate's layer is found once a round.
    - "similarity": those of least 1 − E_t[ cos(x_t, x_t + f(x_t)) ], x the stream that enters the sublayer f with its
      norms, over all real tokens, measured once on the dense model. Source: He et al., "What Matters in Transformers?
      Not All Attention is Needed" (LLM-Drop), 2024, section 3. A cosine with a zero state counts 0.5.

    ``what`` says what may go: both kinds, ranked together, or one of them. A layer that loses both, or the one that an
    earlier pruning left it, goes whole. With ``blocks`` the sublayers of these layers go.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "Sublayers"

    what: Literal["both", "attention", "mlp"] = option("both", "sublayers that may go", group="size")
    ranking: Literal["loss", "similarity"] = option(
        "loss", "what says which go: the loss without each, greedily, or how little each changes the state")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that may go."""
        return SUBLAYERS if self.what == "both" else (self.what,)

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError as other drops by loss do, and for blocks without what may go."""
        check_model(model, substitutes=True)  # what lacks a sublayer is of the package's class
        super().check(model, tokens)
        if self.blocks is not None and not self._named(model):
            raise KDPruneError(f"got blocks whose layers have no {self.what} any more, expected some to leave out: "
                               "name other layers (blocks=…)")

    @property
    def asks_for_losses(self) -> bool:
        """By ``ranking``, where no blocks are named."""
        return super().asks_for_losses and self.ranking == "loss"

    def check_ratio(self, model: PreTrainedModel) -> None:
        """Raises KDPruneError for a ratio out of reach, with the largest that is not."""
        sizes, candidates = Sizes(model), self.candidates(model)
        reachable = sizes.removed(candidates)
        # At least one sublayer of the model has to stay, any that the ranking puts last.
        if candidates and reachable == sum(sizes.layers):
            reachable = min(sizes.removed([other for other in candidates if other != last]) for last in candidates)
        check_reach(self.target(model), reachable)

    def candidates(self, model: PreTrainedModel) -> list[Sublayer]:
        """The sublayers that may go, of those that are there."""
        return self._present(model, self.allowed(model))

    def _named(self, model: PreTrainedModel) -> list[Sublayer]:
        """Those of the given blocks."""
        return self._present(model, [layer for block in self.blocks or () for layer in range(*block)])

    def _present(self, model: PreTrainedModel, layers: Iterable[int]) -> list[Sublayer]:
        gone = left_out(model)
        return [(layer, kind) for layer in layers for kind in self.kinds if (layer, kind) not in gone]

    def named(self, model: PreTrainedModel) -> MethodResult:
        """The sublayers of the named blocks taken out."""
        return MethodResult(sublayer_edits(self._named(model), left_out(model)), tokens=0)

    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> MethodResult:
        """Finds sublayers; returns drops of layers and of sublayers. Arguments as in :meth:`DropMethod.choose`."""
        by_loss = self.ranking == "loss"
        rows, find = (self.rows(tokens), self._by_loss) if by_loss else (tokens, self._by_similarity)
        return MethodResult(sublayer_edits(find(model, rows, run), left_out(model)), tokens=rows.tokens)

    def _by_similarity(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> list[Sublayer]:
        candidates = self.candidates(model)
        with run.stage("similarity of sublayers", len(tokens)) as progress:
            changes = sublayer_changes(model, tokens, candidates, run.batch_size, progress)
        order, sizes, target = sorted(candidates, key=changes.__getitem__), Sizes(model), self.target(model).parameters
        count = next(n for n in range(1, len(order) + 1) if sizes.removed(order[:n]) >= target)
        return order[:count]

    def _by_loss(self, model: PreTrainedModel, rows: TokenSet, run: Run) -> list[Sublayer]:
        sizes, target = Sizes(model), self.target(model).parameters
        stack, candidates = Stack(model), self.candidates(model)
        with run.stage("greedy search") as progress:
            while sizes.removed(stack.gone) < target:
                left = [candidate for candidate in candidates if candidate not in stack.gone]
                losses = stack.losses(rows, left, run.batch_size, progress)
                stack.leave_out(least_loss(losses, "sublayer"))
        return list(stack.gone)


def left_out(model: PreTrainedModel) -> list[Sublayer]:
    """What an earlier pruning left out of the layers that are there."""
    found = [(index, lacking(layer, family_of(model))) for index, layer in enumerate(decoder_layers(model))]
    return [(index, kind) for index, kind in found if kind is not None]


class Sizes:
    """Parameters of the layers of a model, and of their sublayers with the norms that are theirs alone."""

    def __init__(self, model: PreTrainedModel):
        family = family_of(model)
        self.layers = layer_sizes(model)
        self._before = left_out(model)
        self.own = [{kind: sum(parameter.numel() for name in sublayer_parts(layer, kind, family)
                               for parameter in _parameters(layer, name)) for kind in SUBLAYERS}
                    for layer in decoder_layers(model)]

    def removed(self, gone: Collection[Sublayer]) -> int:
        """Parameters that go with these sublayers: of a layer that has none then, all."""
        lost: list[set[str]] = [set() for _ in self.layers]
        for layer, kind in gone:
            lost[layer].add(kind)
        for layer, kind in self._before:
            if lost[layer]:
                lost[layer].add(kind)
        return sum(whole if len(kinds) == len(SUBLAYERS) else sum(own[kind] for kind in kinds)
                   for whole, own, kinds in zip(self.layers, self.own, lost, strict=True))


def _parameters(layer: nn.Module, name: str) -> list[nn.Parameter]:
    return list(layer.get_submodule(name).parameters())


def sublayer_edits(gone: Collection[Sublayer], before: Collection[Sublayer] = ()) -> list[Edit]:
    """Layers that lose both sublayers go, the others lose one; ``before``: what an earlier pruning left out."""
    whole = {layer for layer, _ in gone if all((layer, kind) in (*gone, *before) for kind in SUBLAYERS)}
    single = sorted((layer, kind) for layer, kind in gone if layer not in whole)
    return [*(Drop(block) for block in runs(whole)), *(Resize(layer, {"without": kind}, {}) for layer, kind in single)]


class Stack:
    """A model's layers while sublayers are left out of them; the model stays as it was.

    Attributes:
        gone: what was left out, in order.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._layers: dict[int, nn.Module] = dict(enumerate(decoder_layers(model)))
        self._before = left_out(model)
        self.gone: list[Sublayer] = []

    def leave_out(self, sublayer: Sublayer) -> None:
        """Leaves it out for good."""
        layer = self._without(sublayer)
        if layer is None:
            del self._layers[sublayer[0]]
        else:
            self._layers[sublayer[0]] = layer
        self.gone.append(sublayer)

    def _without(self, sublayer: Sublayer) -> nn.Module | None:
        """Its layer as it is then; None: nothing is left of it."""
        index, kind = sublayer
        if any(layer == index for layer, _ in (*self._before, *self.gone)):
            return None
        return without_sublayer(self._model, self._layers[index], kind)

    def losses(
        self, rows: TokenSet, candidates: Sequence[Sublayer], batch_size: int,
        progress: Callable[[int], None] = lambda _: None,
    ) -> dict[Sublayer, float]:
        """For each candidate the mean next-token loss in nats without it and those gone, as of
        :func:`kdprune.methods.peers.drop.losses_changed`."""
        order = list(self._layers)
        changes = {candidate: (order.index(candidate[0]), self._without(candidate)) for candidate in candidates}
        return losses_changed(self._model, rows, list(self._layers.values()), changes, batch_size, progress)


@torch.no_grad()
def sublayer_changes(
    model: PreTrainedModel, tokens: TokenSet, candidates: Sequence[Sublayer], batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[Sublayer, float]:
    """1 − mean cos(x, x + f(x)) over the real tokens, of every candidate, f with its norms and x what enters it.

    No family's wiring is written down for it: x + attention(x) is what the layer without its MLP gives, and the MLP
    gives the layer's own output of that; where both read the same state, it is as attention is. What an earlier pruning
    folded into the layer stands in front of these, or behind.
    """
    layers, family = decoder_layers(model), family_of(model)
    needed = {layer for layer, _ in candidates}
    other = {"attention": "mlp", "mlp": "attention"}
    # What gives x + f(x) of the state that enters the layer, by the sublayer f.
    whole = {index: _unfolded(model, layers[index]) for index in needed}
    alone = {(index, kind): without_sublayer(model, whole[index], other[kind])
             for index in needed for kind in SUBLAYERS}
    sums, count = dict.fromkeys(candidates, 0.0), 0
    mask = torch.empty(0)

    def after(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given, *rest = args if args else (kwargs["hidden_states"],)
            kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            left = state_of(output)
            if isinstance(layer, FoldedLayer):
                for stand_in, place in reversed(layer.kdp_folded()):
                    given = stand_in(given) if place == "before" else given
                left = state_of(whole[index](given, *rest, **kwargs))
            attended = state_of(alone[index, "attention"](given, *rest, **kwargs))
            pairs = {"attention": (given, attended), "mlp": (attended, left)}
            if family.is_parallel(layer):
                pairs["mlp"] = (given, state_of(alone[index, "mlp"](given, *rest, **kwargs)))
            for kind, (before, behind) in pairs.items():
                if (index, kind) in sums:
                    sums[index, kind] += float(cosine(before, behind)[mask.to(given.device)].sum())
        return hook

    hooks = [layers[index].register_forward_hook(after(index), with_kwargs=True) for index in needed]
    try:
        for batch in tokens.batches(batch_size):
            mask = batch.mask
            run_layers(model, batch)
            count += batch.tokens
            progress(len(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return {candidate: 1 - total / max(count, 1) for candidate, total in sums.items()}


def _unfolded(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """``layer`` without what is folded into it, sharing its weights."""
    if not isinstance(layer, FoldedLayer):
        return layer
    result = sharing_copy(layer, {id(model.config): model.config})
    unfold(result)
    return result
