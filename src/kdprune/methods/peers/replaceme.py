"""ReplaceMe: one run of layers, replaced by a linear map that the down projection in front of it takes in."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.kernel.operators import Moments
from kdprune.methods.common.block_data import candidates, check_rows, nearest
from kdprune.methods.common.budget import layer_sizes
from kdprune.methods.common.distance import measure_distances
from kdprune.methods.common.method import ComparingMethod
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.stand_in_fit import saying
from kdprune.methods.peers.drop import check_reach, runs
from kdprune.methods.peers.slicing import named, read
from kdprune.model.activations import recorded
from kdprune.model.families import decoder_layers, family_of, normalises_behind
from kdprune.model.passes import run_layers
from kdprune.model.placement import input_device
from kdprune.model.streaming import resident
from kdprune.model.structures import last_writer, refuse_experts
from kdprune.model.surgery import Drop, Edit, Rewrite, layers_replaced
from kdprune.options import option
from kdprune.runtime.run import Run
from kdprune.train.gradients import Sums
from kdprune.train.loop import Schedule, advancing, fit
from kdprune.train.trial import rate_on_trial

# From a batch to (M, h_s − M, h_e) of its real tokens, each (n, d).
Interface = Callable[[TokenSet], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ReplaceMe(ComparingMethod):
    """Drops one run of layers [s, e) and maps the MLP output M of layer s−1 linearly, so that the stream matches h_e.

        h_s = r + M;   behind the cut stands  r + T M,   T of shape (d, d)
        solver "least_squares":  T = argmin Σ ‖T M − (h_e − r)‖² + ρ‖T‖²,   ρ = ridge · tr(Σ M Mᵀ)/d,   float64
        solver "cosine":         T = argmin Σ 1 − cos(r + T M, h_e),   by Adam from T = I
                                 or  argmin Σ 1 − cos(T M, h_e − r)   (compared="update")

    over real calibration tokens. T goes into the down projection of layer s−1 (W ← T W, b ← T b), so the result is a
    stock architecture with fewer layers. In a model that was pruned before, where a stand-in is the last that layer s−1
    adds to the stream, M is what its read-out puts out, and T goes into that. The run has the least length that meets
    the ratio and, of those with s ≥ 1, the least mean angle arccos(cos(h_s, h_e))/π at the last real token of a row,
    h_L behind the final norm, as in the published code. With ``cuts`` k, k runs of one length go, the nearest first,
    each the nearest of those that share no layer with it; neighbours are joined. T of every run is fitted on states of
    the dense model.

    Source: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Linear Transformations", 2025.
    The solver with the better published figures, the cosine, is the default; the code's readme recommends least
    squares. Differences from the published code: it lets padding tokens into the fit and holds all activations in
    memory for the cosine; here padding stays out, and every epoch runs the model again. Its cosine recipes compare T M
    with h_e − r, and r + T M with h_e if asked to be accurate. Its regularisation α is absolute and 0; ``ridge`` is
    relative to the mean power of M. Its Adam runs at 1e-4 throughout, 1,024 tokens a step; here rates are tried on
    held-out rows where none is given (:data:`kdprune.train.trial.RATES`, 1e-4 among them), and annealed. Where a run
    ends at the last layer it fits towards the state behind the final norm, which the model then applies again; here h_e
    is what leaves the last layer. Several cosine maps it fits one after the other, on the model with those before.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "ReplaceMe"
    collects: ClassVar[bool] = True
    spreads: ClassVar[bool] = True
    ends: ClassVar[tuple[int, int]] = (1, 0)

    solver: Literal["cosine", "least_squares"] = option(
        "cosine", "how the map is found: cosine distance by Adam, or least squares in closed form")
    ridge: float = option(1e-6, "relative ridge of least squares", least=0, rare=True)
    epochs: int = option(10, "epochs of the cosine solver", least=1)
    rate: float | None = option(
        None, "peak learning rate of the cosine solver (the best of 1e-2, 3e-3, 1e-3, 3e-4, 1e-4 on held-out rows)",
        above=0, rare=True)
    batch: int = option(2, "rows (sequences) a step of the cosine solver", least=1, rare=True)
    compared: Literal["stream", "update"] = option(
        "stream", "what the cosine solver compares: the stream behind the cut with the state there, or the mapped MLP "
        "output with what the stream lacks", rare=True)
    cuts: int = option(1, "runs of layers to take out, all of one length; neighbours are joined", least=1, group="size")
    distance: Literal["last_token", "all_tokens"] = option(
        "last_token", "how far the states around a run are apart: angle at the last token of a row, or one minus the "
        "mean cosine over all tokens", group="size", rare=True)

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        refuse_experts(model)
        if normalises_behind(model):
            raise KDPruneError(
                f"got a {family_of(model).model_type} model that normalises behind its MLP, expected one that adds the "
                f"down projection's output to the stream: prune it with another method, such as linear")
        if self.blocks is None and self.cuts > 1:
            allowed, sizes = self.allowed(model), layer_sizes(model)
            count = len(allowed) // self.cuts * self.cuts
            if not count:
                raise KDPruneError(f"got {self.cuts} cuts for {len(allowed)} layers that may be taken out, expected as "
                                   f"many cuts at most: lower cuts, or protect fewer layers (protect=…)")
            check_reach(self.target(model), sum(sorted(sizes[layer] for layer in allowed)[:count]))
        else:
            for block in candidates(self, model):
                if block.start == 0:
                    raise KDPruneError(
                        f"got block [0, {block.stop}), expected one that starts at layer 1 or later: the layer in "
                        f"front of it takes the map in")
        check_rows(tokens)

    def choose(self, model: PreTrainedModel, tokens: TokenSet, run: Run) -> list[range]:
        """The explicit blocks, or the nearest of those that meet the ratio."""
        if self.blocks is not None:
            return candidates(self, model)
        found = measure_distances(model, tokens, run, normed=self.last_state == "normed")
        distance = found.angular if self.distance == "last_token" else 1 - found.cosine
        if self.cuts == 1:
            return [nearest(candidates(self, model), distance)]
        sizes, allowed, target = layer_sizes(model), self.allowed(model), self.target(model).parameters
        for length in range(1, len(allowed) // self.cuts + 1):
            chosen = nearest_runs(distance, allowed, length, self.cuts)
            if sum(sizes[layer] for block in chosen for layer in block) >= target:
                break
        return runs(layer for block in chosen for layer in block)

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the run, finds its map and returns the edits."""
        blocks = self.choose(model, tokens, run)
        running = run.running(model)
        fitted = tokens.fitted(self.held)
        edits: list[Edit] = []
        rates: list[float] = []
        trained = 0
        for number, block in enumerate(blocks):
            if self.solver == "cosine":
                matrix, rate, cost = self._cosine(running, tokens, block, run.generator(number + 1), run)
                rates += [rate] if self.rate is None else []
                trained += cost
            else:
                with run.stage("least squares", len(fitted)) as progress:
                    matrix = least_squares(running, fitted, block, self.ridge, run.batch_size, progress)
            edits += [Rewrite(block.start - 1, folded_weights(model, block.start - 1, matrix)), Drop(block)]
        return MethodResult(edits, rates=rates, trained=trained)

    def _cosine(
        self, model: PreTrainedModel, tokens: TokenSet, block: range, draw: torch.Generator, run: Run
    ) -> tuple[Tensor, float, int]:
        """T of the cosine distance, shape (d, d), its rate, and parameters × tokens seen."""
        width, name = model.config.hidden_size, f"block [{block.start}, {block.stop})"
        schedule, fitted = Schedule(self.epochs, self.batch, self.rate or 1.0), tokens.fitted(self.held)
        matrix = nn.Parameter(torch.eye(width, device=input_device(model)))
        with interface(model, block) as states:
            def distances(batch: TokenSet) -> Tensor:
                output, rest, target = states(batch)
                mapped = output @ matrix.T
                pair = (rest + mapped, target) if self.compared == "stream" else (mapped, target - rest)
                return 1 - cosine_similarity(*pair, dim=-1)

            def loss_function(rows: Tensor) -> Sums:
                found = distances(fitted.select(rows))
                return Sums({"loss": found.sum()}, len(found))

            @torch.no_grad()
            def look() -> float:
                return float(torch.cat([distances(rows) for rows in tokens.watching(self.held).batches(1)]).mean())

            def train(rows: int, schedule: Schedule, draw: torch.Generator) -> None:
                fit([matrix], loss_function, rows, schedule, draw, name=f"{name}, on trial", notify=lambda _: None)

            if self.rate is None:
                with run.stage(f"rate {name}"):
                    rate = rate_on_trial([matrix], train, look, len(fitted), schedule, draw, saying(run, name))
                schedule = dataclasses.replace(schedule, rate=rate)
            with run.stage(f"cosine {name}", self.epochs) as progress:
                fit([matrix], loss_function, len(fitted), schedule, draw, name=name, on_epoch=advancing(progress),
                    checkpoint=run.checkpoint("replaceme", dataclasses.asdict(self), name))
        return matrix.detach(), schedule.rate, matrix.numel() * self.epochs * fitted.tokens


def nearest_runs(distance: Tensor, allowed: range, length: int, count: int) -> list[range]:
    """``count`` runs of ``length`` layers that share none: the nearest first, each that leaves room for those to come.

    Args:
        distance: of every pair of states, shape (L+1, L+1); of a run [s, e) entry [s, e].
        allowed: the layers that may be taken, at least ``count · length``.
        length: of every run.
        count: how many.
    """
    chosen: list[range] = []
    blocks = [range(start, start + length) for start in range(allowed.start, allowed.stop - length + 1)]
    for block in sorted(blocks, key=lambda block: (float(distance[block.start, block.stop]), block.start)):
        taken = sorted([*chosen, block], key=lambda one: one.start)
        starts = [allowed.start, *(one.stop for one in taken)]
        gaps = [stop - start for start, stop in zip(starts, [*(one.start for one in taken), allowed.stop], strict=True)]
        if len(chosen) < count and min(gaps) >= 0 and sum(gap // length for gap in gaps) >= count - len(taken):
            chosen.append(block)
    return sorted(chosen, key=lambda one: one.start)


@contextlib.contextmanager
def interface(model: PreTrainedModel, block: range) -> Iterator[Interface]:
    """While active, a function that runs a batch up to h_e and returns (M, h_s − M, h_e), real tokens only, (n, d).

    M is what the down projection of layer s−1 puts out, or the last stand-in there, times the multiplier of its
    residual. Float32; nothing is kept beyond a batch.
    """
    layers, device = list(decoder_layers(model)), input_device(model)
    outputs: list[Tensor] = []
    path, multiplier = last_writer(model, layers[block.start - 1])
    projection = layers[block.start - 1].get_submodule(path)
    # A copy: some layers go on to add to the projection's output in place.
    hook = projection.register_forward_hook(lambda _, __, output: outputs.append(output.detach() * multiplier))

    @torch.no_grad()
    def states(batch: TokenSet) -> tuple[Tensor, Tensor, Tensor]:
        outputs.clear()
        run_layers(model, batch)
        mask, entering, leaving = batch.mask.to(device), seen[block.start].to(device), seen[block.stop].to(device)
        # Some families flatten (B, T, d) to (B·T, d) before their MLP.
        output = outputs[0].to(device).reshape(*mask.shape, -1)[mask].float()
        return output, entering[mask].float() - output, leaving[mask].float()

    try:
        with layers_replaced(model, layers[: block.stop]), recorded(model, [block.start, block.stop]) as seen:
            yield states
    finally:
        hook.remove()


def least_squares(
    model: PreTrainedModel, tokens: TokenSet, block: range, ridge: float, batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """T = argmin Σ ‖T M − (h_e − (h_s − M))‖² + ρ‖T‖² from streamed float64 moments, shape (d, d).

    Raises:
        KDPruneError: the moments are not finite, or M does not span R^d and there is no ridge.
    """
    moments = Moments(model.config.hidden_size, model.config.hidden_size, input_device(model))
    with interface(model, block) as states:
        for batch in tokens.batches(batch_size):
            output, rest, target = states(batch)
            moments.update(output, target - rest)
            progress(len(batch))
    matrix = moments.solve(ridge)
    if not torch.isfinite(matrix).all():
        raise KDPruneError(
            f"got a least-squares map of block [{block.start}, {block.stop}) that is not finite, expected one: give "
            f"more calibration text or a larger ridge (now {ridge:g}), or check the checkpoint")
    return matrix


def folded_weights(model: PreTrainedModel, index: int, matrix: Tensor) -> dict[str, Tensor]:
    """The down projection of layer ``index``, or the read-out of the last stand-in there, with T = ``matrix``, shape
    (d, d), behind it: its parameters by name."""
    path, _ = last_writer(model, decoder_layers(model)[index])
    projection = decoder_layers(model)[index].get_submodule(path)
    with resident(projection):
        (weight, bias), matrix = read(projection), matrix.double()
        matrix = matrix.to(weight.device)
        return named(path, projection, (matrix @ weight, None if bias is None else matrix @ bias))
