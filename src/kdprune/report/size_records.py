"""The parts of results.json that say how large a model is: layers, parameters, cache, widths."""

from typing import Literal

from pydantic import Field, model_validator

from kdprune.report.records import Number, Record, divide


class Layers(Record):
    """Decoder layers. Where the model given was pruned before, "dense" is that model, and "first" the dense one."""

    dense: int = Field(description="layers of the dense model, L")
    first: int | None = Field(None, description="layers before the first of all prunings, where there were several")
    pruned: int | None = Field(None, description="layers of the pruned model, with those a stand-in occupies")


class Parameters(Record):
    """Parameters, embeddings included, tied ones counted once; and those outside the embeddings, the layers'.

    Where the model given was pruned before, "dense" is that model, and "first" the dense one.
    """

    dense: int = Field(description="parameters of the dense model")
    pruned: int | None = Field(None, description="parameters of the pruned model, stand-ins included")
    net_ratio: Number = Field(None, description="1 − pruned / dense; derived when left out")
    dense_layers: int | None = Field(
        None, description="those of the dense model outside embedding tables, of positions too, and head; null in "
        "older records")
    pruned_layers: int | None = Field(None, description="the same of the pruned model; null in older records")
    net_ratio_layers: Number = Field(None, description="1 − pruned_layers / dense_layers; derived when left out")
    first: int | None = Field(None, description="parameters before the first of all prunings, where there were several")
    first_layers: int | None = Field(None, description="those of them outside the embeddings")
    net_ratio_first: Number = Field(None, description="1 − pruned / first; derived when left out")
    net_ratio_first_layers: Number = Field(None, description="1 − pruned_layers / first_layers; derived when left out")

    @model_validator(mode="after")
    def _derive(self) -> "Parameters":
        """Fill in what follows from the rest."""
        self.net_ratio = removed(self.dense, self.pruned) if self.net_ratio is None else self.net_ratio
        if self.net_ratio_layers is None:
            self.net_ratio_layers = removed(self.dense_layers, self.pruned_layers)
        if self.net_ratio_first is None:
            self.net_ratio_first = removed(self.first, self.pruned)
        if self.net_ratio_first_layers is None:
            self.net_ratio_first_layers = removed(self.first_layers, self.pruned_layers)
        return self


def removed(dense: int | None, pruned: int | None) -> float | None:
    """Which share went; None where either is not known, or the dense one 0."""
    kept = divide(pruned, dense)
    return None if kept is None else 1 - kept


class KVCache(Record):
    """Key-value cache per token of context."""

    dense: int = Field(description="dense model, bytes")
    pruned: int | None = Field(None, description="pruned model, bytes")


class LayerWidth(Record):
    """A layer that was made narrower: what is left of it."""

    layer: int = Field(description="index of the layer in the dense model")
    without: Literal["attention", "mlp"] | None = Field(None, description="the sublayer that it lacks")
    groups: int | None = Field(None, description="key-value heads, with the queries that read them")
    channels: int | None = Field(None, description="MLP channels")
    states: tuple[int, int, int] | None = Field(
        None, description="width of the residual stream entering the layer, behind its attention and leaving it"
    )
