"""Kernelized Dynamics Pruning: the method as a frozen dataclass (KDP, ICLR 2026)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.block_data import check_rows
from kdprune.methods.common.budget import (
    Budget,
    blocks_to_rank,
    check_budget,
    choose_blocks,
    select_by_similarity,
)
from kdprune.methods.common.method import RankedMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.units import unit_of, whole_units
from kdprune.methods.kdp.damage import Damage, choose_by_damage
from kdprune.methods.kdp.fit_block import FitSettings
from kdprune.methods.kdp.fit_blocks import FitPlan, fit_blocks
from kdprune.methods.kdp.measuring import Trial
from kdprune.model.block_states import PathRows
from kdprune.model.structures import activation_of, channels_of, has_mlp_biases, is_gated
from kdprune.model.surgery import check_model
from kdprune.options import option
from kdprune.runtime.run import Run
from kdprune.train.loop import Schedule

Kernel: TypeAlias = Literal[
    "linear+data", "learned", "fixed", "mlp", "linear", "data", "linear+learned", "linear+fixed", "learned+data",
    "fixed+data", "linear+learned+data", "linear+fixed+data"]

# What a preset fills into fields left at None. "paper" is the method as printed; "default" is the form of it that
# measurement preferred at equal net parameters, trained for as long as a first try may take; "thorough" is the same,
# trained for longer; "fourier" has random Fourier features alone and blocks chosen by similarity, trained as long: the
# form that the small models of research/small-models were pruned in.
_BEST: Mapping[str, Any] = {
    "kernel": "linear+data", "inverse": "residual", "context": "attention", "refine": True, "hidden": 0,
    "fill": True, "endpoints": "input", "sequential": True, "slack": 0.5,
    "ranking": "damage",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {**_BEST, "kernel_epochs": 2, "batch": 4},
    "thorough": {**_BEST, "kernel_epochs": 10, "batch": 8},
    "fourier": {
        **_BEST, "kernel": "learned", "bandwidth": 2.0, "ranking": "similarity", "kernel_epochs": 10, "batch": 8},
    "paper": {
        "kernel": "learned", "inverse": "direct", "context": "none", "refine": False, "hidden": -1, "fill": False,
        "ranking": "similarity", "endpoints": "output", "bandwidth": 1.0, "sequential": False, "slack": 0.0,
        "kernel_epochs": 100, "batch": 8,
    },
}

# How long step 3 is where no epochs are given: the least epochs, the most, and so many between them as make that many
# steps. On SmolLM2 and 22,000 tokens five epochs lose .521 nats a token, twenty .489; on small models and 41,000 tokens
# 60 lose a fifth less than 15 (research/small-models/better.md).
SHORT, LONG = (5, 20, 240), (15, 60, 1200)
LEAST_PATIENCE = 5  # epochs without gain on held-out rows; more where there are many, as the rate ends small


# What an ordinary layer asks for, and what one of the model's own sizes asks for besides; None: nothing may be given.
_ORDINARY: Mapping[str, Any] = {
    "kernel": "data", "inverse": "residual", "context": "attention", "hidden": 0, "features": None}
_ONE_SIZE: Mapping[str, Any] = {"channels": None, "fill": False}


@dataclass(frozen=True, kw_only=True)
class KDP(RankedMethod):
    """Replaces blocks of layers by folded kernel stand-ins. Source: KDP, sections 2 to 6.

    Fields left at None are filled from the preset. Sizes left at None follow the model's width d: ``channels`` c = d/4,
    ``features`` m = d/4 beside channels, else d/2 with a hidden layer and 5d/6 without (2.5 d² parameters either way);
    all rounded down to multiples of 64 (16 in models narrower than 512), and widened by as many.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "KDP"
    caches_parts: ClassVar[bool] = True
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    preset: Literal["default", "thorough", "fourier", "paper"] = option(
        "default", "fills options not given: the best form measured, trained for a short or a long time; random "
        "Fourier features alone, trained for long; or the method as printed")
    endpoints: Literal["input", "output"] | None = option(
        None, "states a block is ranked by: h_s and h_e (input), or outputs of its first and last layer (output)",
        group="size", rare=True)
    kernel: Kernel | None = option(
        None, "feature map, a sum of parts: linear, the state itself; learned, random Fourier features of a learned "
        "anisotropic kernel, or fixed, as drawn; data, the block's own MLP channels; or mlp, a GELU layer as drawn")
    form: Literal["folded", "layer", "stock"] = option(
        "folded", "what a stand-in is in the end: a module of its own; an ordinary decoder layer, of fewer MLP "
        "channels; or one of the model's own size, for a stock checkpoint, which loads without kdprune", group="size",
        rare=True)
    features: int | None = option(
        None, "m, number of random frequencies (the feature vector has 2m entries)", least=1, group="size", rare=True)
    channels: int | None = option(
        None, "c, number of the block's own MLP channels (a quarter of the width, which fill adds to; form stock: "
        "those of a layer)", least=1, group="size", rare=True)
    rank: int = option(16, "r, rank of the learned part of the Fourier kernel's covariance", least=0, rare=True)
    bandwidth: float | None = option(
        None, "scale of the first frequencies in units of the median heuristic (chosen for every block by held-out "
        "error)", above=0, rare=True)
    sequential: bool | None = option(
        None, "fit later blocks on the states that the model with the earlier stand-ins gives, towards the dense one's",
        rare=True)
    inverse: Literal["direct", "residual"] | None = option(
        None, "inverse network rebuilds the state from features alone, or its update on a normalised input", rare=True)
    hidden: int | None = option(
        None, "width of the inverse network's hidden layer; 0: linear, -1: the model's width", least=-1, group="size",
        rare=True)
    context: Literal["none", "attention"] | None = option(
        None, "what stands before the kernel map: nothing, or one attention sublayer started from the block's first",
        group="size")
    refine: bool | None = option(
        None, "step 3: train kernel and inverse (and context) together on the state", rare=True)
    fill: bool | None = option(
        None, "spend what the blocks remove beyond the ratio on more features (not when features is given)",
        group="size", rare=True)
    ranking: Literal["similarity", "damage"] | None = option(
        None, "what the choice of blocks goes by: similarity of states, or how far held-out predictions move (KL) "
        "with stand-ins that are solved for, alone and together",
        group="size", rare=True)
    slack: float | None = option(
        None, "share of a layer by which blocks may remove more than they have to, so that they can be more and "
        "shorter; fill spends it on features", least=0, group="size", rare=True)
    ridge: float = option(1e-4, "relative ridge of every least-squares solve", above=0, rare=True)
    kernel_epochs: int | None = option(None, "epochs of step 1", least=1, rare=True)
    kernel_tokens: int | None = option(
        None, "tokens of step 1 (8192, or 8 for every feature if that is more)", least=1, rare=True)
    kernel_rate: float | None = option(
        None, "peak learning rate of step 1 (0.384 / the width)", above=0, rare=True)
    inverse_epochs: int = option(20, "epochs of step 2 when the inverse has a hidden layer", least=1, rare=True)
    refine_epochs: int | None = option(
        None, "epochs of step 3 (5, or where the rows are few as many as make 240 steps, at most 20; thorough and "
        "fourier: 15, 1,200, 60)", least=1)
    rate: float | None = option(
        None, "peak learning rate of step 3 (chosen for every block by trials on held-out rows) and of step 2 (half "
        "the batch / the width)", above=0, rare=True)
    batch: int | None = option(
        None, "rows (sequences) a step in steps 2 and 3 (4; thorough, fourier and paper: 8)", least=1, rare=True)
    without: tuple[Literal["alpha", "anisotropy", "cosine_term", "ols_start", "operators", "position_weights"], ...] = (
        option((), "parts of the method left out, to see what they bring: alpha (1 instead), anisotropy (one width for "
               "all dimensions), cosine_term and position_weights of step 1's loss, ols_start (operators start at I), "
               "operators (the inverse reads the features of the block's input)", rare=True))

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise KDPruneError(f"got preset {self.preset!r}, expected one of {', '.join(PRESETS)}")
        hidden = self.hidden
        if self.form != "folded":
            self._take(_ORDINARY, "an ordinary layer has attention and MLP channels alone", "folded")
        if self.form == "stock":
            self._take(_ONE_SIZE, "the classes of transformers build layers of one size", "layer")
        # A direct inverse rebuilds the whole state, which a decoder layer around it would add to its input.
        if self.inverse == "direct" and self.context is None:
            object.__setattr__(self, "context", "none")
        if (self.features is not None or self.channels is not None) and self.fill is None:
            object.__setattr__(self, "fill", False)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for size, given, parts in (("features", self.features, ("learned", "fixed", "mlp")),
                                   ("channels", self.channels, ("data",))):
            if given is not None and self.parts.isdisjoint(parts):
                raise KDPruneError(f"got {size} {given} with kernel {self.kernel!r}, which has none; expected a kernel "
                                   f"with the part {' or '.join(parts)}, or no {size}")
        if self.kernel not in ("learned", "fixed"):
            if hidden:
                raise KDPruneError(f"got hidden {hidden} with kernel {self.kernel!r}, expected 'learned' or 'fixed': "
                                   "only those are read through a hidden layer. Choose one, or leave hidden out")
            object.__setattr__(self, "hidden", 0)  # whatever the preset says
        if self.inverse == "direct" and "data" in self.parts:
            raise KDPruneError(f"got inverse 'direct' with kernel {self.kernel!r}, expected inverse 'residual' there: "
                               "the block's channels read a normalised state. Choose that, or kernel 'learned'")
        if self.inverse == "direct" and self.context != "none":
            raise KDPruneError(f"got inverse 'direct' with context {self.context!r}, expected inverse 'residual' "
                               "there: a decoder layer adds to its input. Choose context 'none' or inverse 'residual'")

    def _take(self, asked: Mapping[str, Any], why: str, other: str) -> None:
        """Fills in what the form asks for; raises KDPruneError for an option that it cannot have."""
        for name, value in asked.items():
            given = getattr(self, name)
            if given is not None and given != value:
                expected = "none" if value is None else repr(value)
                raise KDPruneError(f"got {name} {given!r} with form {self.form!r}, expected {expected}: {why}. Leave "
                                   f"{name} out, or choose form {other!r}")
            object.__setattr__(self, name, value)

    @property
    def is_linear(self) -> bool:
        """Whether the stand-in is a linear map of the state that stands alone."""
        return (self.kernel, self.context) == ("linear", "none")

    @property
    def trains(self) -> bool:
        """Whether there is a step 3: a linear map has none, it is solved for."""
        return bool(self.refine) and not self.is_linear

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the kernel, as they are asked for."""
        return frozenset((self.kernel or "").split("+"))

    def budget(self, model: PreTrainedModel) -> Budget:
        """What the selection has to remove of this model, with stand-ins before any spare budget is spent on them."""
        slack = (self.slack or 0.0) if self.fill else 0.0
        return Budget(model, self.shape(model), self.target(model), slack)

    def shape(self, model: PreTrainedModel) -> Shape:
        """The stand-in before any spare budget is spent on it, for this model.

        Raises KDPruneError for more channels than a layer has, where it is to be one.
        """
        width, kernel = model.config.hidden_size, self.kernel or ""
        parts = kernel.replace("learned", "fourier").replace("fixed", "fourier").split("+")
        hidden = width if self.hidden == -1 else self.hidden or 0
        both = {"fourier", "data"} <= set(parts)
        features = {"fourier": width // 4 if both else width // 2 if hidden else round(5 * width / 6),
                    "mlp": round(5 * width / 4)}
        unit = unit_of(width)
        drawn = [self.features or whole_units(features[part], unit) for part in parts if part in features]
        shape = Shape(
            width=width, kind="+".join(parts), features=sum(drawn), hidden=hidden, residual=self.inverse == "residual",
            context=self.context == "attention", unit=unit)
        if "data" not in parts:
            return shape
        channels = self.channels or whole_units(width // 4, unit)
        shape = replace(shape, channels=channels, gated=is_gated(model), activation=activation_of(model))
        if self.form == "folded":
            return shape
        most = channels_of(model)
        if channels > most and self.channels is not None:
            raise KDPruneError(f"got channels {channels} with form {self.form!r}, expected at most the {most} that a "
                               f"layer of this model has: give fewer, or choose form 'folded'")
        channels = most if self.form == "stock" else min(channels, most)
        return replace(shape, channels=channels, ordinary=True, biased=has_mlp_biases(model), most=most)

    @property
    def takes_apart(self) -> bool:
        """For a context, a copy of a layer, and for channels of the layers' own."""
        return self.context != "none" or "data" in self.parts

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, not after the analysis."""
        super().check(model, tokens)
        check_model(model, substitutes=True)
        if self.form == "stock" and getattr(model.config, "kdp", None):
            raise KDPruneError("got form 'stock' for a model that holds stand-ins or narrower layers, which no stock "
                               "checkpoint can; expected form 'folded' or 'layer', or the dense model")
        check_budget(self if self.measures else replace(self, ranking="similarity"), self.budget(model))
        check_rows(tokens)

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the blocks, fits their stand-ins and returns the edits."""
        budget = self.budget(model)
        blocks, damage = self.choose(model, tokens, run, budget)
        shapes = [candidate.shape for candidate in budget.candidates(blocks, bool(self.fill))]
        plan = FitPlan(
            blocks, shapes, self.settings(budget.shape, tokens), tokens.held_out(self.held),
            max((self.path_rows(tokens, shape) for shape in shapes), key=lambda rows: rows.fit), bool(self.sequential))
        return replace(fit_blocks(model, tokens, plan, run), damage=None if damage is None else damage.alone)

    def choose(
        self, model: PreTrainedModel, tokens: TokenSet, run: Run, budget: Budget
    ) -> tuple[list[range], Damage | None]:
        """The blocks, and what was measured to find them."""
        if not self.measures:
            method = replace(self, ranking="similarity")
            return choose_blocks(method, model, tokens, run, budget), None
        blocks, scores = blocks_to_rank(self, model, tokens, run, budget)
        shape = budget.shape
        trial = Trial(self.settings(shape, tokens), self.held, self.path_rows(tokens, shape).fit)
        similar = select_by_similarity(self, torch.as_tensor(scores[self.similarity]), budget, blocks)
        damage = choose_by_damage(model, tokens, blocks, budget, trial, run, bool(self.fill), similar)
        return list(damage.together[0][0]), damage

    @property
    def shortest(self) -> int:
        """A single layer may go behind a linear map."""
        return 1 if self.is_linear and self.measures else 2

    @property
    def measures(self) -> bool:
        """Whether blocks are to be chosen, by damage."""
        return self.blocks is None and self.ranking == "damage"

    def path_rows(self, tokens: TokenSet, shape: Shape) -> PathRows:
        """Rows that step 1 sees: enough tokens for the operators' solves."""
        if "fourier" not in shape.parts:
            return PathRows(0, 0)
        wanted = self.kernel_tokens or max(8192, 8 * 2 * shape.features)
        return PathRows(tokens.fitted(self.held).rows_of(wanted), tokens.watching(self.held).rows_of(4096))

    def settings(self, shape: Shape, tokens: TokenSet) -> FitSettings:
        """How blocks are fitted with stand-ins of this shape, on these tokens."""
        # Step 2 trains drawn weights. Adam moves one by about the rate, whatever its size; they shrink as the width
        # grows, and a step's noise as its rows grow in number. Step 3's are a model's own, and say nothing beforehand.
        batch = self.batch or 1
        rate, epochs = self.rate or batch / 2 / shape.width, self._refine_epochs(tokens, batch)
        return FitSettings(
            kernel=self.kernel or "", rank=self.rank, bandwidth=self.bandwidth, ridge=self.ridge,
            refine=self.trains,
            step1=Schedule(self.kernel_epochs or 1, 256, self.kernel_rate or 0.384 / shape.width),
            step2=Schedule(self.inverse_epochs, batch, rate),
            step3=Schedule(epochs, batch, rate, patience=max(LEAST_PATIENCE, epochs // 3)),
            on_trial=self.rate is None,
            without=tuple(sorted(set(self.without))),
        )

    def _refine_epochs(self, tokens: TokenSet, batch: int) -> int:
        """Epochs of step 3 on these rows, less those held out, so many a step."""
        if self.refine_epochs is not None:
            return self.refine_epochs
        least, most, wanted = SHORT if self.preset == "default" else LONG
        steps = -(-len(tokens.fitted(self.held)) // batch)
        return min(most, max(least, -(-wanted // steps)))
