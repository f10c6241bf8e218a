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
from kdprune.methods.common.block_data import candidates, check_rows, choose
from kdprune.methods.common.method import DepthMethod
from kdprune.methods.common.result import MethodResult
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

# From a batch to (M, h_s − M, h_e) of its real tokens, each (n, d).
Interface = Callable[[TokenSet], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ReplaceMe(DepthMethod):
    """Drops one run of layers [s, e) and maps the MLP output M of layer s−1 linearly, so that the stream matches h_e.

        h_s = r + M;   behind the cut stands  r + T M,   T of shape (d, d)
        solver "least_squares":  T = argmin Σ ‖T M − (h_e − r)‖² + ρ‖T‖²,   ρ = ridge · tr(Σ M Mᵀ)/d,   float64
        solver "cosine":         T = argmin Σ 1 − cos(r + T M, h_e),   by Adam from T = I

    over real calibration tokens. T goes into the down projection of layer s−1 (W ← T W, b ← T b), so the result is a
    stock architecture with fewer layers. In a model that was pruned before, where a stand-in is the last that layer s−1
    adds to the stream, M is what its read-out puts out, and T goes into that. The run has the least length that meets
    the ratio and, of those with s ≥ 1, the least cosine distance of h_s and h_e.

    Source: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Linear Transformations", 2025.
    Its better solver, the cosine, is the default (the code's readme recommends least squares). Differences from the
    published code: it lets padding tokens into the fit and holds all activations in memory for the cosine; here
    padding stays out, and every epoch runs the model again. Its cosine example compares T M with h_e − r instead of
    r + T M with h_e, and it chooses the run by the angle at the last token. Its regularisation α is absolute and 0;
    ``ridge`` is relative to the mean power of M. Its Adam runs at 1e-4 throughout, 1,024 tokens a step; here that is
    the peak at d = 4096, goes as 1/d, and is annealed.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str] = "ReplaceMe"
    collects: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    solver: Literal["cosine", "least_squares"] = option(
        "cosine", "how the map is found: cosine distance by Adam, or least squares in closed form")
    ridge: float = option(1e-6, "relative ridge of least squares", least=0, rare=True)
    epochs: int = option(10, "epochs of the cosine solver", least=1)
    rate: float | None = option(None, "peak learning rate of the cosine solver (0.41 / the width)", above=0, rare=True)
    batch: int = option(2, "rows (sequences) a step of the cosine solver", least=1, rare=True)

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        super().check(model, tokens)
        refuse_experts(model)
        if normalises_behind(model):
            raise KDPruneError(
                f"got a {family_of(model).model_type} model that normalises behind its MLP, expected one that adds the "
                f"down projection's output to the stream: prune it with another method, such as linear")
        for block in candidates(self, model, first=1):
            if block.start == 0:
                raise KDPruneError(
                    f"got block [0, {block.stop}), expected one that starts at layer 1 or later: the layer in front of "
                    f"it takes the map in")
        check_rows(tokens)

    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Chooses the run, finds its map and returns the edits."""
        blocks = choose(self, model, tokens, run, first=1)
        running = run.running(model)
        fitted = tokens.fitted(self.held)
        edits: list[Edit] = []
        for number, block in enumerate(blocks):
            if self.solver == "cosine":
                matrix = self._cosine(running, fitted, block, run.generator(number + 1), run)
            else:
                with run.stage("least squares", len(fitted)) as progress:
                    matrix = least_squares(running, fitted, block, self.ridge, run.batch_size, progress)
            edits += [Rewrite(block.start - 1, folded_weights(model, block.start - 1, matrix)), Drop(block)]
        return MethodResult(edits)

    def _cosine(
        self, model: PreTrainedModel, tokens: TokenSet, block: range, draw: torch.Generator, run: Run
    ) -> Tensor:
        """T of the cosine distance, shape (d, d)."""
        width, name = model.config.hidden_size, f"block [{block.start}, {block.stop})"
        schedule = Schedule(self.epochs, self.batch, self.rate or 1e-4 * 4096 / width)
        matrix = nn.Parameter(torch.eye(width, device=input_device(model)))
        with interface(model, block) as states, run.stage(f"cosine {name}", self.epochs) as progress:
            def loss_function(rows: Tensor) -> Sums:
                output, rest, target = states(tokens.select(rows))
                distance = 1 - cosine_similarity(rest + output @ matrix.T, target, dim=-1)
                return Sums({"loss": distance.sum()}, len(target))

            fit([matrix], loss_function, len(tokens), schedule, draw, name=name, on_epoch=advancing(progress),
                checkpoint=run.checkpoint("replaceme", dataclasses.asdict(self), name))
        return matrix.detach()


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
        with layers_replaced(model, layers[: block.stop + 1]), recorded(model, [block.start, block.stop]) as seen:
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
    try:
        matrix = moments.solve(ridge)
    except torch.linalg.LinAlgError:
        matrix = torch.full_like(moments.xx, torch.nan)
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
