"""Size and form of a stand-in, before it is fitted."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from kdprune.model.modeling_kdp import StandIn, parts_of


@dataclass(frozen=True)
class Shape:
    """Size and form of a stand-in.

    Attributes:
        width: d.
        kind: its parts, as :class:`StandIn` names them.
        features: m.
        hidden: h, 0 = none.
        residual: the stand-in adds to its input, which it normalises, unless it is a linear map alone.
        context: it sits in a layer's MLP place.
        channels: c, of the part "data".
        gated: whether those have gates.
        activation: of those, or of the hidden layer.
        ordinary: in the end it is the MLP of that layer: channels and a read-out, nothing else.
        biased: such an MLP has biases.
        most: channels or features at most, where it is widened; None: as many as are of use.
        unit: in steps of how many it is widened.
    """

    width: int
    kind: str
    features: int
    hidden: int
    residual: bool
    context: bool
    channels: int = 0
    gated: bool = True
    activation: str = "gelu"
    ordinary: bool = False
    biased: bool = True
    most: int | None = None
    unit: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """What the kind names."""
        return parts_of(self.kind)

    def build(self, generator: torch.Generator) -> StandIn:
        """An unfitted stand-in. In a decoder layer, the layer itself normalises and adds."""
        alone = self.residual and not self.context
        stand_in = StandIn(
            self.width, kind=self.kind, features=self.features, channels=self.channels, gated=self.gated,
            hidden=self.hidden, residual=alone, normalize=alone and self.kind != "linear", activation=self.activation)
        for module in stand_in.modules():
            if isinstance(module, nn.Linear):
                # torch's own initialisation, from the explicit generator.
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        return stand_in

    def source(self, block: range) -> int | None:
        """The layer that the context of this block's stand-in is started from: its first; None without context."""
        return block.start if self.context else None

    def parameters(self) -> int:
        """Parameters of the folded stand-in: (d + 1)(m + c, twice c if gated) into the features, D·d + d out of them,
        D·h + h + h·d + d with a hidden layer; D entries of all parts. Without biases less."""
        d, h, bias = self.width, self.hidden, int(self.biased)
        into = (d + bias) * ((self.features if self._drawn else 0) + (1 + self.gated) * self.channels)
        return into + (self.entries * h + h + h * d + d if h else self.entries * d + bias * d)

    @property
    def entries(self) -> int:
        """D, the entries of all its parts together."""
        sizes = {"linear": self.width, "fourier": 2 * self.features, "mlp": self.features, "data": self.channels}
        return sum(sizes[part] for part in self.parts)

    @property
    def _drawn(self) -> bool:
        return bool({"fourier", "mlp"} & set(self.parts))

    def wider(self, units: int) -> "Shape":
        """The same with so many more units of what it can have more of: channels, or features where it has none."""
        if "data" in self.parts:
            return replace(self, channels=self.channels + units)
        return replace(self, features=self.features + units) if self._drawn else self

    @property
    def units(self) -> int:
        """How many it has of those."""
        return self.channels if "data" in self.parts else self.features if self._drawn else 0

    def parameters_per_unit(self) -> int:
        """By how much ``parameters`` grows with one more of them (0 for a linear map)."""
        return self.wider(1).parameters() - self.parameters()


@dataclass(frozen=True)
class Candidate:
    """A block, and the form of the stand-in that would take its place."""

    block: range
    shape: Shape

    @property
    def start(self) -> int:
        """Its first layer."""
        return self.block.start

    @property
    def stop(self) -> int:
        """The layer behind it."""
        return self.block.stop
