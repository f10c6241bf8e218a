"""Similarity scores of a model's layers: the first stage of every run, and ``kdprune.analyze``'s result."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data import TokenSet
from kdprune.kernel.similarity import LayerSimilarity, median_distances
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers
from kdprune.report import plots
from kdprune.report.results import Analysis
from kdprune.runtime import Stages, generator
from kdprune.selection import open_layers
from kdprune.world import world

CHUNK = 128   # tokens a chunk: the estimator is unbiased at any size; its cost a token grows with it
ENOUGH = 131_072  # tokens: docs/benchmarks.md shows what fewer and more change
STATES = 2**30  # bytes that the states of one batch at all layers may take: fewer rows pass at once where they are wide
_PURPOSE = 500_000  # of the draws: the rows, and from the next number on the order of each batch's tokens


@dataclass(frozen=True)
class Scores(Mapping[str, np.ndarray]):
    """Arrays by name, S = L + 1 states: ``cosine``, ``linear_cka``, ``rbf_cka`` (S, S) between the states entering
    layers s and e, ``relative_update`` (L,), ``state_norm`` (S,).

    Attributes:
        arrays: the arrays. tokens: how many tokens they were taken over. protected: layers kept at either end.
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

    def kept(self) -> dict[str, Tensor]:
        """All of it but ``protected`` as tensors, for a work directory."""
        return {**self.tensors(), "tokens": torch.tensor(self.tokens)}

    @staticmethod
    def again(kept: Mapping[str, Tensor], protect: float) -> "Scores":
        """The scores that :meth:`kept` gave, with a share of layers protected at either end."""
        arrays = {name: value.numpy() for name, value in kept.items() if name != "tokens"}
        layers = len(arrays["relative_update"])
        opened = open_layers(layers, protect)
        return Scores(arrays, int(kept["tokens"]), (opened.start, layers - opened.stop))

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


def score_layers(
    model: PreTrainedModel, tokens: TokenSet, *, protect: float, seed: int, batch_size: int, stages: Stages,
    limit: int = ENOUGH,
) -> Scores:
    """Streams calibration rows once through the model and scores every pair of states.

    Every batch of rows is shuffled into chunks of ``CHUNK`` real tokens, so that a chunk mixes rows; a remainder of
    fewer than four tokens (the estimator's least) is left out. Several processes take batches in turn; what a batch
    is shuffled by follows from its number alone, and the RBF widths are those of the first process's first chunk.

    Args:
        protect: share of layers kept at either end (recorded for the plots). seed: of the rows and the shuffles.
        batch_size: rows a forward pass, at most. limit: tokens that are enough; of a larger set random rows are taken.
    """
    layers = len(decoder_layers(model))
    tokens = some_rows(tokens, limit, seed)
    row = tokens.ids.shape[1] * model.config.hidden_size * model.dtype.itemsize * (layers + 1)
    batch_size = min(batch_size, max(1, STATES // row))
    mine = tokens.select(world().share(len(tokens), batch_size))
    with stages.stage("analyse", len(mine)) as advance:
        chunks = _chunks(model, mine, seed, batch_size, advance)
        chunk = next(chunks, None)
        width = world().broadcast(None if chunk is None else median_distances(chunk).cpu())
        assert width is not None, "the first process has rows"
        similarity = LayerSimilarity(width if chunk is None else width.to(chunk.device))
        while chunk is not None:
            similarity.update(chunk)
            chunk = next(chunks, None)
        world().sum(*similarity.sums.values())
    opened = open_layers(layers, protect)
    arrays = {name: value.numpy() for name, value in similarity.value().items()}
    return Scores(arrays, int(similarity.sums["tokens"]), (opened.start, layers - opened.stop))


def some_rows(tokens: TokenSet, limit: int, seed: int) -> TokenSet:
    """Random rows with at most ``limit`` real tokens (but one row at least), in their order; all if they fit."""
    if tokens.tokens <= limit:
        return tokens
    order = torch.randperm(len(tokens), generator=generator(seed, _PURPOSE))
    count = int((tokens.mask.sum(1)[order].cumsum(0) <= limit).sum())
    return tokens.select(order[: max(1, count)].sort().values)


def _chunks(
    model: PreTrainedModel, tokens: TokenSet, seed: int, batch_size: int, advance: Callable[[int], None],
) -> Iterator[Tensor]:
    """The states of shuffled real tokens, (L + 1, n, d), n = ``CHUNK`` but for a short batch; rows of this process."""
    states_wanted = range(len(decoder_layers(model)) + 1)
    for number, (batch, states) in enumerate(layer_states(model, tokens, states_wanted, batch_size)):
        draw = generator(seed, _PURPOSE + 1 + number * world().size + world().rank)
        real = batch.mask.flatten().nonzero().flatten()
        order = real[torch.randperm(len(real), generator=draw)].to(states[0].device)
        # Chunks of one size weigh the same in the average over chunks; a short last batch is one chunk.
        size = min(CHUNK, len(order))
        for chunk in order.split(size):
            if len(chunk) >= max(size, 4):
                picked = [states[index].flatten(0, 1)[chunk.to(states[index].device)] for index in states_wanted]
                yield torch.stack([state.to(order.device) for state in picked])
        advance(len(batch))
