"""Step 1: learn the kernel and the linear operators together (KDP, section 4)."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kdprune.kernel.features import CHUNK, FourierFeatures, effective_rank
from kdprune.kernel.operators import LinearDynamics, Moments
from kdprune.runtime.distributed import world
from kdprune.store.checkpoints import Checkpoint
from kdprune.train.gradients import Sums
from kdprune.train.loop import Schedule, fit


@dataclass(frozen=True)
class Step1:
    """What step 1 leaves behind; curves hold one value an epoch.

    Attributes:
        curves: ``loss`` and ``cosine`` (of gradient steps), ``spectral_norm`` (B_A), ``feature_norm`` (R_φ) and
            ``unexplained`` (Σ‖A φ(h_s) − φ(h_e)‖² / Σ‖φ(h_e) − mean‖²), the last three with the operators an
            epoch starts from.
        effective_rank: exp(entropy) of the spectrum of φ(h_s)'s second moment: near 1 if the kernel collapsed.
    """

    features: FourierFeatures
    dynamics: LinearDynamics
    curves: dict[str, list[float]]
    effective_rank: float


@torch.no_grad()
def solve_operators(features: FourierFeatures, path: Tensor, ridge: float) -> Iterator[Tensor]:
    """Least-squares operators in the current kernel space, from streamed float64 moments: (k+1, n, d) → k times (D, D).

    The regression is of the step φ(h') − φ(h) on φ(h), with the ridge on it: A = I + γB shrinks towards the
    identity, which is what a residual layer does when it does nothing. One after the other, since the moments of one
    operator take four times its memory.
    """
    size = 2 * features.features
    for start in range(len(path) - 1):
        moments = Moments(size, size, path.device)
        for chunk in _own_chunks(path[start : start + 2]):
            before, after = features(chunk)
            moments.update(before, after - before)
        step = moments.add_processes().solve(ridge)
        del moments
        yield step + torch.eye(size, dtype=step.dtype, device=step.device)


@torch.no_grad()
def endpoint_statistics(features: FourierFeatures, product: Tensor, path: Tensor) -> dict[str, float]:
    """R_φ and the unexplained share of the block's whole map, Σ‖P φ(h_s) − φ(h_e)‖² / Σ‖φ(h_e) − mean‖²."""
    moments = Moments(len(product), len(product), path.device)
    largest = 0.0
    for chunk in _own_chunks(path):
        first, last = features(chunk[0]), features(chunk[-1])
        largest = max(largest, float(first.norm(dim=-1).max()), float(last.norm(dim=-1).max()))
        moments.update(first, last)
    moments, largest = moments.add_processes(), max(world().gather(largest))
    return {"feature_norm": largest, "unexplained": moments.residual(product) / max(moments.variance(), 1e-300)}


def _own_chunks(path: Tensor) -> Iterator[Tensor]:
    """This process's share of a path that all processes hold, (k+1, n, d), in chunks of tokens."""
    return (chunk for number, chunk in enumerate(path.split(CHUNK, dim=1)) if world().owner(number) == world().rank)


def position_weights(positions: Tensor, length: int) -> Tensor:
    """w_t = (t + 1)/T, growing towards later tokens; the paper gives the trend, not the form."""
    return (positions + 1) / length


def fit_dynamics(
    features: FourierFeatures,
    path: Tensor,
    weights: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    ridge: float,
    name: str,
    learn_kernel: bool = True,
    without: Collection[str] = (),
    progress: Callable[[int], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
) -> Step1:
    """Jointly learns θ = (λ, L, b) and the operators A_i = I + γ_i B_i by

        Σ_i Σ_x ‖A_i φ(h_{s+i−1}) − φ(h_{s+i})‖² + (1 − w_t cos(A_i φ(h_{s+i−1}), φ(h_{s+i}))),

    the operators restarted at the least-squares solution of the current kernel space at the start of every epoch
    (the paper's "iteration") and once more at the end.

    Args:
        path: the block's states at the same tokens, shape (k+1, n, d).
        weights: w_t, shape (n,).
        ridge: relative ridge of the restarts.
        learn_kernel: False keeps θ as drawn (only restarts and B learn).
        without: parts left out. Without ``ols_start`` A_i starts at I (γ_i = 0, B_i random) and gradients alone teach
            it; without ``cosine_term`` the loss ends after the first sum; without ``operators`` A_i stays I, and θ as
            drawn, since the loss would then only ask φ to be constant.
    """
    dynamics = LinearDynamics(len(path) - 1, 2 * features.features).to(path.device)
    solves = not {"operators", "ols_start"}.intersection(without)
    if "operators" not in without and not solves:
        dynamics.start_random(generator)

    def restart() -> dict[str, float]:
        if solves:
            dynamics.start(solve_operators(features, path, ridge))
        largest = float(dynamics.spectral_norms().max())
        return {"spectral_norm": largest, **endpoint_statistics(features, dynamics.product().detach(), path)}

    def on_epoch(_: int) -> dict[str, float]:
        progress(1)
        return restart()

    def loss_function(chosen: Tensor) -> Sums:
        squared, cosine = _step_errors(features, dynamics, path[:, chosen.to(path.device)])
        loss = squared if "cosine_term" in without else squared + 1 - weights[chosen].to(path.device) * cosine
        # Means over the operators, sums over the tokens.
        return Sums({"loss": loss.mean(0).sum(), "cosine": cosine.mean(0).sum()}, len(chosen))

    tokens = path.shape[1]
    if "operators" in without:
        with torch.no_grad():
            curves = {key: [value] for key, value in loss_function(torch.arange(tokens)).means().items()}
    else:
        trained = [*(features.parameters() if learn_kernel else []), *dynamics.parameters()]
        curves = fit(trained, loss_function, tokens, schedule, generator, name=name, on_epoch=on_epoch,
                     local_rows=lambda chosen: chosen[world().share(len(chosen))], checkpoint=checkpoint)
    for key, value in restart().items():
        curves.setdefault(key, []).append(value)
    return Step1(features, dynamics, curves, _feature_rank(features, path[0]))


def _step_errors(features: FourierFeatures, dynamics: LinearDynamics, path: Tensor) -> tuple[Tensor, Tensor]:
    """‖A_i φ(h_{s+i−1}) − φ(h_{s+i})‖² and the cosine of the two, each of shape (k, n); path (k+1, n, d)."""
    mapped = features(path)
    predicted = mapped[:-1] @ dynamics.matrices().transpose(1, 2)
    cosine = cosine_similarity(predicted, mapped[1:], dim=-1)
    return (predicted - mapped[1:]).square().sum(-1), cosine


@torch.no_grad()
def _feature_rank(features: FourierFeatures, states: Tensor) -> float:
    gram = torch.zeros(2 * features.features, 2 * features.features, dtype=torch.float64, device=states.device)
    for chunk in states.split(CHUNK):
        mapped = features(chunk).double()
        gram += mapped.T @ mapped
    return effective_rank(gram)
