"""Where a stand-in sits while it is fitted: alone (token-wise), or in the MLP place of a decoder layer (context)."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from kdprune.kernel.features import rms_normalize
from kdprune.kernel.operators import Moments
from kdprune.model.activations import Arguments, layer_arguments
from kdprune.model.block_states import BlockStates
from kdprune.model.families import (
    decoder_layers,
    family_of,
    mlp_source,
    norm_before_mlp,
    norms_behind_mlp,
    state_of,
)
from kdprune.model.modeling_kdp import StandIn
from kdprune.model.placement import input_device
from kdprune.model.structures import gains_from, has_mlp_biases, mlp_weights, norm_affine, reciprocal
from kdprune.model.surgery import Substitute, context_layer, ordinary_layer, plain_copy
from kdprune.model.widths import set_weights
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.store.checkpoints import Checkpoint
from kdprune.train.gradients import LossFunction, Sums
from kdprune.train.loop import Schedule, advancing, fit
from kdprune.train.trial import rate_on_trial

PASS_TOKENS = 4096  # a pass when nothing is trained, at least one row: regressors of all of them, float64, are held
Seen: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # errors of states and the true ones (n, d) → what counts of them


def as_it_is(error: Tensor, _: Tensor) -> Tensor:
    """The error itself."""
    return error


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
        ordinary: whether it becomes the MLP of that copy in the end, with what stands behind an MLP in this family, and
            without biases where its layers have none.

    Attributes:
        trained: parameters trained × tokens seen in training, so far.
        intercept: whether the read-out has a bias.
        multiplier: what the layer around it multiplies its output by (Granite), else 1.
    """

    def __init__(
        self, model: PreTrainedModel, states: BlockStates, template: StandIn, context: int | None, run: Run,
        ordinary: bool = False,
    ):
        self.states, self.context, self._running = states, context, run.running(model)
        self._model, self._ordinary = model, ordinary
        self.trained = 0
        self.intercept = not ordinary or has_mlp_biases(model)
        self.device = device = input_device(self._running)
        self.fit_rows = len(states.tokens.ids) - states.held
        self.stand_in = template.to(device)
        self.module: nn.Module = self.stand_in
        self._norm: nn.Module | None = None
        self.multiplier = 1.0
        self._behind: Any = None  # the norm between an ordinary layer's MLP and its residual sum
        if context is not None:
            self.module = context_layer(model, context, self.stand_in).float().to(device)
            self.module.requires_grad_(True)
            self._norm = plain_copy(norm_before_mlp(model, decoder_layers(model)[context])).float().to(device)
            self.multiplier = family_of(model).multiplier(decoder_layers(model)[context])
            for name in norms_behind_mlp(family_of(model)) if ordinary else ():
                source = decoder_layers(model)[mlp_source(model, context, template.channels)]
                self._behind = plain_copy(getattr(source, name)).float().to(device)
                setattr(self.module, name, self._behind)
        self.stand_in.readout.requires_grad_(True)
        if not self.intercept:
            for name, parameter in self.stand_in.named_parameters():
                if name.endswith("bias"):
                    parameter.data.zero_()
                    parameter.requires_grad_(False)
        self._shared_arguments: dict[tuple[int, int], Arguments] = {}

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
        args, kwargs = self.arguments(rows, self.context)
        return state_of(self.module(hidden, *args, **kwargs))

    def arguments(self, rows: Tensor, layer: int) -> Arguments:
        """What the model hands this layer beside the state, for some rows."""
        batch = self.states.tokens.select(rows)
        if not batch.mask.all():
            return layer_arguments(self._running, layer, batch)
        # Without padding, masks and positions depend on the batch's size alone.
        if (layer, len(rows)) not in self._shared_arguments:
            self._shared_arguments[layer, len(rows)] = layer_arguments(self._running, layer, batch)
        return self._shared_arguments[layer, len(rows)]

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

    @torch.no_grad()
    def wanted(self, probe: Probe) -> Tensor:
        """What the read-out should give, (n, d): target − base, over the layer's multiplier. Where a norm γ ∘ n(·)
        stands behind it, of that the direction before it, n((target − base) / γ): the norm takes its length away."""
        update = (probe.target - probe.base) / self.multiplier
        return update if self._behind is None else direction_before(self._behind, update)

    @torch.no_grad()
    def solve_norm_behind(self) -> None:
        """Gives the norm behind an ordinary layer's MLP, where its family has one, the scale of least squared error
        (:func:`scale_behind`), y = target − base."""
        if self._behind is None:
            return

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in self.passes():
                probe = self.probe(rows)
                yield self.predict(rows)[self.target(rows)[1]] - probe.base, probe.target - probe.base

        self._behind.weight.copy_(scale_behind(self._behind, pairs(), self.stand_in.width, self.device))

    def passes(self, held: bool = False, most: int | None = None) -> Iterator[Tensor]:
        """This process's row numbers in order, in batches of about ``PASS_TOKENS`` tokens: of the rows to fit on, of
        the first of them with ``most`` tokens where so many are enough, or of the held-out ones."""
        length = self.states.tokens.ids.shape[1]
        first, last = (self.fit_rows, self.fit_rows + self.states.held) if held else (0, self.fit_rows)
        if most is not None:
            last = min(last, first + -(-most // length))
        rows = self.states.local_rows(torch.arange(first, last))
        return iter(rows.split(max(1, PASS_TOKENS // length))) if len(rows) else iter(())

    @torch.no_grad()
    def affine(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(M, c) of the least-squares map of h_e − h_s on h_s over the fitted tokens, (d, d) and (d,), float64."""
        return self._moments.solve_affine(ridge)

    @functools.cached_property
    def _moments(self) -> Moments:
        """Of h_e − h_s on h_s over the fitted tokens, for maps of several ridges."""
        width = self.states.inputs.shape[-1]
        moments = Moments(width, width, self.device)
        for rows in self.passes():
            target, mask = self.target(rows)
            inputs = self.states.inputs[rows].to(self.device).float()[mask]
            moments.update(inputs, target[mask] - inputs)
        return moments.add_processes()

    def update_energy(self) -> float:
        """Mean ‖h_e − h_s‖² over the fitted tokens, the unit of every state loss: dropping the block scores 1."""
        return self._update(as_it_is)

    @torch.no_grad()
    def _update(self, seen: Seen) -> float:
        """Mean ‖seen(h_e − h_s, h_e)‖² over the fitted tokens."""
        total, count = 0.0, 0
        for rows in self.passes():
            target, mask = self.target(rows)
            update = seen((target - self.states.inputs[rows].to(self.device).float())[mask], target[mask])
            total, count = total + float(update.double().square().sum()), count + len(update)
        total, tokens = world().total([total, count])
        return max(total / tokens, 1e-30)

    def state_loss(self, energy: float) -> LossFunction:
        """Loss of step 2 and of trained layers: Σ ‖S(h_s) − h_e‖² / E‖h_e − h_s‖² and Σ cosine of the two, real tokens
        only."""
        return self._loss(energy, as_it_is)

    def reading_loss(self) -> LossFunction:
        """Loss of step 3, the error as the layers behind the block read it: Σ e / E[e of dropping the block], and Σ
        cosine of the states, real tokens only.

            e = ‖m ∘ (S(h_s) − h_e)‖² / ‖h_e‖²,   m as of :func:`kdprune.model.structures.gains_from`

        What a norm behind it makes of the state, γ ∘ h / rms(h), is off by that. The plain error is ruled by outlier
        dimensions, which norms read with a small γ, and by tokens with a large state.
        """
        gains = gains_from(self._model, self.states.block.stop).to(self.device)

        def seen(error: Tensor, target: Tensor) -> Tensor:
            return error * gains / target.norm(dim=-1, keepdim=True).clamp_min(1e-12)

        return self._loss(self._update(seen), seen)

    def _loss(self, energy: float, seen: Seen) -> LossFunction:
        """:func:`state_errors` of the real tokens of some rows."""

        def loss_function(rows: Tensor) -> Sums:
            predicted = self.predict(rows)
            target, mask = self.target(rows)
            return state_errors(predicted[mask], target[mask], energy, seen)

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
        parameters = list(parameters)
        with run.stage(f"{step} {self.states.name}", schedule.epochs) as progress:
            curves = fit(
                parameters, loss_function, self.fit_rows, schedule, draw, name=self.states.name,
                on_epoch=advancing(progress), local_rows=self.states.local_rows, checkpoint=checkpoint,
                watch=watch)
        seen = len(curves["loss"]) * int(self.states.tokens.mask[: self.fit_rows].sum())
        self.trained += seen * sum(parameter.numel() for parameter in parameters)
        return curves

    def rate(
        self, parameters: Iterable[nn.Parameter], loss_function: LossFunction, look: Callable[[], float],
        schedule: Schedule, draw: torch.Generator, run: Run,
    ) -> float:
        """The learning rate for such a training that serves best on the held-out rows, of those tried
        (:func:`kdprune.train.trial.rate_on_trial`); ``look`` is what :meth:`train` would watch, other arguments are as
        there."""
        parameters, name = list(parameters), self.states.name

        def train(rows: int, schedule: Schedule, draw: torch.Generator) -> None:
            fit(parameters, loss_function, rows, schedule, draw, name=f"{name}, on trial",
                local_rows=self.states.local_rows, notify=lambda _: None)

        with run.stage(f"rate {name}"):
            return rate_on_trial(
                parameters, train, look, self.fit_rows, schedule, draw, saying(run, name))

    def edit(self) -> Substitute:
        """The architecture change this fitting stands for."""
        if self.context is None:
            return Substitute(self.states.block, self.stand_in)
        if self._ordinary:
            return Substitute(self.states.block, None, self._ordinary_layer(self.context), self.context)
        return Substitute(self.states.block, self.stand_in, self.module, self.context)


    def _ordinary_layer(self, context: int) -> nn.Module:
        """The layer, with the stand-in's channels and read-out as its MLP."""
        stand_in, model = self.stand_in, self._model
        layer = ordinary_layer(model, context, channels=stand_in.channels).float().to(self.device)
        inside = f"{family_of(model).mlp[0]}."
        weights = {name: p.detach() for name, p in self.module.named_parameters() if not name.startswith(inside)}
        into = [stand_in.gate, stand_in.up] if stand_in.gated else [stand_in.up]
        set_weights(layer, weights | mlp_weights(model, layer, into, stand_in.readout), "the layer in a block's place")
        return layer


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


@torch.no_grad()
def direction_before(norm: nn.Module, update: Tensor) -> Tensor:
    """n(update / γ), (n, d): what to give a norm γ ∘ n(·) for it to give ``update``, whose length it takes away."""
    scale, _ = norm_affine(norm, update.shape[-1])
    return rms_normalize(update * reciprocal(scale))


@torch.no_grad()
def scale_behind(
    norm: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], width: int, device: torch.device
) -> Tensor:
    """The weight, as the norm γ ∘ n(·) stores it, of least Σ ‖γ ∘ n − y‖², (d,), float64; of all processes of the run.

        γ_j = Σ y_j n_j / Σ n_j²

    Args:
        norm: as it is now.
        pairs: batches of what it gives, γ ∘ n, and of y, what it should give, (n, d) each.
        width: d.
        device: where the sums are kept.
    """
    scale, _ = norm_affine(norm, width)
    products, squares = torch.zeros(2, width, dtype=torch.float64, device=device)
    for given, wanted in pairs:
        direction = given.double() * reciprocal(scale)
        products += (direction * wanted).sum(0)
        squares += direction.square().sum(0)
    world().sum(products, squares)
    stored = norm.get_parameter("weight") - scale  # 0, or −1 where a family stores γ − 1
    return products / squares.clamp_min(1e-30) + stored


def state_errors(predicted: Tensor, target: Tensor, energy: float, seen: Seen = as_it_is) -> Sums:
    """Sums over n tokens: "loss", the squared error as it is seen, in units of ``energy``, and "cosine"; shapes (n, d).
    """
    return Sums({
        "loss": seen(predicted - target, target).square().sum() / energy,
        "cosine": cosine_similarity(predicted, target, dim=-1).sum(),
    }, len(target))


def saying(run: Run, name: str) -> Callable[[float, float], None]:
    """What tells of a rate on trial."""
    return lambda rate, value: run.stages.tell(
        f"{name}: loss {value:.4g} on held-out rows after a trial at rate {rate:.2g}")


@torch.no_grad()
def average(loss_function: LossFunction, fitting: StandInFit, held: bool = False) -> dict[str, list[float]]:
    """A measure over all fitted (or held-out) rows, as a curve of one value: what a closed form reaches at once."""
    sums: dict[str, float] = {}
    count = 0
    for rows in fitting.passes(held):
        seen = loss_function(rows)
        for key, value in seen.values.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        count += seen.count
    # A process without a row of its own has no names yet.
    names = sorted(set().union(*world().gather(list(sums))))
    *totals, tokens = world().total([*(sums.get(key, 0.0) for key in names), count])
    return {key: [total / tokens] for key, total in zip(names, totals, strict=True)}
