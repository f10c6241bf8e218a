"""A chunk file: the states of a few calibration rows as safetensors, with a checksum of them and of their row numbers.

Read with plain reads, not through a map: pages of an open map count as resident, and a map of a file that got shorter
kills the process; eight rows of 64 KiB take .10 ms, through ``safe_open`` .70 ms.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import LongTensor, Tensor

from kdprune.store.files import crc32, whole_file
from kdprune.store.tensors import raw_bytes

TENSOR = "states"  # the one tensor in a file


class BrokenChunk(Exception):
    """A chunk that is not what was written; the message says why."""


@dataclass
class Chunk:
    """A chunk file, open for nobody.

    Attributes:
        path: its name starts with its number in the order of writing.
        rows: row numbers (b,) in order.
        shape: shape of one row.
        dtype: dtype of the states.
        checksum: CRC-32 of states and row numbers.
        offset: byte at which the states start.
        verified: whether this process has found the checksum to hold.
    """

    path: Path
    rows: LongTensor
    shape: torch.Size
    dtype: torch.dtype
    checksum: int
    offset: int
    verified: bool = False

    @property
    def number(self) -> int:
        """Its number in the order of writing."""
        return int(self.path.name.partition("-")[0])

    def read(self, places: list[int], targets: list[int], into: Tensor) -> None:
        """Fills ``into[targets]`` with the rows that stand at these places of the chunk; verifies it at the first time.

        Raises:
            BrokenChunk: the file is missing, too short, or its checksum does not hold.
        """
        size = self.shape.numel() * self.dtype.itemsize
        try:
            if not self.verified:
                found = zlib.crc32(rows_text(self.rows).encode(), crc32(self.path, self.offset))
                if found != self.checksum:
                    raise BrokenChunk("is corrupted (checksum)")
                self.verified = True
            with open(self.path, "rb", buffering=0) as file:
                for place, target in zip(places, targets, strict=True):
                    file.seek(self.offset + place * size)
                    if file.readinto(raw_bytes(into[target])) != size:
                        raise BrokenChunk("is corrupted (too short)")
        except FileNotFoundError:
            raise BrokenChunk("is missing") from None
        except OSError as error:
            raise BrokenChunk(f"cannot be read ({error.strerror})") from error


def write_chunk(folder: Path, number: int, rows: LongTensor, values: Tensor, what: str, advice: str) -> Chunk:
    """Writes states (b, T, d), contiguous, on the CPU; whole or not at all.

    Not forced to the disk: that adds a sixth to a write at best, and at worst waits for the disk. What a power cut
    leaves is found by the checksum.

    Raises:
        KDPruneError: the disk is full or refuses to be written; names `what` and gives `advice`.
    """
    text = rows_text(rows)
    path = folder / f"{number:06d}-{zlib.crc32(text.encode()):08x}.safetensors"
    checksum = zlib.crc32(text.encode(), zlib.crc32(raw_bytes(values)))
    with whole_file(path, what, advice) as partial:
        save_file({TENSOR: values}, partial, metadata={"rows": text, "crc32": f"{checksum:08x}"})
        offset = partial.stat().st_size - values.nbytes
    return Chunk(path, rows, values.shape[1:], values.dtype, checksum, offset)


def open_chunk(path: Path) -> Chunk:
    """The chunk by its header, unverified.

    Raises:
        BrokenChunk: the header cannot be read, or the file is shorter or longer than it says.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, part = file.metadata(), file.get_slice(TENSOR)
            shape, dtype = torch.Size(part.get_shape()), part[:0].dtype
        rows, checksum = _rows(metadata["rows"]), int(metadata["crc32"], 16)
        if len(shape) != 3 or shape[0] != len(rows) or int(rows.min()) < 0:
            raise BrokenChunk(f"holds states {tuple(shape)} of {len(rows)} rows")
        offset = path.stat().st_size - shape.numel() * dtype.itemsize
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise BrokenChunk("is no whole chunk") from error
    return Chunk(path, rows, shape[1:], dtype, checksum, offset)  # type: ignore[arg-type]


def rows_text(rows: Tensor) -> str:
    """ "8:16" for consecutive rows, else "3,1,7"."""
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count)):
        return f"{first}:{first + count}"
    return ",".join(map(str, rows.tolist()))


def _rows(text: str) -> LongTensor:
    first, colon, last = text.partition(":")
    numbers = range(int(first), int(last)) if colon else [int(row) for row in text.split(",")]
    return torch.tensor(numbers)  # type: ignore[return-value]
