"""LLM-Streamline: one run of layers, replaced by a lightweight network trained on its states (ICLR 2025)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.block_data import block_states, candidates, check_rows, choose, fit_record
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import PASS_ROWS, StandInFit
from kdprune.model.block_states import BlockStates
from kdprune.model.families import decoder_layers
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.surgery import Drop, Edit, Rewrite, check_model, plain_copy
from kdprune.options import option
from kdprune.runtime.run import Run
from kdprune.train.loop import Schedule


@dataclass(frozen=True, kw_only=True)
class Streamline(DepthMethod):
    """Replaces one run of n layers by a network f trained on mean ‖f(h_s) − h_e‖² over real tokens.

    The run has the least length n that meets the ratio and starts at s = argmax mean cos(h_s, h_{s+n}). ``stand_in``:

    - "none": nothing is put in its place; a stock architecture.
    - "ffn": f(h) = W₂ relu(W₁ h + b₁) + b₂ with 4d units, no residual, no norm, started at random: 8d² + 5d parameters.
    - "layer": a decoder layer started from the first of the run, which it replaces; a stock architecture.

    Source: Chen et al., "Streamlining Redundant Layers to Compress Large Language Models", ICLR 2025. The default is
    "ffn", the smaller of its two stand-ins, with which its 25.0 % on LLaMA2-7B is reached. Differences:

    - The published code trains "layer" without a causal mask, so that tokens see the future; here it has the masks,
      positions and rotary embeddings the model itself hands the layer.
    - The paper trains for 10 epochs on 30,000 samples; the code for "layer" one epoch, AdamW 2e-4, weight decay 1e-3,
      128 sequences a step, gradients clipped at 5. Here 10 epochs, with that decay and clip, on a loss in units of
      E‖h_e − h_s‖². The rate goes as 1/d, as weights do: at d = 4096 it is the code's 2e-4 for "layer", and 1e-3 for
      "ffn", for which none is known; 8 sequences a step, since calibration sets here are hundreds of rows, not tens
      of thousands.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "LLM-Streamline"
    collects: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    stand_in: Literal["none", "ffn", "layer"] = option(
        "ffn", "what replaces the run: nothing, a ReLU network of 4d units, or one decoder layer")
    epochs: int = option(10, "epochs of its training", least=1)
    rate: float | None = option(
        None, "peak learning rate (4.1 / the width, 0.82 / the width for layer)", above=0, rare=True)
    batch: int = option(8, "rows (sequences) a step", least=1, rare=True)
    clip: float = option(5.0, "largest norm of a step's gradient", above=0, rare=True)
    weight_decay: float = option(1e-3, "weight decay of AdamW", least=0, rare=True)

    @property
    def puts_in(self) -> bool:
        """All but "none" put a network or a layer in."""
        return self.stand_in != "none"

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
            return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model))
        return 0

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the run, trains its stand-in and returns the edits."""
        blocks = choose(self, model, tokens, run, self._cost(model))
        if self.stand_in == "none":
            return MethodResult([Drop(block) for block in blocks], tokens=None if self.blocks is None else 0)
        edits: list[Edit] = []
        records: list[dict[str, Any]] = []
        for number, states in enumerate(block_states(model, tokens, blocks, self.held, run)):
            draw = run.generator(number + 1)
            if self.stand_in == "ffn":
                edit, record = self._fit_ffn(model, states, draw, run)
                edits.append(edit)
                records.append(record)
            else:
                edits += self._fit_layer(model, states, draw, run)
        return MethodResult(edits, records, replaced=blocks)

    def _fit_ffn(
        self, model: PreTrainedModel, states: BlockStates, draw: torch.Generator, run: Run
    ) -> tuple[Edit, dict[str, Any]]:
        fitting = StandInFit(model, states, new_ffn(model.config.hidden_size, draw), None, run)
        energy = fitting.update_energy(PASS_ROWS)
        curves = self._train(fitting, energy, draw, run)
        return fitting.edit(), fit_record(fitting, energy, curves)

    def _fit_layer(
        self, model: PreTrainedModel, states: BlockStates, draw: torch.Generator, run: Run
    ) -> list[Edit]:
        fitting, block = LayerFit(model, states, run), states.block
        self._train(fitting, fitting.update_energy(PASS_ROWS), draw, run)
        weights = {name: weight.detach() for name, weight in fitting.module.named_parameters()}
        return [Rewrite(block.start, weights), Drop(range(block.start + 1, block.stop))]

    def _train(self, fitting: StandInFit, energy: float, draw: torch.Generator, run: Run) -> dict[str, list[float]]:
        """Trains the stand-in in its place; returns its curves."""
        full = 1e-3 if self.stand_in == "ffn" else 2e-4
        rate = self.rate or full * 4096 / fitting.states.inputs.shape[-1]
        schedule = Schedule(self.epochs, self.batch, rate, clip=self.clip, weight_decay=self.weight_decay)
        checkpoint = run.checkpoint("streamline", dataclasses.asdict(self), fitting.states.name)
        return fitting.train(
            self.stand_in, fitting.module.parameters(), fitting.state_loss(energy), schedule, draw, run, checkpoint)


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
    """The untrained network of 4d units, weights uniform within ±1/√(inputs)."""
    stand_in = StandIn(
        width, kind="mlp", features=4 * width, residual=False, normalize=False, activation="relu")
    stand_in.load_state_dict(_ffn_shape(width).build(draw).state_dict())
    return stand_in
