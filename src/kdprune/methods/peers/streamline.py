"""LLM-Streamline: one run of layers, replaced by a lightweight network trained on its states (ICLR 2025)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.block_data import block_states, candidates, check_rows, choose, fit_record
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.common.method import ComparingMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import StandInFit, average
from kdprune.model.block_states import BlockStates
from kdprune.model.families import decoder_layers
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Drop, Edit, Rewrite, check_model, plain_copy
from kdprune.options import option
from kdprune.runtime.run import Run
from kdprune.train.loop import Schedule

START = 0.02  # standard deviation of the FFN's weights at the start, as of a transformer's own


@dataclass(frozen=True, kw_only=True)
class Streamline(ComparingMethod):
    """Replaces one run of n layers by a network f trained on mean ‖f(h_s) − h_e‖² over real tokens.

    The run has the least length n that meets the ratio and starts at s = argmax mean cos(h_s, h_{s+n}), any layer of
    the model allowed and h_L behind the final norm, as in the published code. ``stand_in``:

    - "none": nothing is put in its place; a stock architecture.
    - "ffn": f(h) = W₂ relu(W₁ h + b₁) + b₂ with 4d units, no residual, no norm, W ~ N(0, 0.02²) and b = 0 at the
      start: 8d² + 5d parameters.
    - "layer": a decoder layer started from the first of the run, which it replaces; a stock architecture.

    Source: Chen et al., "Streamlining Redundant Layers to Compress Large Language Models", ICLR 2025. The default is
    "layer", which its code puts above "ffn". Differences:

    - The published code trains "layer" without a causal mask, so that tokens see the future; here it has the masks,
      positions and rotary embeddings the model itself hands the layer. Where a run ends at the last layer the code
      trains towards the state behind the final norm, which the model then applies again; here f learns what leaves
      the last layer.
    - The paper trains for 10 epochs on 30,000 samples; the code for "layer" one epoch, AdamW 2e-4, weight decay 1e-3,
      128 sequences a step, gradients clipped at 5. Here 10 epochs, with that decay and clip, on a loss in units of
      E‖h_e − h_s‖², 8 sequences a step, since calibration sets here are hundreds of rows, not tens of thousands.
      Of the epochs the one is kept that held-out rows find best, as the code means to.
    - The rate is 2e-4 there at any width. Here the rates of :data:`kdprune.train.trial.RATES` are tried on held-out
      rows where none is given.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "LLM-Streamline"
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    stand_in: Literal["none", "ffn", "layer"] = option(
        "layer", "what replaces the run: nothing, a ReLU network of 4d units, or one decoder layer")
    epochs: int = option(10, "epochs of its training", least=1)
    rate: float | None = option(
        None, "peak learning rate (the best of 1e-2, 3e-3, 1e-3, 3e-4, 1e-4 on held-out rows)", above=0, rare=True)
    batch: int = option(8, "rows (sequences) a step", least=1, rare=True)
    clip: float = option(5.0, "largest norm of a step's gradient", above=0, rare=True)
    weight_decay: float = option(1e-3, "weight decay of AdamW", least=0, rare=True)

    @property
    def puts_in(self) -> bool:
        """All but "none" put a network or a layer in."""
        return self.stand_in != "none"

    @property
    def takes_apart(self) -> bool:
        """Where an ordinary layer, a copy of one of the run, is put in."""
        return self.stand_in == "layer"

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        check_model(model, substitutes=self.stand_in == "ffn")
        blocks = candidates(self, model, self._cost(model))
        if self.stand_in == "layer" and min(map(len, blocks)) < 2:
            raise KDPruneError(
                "got a block of one layer for stand_in 'layer', expected two or more: one layer stays. Give longer "
                "blocks, or a higher ratio")
        if self.stand_in != "none":
            check_rows(tokens)

    def _cost(self, model: PreTrainedModel) -> int:
        """Parameters put in the place of the run."""
        if self.stand_in == "ffn":
            return _ffn_shape(model.config.hidden_size).parameters()
        if self.stand_in == "layer":
            return max(layer_sizes(model))
        return 0

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the run, trains its stand-in and returns the edits."""
        blocks = choose(self, model, tokens, run, self._cost(model))
        if self.stand_in == "none":
            return MethodResult([Drop(block) for block in blocks], tokens=None if self.blocks is None else 0)
        edits: list[Edit] = []
        records: list[dict[str, Any]] = []
        rates: list[float] = []
        trained = 0
        for number, states in enumerate(block_states(model, tokens, blocks, self.held, run)):
            draw = run.generator(number + 1)
            if self.stand_in == "ffn":
                fitting: StandInFit = StandInFit(model, states, new_ffn(model.config.hidden_size, draw), None, run)
            else:
                fitting = LayerFit(model, states, run)
            energy = fitting.update_energy()
            rate, curves = self._train(fitting, energy, draw, run)
            if self.rate is None:
                rates.append(rate)
            if self.stand_in == "ffn":
                edits.append(fitting.edit())
                records.append(fit_record(fitting, energy, curves))
            else:
                block, trained = states.block, trained + fitting.trained
                weights = {name: weight.detach() for name, weight in fitting.module.named_parameters()}
                edits += [Rewrite(block.start, weights), Drop(range(block.start + 1, block.stop))]
        return MethodResult(edits, records, replaced=blocks, rates=rates, trained=trained)

    def _train(
        self, fitting: StandInFit, energy: float, draw: torch.Generator, run: Run
    ) -> tuple[float, dict[str, list[float]]]:
        """Trains the stand-in in its place; returns the rate, given or found, and its curves."""
        parameters, loss_function = list(fitting.module.parameters()), fitting.state_loss(energy)
        schedule = Schedule(self.epochs, self.batch, 1.0, clip=self.clip, weight_decay=self.weight_decay)

        def look() -> float:
            return average(loss_function, fitting, held=True)["loss"][0]

        rate = self.rate or fitting.rate(parameters, loss_function, look, schedule, draw, run)
        checkpoint = run.checkpoint("streamline", dataclasses.asdict(self), fitting.states.name)
        return rate, fitting.train(
            self.stand_in, parameters, loss_function, dataclasses.replace(schedule, rate=rate), draw, run, checkpoint,
            look)


class LayerFit(StandInFit):
    """A fitting whose whole decoder layer, a float32 copy of the block's first, is the stand-in."""

    def __init__(self, model: PreTrainedModel, states: BlockStates, run: Run):
        super().__init__(model, states, StandIn(1, kind="linear", features=0), None, run)
        layer = decoder_layers(model)[states.block.start]
        self.module = plain_copy(layer, {id(model.config): model.config}).float().to(self.device)
        self.module.requires_grad_(True)
        self.context = states.block.start  # the layer gets the arguments that the model hands it


def _ffn_shape(width: int) -> Shape:
    return Shape(width, kind="mlp", features=4 * width, hidden=0, residual=False, context=False)


def new_ffn(width: int, draw: torch.Generator) -> StandIn:
    """The untrained network of 4d units: weights from N(0, 0.02²), biases zero."""
    stand_in = StandIn(
        width, kind="mlp", features=4 * width, residual=False, normalize=False, activation="relu")
    for module in (stand_in.phase, stand_in.readout):
        nn.init.normal_(module.weight, std=START, generator=draw)
        nn.init.zeros_(module.bias)
    return stand_in
