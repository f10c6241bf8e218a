"""One block from states to a fitted edit: steps 1, 2 and 3, and the record of what happened."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.kernel.features import FourierFeatures
from kdprune.kernel.operators import LinearDynamics, Moments
from kdprune.methods.common.held_out import held_out
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import Probe, StandInFit, average, state_errors
from kdprune.methods.kdp.diagnostics import norm_decay, theory
from kdprune.methods.kdp.landmarks import place_landmarks
from kdprune.methods.kdp.step1_dynamics import Step1, fit_dynamics, position_weights, solve_operators
from kdprune.methods.kdp.step2_inverse import InverseNetwork, decay_compensation, fold, solve_readout
from kdprune.model.block_states import BlockStates
from kdprune.runtime.machine import mixed_precision
from kdprune.runtime.run import Run
from kdprune.train.gradients import LossFunction, Sums
from kdprune.train.loop import Schedule

# Of which the frequencies' scale is chosen where none is given: on models of 4 M parameters 2 times the median
# heuristic serves best, on really trained ones .3, at which states far apart still have features in common.
BANDWIDTHS = (0.1, 0.3, 0.6, 1.0, 2.0)


@dataclass(frozen=True)
class FitSettings:
    """How a block is fitted; names as in ``KDP``. bandwidth None: chosen for every block, of ``BANDWIDTHS``; with
    ``on_trial`` step 3's rate likewise, of ``RATES``."""

    kernel: str
    rank: int
    bandwidth: float | None
    ridge: float
    refine: bool
    step1: Schedule
    step2: Schedule
    step3: Schedule
    on_trial: bool = False
    without: tuple[str, ...] = ()

    @property
    def solved(self) -> list[Any]:
        """What :func:`fit_closed_form` goes by of them, as plain data: nothing that says how long or fast to train."""
        return [self.kernel, self.rank, self.bandwidth, self.ridge, list(self.without)]


@dataclass(frozen=True)
class Fit:
    """One block's fit under way: its stand-in in place, how it is fitted, and the one source of every draw.

    Attributes:
        follows_from: what, with the run, decides the fit: the key of its checkpoints.
    """

    fitting: StandInFit
    shape: Shape
    settings: FitSettings
    draw: torch.Generator
    run: Run
    follows_from: Any = None

    @staticmethod
    def of(
        model: PreTrainedModel, states: BlockStates, shape: Shape, settings: FitSettings, number: int, run: Run,
        follows_from: Any = None,
    ) -> "Fit":
        """The fit of block ``number`` of a run, with an unfitted stand-in of this shape."""
        draw = run.generator(number + 1)
        fitting = StandInFit(
            model, states, shape.build(draw), shape.source(states.block), run, shape.ordinary)
        return Fit(fitting, shape, settings, draw, run, follows_from)

    def train(
        self, step: str, parameters: Iterable[nn.Parameter], loss_function: LossFunction, schedule: Schedule,
        watch: Callable[[], float] | None = None,
    ) -> dict[str, list[float]]:
        """Trains over the fitted rows, as the stage and from the checkpoint of this name; returns the curves."""
        checkpoint = self.run.checkpoint(step, self.follows_from)
        return self.fitting.train(step, parameters, loss_function, schedule, self.draw, self.run, checkpoint, watch)


def fit_block(
    model: PreTrainedModel, states: BlockStates, shape: Shape, settings: FitSettings, number: int, run: Run,
    follows_from: Any = None,
) -> MethodResult:
    """Fits the stand-in of one block.

    Args:
        model: the dense model.
        states: of this block.
        shape: of the stand-in.
        settings: how it is fitted.
        number: of the block among those of the run; every draw follows from it and the run's seed.
        run: seed, stages, cache.
        follows_from: what, with the run, decides the fit.

    Returns:
        The edit, the block's entry of ``results.json``'s ``fit``, and step 3's rate where it was on trial.
    """
    this = Fit.of(model, states, shape, settings, number, run, follows_from)
    fitting, block, energy = this.fitting, states.block, this.fitting.update_energy()
    record: dict[str, Any] = {"step1": None, "step3": None, "refined": None}
    rates: list[float] = []
    if "data" in shape.parts:
        place_landmarks(model, fitting, settings.ridge)
    if "fourier" in shape.parts:
        this = _with_bandwidth(this)
        settings = this.settings
        step1 = _step1(this)
        record["step1"] = step1.curves
        record |= _step2(this, step1, energy)
        record |= theory(fitting, step1)
    else:
        _solve_plain(fitting, settings.ridge)
        record["step2"] = average(fitting.state_loss(energy), fitting)
    if settings.refine:
        curves, rate = _step3(this)
        record |= {"step3": curves, "refined": min(curves["watched"]) < curves["watched"][0]}
        rates = [rate] if settings.on_trial else []
    record |= held_out(fitting, energy)
    edit = fitting.edit()
    place = "mlp" if shape.context else "beside"
    added: Any = edit.context if edit.context is not None else edit.stand_in
    record |= {
        "bandwidth": settings.bandwidth if "fourier" in shape.parts else None,
        "block": (block.start, block.stop), "place": place, "kind": shape.kind, "features": shape.features,
        "channels": shape.channels, "hidden": shape.hidden, "rank": _rank(shape, settings),
        "context": "attention" if shape.context else "none", "context_layer": fitting.context,
        "ordinary": shape.ordinary, "trained": fitting.trained,
        "parameters": sum(parameter.numel() for parameter in added.parameters()),
    }
    return MethodResult([edit], [record], rates=rates)


def _rank(shape: Shape, settings: FitSettings) -> int:
    """Rank of the low-rank part of Σ; 0 where the stand-in has none."""
    return settings.rank if "fourier" in shape.parts and "anisotropy" not in settings.without else 0


@torch.no_grad()
def fit_closed_form(model: PreTrainedModel, this: Fit) -> None:
    """Fits a stand-in by solves alone: kernel as drawn, least-squares operators, ridge read-out; nothing is recorded.

    Without a hidden layer that is what :func:`fit_block` gives, up to rounding, with kernel "fixed", no refinement and
    the same generator; a hidden layer stays as drawn.
    """
    fitting, shape, ridge = this.fitting, this.shape, this.settings.ridge
    if "data" in shape.parts:
        place_landmarks(model, fitting, ridge)
    if "fourier" in shape.parts:
        _solve_kernel(_with_bandwidth(this))
    else:
        _solve_plain(fitting, ridge)


@torch.no_grad()
def choose_bandwidth(this: Fit) -> float:
    """Of ``BANDWIDTHS`` the one whose closed form has the least error on held-out rows; draws are as if it never was.

    The stand-in's landmarks, if it has any, are in place.
    """
    start, errors = this.draw.get_state(), {}
    loss_function = this.fitting.state_loss(1.0)  # the least is the least in any unit
    for bandwidth in BANDWIDTHS:
        this.draw.set_state(start)
        _solve_kernel(replace(this, settings=replace(this.settings, bandwidth=bandwidth)))
        errors[bandwidth] = average(loss_function, this.fitting, held=True)["loss"][0]
    this.draw.set_state(start)
    return min(errors, key=errors.__getitem__)


def _with_bandwidth(this: Fit) -> Fit:
    """The same with a bandwidth, chosen where none is given."""
    if this.settings.bandwidth is not None:
        return this
    return replace(this, settings=replace(this.settings, bandwidth=choose_bandwidth(this)))


def _solve_kernel(this: Fit) -> None:
    """The kernel as drawn, its operators and read-out by least squares, folded into the stand-in."""
    fitting, shape, ridge = this.fitting, this.shape, this.settings.ridge
    features, path = _draw_kernel(this)
    dynamics = LinearDynamics(len(path) - 1, 2 * shape.features).to(fitting.device)
    if "operators" not in this.settings.without:
        dynamics.start(solve_operators(features, path, ridge), trained=False)
    product = dynamics.product()
    inverse = _new_inverse(this)
    _solve_inverse(fitting, inverse, lambda probe: _advanced(fitting, features, product, probe), ridge)
    fold(features, dynamics, inverse, fitting.stand_in)


def _step1(this: Fit) -> Step1:
    features, path = _draw_kernel(this)
    settings, states = this.settings, this.fitting.states
    weights = position_weights(states.path_position, int(states.tokens.mask.sum(1).max()))
    if "position_weights" in settings.without:
        weights = torch.ones_like(weights)
    with this.run.stage(f"kernel {this.fitting.states.name}", settings.step1.epochs) as progress:
        found = fit_dynamics(
            features, path, weights, settings.step1, this.draw, ridge=settings.ridge, name=this.fitting.states.name,
            learn_kernel="fixed" not in settings.kernel, without=settings.without, progress=progress,
            checkpoint=this.run.checkpoint("kernel", this.follows_from))
    if "operators" not in settings.without:
        learned = [*(features.parameters() if "fixed" not in settings.kernel else ()), *found.dynamics.parameters()]
        this.fitting.trained += (
            settings.step1.epochs * path.shape[1] * sum(parameter.numel() for parameter in learned))
    return found


def _draw_kernel(this: Fit) -> tuple[FourierFeatures, Tensor]:
    """The kernel that step 1 starts from, and the states on the block's path as it sees them, (k+1, n, d)."""
    fitting, shape, settings = this.fitting, this.shape, this.settings
    path = fitting.to_kernel(fitting.states.path.to(fitting.device))
    features = FourierFeatures(
        shape.width, shape.features, settings.rank, this.draw, anisotropic="anisotropy" not in settings.without)
    assert settings.bandwidth is not None
    features.to(fitting.device).init_median(path.flatten(0, 1), this.draw, settings.bandwidth)
    return features, path


def _new_inverse(this: Fit) -> InverseNetwork:
    shape, generator = this.shape, this.draw
    entries = (this.fitting.stand_in.lift if shape.hidden else this.fitting.stand_in.readout).in_features
    inverse = InverseNetwork(entries, shape.hidden, shape.width)
    if inverse.lift is not None:
        # ‖φ‖ = 1, so entries of unit variance give the hidden layer inputs of unit variance; torch's usual start, made
        # for inputs of norm √(2m), would leave it linear and its read-out enormous. The
        # generator is the host's, as of all draws.
        nn.init.normal_(inverse.lift.weight, generator=generator)
        nn.init.normal_(inverse.lift.bias, generator=generator)
    return inverse.to(this.fitting.device)


@torch.no_grad()
def _advanced(fitting: StandInFit, features: FourierFeatures, product: Tensor, probe: Probe) -> Tensor:
    """z as the inverse network sees it, (n, D): of the Fourier part the features that the operators have advanced.

    The operators of a sum of kernels are block-diagonal, diag(I, A_k ⋯ A_1, I): what the linear part and the channels
    would be advanced by, the read-out is solved for at once.
    """
    x, stand_in = probe.kernel_input, fitting.stand_in
    parts = [features(x) @ product.T if part == "fourier" else stand_in.mapped(part, x) for part in stand_in.parts]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def _solve_inverse(
    fitting: StandInFit, inverse: InverseNetwork, mapped: Callable[[Probe], Tensor], ridge: float
) -> None:
    """The inverse network's read-out by ridge regression of what is lacking on ``mapped`` features (n, 2m)."""
    moments = Moments(inverse.readout.in_features, inverse.readout.out_features, fitting.device)
    for rows in fitting.passes():
        probe = fitting.probe(rows)
        moments.update(inverse.hidden(mapped(probe)), fitting.wanted(probe))
    solve_readout(inverse, moments.add_processes(), ridge)


def _step2(this: Fit, step1: Step1, energy: float) -> dict[str, Any]:
    """Fits the inverse network on frozen features, folds it into the stand-in; returns its part of the record."""
    fitting, settings = this.fitting, this.settings
    product = step1.dynamics.product().detach()
    inverse = _new_inverse(this)

    def mapped(probe: Probe) -> Tensor:
        return _advanced(fitting, step1.features, product, probe)

    kernel_path = fitting.to_kernel(fitting.states.path.to(fitting.device))
    held_path = fitting.to_kernel(fitting.states.path_held.to(fitting.device))
    with torch.no_grad():
        predicted, true = step1.features(kernel_path[0]) @ product.T, step1.features(kernel_path[-1])
        alpha = decay_compensation(predicted, true)
        norms = norm_decay(step1, alpha, kernel_path, held_path, settings.ridge)
        if "alpha" not in settings.without:
            inverse.alpha.fill_(alpha)
        else:
            inverse.alpha.requires_grad_(False)
    _solve_inverse(fitting, inverse, mapped, settings.ridge)

    def loss_function(rows: Tensor) -> Sums:
        probe = fitting.probe(rows)
        return state_errors(probe.base + fitting.multiplier * inverse(mapped(probe)), probe.target, energy)

    if this.shape.hidden:
        trained = [parameter for parameter in inverse.parameters() if parameter.requires_grad]
        curves = this.train("inverse", trained, loss_function, settings.step2)
    else:
        curves = average(loss_function, fitting)
    fold(step1.features, step1.dynamics, inverse, fitting.stand_in)
    return {"step2": curves, "alpha": float(inverse.alpha.detach()), "norms": norms}


def _step3(this: Fit) -> tuple[dict[str, list[float]], float]:
    """Trains stand-in and context together on the error as the layers behind read it, up to the epoch that held-out
    rows find best, the start among them.

    Weights are float32; matrix products of the gradient steps are bfloat16 where the device computes in it. Held-out
    rows are looked at in float32.

    Returns:
        The curves, and the rate, given or found.
    """
    fitting, loss_function, schedule = this.fitting, this.fitting.reading_loss(), this.settings.step3
    # A frequency's phase has no digits to spare: three of them are all that bfloat16 has.
    fast = "fourier" not in this.shape.parts

    def stepping(rows: Tensor) -> Sums:
        with mixed_precision(fitting.device, fast):
            return loss_function(rows)

    def look() -> float:
        return average(loss_function, fitting, held=True)["loss"][0]

    trained = [parameter for parameter in fitting.module.parameters() if parameter.requires_grad]
    if this.settings.on_trial:
        schedule = replace(
            schedule, rate=fitting.rate(trained, stepping, look, schedule, this.draw, this.run))
    return this.train("refine", trained, stepping, schedule, look), schedule.rate


@torch.no_grad()
def _solve_plain(fitting: StandInFit, ridge: float) -> None:
    """Read-out of a stand-in without a Fourier part by ridge regression; of an ordinary layer without intercept where
    its MLP has no biases, and then the scale of the norm behind that, where there is one."""
    stand_in = fitting.stand_in
    moments = Moments(stand_in.readout.in_features, stand_in.readout.out_features, fitting.device)
    for rows in fitting.passes():
        probe = fitting.probe(rows)
        moments.update(probe.readout_input, fitting.wanted(probe))
    if fitting.intercept:
        matrix, offset = moments.add_processes().solve_affine(ridge)
        stand_in.readout.weight.copy_(matrix)
        stand_in.readout.bias.copy_(offset)
    else:
        stand_in.readout.weight.copy_(moments.add_processes().solve(ridge))
    fitting.solve_norm_behind()
