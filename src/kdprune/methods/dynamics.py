"""Step 1: learn the kernel and the linear operators together (KDP, section 4)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kdprune.checkpoints import Checkpoint
from kdprune.gradients import Sums
from kdprune.kernel.features import FourierFeatures, effective_rank
from kdprune.kernel.operators import LinearDynamics, Moments
from kdprune.training import Schedule, fit
from kdprune.world import world

CHUNK = 2048  # tokens a chunk: bounds the memory of φ and its float64 moments over a long path


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


@dataclass(frozen=True)
class Parts:
    """Which parts of the method are there; names as in ``KDP``, and all of them by default."""

    ols_start: bool = True
    cosine_term: bool = True
    position_weights: bool = True
    operators: bool = True
    alpha: bool = True


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
        step = moments.reduced().solve(ridge)
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
    moments, largest = moments.reduced(), max(world().gather(largest))
    return {"feature_norm": largest, "unexplained": moments.residual(product) / max(moments.variance(), 1e-300)}


def _own_chunks(path: Tensor) -> Iterator[Tensor]:
    """This process's share of a path that all processes hold, (k+1, n, d), in chunks of tokens."""
    return (chunk for number, chunk in enumerate(path.split(CHUNK, dim=1)) if world().owner(number) == world().rank)


def position_weights(positions: Tensor, length: int) -> Tensor:
    """w_t = (t + 1)/T, growing towards later tokens; the paper gives the trend, not the form."""
    return (positions + 1) / length


def fit_dynamics(
    features: FourierFeatures,
    paths: Sequence[Tensor],
    weights: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    ridge: float,
    name: str,
    learn_kernel: bool = True,
    parts: Parts = Parts(),
    limit: float | None = None,
    advance: Callable[[int], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
) -> list[Step1]:
    """Jointly learns θ = (λ, L, b) and the operators A_i = I + γ_i B_i by

        Σ_i Σ_x ‖A_i φ(h_{s+i−1}) − φ(h_{s+i})‖² + (1 − w_t cos(A_i φ(h_{s+i−1}), φ(h_{s+i}))),

    the operators restarted at the least-squares solution of the current kernel space at the start of every epoch
    (the paper's "iteration") and once more at the end. Given several blocks, i runs over the operators of all of them:
    one θ serves them all.

    Args:
        paths: of every block its states at the same tokens, shape (k+1, n, d). weights: w_t, shape (n,).
        ridge: relative ridge of the restarts. learn_kernel: False keeps θ as drawn (only restarts and B learn).
        parts: without ``ols_start`` A_i starts at I (γ_i = 0, B_i random) and gradients alone teach it; without
            ``cosine_term`` the loss ends after the first sum; without ``operators`` A_i stays I, and θ as drawn, since
            the loss would then only ask φ to be constant.
        limit: largest ‖A_i‖₂ of the operators an epoch starts from, and of those at the end; None: any.

    Returns:
        What was learned of every block; all share ``features`` and the curves of loss and cosine.
    """
    device, tokens = paths[0].device, paths[0].shape[1]
    blocks = [LinearDynamics(len(path) - 1, 2 * features.features, limit).to(device) for path in paths]
    if parts.operators and not parts.ols_start:
        for dynamics in blocks:
            dynamics.start_random(generator)

    def restart() -> dict[str, float]:
        found = {}
        for number, (dynamics, path) in enumerate(zip(blocks, paths, strict=True)):
            if parts.operators and parts.ols_start:
                dynamics.start(solve_operators(features, path, ridge))
            else:
                dynamics.hold()
            found[f"spectral_norm {number}"] = float(dynamics.spectral_norms().max())
            for key, value in endpoint_statistics(features, dynamics.product().detach(), path).items():
                found[f"{key} {number}"] = value
        return found

    def on_epoch(_: int) -> dict[str, float]:
        advance(1)
        return restart()

    def measure(chosen: Tensor) -> Sums:
        errors = [_step_errors(features, dynamics, path[:, chosen.to(device)])
                  for dynamics, path in zip(blocks, paths, strict=True)]
        squared, cosine = (torch.cat(found) for found in zip(*errors, strict=True))
        loss = squared + 1 - weights[chosen].to(device) * cosine if parts.cosine_term else squared
        # Means over the operators, sums over the tokens.
        return Sums({"loss": loss.mean(0).sum(), "cosine": cosine.mean(0).sum()}, len(chosen))

    trained = [*(features.parameters() if learn_kernel else []), *(p for block in blocks for p in block.parameters())]
    if parts.operators:
        curves = fit(trained, measure, tokens, schedule, generator, name=name, on_epoch=on_epoch,
                     mine=lambda chosen: chosen[world().share(len(chosen))], checkpoint=checkpoint)
    else:
        with torch.no_grad():
            curves = {key: [value] for key, value in measure(torch.arange(tokens)).means().items()}
    for key, value in restart().items():
        curves.setdefault(key, []).append(value)
    return [
        Step1(features, dynamics, _curves_of(curves, number), _feature_rank(features, path[0]))
        for number, (dynamics, path) in enumerate(zip(blocks, paths, strict=True))
    ]


def _step_errors(features: FourierFeatures, dynamics: LinearDynamics, path: Tensor) -> tuple[Tensor, Tensor]:
    """‖A_i φ(h_{s+i−1}) − φ(h_{s+i})‖² and the cosine of the two, each of shape (k, n); path (k+1, n, d)."""
    mapped = features(path)
    predicted = mapped[:-1] @ dynamics.matrices().transpose(1, 2)
    cosine = cosine_similarity(predicted, mapped[1:], dim=-1)
    return (predicted - mapped[1:]).square().sum(-1), cosine


def _curves_of(curves: dict[str, list[float]], number: int) -> dict[str, list[float]]:
    """The curves of one block, by plain names, and those of all blocks together."""
    own = {key.removesuffix(f" {number}"): values for key, values in curves.items() if key.endswith(f" {number}")}
    return {key: values for key, values in curves.items() if " " not in key} | own


@torch.no_grad()
def _feature_rank(features: FourierFeatures, states: Tensor) -> float:
    gram = torch.zeros(2 * features.features, 2 * features.features, dtype=torch.float64, device=states.device)
    for chunk in states.split(CHUNK):
        mapped = features(chunk).double()
        gram += mapped.T @ mapped
    return effective_rank(gram)
