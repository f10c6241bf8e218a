"""Tensors on their way to a file and back: their bytes, copies of their own, a folder of them beside plain data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PLAIN, TENSORS = "record.json", "tensors.safetensors"


def raw_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not a copy; bfloat16 has no numpy form, its bytes do."""
    return memoryview(values.detach().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: a file cannot hold views of one tensor."""
    contiguous = torch.contiguous_format
    return {name: value.detach().cpu().clone(memory_format=contiguous) for name, value in tensors.items()}


def write_parts(folder: Path, plain: Any, tensors: Mapping[str, Tensor]) -> None:
    """Writes what JSON can hold, and tensors by name, to a folder."""
    (folder / PLAIN).write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    save_file(apart(tensors), folder / TENSORS)


def read_parts(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """What :func:`write_parts` wrote."""
    return json.loads((folder / PLAIN).read_text(encoding="utf-8")), load_file(folder / TENSORS)
