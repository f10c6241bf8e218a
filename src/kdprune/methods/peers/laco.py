"""LaCo: runs of layers are merged into the layer before them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.budget import check_blocks
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.peers.drop import check_reach, layer_sizes
from kdprune.methods.peers.merging import Merger, Slot, edits_of, final_states, first_tokens, mean_cosine, merged_names
from kdprune.model.families import decoder_layers
from kdprune.model.structures import refuse_experts
from kdprune.model.surgery import apply_edits
from kdprune.options import option
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance

NEAR = 1e-4  # thresholds no further apart are one; the paper gives two digits of its own
PAPER_LAYERS = 4  # C of the paper for 7 billion parameters (for 13 billion 7)


@dataclass(frozen=True, kw_only=True)
class LaCo(DepthMethod):
    """Merges layers l+1 … l+m into layer l, from the top downward. Source: Yang et al. 2024, section 2 (RDSC merge).

        θ_l* = θ_l + Σ_{k=1..m} (θ_{l+k} − θ_l),   m = C − 1                                        (form "paper")
        θ_l* = θ_{l+m}                                                                              (form "code")

    The published notebook subtracts the weights that it has just updated, so that its sum telescopes to "code". That
    is the default here, against the rule that the paper's form is: as printed, m = 3 already gives gibberish
    (docs/methods/laco.md), because Σθ_{l+k} − (m − 1) θ_l of unrelated weights is far larger than any of them.
    Loop: from l = H − C, a candidate is accepted if s > T, and l goes down by I, else by 1, until l < L;
    s is the mean over a few rows of the cosine between the flattened final states (behind the final norm, as in the
    notebook, real tokens only) of the dense model and of the candidate. Merged layers may be merged again.

    The ratio follows from C and T. Without ``threshold`` it is the strictest T that meets the ratio, by bisection;
    without ``merge_layers`` that of the C which comes nearest the ratio from above, of several the one that gets there
    at the strictest T.

    Blocks given by the user are merged into the layer before them; ``ratio`` and T then play no part.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "LaCo"

    form: Literal["paper", "code"] = option(
        "code", "the sum of differences: telescoped to θ_{l+m} (code), or as printed, which breaks models (paper)",
        rare=True)
    merged: Literal["projections", "all"] = option(
        "projections", "what is merged: attention and MLP projections (norms stay the base layer's), or all parameters",
        rare=True)
    merge_layers: int | None = option(
        None, "C, layers merged into one (the number that meets the ratio at the strictest T; 4 with a threshold)",
        least=2, group="size")
    interval: int = option(1, "I, layers to go down after a merge", least=1, group="size", rare=True)
    lowest: int = option(0, "L, the lowest layer that others are merged into", least=0, group="size", rare=True)
    highest: int | None = option(
        None, "H, the merges start C layers below it (the last layer)", least=1, group="size", rare=True)
    sentences: int = option(
        10, "calibration rows on which candidates are compared with the dense model", least=1, group="data")
    sentence_tokens: int = option(
        64, "real tokens taken of each of these rows, from its start", least=1, group="data", rare=True)
    threshold: float | None = option(
        None, "T, least similarity of a candidate; given, the ratio follows from it (searched to meet the ratio)",
        group="size")

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError for layers that differ in shape, impossible bounds, or a ratio out of reach."""
        super().check(model, tokens)
        refuse_experts(model)
        layers = len(decoder_layers(model))
        if self.blocks is not None:
            blocks = check_blocks([range(*block) for block in self.blocks], layers)
            if blocks[0].start == 0:
                raise KDPruneError(f"got block [0, {blocks[0].stop}), expected a start of 1 or more: it is merged into "
                                   f"the layer before it")
            self._check_shapes(model)
            return
        if self.highest is not None and self.highest >= layers:
            raise KDPruneError(f"got highest {self.highest}, expected at most {layers - 1}, the last layer")
        self._check_shapes(model)
        reach = max(max(schedule.reachable()) for schedule in self.schedules(model))
        if not reach:
            raise KDPruneError("got bounds between which no layer can be merged, expected lowest ≤ highest − "
                               "merge_layers: raise highest, or lower merge_layers, lowest or protect")
        if self.threshold is None:
            check_reach(self.target(model), reach * self._layer_size(model))

    def _runs(self, model: PreTrainedModel) -> list[range]:
        """Runs of layers within which some may be merged."""
        if self.blocks is not None:
            return [range(start - 1, stop) for start, stop in self.blocks]
        opened = self.allowed(model)
        return [range(max(self.lowest, opened.start), opened.stop)]

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """Raises KDPruneError for layers that may be merged and differ, as those of a pruned model may."""
        for run in self._runs(model):
            found = []
            for index in run:
                own = dict(decoder_layers(model)[index].named_parameters())
                found.append({name: own[name].shape for name in merged_names(model, self.merged, index)})
            odd = next((index for index, shapes in zip(run, found, strict=True) if shapes != found[0]), None)
            if odd is not None:
                raise KDPruneError(
                    f"got layers {run.start} and {odd} with parameters of different shapes, expected equal ones: only "
                    "such can be merged. Keep the merges beside them (lowest=…, protect=…, blocks=…), or take whole "
                    "layers out, as shortgpt does")

    def _layer_size(self, model: PreTrainedModel) -> int:
        """The fewest parameters that go with a layer that may be merged."""
        sizes = layer_sizes(model)
        return min((sizes[index] for run in self._runs(model) for index in run), default=max(sizes))

    def protected(self, model: PreTrainedModel) -> tuple[int, int] | None:
        """As of every method; the lowest layer that others are merged into stays."""
        if self.blocks is not None:
            return None
        layers, allowed = len(decoder_layers(model)), self.allowed(model)
        top = layers if self.highest is None else self.highest + 1
        return max(self.lowest, allowed.start) + 1, layers - min(top, allowed.stop)

    def wanted(self, model: PreTrainedModel) -> int:
        """How many layers have to go to meet the ratio."""
        return max(1, -(-self.target(model).parameters // self._layer_size(model)))

    def schedules(self, model: PreTrainedModel) -> list["MergeSchedule"]:
        """The numbers C that may be taken, those that can come nearest the ratio in front."""
        layers, wanted = len(decoder_layers(model)), self.wanted(model)
        opened = self.allowed(model)
        highest = layers - 1 if self.highest is None else self.highest
        top, lowest = min(highest, opened.stop), max(self.lowest, opened.start)
        if self.merge_layers is not None or self.threshold is not None:
            counts = [self.merge_layers or PAPER_LAYERS]
        else:
            counts = list(range(2, wanted + 2))
        schedules = [
            MergeSchedule(layers, count, top - count, lowest, self.interval, layers - opened.stop) for count in counts]
        return sorted(schedules, key=lambda schedule: schedule.excess(wanted))

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Merges and returns the edits. Nothing is drawn at random."""
        first = min(run.start for run in self._runs(model))
        merger = Merger(model, self.form, merged_names(model, self.merged, first))
        if self.blocks is not None:
            slots = merger.dense()
            # From the top down, so that the places of those still to come stay what they are in the dense model.
            for start, stop in sorted(self.blocks, reverse=True):
                slots = merger.merge(slots, start - 1, stop - start)
            return MethodResult(edits_of(slots, len(decoder_layers(model))), tokens=0)
        rows = first_tokens(tokens.select(slice(0, self.sentences)), self.sentence_tokens)
        with run.stage("merge search") as progress:
            walk = self.search(model, Judge(model, merger, rows, run.batch_size, progress))
        return MethodResult(edits_of(walk.slots, len(decoder_layers(model))), tokens=rows.tokens)

    def search(self, model: PreTrainedModel, judge: "Judge") -> "Walk":
        """The merges of the given threshold, or those nearest the ratio from above.

        Raises:
            KDPruneError: the threshold lets no merge pass, or none meets the ratio (says the largest reached).
        """
        schedules, wanted = self.schedules(model), self.wanted(model)
        if self.threshold is not None:
            walk = judge.walk(schedules[0], self.threshold)
            if not walk.removed:
                raise KDPruneError(f"got threshold {self.threshold}, expected one below {walk.rejected:.4g}, the "
                                   f"similarity of the best single merge")
            return walk
        best: Walk | None = None
        largest = 0
        for schedule in schedules:
            if best is not None:
                nearer = best.removed - wanted - schedule.excess(wanted)  # layers by which it can be, at most
                if nearer < 0:  # nor can those to come be, which are in order
                    break
                if nearer == 0 and judge.walk(schedule, best.accepted).removed < wanted:  # not at a stricter threshold
                    continue
            found = judge.strictest(schedule, wanted)
            largest = max(largest, found.removed)
            if found.removed >= wanted and (best is None or found.order < best.order):
                best = found
        if best is None:
            check_reach(self.target(model), largest * self._layer_size(model))
        assert best is not None
        return best


@dataclass(frozen=True)
class MergeSchedule:
    """Where merges are tried: from position ``start`` down to ``lowest``, of a model of ``layers`` layers.

    ``merge_layers`` is C, ``interval`` I; the last ``kept`` layers are never merged.
    """

    layers: int
    merge_layers: int
    start: int
    lowest: int
    interval: int
    kept: int

    def count(self, position: int, removed: int) -> int:
        """m, how many layers go into the one at ``position`` when ``removed`` are gone already."""
        return min(self.merge_layers - 1, self.layers - removed - self.kept - 1 - position)

    def reachable(self) -> set[int]:
        """Every number of layers that some choice of accepted merges removes."""
        found, states = set(), {(self.start, 0)}
        while states:
            position, removed = states.pop()
            found.add(removed)
            if position >= self.lowest:
                states.add((position - 1, removed))
                if (count := self.count(position, removed)) > 0:
                    states.add((position - self.interval, removed + count))
        return found

    def excess(self, wanted: int) -> float:
        """Least number of layers beyond ``wanted`` that could be removed; infinite where so many never are."""
        return min((removed - wanted for removed in self.reachable() if removed >= wanted), default=math.inf)


@dataclass(frozen=True)
class Walk:
    """One run of the loop: the layers it leaves, how many it took out, the largest similarity it rejected and the least
    it accepted. It is the same at every threshold from the one up to just below the other."""

    slots: tuple[Slot, ...]
    removed: int
    rejected: float
    accepted: float

    @property
    def order(self) -> tuple[int, float]:
        """Of those that remove enough the least is best: it removes fewest, and is the strictest of these."""
        return self.removed, -self.accepted


class Judge:
    """Runs the loop at a threshold; the similarity of a candidate, which only its merges decide, is measured once.

    Args:
        rows: calibration rows.
        batch_size: rows a forward pass.
        progress: told of every candidate measured.
    """

    def __init__(self, model: PreTrainedModel, merger: Merger, rows: TokenSet, batch_size: int, progress: Advance):
        self.model, self.merger, self.rows, self.batch_size, self.progress = model, merger, rows, batch_size, progress
        self.known: dict[tuple[tuple[int, int], ...], float] = {}
        self.dense = final_states(model, rows, batch_size)

    def strictest(self, schedule: MergeSchedule, wanted: int) -> Walk:
        """The run at the strictest threshold that removes as many layers as are wanted, or the run that accepts all
        where none does.

        By bisection, for which a lower threshold removes no fewer layers: that is the rule, and where it has exceptions
        the run that is found is still one that a threshold has, and a threshold ``NEAR`` above it removes too few.
        """
        enough, few = self.walk(schedule, -math.inf), self.walk(schedule, math.inf)
        while enough.removed >= wanted > few.removed and few.rejected - enough.accepted > NEAR:
            between = self.walk(schedule, (enough.accepted + few.rejected) / 2)
            enough, few = (between, few) if between.removed >= wanted else (enough, between)
        return enough

    def walk(self, schedule: MergeSchedule, threshold: float) -> Walk:
        """The loop of the paper at one threshold."""
        slots, position, rejected, accepted = self.merger.dense(), schedule.start, -math.inf, math.inf
        history: tuple[tuple[int, int], ...] = ()
        while position >= schedule.lowest:
            count = schedule.count(position, schedule.layers - len(slots))
            if count < 1:
                position -= 1
                continue
            tried = (*history, (position, count))
            similarity = self.similarity(slots, tried)
            if similarity > threshold:
                slots, history, accepted = self.merger.merge(slots, position, count), tried, min(accepted, similarity)
                position -= schedule.interval
            else:
                rejected = max(rejected, similarity)
                position -= 1
        return Walk(slots, schedule.layers - len(slots), rejected, accepted)

    def similarity(self, slots: Sequence[Slot], history: tuple[tuple[int, int], ...]) -> float:
        """s of ``slots`` after the last merge of ``history``; −∞ where it is not a number."""
        if history not in self.known:
            merged = self.merger.merge(slots, *history[-1])
            candidate = apply_edits(self.model, edits_of(merged, len(self.merger.dense())))
            self.known[history] = mean_cosine(self.dense, final_states(candidate, self.rows, self.batch_size))
            self.progress(1)
        return self.known[history]
