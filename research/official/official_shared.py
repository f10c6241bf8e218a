"""What both sides of the study share: the rows, the patches to published code, and one evaluation. Knows no kdprune."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROWS, LENGTH, HELD = 16, 128, 2  # of the calibration rows the last two are kept out of fits, on both sides
TEXT, WINDOW = 8, 256  # held-out rows, one behind the other in one text
RUN = 8  # layers of the run that is replaced
SLEB_ROWS, SLEB_LAYERS = 2, 3
SLICES, SLICE_LENGTH, RATE = 10, 64, 0.35  # LLM-Pruner: slices of text, nominal rate
FIRST, LAST = 4, 28  # LLM-Pruner: layers [4, 28) are pruned
SPARSITY = 0.25  # SliceGPT: 576 → 432


class Work:
    """A folder with the rows, a copy of the model for older transformers, and what the published code left."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = folder / "llama-smollm2-135m"  # SLEB and LLM-Streamline look for "llama" in the name

    def rows(self) -> dict[str, Tensor]:
        """calibration (ROWS, LENGTH), heldout (TEXT, WINDOW)."""
        return torch.load(self.folder / "rows.pt")

    def save(self, name: str, found: dict[str, Any]) -> None:
        torch.save(found, self.folder / f"{name}.pt")

    def load(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / f"{name}.pt", weights_only=False)

    def note(self, side: str, name: str, found: dict[str, Any]) -> None:
        (self.folder / f"{side}-{name}.json").write_text(json.dumps(found, indent=1))

    def noted(self, side: str, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{side}-{name}.json").read_text())


def patched(name: str, file: Path, patches: Sequence[tuple[str, str]]) -> ModuleType:
    """A module of published code, loaded with text replaced; each patch must apply."""
    text = file.read_text()
    for old, new in patches:
        if old not in text:
            raise ValueError(f"{file.name} has no {old!r}")
        text = text.replace(old, new)
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(file))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file)
    if "." in name:
        module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(text, str(file), "exec"), module.__dict__)
    return module


@torch.no_grad()
def loss_of(model: Any, ids: Tensor) -> float:
    """Mean next-token cross-entropy in nats, rows one by one, summed in float64."""
    total = 0.0
    for row in ids.split(1):
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, row[0, 1:], reduction="sum").double())
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def apart(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖, Frobenius."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
