"""How many parameters have to go: a ratio, and what it is a share of."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from transformers import PreTrainedModel

from kdprune.errors import KDPruneError
from kdprune.model.families import outside_embeddings

Of: TypeAlias = Literal["all", "layers"]


@dataclass(frozen=True)
class Target:
    """A net ratio of one model, as parameters.

    Attributes:
        ratio: share to remove.
        of: what it is a share of: all parameters, or those outside the embeddings (layers).
        total: how many those are in the dense model.
    """

    ratio: float
    of: Of
    total: int

    @classmethod
    def in_model(cls, model: PreTrainedModel, ratio: float, of: Of = "all") -> "Target":
        """What the ratio is in this dense model."""
        return cls(ratio, of, counted(model, of))

    @property
    def parameters(self) -> int:
        """The fewest whole parameters that are the ratio at least, and one; what is put in counts against those
        removed."""
        return max(1, math.ceil(self.ratio * self.total - 1e-6))

    def check(self, reachable: int, what: str, advice: str) -> None:
        """Raises KDPruneError where the ratio is out of reach, with the largest that is not, of the same parameters.

        Args:
            reachable: the most parameters that can go.
            what: what keeps it from being more, for the message: "that the layers from 1 to 4 allow".
            advice: what the user can do: "lower the ratio or protect fewer layers (protect=…)".
        """
        if reachable < self.parameters:
            unit = "" if self.of == "all" else " of the parameters outside the embeddings"
            largest = max(math.floor(reachable / self.total * 1e4) / 1e4, 0.0)
            raise KDPruneError(
                f"got ratio {self.ratio:.4g}{unit}, expected at most {largest:.4g}, the largest {what}; {advice}")


def counted(model: PreTrainedModel, of: Of) -> int:
    """The parameters of a model, dense or pruned, that a ratio is a share of."""
    return model.num_parameters() if of == "all" else outside_embeddings(model)
