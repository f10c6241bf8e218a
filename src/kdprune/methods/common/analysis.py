"""Similarity scores of a model's layers: the first stage of every run, and ``kdprune.analyze``'s result."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.kernel.massive import MASSIVE, MassiveTokens, movers
from kdprune.kernel.similarity import LayerSimilarity, median_distances
from kdprune.methods.common.selection import open_layers
from kdprune.model.activations import layer_states, rows_at_once
from kdprune.model.families import decoder_layers
from kdprune.report import plots
from kdprune.report.results import Analysis
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance
from kdprune.store.cache import TensorCodec

CHUNK = 128   # tokens a chunk: the estimator is unbiased at any size; its cost a token grows with it
ENOUGH = 16_384  # tokens: research/analysis-tokens shows what fewer and more change; blocks stay the same
_PURPOSE = 500_000  # of the draws: the rows, and from the next number on the order of each batch's tokens


@dataclass(frozen=True)
class Scores(Mapping[str, np.ndarray]):
    """Arrays by name, S = L + 1 states: ``cosine``, ``linear_cka``, ``rbf_cka`` (S, S) between the states entering
    layers s and e, ``relative_update`` (L,), ``state_norm`` (S,), over tokens that are massive nowhere; over all tokens
    ``largest_norm``, ``median_norm``, ``massive_share`` (S,), ``massive_move`` and ``massive_growth`` (L,)
    (:class:`kdprune.kernel.massive.MassiveTokens`).

    Attributes:
        arrays: the arrays.
        tokens: how many tokens the similarity was taken over.
        protected: layers kept at either end.
        left_out: how many tokens were left out of it, because they are massive at some boundary.
    """

    arrays: Mapping[str, np.ndarray]
    tokens: int
    protected: tuple[int, int]
    left_out: int = 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays as tensors."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    @staticmethod
    def again(tensors: Mapping[str, Tensor], protect: float) -> "Scores":
        """The scores from their arrays and the number of tokens, with a share of layers protected at either end."""
        arrays = {name: value.numpy() for name, value in tensors.items() if name not in ("tokens", "left_out")}
        layers = len(arrays["relative_update"])
        opened = open_layers(layers, protect)
        protected = (opened.start, layers - opened.stop)
        return Scores(arrays, int(tensors["tokens"]), protected, int(tensors["left_out"]))

    def record(self) -> Analysis:
        """The ``analysis`` part of ``results.json``."""
        pairs = {f"pair_{name}": self[name].tolist() for name in ("cosine", "linear_cka", "rbf_cka")}
        steps = {name: self[name].diagonal(1).tolist() for name in ("cosine", "linear_cka", "rbf_cka")}
        lists = ("relative_update", "state_norm", "largest_norm", "median_norm", "massive_share", "massive_move")
        writes, erases = massive_layers(self)
        return Analysis(
            tokens=self.tokens, left_out=self.left_out, protected=self.protected, massive_above=MASSIVE, writes=writes,
            erases=erases, **{name: self[name].tolist() for name in lists}, **pairs, **steps,
        )

    def plot(self, path: str | Path) -> Path:
        """Draws the heat maps and per-layer curves to a file; its ending (.png, .svg, .pdf) says the format."""
        return plots.save_analysis_plot(self.record(), path)


def massive_layers(scores: Mapping[str, np.ndarray]) -> tuple[list[int], list[int]]:
    """The layers that write massive tokens and those that erase them; none where scores say nothing of it."""
    if "massive_move" not in scores:
        return [], []
    return movers(scores["massive_move"].tolist(), scores["massive_growth"].tolist())


def massive_line(scores: Mapping[str, np.ndarray]) -> str:
    """What to tell of them in one line; empty where there are none."""
    names = [f"{name} in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
             for name, layers in zip(("written", "erased"), massive_layers(scores), strict=True) if layers]
    if not names:
        return ""
    largest = float((scores["largest_norm"] / scores["median_norm"]).max())
    return f"massive tokens, up to {largest:.0f} times the median norm, are {', '.join(names)}"


def score_layers(model: PreTrainedModel, tokens: TokenSet, run: Run, *, protect: float, limit: int = ENOUGH) -> Scores:
    """Scores every pair of states in one pass over the calibration rows, or finds the scores in the cache.

    Every batch of rows is shuffled into chunks of ``CHUNK`` real tokens, so that a chunk mixes rows; a remainder
    shorter than a chunk is left out. A token that is massive at any boundary is left out of
    all similarities, so that every pair is taken over the same tokens: linear CKA would see nothing but such tokens,
    and the RBF kernel not see them at all. Several processes take batches in turn; what a batch
    is shuffled by follows from its number alone, and the RBF widths are those of the first process's first chunk.

    Args:
        model: the dense model.
        tokens: the calibration rows.
        run: gives seed (of the rows and the shuffles), size of batches and cache.
        protect: share of layers kept at either end (recorded for the plots).
        limit: tokens that are enough; of a larger set random rows are taken.
    """
    cached = run.cached(
        "analysis", limit, lambda: _measure(run.running(model), tokens, run, limit), TensorCodec(), "analyse")
    return Scores.again(cached, protect)


def _measure(model: PreTrainedModel, tokens: TokenSet, run: Run, limit: int) -> dict[str, Tensor]:
    """What :meth:`Scores.again` reads."""
    tokens = some_rows(tokens, limit, run)
    batch_size = rows_at_once(model, tokens.ids.shape[1], run.batch_size)
    local = tokens.select(world().share(len(tokens), batch_size))
    massive = MassiveTokens(len(decoder_layers(model)) + 1)
    with run.stage("analyse", len(local)) as progress:
        chunks = _chunks(model, local, run, batch_size, massive, progress)
        chunk = next(chunks, None)
        width = world().broadcast(None if chunk is None else median_distances(chunk).cpu())
        if width is None:
            raise KDPruneError(f"got batches with fewer than 4 tokens each from {tokens.source}, expected enough to "
                               "compare states by: give longer rows (length=…) or more of them")
        similarity = LayerSimilarity(width if chunk is None else width.to(chunk.device))
        while chunk is not None:
            similarity.update(chunk)
            chunk = next(chunks, None)
        world().sum(*similarity.sums.values())
        norms = massive.add_processes().value()
    return {**similarity.value(), **norms, "tokens": similarity.sums["tokens"].long().cpu()}


def some_rows(tokens: TokenSet, limit: int, run: Run) -> TokenSet:
    """Random rows with at most ``limit`` real tokens (but one row at least), in their order; all if they fit."""
    if tokens.tokens <= limit:
        return tokens
    order = torch.randperm(len(tokens), generator=run.generator(_PURPOSE))
    count = int((tokens.mask.sum(1)[order].cumsum(0) <= limit).sum())
    return tokens.select(order[: max(1, count)].sort().values)


def _chunks(
    model: PreTrainedModel, tokens: TokenSet, run: Run, batch_size: int, massive: MassiveTokens, progress: Advance,
) -> Iterator[Tensor]:
    """The states of shuffled real tokens, (L + 1, n, d), massive ones left out, of the rows of this process.

    n is ``CHUNK`` but for a short batch, or one that tokens were left out of. ``massive`` is shown every batch whole.
    """
    states_wanted = range(len(decoder_layers(model)) + 1)
    for number, (batch, states) in enumerate(layer_states(model, tokens, states_wanted, batch_size)):
        found = massive.update(states[index][batch.mask.to(states[index].device)] for index in states_wanted)
        draw = run.generator(_PURPOSE + 1 + number * world().size + world().rank)
        real = batch.mask.flatten().nonzero().flatten()
        shuffled = torch.randperm(len(real), generator=draw)
        order = real[shuffled[~found[shuffled]]].to(states[0].device)
        # Chunks of one size weigh the same in the average over chunks; a short last batch is one chunk.
        size = min(CHUNK, len(order))
        if len(order) < len(real):
            size = len(order) // max(1, -(-len(order) // CHUNK))  # a little smaller, so that next to nothing is over
        for chunk in order.split(size):
            if len(chunk) >= max(size, 4):
                picked = [states[index].flatten(0, 1)[chunk.to(states[index].device)] for index in states_wanted]
                yield torch.stack([state.to(order.device) for state in picked])
        states.clear()  # before the next batch's are there too
        progress(len(batch))
