"""SliceGPT: the residual stream is rotated to its principal components, and the least of them are cut off."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.method import Method
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.target import counted
from kdprune.methods.common.units import unit_of
from kdprune.methods.peers.slicing import StreamSize, measure_cuts, sliced_edits
from kdprune.model.families import (
    decoder_layers,
    family_of,
    final_norm,
    holds_stand_ins,
    is_sliced,
    normalises_behind,
)
from kdprune.model.structures import refuse_experts
from kdprune.model.surgery import check_model
from kdprune.options import option
from kdprune.runtime.run import Run

PAPER_UNIT = 8  # the paper's widths are multiples of this, and so are those of the narrowest models
SPARE = 0.005  # share of the parameters counted by which the ratio may be exceeded before cuts get widths of their own


@dataclass(frozen=True, kw_only=True)
class SliceGPT(Method):
    """SliceGPT (ICLR 2024, arXiv 2401.15024), without its fine-tuning.

    Norm scales are folded into the projections that follow (LayerNorm: its mean subtraction into those in front, its
    bias into the bias of those that follow), which leaves x / rms(x), which commutes with rotations. At every cut (the
    embeddings' sum, each MLP norm's input, each layer's output) the eigenvectors Q of H = Σ x xᵀ + 0.01 mean(diag H) I,
    in float64 and on signals already sliced, turn the stream; its first d' components stay. Shortcut matrices
    Q_prevᵀ Q_next stand in the residual branches. The last layer's output and the head stay full width; there Q is the
    identity, which computes the same as any other rotation. Embeddings and head are no longer tied.

    The paper's width is d' = ⌊(1 − s) d⌋ rounded down to a multiple of 8 for every cut; with ``sparsity`` s this is
    what happens, with ``round_to`` 64 in models from 512 on and 16 in narrower ones. Otherwise d' is the largest
    multiple that meets the net ratio. Where that exceeds the ratio by more than half a point, cuts get ``round_to``
    columns more, the last cut first, as many as the ratio allows; where it still does, half as many, and so on.

    With ``of`` layers the ratio is what goes outside the embeddings, net, over what the dense model has there: the
    sizes of the projections with their shortcuts, and the norms that are folded away. That the tables get narrower,
    and that a tied head becomes a matrix of its own, counts for nothing there, only in the ratio of all parameters.
    With ``of`` all and ``counted`` "outside" as many parameters go outside the embeddings as the ratio is of all, as
    with methods that take whole layers out: so it compares with them. The ratio of all parameters is then another.
    """

    title: ClassVar[str] = "SliceGPT"
    narrows: ClassVar[bool] = True

    sparsity: float | None = option(
        None, "share of the stream's width to cut; then ratio is not used", least=0, group="size")
    counted: Literal["all", "outside"] = option(
        "all", "what must shrink by the parameters that have to go: all, tables and an untied head among them, or what "
        "is outside the embeddings", group="size")
    round_to: int | None = option(
        None, "widths are multiples of this (64; 16 in models narrower than 512, 8 below 64)", least=1, group="size",
        rare=True)
    sequences: int | None = option(128, "calibration rows looked at; all if there are fewer", least=1, group="data")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and not self.sparsity < 1:
            raise KDPruneError(f"got sparsity {self.sparsity}, expected a share from 0 up to 1")

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        check_model(model, substitutes=True, narrows=True)
        family = family_of(model)
        refuse_experts(model)
        if is_sliced(model.config) or holds_stand_ins(model.config):
            held = ("a stream that was turned and cut already" if is_sliced(model.config) else
                    "stand-ins, which are functions of the stream as it is")
            raise KDPruneError(
                f"got a pruned model with {held}: SliceGPT cannot turn it; expected one without. Take more out with "
                f"{'llm-pruner' if is_sliced(model.config) else 'shortgpt, kdp or llm-pruner'}, or run slicegpt on the "
                "model before that")
        if normalises_behind(model) or isinstance(final_norm(model), nn.Identity) or family.embedding_norm:
            raise KDPruneError(
                f"got a {family.model_type} model with a norm between a sublayer and the residual sum or behind it, "
                f"behind the embeddings, or none in front of the head, expected norms in front of every sublayer: "
                f"SliceGPT cannot rotate it")
        if model.get_parameter(f"{family.embeddings[0]}.weight").shape[1] != model.config.hidden_size:
            raise KDPruneError("got embeddings that are projected to the stream's width, expected its own width")
        self.widths(model)

    def widths(self, model: PreTrainedModel) -> list[int]:
        """The width of every cut in order, the last layer's output left out; raises KDPruneError for a ratio out of
        reach."""
        size, width = StreamSize.of(model), model.config.hidden_size
        unit = self.round_to or max(unit_of(width), PAPER_UNIT)
        if self.sparsity is not None:
            kept = math.floor((1 - self.sparsity) * width + 1e-9)
            kept = kept if kept == width else kept // unit * unit
            if kept < 1:
                raise KDPruneError(f"got sparsity {self.sparsity:.4g}, expected one that leaves a multiple of "
                                   f"{unit} of a stream {width} wide: lower it, or round_to")
            return [kept] * size.cuts
        target, outside = self.target(model), self.of == "layers" or self.counted == "outside"
        count = size.outside_embeddings if outside else size.parameters
        total = counted(model, "layers" if outside else "all")
        most = total - target.parameters  # may stay
        narrowest = min(unit, width)
        target.check(total - count([narrowest] * size.cuts), f"at a width of {narrowest}",
                     "lower the ratio (or round_to)")
        fitting = [kept for kept in range(narrowest, width + 1, unit) if count([kept] * size.cuts) <= most]
        found, step = [fitting[-1]] * size.cuts, unit
        while step and count(found) < most - SPARE * total:
            _widen(found, count, most, min(fitting[-1] + unit, width), step)
            step //= 2
        return found

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Turns and cuts the stream layer by layer and returns the narrower layers."""
        widths = self.widths(model)
        chosen = tokens.fitted(self.held).select(slice(self.sequences))
        with run.stage("principal components", len(decoder_layers(model))) as progress:
            rotations = measure_cuts(model, chosen, widths, run.batch_size, progress)
        return MethodResult(sliced_edits(model, rotations), tokens=chosen.tokens)


def _widen(widths: list[int], count: Callable[[Sequence[int]], int], most: int, widest: int, step: int) -> None:
    """Give cuts, the last first, ``step`` more columns at a time while no more than ``most`` parameters stay."""
    for cut in reversed(range(len(widths))):
        while widths[cut] + step <= widest:
            widths[cut] += step
            if count(widths) > most:
                widths[cut] -= step
                return
