"""Where a stand-in sits while it is fitted: alone (token-wise), or in the MLP place of a decoder layer (context)."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from kdprune.kernel.features import rms_normalize
from kdprune.model.activations import Arguments, layer_arguments
from kdprune.model.block_states import BlockStates
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.placement import input_device
from kdprune.model.surgery import Substitute, context_layer, plain_copy
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.store.checkpoints import Checkpoint
from kdprune.train.gradients import LossFunction, Sums
from kdprune.train.loop import Schedule, advancing, fit

PASS_ROWS = 32  # rows a pass when nothing is trained


@dataclass(frozen=True)
class Probe:
    """What a batch of rows shows of a place whose stand-in is silent; padding removed.

    Attributes:
        kernel_input: what the kernel map is applied to, shape (n, d).
        readout_input: what the silent stand-in's read-out sees, shape (n, 2m | m | d | hidden).
        base: the output without the stand-in, shape (n, d): h_s, h_s + attention, or 0 (direct inverse).
        target: h_e, shape (n, d).
    """

    kernel_input: Tensor
    readout_input: Tensor
    base: Tensor
    target: Tensor


class StandInFit:
    """A block's stand-in in its place, with the block's states; everything in float32, as fits need it.

    Args:
        model: the dense model; not changed.
        states: the block's calibration states.
        template: an unfitted stand-in of the wanted shape.
        context: the layer into a copy of which it is put; None: it is alone.
        run: says which model runs; fits run on its device.
    """

    def __init__(
        self, model: PreTrainedModel, states: BlockStates, template: StandIn, context: int | None, run: Run,
    ):
        self.states, self.context, self._running = states, context, run.running(model)
        self.device = device = input_device(self._running)
        self.fit_rows = len(states.tokens.ids) - states.held
        self.stand_in = template.to(device)
        self.module: nn.Module = self.stand_in
        self._norm: nn.Module | None = None
        if context is not None:
            self.module = context_layer(model, context, self.stand_in).float().to(device)
            self.module.requires_grad_(True)
            norm = getattr(decoder_layers(model)[context], family_of(model).mlp_norm)
            self._norm = plain_copy(norm).float().to(device)
        self.stand_in.readout.requires_grad_(True)
        self._shared_arguments: dict[int, Arguments] = {}

    @torch.no_grad()
    def to_kernel(self, states: Tensor) -> Tensor:
        """States (…, d) as the kernel map sees them: under the layer norm, divided by their RMS, or as they are."""
        if self._norm is not None:
            return self._norm(states)
        return rms_normalize(states) if self.stand_in.normalize else states

    def predict(self, rows: Tensor) -> Tensor:
        """The fitting's estimate of h_e for some rows: (b,) row numbers → (b, T, d), with gradients."""
        hidden = self.states.inputs[rows].to(self.device).float()
        if self.context is None:
            return self.module(hidden)
        args, kwargs = self._arguments(rows, self.context)
        output = self.module(hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _arguments(self, rows: Tensor, layer: int) -> Arguments:
        batch = self.states.tokens.select(rows)
        if not batch.mask.all():
            return layer_arguments(self._running, layer, batch)
        # Without padding, masks and positions depend on the batch's size alone.
        if len(rows) not in self._shared_arguments:
            self._shared_arguments[len(rows)] = layer_arguments(self._running, layer, batch)
        return self._shared_arguments[len(rows)]

    def target(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(h_e, mask) of some rows: shapes (b, T, d), (b, T)."""
        return self.states.outputs[rows].to(self.device).float(), self.states.tokens.mask[rows].to(self.device)

    @torch.no_grad()
    def probe(self, rows: Tensor) -> Probe:
        """Runs some rows with the read-out at zero, recording what reaches the stand-in."""
        readout = self.stand_in.readout
        saved = copy.deepcopy(readout.state_dict())
        for parameter in readout.parameters():
            parameter.zero_()
        try:
            with inputs_of(self.stand_in, readout) as seen:
                base = self.predict(rows)
        finally:
            readout.load_state_dict(saved)
        target, mask = self.target(rows)
        # Some families flatten (B, T, d) to (B·T, d) before their MLP.
        kernel_input, readout_input = (value.reshape(*mask.shape, -1)[mask] for value in seen)
        if self.stand_in.normalize:
            kernel_input = rms_normalize(kernel_input)
        return Probe(kernel_input, readout_input, base[mask], target[mask])

    def row_batches(self, size: int, held: bool = False) -> Iterator[Tensor]:
        """This process's row numbers in order, in batches: of the rows to fit on, or of the held-out ones."""
        first, last = (self.fit_rows, self.fit_rows + self.states.held) if held else (0, self.fit_rows)
        rows = self.states.local_rows(torch.arange(first, last))
        return iter(rows.split(size)) if len(rows) else iter(())

    @torch.no_grad()
    def update_energy(self, size: int) -> float:
        """Mean ‖h_e − h_s‖² over the fitted tokens, the unit of every state loss: dropping the block scores 1."""
        total, count = 0.0, 0
        for rows in self.row_batches(size):
            target, mask = self.target(rows)
            update = (target - self.states.inputs[rows].to(self.device).float())[mask]
            total, count = total + float(update.double().square().sum()), count + len(update)
        total, tokens = world().total([total, count])
        return max(total / tokens, 1e-30)

    def state_loss(self, energy: float) -> LossFunction:
        """Loss of steps 2 and 3: Σ ‖S(h_s) − h_e‖² / E‖h_e − h_s‖² and Σ cosine of the two, real tokens only."""

        def loss_function(rows: Tensor) -> Sums:
            predicted = self.predict(rows)
            target, mask = self.target(rows)
            predicted, target = predicted[mask], target[mask]
            return state_errors(predicted, target, energy)

        return loss_function

    def train(
        self, step: str, parameters: Iterable[nn.Parameter], loss_function: LossFunction, schedule: Schedule,
        draw: torch.Generator, run: Run, checkpoint: Checkpoint, watch: Callable[[], float] | None = None,
    ) -> dict[str, list[float]]:
        """Trains over the fitted rows and returns the curves.

        Args:
            step: what the stage is called, before the block's name.
            parameters: what is trained.
            loss_function: of row numbers.
            schedule: for how long.
            draw: orders the rows.
            run: shows the stage.
            checkpoint: where the fit stands.
            watch: a figure whose best value decides what is kept, as of :func:`kdprune.train.loop.fit`.
        """
        with run.stage(f"{step} {self.states.name}", schedule.epochs) as progress:
            return fit(
                parameters, loss_function, self.fit_rows, schedule, draw, name=self.states.name,
                on_epoch=advancing(progress), local_rows=self.states.local_rows, checkpoint=checkpoint,
                watch=watch)

    def edit(self) -> Substitute:
        """The architecture change this fitting stands for."""
        if self.context is None:
            return Substitute(self.states.block, self.stand_in)
        return Substitute(self.states.block, self.stand_in, self.module, self.context)


@contextlib.contextmanager
def inputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """While active, every call of one of ``modules`` adds its input to the yielded list."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def state_errors(predicted: Tensor, target: Tensor, energy: float) -> Sums:
    """Sums over n tokens: "loss", the squared error in units of ``energy``, and "cosine"; shapes (n, d)."""
    return Sums({
        "loss": (predicted - target).square().sum() / energy,
        "cosine": cosine_similarity(predicted, target, dim=-1).sum(),
    }, len(target))


@torch.no_grad()
def average(loss_function: LossFunction, fitting: StandInFit, held: bool = False) -> dict[str, list[float]]:
    """A measure over all fitted (or held-out) rows, as a curve of one value: what a closed form reaches at once."""
    sums: dict[str, float] = {}
    count = 0
    for rows in fitting.row_batches(PASS_ROWS, held):
        seen = loss_function(rows)
        for key, value in seen.values.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        count += seen.count
    # A process without a row of its own has no names yet.
    names = sorted(set().union(*world().gather(list(sums))))
    *totals, tokens = world().total([*(sums.get(key, 0.0) for key in names), count])
    return {key: [total / tokens] for key, total in zip(names, totals, strict=True)}
