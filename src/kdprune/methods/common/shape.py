"""Size and form of a stand-in, before it is fitted."""

from dataclasses import dataclass

import torch
from torch import nn

from kdprune.model.modeling_kdp import StandIn


@dataclass(frozen=True)
class Shape:
    """Size and form of a stand-in.

    Attributes:
        width: d.
        kind: "fourier", "mlp" or "linear".
        features: m.
        hidden: h, 0 = none.
        residual: the stand-in adds to its input, which it normalises.
        context: it sits in a layer's MLP place.
    """

    width: int
    kind: str
    features: int
    hidden: int
    residual: bool
    context: bool

    def build(self, generator: torch.Generator) -> StandIn:
        """An unfitted stand-in. In a decoder layer, the layer itself normalises and adds."""
        alone = self.residual and not self.context
        stand_in = StandIn(
            self.width, kind=self.kind, features=self.features, hidden=self.hidden, residual=alone, normalize=alone)
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
        """Parameters of the folded stand-in, d·m + m + 2m·h + h + h·d + d for the kernel with a hidden layer."""
        d, m, h = self.width, self.features, self.hidden
        lifted = {"fourier": 2 * m, "mlp": m, "linear": d}[self.kind]
        phase = 0 if self.kind == "linear" else d * m + m
        return phase + (lifted * h + h + h * d + d if h else lifted * d + d)

    def parameters_per_feature(self) -> int:
        """By how much ``parameters`` grows with one more feature (0 for a linear map)."""
        out = self.hidden or self.width
        return {"fourier": self.width + 1 + 2 * out, "mlp": self.width + 1 + out, "linear": 0}[self.kind]
