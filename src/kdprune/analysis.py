"""Similarity scores of a model's layers: the first stage of every run, and ``kdprune.analyze``'s result."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data import TokenSet
from kdprune.kernel.similarity import LayerSimilarity
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers
from kdprune.report import plots
from kdprune.report.results import Analysis
from kdprune.runtime import Stages
from kdprune.selection import open_layers

CHUNK = 128   # tokens a chunk: the estimator is unbiased at any size; its cost a token grows with it


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
    model: PreTrainedModel, tokens: TokenSet, *, protect: float, generator: torch.Generator, batch_size: int,
    stages: Stages,
) -> Scores:
    """Streams the calibration set once through the model and scores every pair of states.

    Every batch of rows is shuffled into chunks of ``CHUNK`` real tokens, so that a chunk mixes rows; a remainder of
    fewer than four tokens (the estimator's least) is left out.

    Args:
        protect: share of layers kept at either end (recorded for the plots). generator: of the shuffle.
        batch_size: rows a forward pass.
    """
    layers = len(decoder_layers(model))
    similarity = LayerSimilarity(layers + 1)
    with stages.stage("analyse", len(tokens)) as advance:
        for batch, states in layer_states(model, tokens, range(layers + 1), batch_size):
            real = torch.stack([states[index][batch.mask.to(states[index].device)] for index in range(layers + 1)])
            order = torch.randperm(real.shape[1], generator=generator).to(real.device)
            # Chunks of one size weigh the same in the average over chunks; a short last batch is one chunk.
            for chunk in order.split(min(CHUNK, len(order))):
                if len(chunk) >= min(CHUNK, len(order)) >= 4:
                    similarity.update(real[:, chunk])
            advance(len(batch))
    opened = open_layers(layers, protect)
    arrays = {name: value.numpy() for name, value in similarity.value().items()}
    return Scores(arrays, similarity.tokens, (opened.start, layers - opened.stop))
