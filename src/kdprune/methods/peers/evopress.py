"""EvoPress: which layers go is searched for by mutation and selection (ICML 2025, arXiv 2410.14649)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.perplexity import default_batch
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.common.result import MethodResult
from kdprune.methods.peers.drop import DropMethod, cheapest_layers, runs
from kdprune.model.edits import Drop
from kdprune.model.families import decoder_layers
from kdprune.model.losses import batch_logits
from kdprune.model.surgery import layers_replaced
from kdprune.model.teacher import Teacher
from kdprune.options import option
from kdprune.runtime.run import Run

SWITCHES = 3  # most layers that a mutation switches; the lesser of two draws from 1 to so many


@dataclass(frozen=True)
class Effort:
    """What a search is allowed, in rows and generations.

    Attributes:
        screened: rows on which the first candidates, and all offspring, are compared.
        judged: rows on which those that survive, and their parent, are compared.
        generations: how many.
        rows: that pass a model at most, those of the dense one among them.
    """

    screened: int
    judged: int
    generations: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class EvoPress(DropMethod):
    """Searches for the set S of layers whose removal moves the next token's distribution least.

        S* = argmin_S  E_t[ KL( p(x_t | x_<t) ‖ q_S(x_t | x_<t) ) ]

    p of the dense model and q_S of the one without S, over real tokens of calibration rows, in nats; of p the ``top``
    most probable tokens are told apart, the rest is one. Every S meets the ratio and can spare none of its layers.

    The best of ``first`` random sets is the first parent. In every generation it has ``offspring`` mutants, of which
    one to three layers have switched places with layers that were kept (level switches); on a few random rows the
    ``survivors`` best of them are found, and on more rows the best of these and their parent is the next parent. The
    search ends with its budget: ``passes`` forward passes of the calibration rows, a row through a model of whatever
    depth counting as a row, and the dense model's own rows among them.

    Source: Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025,
    section 4 and appendix (depth pruning). Numbers are those of the published code's scripts: 64 first candidates,
    32 offspring, 2 survivors, 1/64 and then 1/4 of 131,072 calibration tokens, k(n−k)/1.5 generations for k of n
    layers. It drops attention and MLP sublayers too; here layers go whole, so that the result is a stock checkpoint.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "EvoPress"
    spreads: ClassVar[bool] = True

    passes: float | None = option(
        None, "forward passes of the calibration rows that the search may take (what k(n-k)/1.5 generations take, of n "
        "layers that may go, k at a time)", above=0, group="data")
    offspring: int = option(32, "mutants a generation", least=1, rare=True)
    survivors: int = option(2, "of these, how many are compared on more rows", least=1, rare=True)
    first: int = option(64, "random sets of layers that the first parent is chosen from", least=1, rare=True)
    screen: float = option(
        1 / 64, "share of the calibration rows, drawn anew each time, on which mutants are compared", above=0, most=1,
        group="data", rare=True)
    judge: float = option(
        1 / 4, "the same for those that survive and their parent", above=0, most=1, group="data", rare=True)
    top: int = option(
        128, "most probable tokens of the dense model's distribution that are told apart", least=1, group="data",
        rare=True)

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError as other drops do, and for a budget that takes no generation."""
        super().check(model, tokens)
        if self.blocks is None:
            self.effort(model, tokens)

    def effort(self, model: PreTrainedModel, tokens: TokenSet, kept: bool = True) -> Effort:
        """What the search is allowed; raises KDPruneError where that is nothing.

        Args:
            kept: whether a row passes the dense model once; else once for every comparison.
        """
        count = len(tokens)
        screened, judged = (max(1, round(share * count)) for share in (self.screen, self.judge))
        start = (count if kept else screened) + self.first * screened
        generation = self.offspring * screened + (self.survivors + 1) * judged + (0 if kept else screened + judged)
        if self.passes is None:
            allowed = self.allowed(model)
            gone = len(cheapest_layers(allowed, layer_sizes(model), self.target(model).parameters))
            generations = max(1, math.ceil(gone * (len(allowed) - gone) / 1.5))
        else:
            generations = math.floor((self.passes * count - start) / generation)
        if generations < 1:
            least = math.ceil((start + generation) / count * 100) / 100
            raise KDPruneError(
                f"got passes {self.passes:g}, expected {least:g} or more: what the dense model, the first candidates "
                f"and one generation take of {count} calibration rows. Raise passes, or lower first or offspring")
        return Effort(screened, judged, generations, start + generations * generation)

    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> MethodResult:
        """Searches, with draws of the run's seed; returns the drops and what the search took."""
        spill = run.cache.spill_directory("teacher", run.key("teacher", self.top))
        teacher = Teacher(model, tokens, self.top, keep=torch.arange(len(tokens)), folder=spill)
        effort, draw = self.effort(model, tokens, teacher.kept is not None), run.generator(1)
        sets = LayerSets(self.allowed(model), layer_sizes(model), self.target(model).parameters, draw)
        curve: list[float] = []
        with run.stage("evolutionary search", effort.rows) as progress:
            judge = Judge(model, tokens, teacher, run.batch_size, progress)

            def best(candidates: Sequence[frozenset[int]], rows: int, count: int) -> list[tuple[float, frozenset[int]]]:
                numbers = torch.randperm(len(tokens), generator=draw)[:rows].sort().values
                scores = judge(candidates, numbers)
                order = sorted(range(len(candidates)), key=lambda number: scores[number])[:count]
                return [(scores[number], candidates[number]) for number in order]

            firsts = list(dict.fromkeys(sets.random() for _ in range(self.first)))
            (_, parent), = best(firsts, effort.screened, 1)
            for _ in range(effort.generations):
                # Equal mutants are one: in a small model there are not as many as are drawn.
                mutants = dict.fromkeys(sets.mutated(parent) for _ in range(self.offspring))
                mutants.pop(parent, None)
                survivors = [found for _, found in best(list(mutants), effort.screened, self.survivors)]
                (divergence, parent), = best([parent, *survivors], effort.judged, 1)
                curve.append(divergence)
        if math.isinf(curve[-1]):
            raise KDPruneError("got no finite divergence without any set of layers that was tried, expected one: load "
                               "the model in another dtype (--dtype float32)")
        search = {"passes": judge.rows / len(tokens), "candidates": judge.candidates, "divergence": curve}
        return MethodResult([Drop(block) for block in runs(parent)], tokens=judge.tokens, search=search)


class LayerSets:
    """Sets of layers that have the parameters to remove, and none to spare: random ones, and neighbours.

    Where all layers have one size that is k of them.

    Args:
        allowed: layers that may be in a set.
        sizes: parameters of every layer.
        target: what a set has at least; without the smallest of its layers it would have less.
        draw: draws them.
    """

    def __init__(self, allowed: Sequence[int], sizes: Sequence[int], target: int, draw: torch.Generator):
        self.allowed, self.sizes, self.target, self.draw = list(allowed), sizes, target, draw

    def random(self) -> frozenset[int]:
        """Any set."""
        return self._completed(frozenset())

    def mutated(self, layers: frozenset[int]) -> frozenset[int]:
        """One to three layers less, and as many others more; more, or less, where sizes differ."""
        switches = int(torch.randint(1, SWITCHES + 1, (2,), generator=self.draw).min())
        kept = [layer for layer in self.allowed if layer not in layers]
        back, gone = self._some(sorted(layers), switches), self._some(kept, switches)
        count = min(len(back), len(gone))
        return self._completed((layers - set(back[:count])) | set(gone[:count]))

    def _completed(self, layers: frozenset[int]) -> frozenset[int]:
        """Random layers are added until there are enough, then those that can be spared are put back."""
        found = set(layers)
        for layer in self._some([layer for layer in self.allowed if layer not in found]):
            if self._size(found) >= self.target:
                break
            found.add(layer)
        for layer in self._some(sorted(found)):
            if self._size(found) - self.sizes[layer] >= self.target:
                found.remove(layer)
        return frozenset(found)

    def _size(self, layers: set[int]) -> int:
        return sum(self.sizes[layer] for layer in layers)

    def _some(self, layers: Sequence[int], count: int | None = None) -> list[int]:
        """So many of these layers, or all, in random order."""
        order = torch.randperm(len(layers), generator=self.draw)[:count]
        return [layers[int(number)] for number in order]


class Judge:
    """How far the model without sets of its layers is from the dense one, on rows of one token set.

    Args:
        model: the dense model.
        tokens: the rows.
        teacher: the dense model's distributions on them.
        batch_size: rows a pass.
        progress: told of every row.

    Attributes:
        rows: how many have passed a model, the dense one's among them.
        candidates: how many sets were compared, however often.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: TokenSet, teacher: Teacher, batch_size: int,
        progress: Callable[[int], None],
    ):
        self._model, self._tokens, self._batch_size, self._progress = model, tokens, batch_size, progress
        self._teacher = teacher
        self._seen = torch.zeros(len(tokens), dtype=torch.bool)
        self.rows = self.candidates = 0

    @property
    def tokens(self) -> int:
        """Real tokens of all rows that were looked at."""
        return int(self._tokens.mask[self._seen].sum())

    @torch.no_grad()
    def __call__(self, candidates: Sequence[frozenset[int]], numbers: Tensor) -> list[float]:
        """Mean KL(dense‖without) in nats over the real tokens of the rows with these numbers, of every candidate;
        infinite where it is not a number."""
        totals, layers = [0.0] * len(candidates), list(decoder_layers(self._model))
        size = default_batch(self._model, self._tokens.ids.shape[1], copies=2, most=self._batch_size)
        for part in numbers.split(size):
            batch = self._tokens.select(part)
            targets = self._teacher(part, batch.mask)
            fresh = len(part) if self._teacher.kept is None else int((~self._seen[part]).sum())
            self._seen[part] = True
            self._count(fresh)
            for number, gone in enumerate(candidates):
                with layers_replaced(self._model, [layer for index, layer in enumerate(layers) if index not in gone]):
                    logits = batch_logits(self._model, batch)
                totals[number] += float(targets.divergence(logits[batch.mask.to(logits.device)]))
                self._count(len(part))
        self.candidates += len(candidates)
        count = max(int(self._tokens.mask[numbers].sum()), 1)
        return [total / count if math.isfinite(total) else math.inf for total in totals]

    def _count(self, rows: int) -> None:
        self.rows += rows
        self._progress(rows)
