"""Similarity scores of a model's layers: the first stage of every run, and ``kdprune.analyze``'s result."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.kernel.similarity import LayerSimilarity, median_distances
from kdprune.methods.common.selection import open_layers
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers
from kdprune.report import plots
from kdprune.report.results import Analysis
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.runtime.stages import Advance
from kdprune.store.cache import TensorCodec

CHUNK = 128   # tokens a chunk: the estimator is unbiased at any size; its cost a token grows with it
ENOUGH = 16_384  # tokens: research/analysis-tokens shows what fewer and more change; blocks stay the same
STATES = 2**30  # bytes that the states of one batch at all layers may take: fewer rows pass at once where they are wide
_PURPOSE = 500_000  # of the draws: the rows, and from the next number on the order of each batch's tokens


@dataclass(frozen=True)
class Scores(Mapping[str, np.ndarray]):
    """Arrays by name, S = L + 1 states: ``cosine``, ``linear_cka``, ``rbf_cka`` (S, S) between the states entering
    layers s and e, ``relative_update`` (L,), ``state_norm`` (S,).

    Attributes:
        arrays: the arrays.
        tokens: how many tokens they were taken over.
        protected: layers kept at either end.
    """

    arrays: Mapping[str, np.ndarray]
    tokens: int
    protected: tuple[int, int]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays as tensors, for a method's selection."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    @staticmethod
    def again(tensors: Mapping[str, Tensor], protect: float) -> "Scores":
        """The scores from their arrays and the number of tokens, with a share of layers protected at either end."""
        arrays = {name: value.numpy() for name, value in tensors.items() if name != "tokens"}
        layers = len(arrays["relative_update"])
        opened = open_layers(layers, protect)
        return Scores(arrays, int(tensors["tokens"]), (opened.start, layers - opened.stop))

    def record(self) -> Analysis:
        """The ``analysis`` part of ``results.json``."""
        pairs = {f"pair_{name}": self[name].tolist() for name in ("cosine", "linear_cka", "rbf_cka")}
        steps = {name: self[name].diagonal(1).tolist() for name in ("cosine", "linear_cka", "rbf_cka")}
        return Analysis(
            relative_update=self["relative_update"].tolist(), state_norm=self["state_norm"].tolist(),
            tokens=self.tokens, protected=self.protected, **pairs, **steps,
        )

    def plot(self, path: str | Path) -> Path:
        """Draws the heat maps and per-layer curves to a file; its ending (.png, .svg, .pdf) says the format."""
        return plots.save_analysis_plot(self.record(), path)


def score_layers(model: PreTrainedModel, tokens: TokenSet, run: Run, *, protect: float, limit: int = ENOUGH) -> Scores:
    """Scores every pair of states in one pass over the calibration rows, or finds the scores in the cache.

    Every batch of rows is shuffled into chunks of ``CHUNK`` real tokens, so that a chunk mixes rows; a remainder of
    fewer than four tokens (the estimator's least) is left out. Several processes take batches in turn; what a batch
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
    row = tokens.ids.shape[1] * model.config.hidden_size * model.dtype.itemsize * (len(decoder_layers(model)) + 1)
    batch_size = min(run.batch_size, max(1, STATES // row))
    local = tokens.select(world().share(len(tokens), batch_size))
    with run.stage("analyse", len(local)) as progress:
        chunks = _chunks(model, local, run, batch_size, progress)
        chunk = next(chunks, None)
        width = world().broadcast(None if chunk is None else median_distances(chunk).cpu())
        assert width is not None, "the first process has rows"
        similarity = LayerSimilarity(width if chunk is None else width.to(chunk.device))
        while chunk is not None:
            similarity.update(chunk)
            chunk = next(chunks, None)
        world().sum(*similarity.sums.values())
    return {**similarity.value(), "tokens": similarity.sums["tokens"].long().cpu()}


def some_rows(tokens: TokenSet, limit: int, run: Run) -> TokenSet:
    """Random rows with at most ``limit`` real tokens (but one row at least), in their order; all if they fit."""
    if tokens.tokens <= limit:
        return tokens
    order = torch.randperm(len(tokens), generator=run.generator(_PURPOSE))
    count = int((tokens.mask.sum(1)[order].cumsum(0) <= limit).sum())
    return tokens.select(order[: max(1, count)].sort().values)


def _chunks(
    model: PreTrainedModel, tokens: TokenSet, run: Run, batch_size: int, progress: Advance,
) -> Iterator[Tensor]:
    """The states of shuffled real tokens, (L + 1, n, d), n = ``CHUNK`` but for a short batch; rows of this process."""
    states_wanted = range(len(decoder_layers(model)) + 1)
    for number, (batch, states) in enumerate(layer_states(model, tokens, states_wanted, batch_size)):
        draw = run.generator(_PURPOSE + 1 + number * world().size + world().rank)
        real = batch.mask.flatten().nonzero().flatten()
        order = real[torch.randperm(len(real), generator=draw)].to(states[0].device)
        # Chunks of one size weigh the same in the average over chunks; a short last batch is one chunk.
        size = min(CHUNK, len(order))
        for chunk in order.split(size):
            if len(chunk) >= max(size, 4):
                picked = [states[index].flatten(0, 1)[chunk.to(states[index].device)] for index in states_wanted]
                yield torch.stack([state.to(order.device) for state in picked])
        progress(len(batch))
