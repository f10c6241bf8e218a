"""What every method returns: the architecture change as data, and what is known about its fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdprune.model.surgery import Edit


@dataclass(frozen=True)
class MethodResult:
    """Edits to apply to the dense model and, for methods that fit something, one record a block.

    ``fit`` holds plain dicts with the fields of ``results.json``'s ``fit``.
    """

    edits: Sequence[Edit]
    fit: Sequence[dict[str, Any]]

    @property
    def blocks(self) -> list[range]:
        """The removed blocks, in order."""
        return sorted((edit.block for edit in self.edits), key=lambda block: block.start)
