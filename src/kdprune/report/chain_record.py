"""The part of results.json that says how the model given had been pruned before."""

from pydantic import Field

from kdprune.report.records import Block, Record
from kdprune.report.size_records import Layers, Parameters


class Step(Record):
    """One earlier pruning; what is not known of it is left out."""

    model: str = Field("", description="what was pruned, as the user named it; empty: not known")
    method: str = Field("", description="the method; empty: not known")
    blocks: list[Block] = Field(default_factory=list, description="[[start, end], …] in the layers that it found")
    layers: Layers | None = Field(None, description="decoder layers before and after it")
    parameters: Parameters | None = Field(None, description="parameters before and after it")
