"""Tensors in safetensors files, read and written one at a time: the format's library wants all of a file in memory.

Read with plain reads, not through a map: pages of a map count as resident until it is closed. The format is the length
of the header (8 bytes, little-endian), the header (JSON, padded to a multiple of 8: dtype, shape and bytes from … to of
each tensor), the tensors.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from kdprune.errors import KDPruneError, one_line
from kdprune.store.tensors import raw_bytes

# What the format calls a dtype, in the order in which its own writer puts the tensors of a file.
_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, dtype, shape and first byte."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    def read(self) -> Tensor:
        """A copy on the host. Raises KDPruneError where the file is gone or shorter than it was."""
        found = torch.empty(self.shape, dtype=self.dtype)
        into = raw_bytes(found)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start)
                while into:
                    got = file.readinto(into)  # Linux gives 2 GiB at most
                    if not got:
                        raise OSError("it is too short")
                    into = into[got:]
        except OSError as error:
            raise KDPruneError(
                f"cannot read {self.key} of {self.file} ({one_line(error)}); expected the checkpoint that the run "
                "started with, put it back"
            ) from error
        return found


@dataclass(frozen=True)
class Source:
    """Where a parameter's weights are, and the dtype and device they are wanted in."""

    stored: Stored
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        """A copy of the weights. Raises KDPruneError where the file is gone or shorter than it was."""
        return self.stored.read().to(self.device, self.dtype)


def stored_tensors(name: str | Path) -> list[Stored]:
    """Every tensor of a safetensors checkpoint, a directory or a hub id (which is downloaded), from headers alone.

    Raises KDPruneError for a checkpoint in other files, and for tensors in fewer than 16 bits.
    """
    return [tensor for file in _weight_files(name) for tensor in _header(file)]


def write_tensors(tensors: Mapping[str, Tensor], file: Path, values: Callable[[Tensor], Tensor]) -> None:
    """A safetensors file of these tensors; ``values`` gives the weights, on the CPU, of one that may hold none."""
    kinds = {dtype: (number, name) for number, (name, dtype) in enumerate(_DTYPES.items())}
    names = sorted(tensors, key=lambda name: (kinds[tensors[name].dtype][0], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = kinds[tensors[name].dtype][1], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = values(tensors[name])
            assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
            stream.write(raw_bytes(tensor.contiguous()))


def _weight_files(name: str | Path) -> list[Path]:
    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        listed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        return [Path(str(cached_file(name, file))) for file in sorted(set(listed))]
    whole = find(SAFE_WEIGHTS_NAME)
    if whole is None:
        raise KDPruneError(
            f"got {name} without {SAFE_WEIGHTS_NAME}, expected a safetensors checkpoint: no other can be streamed; "
            "load it with transformers and save it again"
        )
    return [Path(whole)]


def _header(path: Path) -> list[Stored]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    found = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise KDPruneError(f"got {key} in {entry['dtype']}, expected weights of 16 bits or more to stream")
        start = 8 + size + entry["data_offsets"][0]
        found.append(Stored(path, key, _DTYPES[entry["dtype"]], torch.Size(entry["shape"]), start))
    return found
