"""What every method returns: the architecture change as data, and what is known about its fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdprune.model.surgery import Drop, Edit, Substitute


@dataclass(frozen=True)
class MethodResult:
    """Edits to apply to the dense model and, for methods that fit something, one record a block.

    ``fit`` holds plain dicts with the fields of ``results.json``'s ``fit``; ``tokens`` is how many calibration tokens
    the method looked at, None for all of them. ``replaced``: the runs that were replaced, where the edits alone would
    say less, because one of a run's layers stays with new weights. ``damage``: of the blocks that were tried one by
    one, what the loss grew by, where that chose the blocks. ``rates``: learning rates found on trial, one a block.
    ``trained``: parameters trained × tokens seen in training, of fits without a record.
    ``search``: the fields of ``results.json``'s ``search``, where many sets of layers were tried.
    """

    edits: Sequence[Edit]
    fit: Sequence[dict[str, Any]] = ()
    tokens: int | None = None
    replaced: Sequence[range] | None = None
    damage: Mapping[range, float] | None = None
    search: Mapping[str, Any] | None = None
    rates: Sequence[float] = ()
    trained: int = 0

    @property
    def training(self) -> int:
        """Parameters trained × tokens seen in training, of all fits; closed forms and rates on trial count nothing."""
        return self.trained + sum(int(record.get("trained", 0)) for record in self.fit)

    @property
    def blocks(self) -> list[range]:
        """The removed blocks, in order."""
        if self.replaced is not None:
            return sorted(self.replaced, key=lambda block: block.start)
        return sorted(
            (edit.block for edit in self.edits if isinstance(edit, Drop | Substitute)), key=lambda block: block.start)
