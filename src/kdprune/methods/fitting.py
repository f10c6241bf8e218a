"""One block from states to a fitted edit: steps 1, 2 and 3, and the record of what happened."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.checkpoints import Checkpoint
from kdprune.gradients import Measure, Sums
from kdprune.kernel.features import FourierFeatures
from kdprune.kernel.operators import LinearDynamics, Moments
from kdprune.methods.diagnostics import held_out, norm_decay, theory
from kdprune.methods.dynamics import Step1, fit_dynamics, position_weights, solve_operators
from kdprune.methods.inverse import InverseNetwork, decay_compensation, fold, solve_readout
from kdprune.methods.shape import Shape
from kdprune.methods.site import PASS_ROWS, Probe, Site, state_errors
from kdprune.model.block_states import BlockStates
from kdprune.model.surgery import Edit
from kdprune.runtime import Stages
from kdprune.training import Schedule, advancing, fit
from kdprune.world import world

Checkpoints = Callable[[str], Checkpoint | None]


@dataclass(frozen=True)
class FitSettings:
    """How a block is fitted; names as in ``KDP``."""

    kernel: str
    rank: int
    bandwidth: float
    ridge: float
    refine: bool
    step1: Schedule
    step2: Schedule
    step3: Schedule
    without: frozenset[str] = frozenset()


def new_site(
    model: PreTrainedModel, states: BlockStates, shape: Shape, generator: torch.Generator, device: torch.device
) -> Site:
    """An unfitted stand-in of this shape in its place."""
    return Site(model, states, shape.build(generator), shape.source(states.block), device)


def fit_block(
    model: PreTrainedModel, states: BlockStates, shape: Shape, settings: FitSettings, generator: torch.Generator,
    device: torch.device, stages: Stages, checkpoints: Checkpoints = lambda _: None,
) -> tuple[Edit, dict[str, Any]]:
    """Fits the stand-in of one block.

    Args:
        model: the dense model. states: of this block. shape: of the stand-in. generator: source of every draw.
        checkpoints: where a fit stands, by the name of its step.

    Returns:
        The edit, and the block's entry of ``results.json``'s ``fit``.
    """
    block = states.block
    name = f"block [{block.start}, {block.stop})"
    site = new_site(model, states, shape, generator, device)
    energy = site.update_energy(PASS_ROWS)
    record: dict[str, Any] = {"step1": None, "step3": None, "refined": None}
    if shape.kind == "fourier":
        step1 = _step1(site, shape, settings, generator, name, stages, checkpoints)
        record["step1"] = step1.curves
        record |= _step2(site, step1, shape, settings, generator, energy, name, stages, checkpoints)
        record |= theory(site, step1)
    else:
        _solve_plain(site, settings.ridge)
        record["step2"] = average(site.state_measure(energy), site)
    if settings.refine and (shape.kind != "linear" or shape.context):
        record["step3"], record["refined"] = _step3(
            site, settings, generator, energy, name, stages, checkpoints)
    record |= held_out(site, energy, PASS_ROWS)
    edit = site.edit()
    place = "mlp" if shape.context else ("before" if block.start == 0 else "after")
    added = edit.context if edit.context is not None else edit.stand_in
    return edit, record | {
        "block": (block.start, block.stop), "place": place, "kind": shape.kind, "features": shape.features,
        "hidden": shape.hidden, "rank": _rank(shape, settings),
        "context": "attention" if shape.context else "none", "context_layer": site.context,
        "parameters": sum(parameter.numel() for parameter in added.parameters()),
    }


def _rank(shape: Shape, settings: FitSettings) -> int:
    """Rank of the low-rank part of Σ; 0 where the stand-in has none."""
    return settings.rank if shape.kind == "fourier" and "anisotropy" not in settings.without else 0


@torch.no_grad()
def fit_closed_form(site: Site, shape: Shape, settings: FitSettings, generator: torch.Generator) -> None:
    """Fits a site by solves alone: kernel as drawn, least-squares operators, ridge read-out; nothing is recorded.

    Without a hidden layer that is what :func:`fit_block` gives, up to rounding, with kernel "fixed", no refinement and
    the same generator; a hidden layer stays as drawn.
    """
    if shape.kind != "fourier":
        _solve_plain(site, settings.ridge)
        return
    features, path = _draw_kernel(site, shape, settings, generator)
    dynamics = LinearDynamics(len(path) - 1, 2 * shape.features).to(site.device)
    if "operators" not in settings.without:
        dynamics.start(solve_operators(features, path, settings.ridge), trained=False)
    product = dynamics.product()
    inverse = _new_inverse(shape, site.device, generator)
    _solve_inverse(site, inverse, lambda probe: features(probe.kernel_input) @ product.T, settings.ridge)
    alone = site.stand_in
    site.place(fold(features, dynamics, inverse, residual=alone.residual, normalize=alone.normalize))


def _step1(
    site: Site, shape: Shape, settings: FitSettings, generator: torch.Generator, name: str, stages: Stages,
    checkpoints: Checkpoints,
) -> Step1:
    features, path = _draw_kernel(site, shape, settings, generator)
    weights = position_weights(site.states.path_position, site.states.tokens.ids.shape[1])
    if "position_weights" in settings.without:
        weights = torch.ones_like(weights)
    with stages.stage(f"kernel {name}", settings.step1.epochs) as advance:
        return fit_dynamics(
            features, path, weights, settings.step1, generator, ridge=settings.ridge, name=name,
            learn_kernel=settings.kernel != "fixed", without=settings.without, advance=advance,
            checkpoint=checkpoints("kernel"))


def _draw_kernel(
    site: Site, shape: Shape, settings: FitSettings, generator: torch.Generator,
) -> tuple[FourierFeatures, Tensor]:
    """The kernel that step 1 starts from, and the states on the block's path as it sees them, (k+1, n, d)."""
    path = site.to_kernel(site.states.path.to(site.device))
    features = FourierFeatures(
        shape.width, shape.features, settings.rank, generator, anisotropic="anisotropy" not in settings.without)
    features.to(site.device).init_median(path.flatten(0, 1), generator, settings.bandwidth)
    return features, path


def _new_inverse(shape: Shape, device: torch.device, generator: torch.Generator) -> InverseNetwork:
    inverse = InverseNetwork(2 * shape.features, shape.hidden, shape.width).to(device)
    if inverse.lift is not None:
        # ‖φ‖ = 1, so entries of unit variance give the hidden layer inputs of unit variance; torch's usual start, made
        # for inputs of norm √(2m), would leave it linear and its read-out enormous.
        nn.init.normal_(inverse.lift.weight, generator=generator)
        nn.init.normal_(inverse.lift.bias, generator=generator)
    return inverse


@torch.no_grad()
def _solve_inverse(site: Site, inverse: InverseNetwork, mapped: Callable[[Probe], Tensor], ridge: float) -> None:
    """The inverse network's read-out by ridge regression of what the site lacks on ``mapped`` features (n, 2m)."""
    moments = Moments(inverse.readout.in_features, inverse.readout.out_features, site.device)
    for rows in site.row_batches(PASS_ROWS):
        probe = site.probe(rows)
        moments.update(inverse.hidden(mapped(probe)), probe.target - probe.base)
    solve_readout(inverse, moments.reduced(), ridge)


def _step2(
    site: Site, step1: Step1, shape: Shape, settings: FitSettings, generator: torch.Generator, energy: float,
    name: str, stages: Stages, checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Fits the inverse network on frozen features, folds it into the site; returns its part of the record."""
    product = step1.dynamics.product().detach()
    inverse = _new_inverse(shape, site.device, generator)

    @torch.no_grad()
    def mapped(probe: Probe) -> Tensor:
        return step1.features(probe.kernel_input) @ product.T

    kernel_path = site.to_kernel(site.states.path.to(site.device))
    held_path = site.to_kernel(site.states.path_held.to(site.device))
    with torch.no_grad():
        predicted, true = step1.features(kernel_path[0]) @ product.T, step1.features(kernel_path[-1])
        alpha = decay_compensation(predicted, true)
        norms = norm_decay(step1, alpha, kernel_path, held_path, settings.ridge)
        if "alpha" not in settings.without:
            inverse.alpha.fill_(alpha)
        else:
            inverse.alpha.requires_grad_(False)
    _solve_inverse(site, inverse, mapped, settings.ridge)

    def measure(rows: Tensor) -> Sums:
        probe = site.probe(rows)
        return state_errors(probe.base + inverse(mapped(probe)), probe.target, energy)

    if shape.hidden:
        with stages.stage(f"inverse {name}", settings.step2.epochs) as advance:
            parameters = [parameter for parameter in inverse.parameters() if parameter.requires_grad]
            curves = fit(parameters, measure, site.fit_rows, settings.step2, generator, name=name,
                         on_epoch=advancing(advance), mine=site.states.mine, checkpoint=checkpoints("inverse"))
    else:
        curves = average(measure, site)
    alone = site.stand_in
    site.place(fold(step1.features, step1.dynamics, inverse, residual=alone.residual, normalize=alone.normalize))
    return {"step2": curves, "alpha": float(inverse.alpha.detach()), "norms": norms}


def _step3(
    site: Site, settings: FitSettings, generator: torch.Generator, energy: float, name: str, stages: Stages,
    checkpoints: Checkpoints,
) -> tuple[dict[str, list[float]], bool]:
    """Trains everything in the site together; undone if held-out rows say that it did harm (few tokens, high rate).

    Returns:
        The curves, and whether the result was kept.
    """
    before, start = average(site.state_measure(energy), site, held=True), copy.deepcopy(site.module.state_dict())
    parameters = [parameter for parameter in site.module.parameters() if parameter.requires_grad]
    with stages.stage(f"refine {name}", settings.step3.epochs) as advance:
        curves = fit(
            parameters, site.state_measure(energy), site.fit_rows, settings.step3, generator, name=name,
            on_epoch=advancing(advance), mine=site.states.mine, checkpoint=checkpoints("refine"))
    after = average(site.state_measure(energy), site, held=True)
    kept = after["loss"] <= before["loss"]
    if not kept:
        site.module.load_state_dict(start)
    return curves, kept


@torch.no_grad()
def _solve_plain(site: Site, ridge: float) -> None:
    """Read-out of a stand-in without a kernel (GELU features as drawn, or the input itself) by ridge regression."""
    stand_in = site.stand_in
    moments = Moments(stand_in.readout.in_features, stand_in.readout.out_features, site.device)
    for rows in site.row_batches(PASS_ROWS):
        probe = site.probe(rows)
        moments.update(probe.readout_input, probe.target - probe.base)
    matrix, offset = moments.reduced().solve_affine(ridge)
    stand_in.readout.weight.copy_(matrix)
    stand_in.readout.bias.copy_(offset)


@torch.no_grad()
def average(measure: Measure, site: Site, held: bool = False) -> dict[str, list[float]]:
    """A measure over all fitted (or held-out) rows, as a curve of one value: what a closed form reaches at once."""
    sums: dict[str, float] = {}
    count = 0
    for rows in site.row_batches(PASS_ROWS, held):
        seen = measure(rows)
        for key, value in seen.values.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        count += seen.count
    # A process without a row of its own has no names yet.
    names = sorted(set().union(*world().gather(list(sums))))
    *totals, tokens = world().total([*(sums.get(key, 0.0) for key in names), count])
    return {key: [total / tokens] for key, total in zip(names, totals, strict=True)}
