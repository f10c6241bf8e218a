"""States of calibration rows at one boundary, (N, T, d): in memory, or spilled to a directory chunk by chunk.

Users read ``states[rows]`` and do not care which.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import BoolTensor, LongTensor, Tensor

from kdprune.errors import DiskError, KDPruneError
from kdprune.store.chunks import BrokenChunk, Chunk, open_chunk, rows_text, write_chunk
from kdprune.store.files import Notify, readable_bytes, tell

Recompute = Callable[[LongTensor], Tensor]
Rows = slice | Tensor


def open_states(
    shape: tuple[int, int, int], dtype: torch.dtype, name: str, folder: Path | None = None, *,
    recompute: Recompute | None = None, notify: Notify = tell,
) -> "States":
    """States of this shape (N, T, d): in memory, or in a folder where one is given (what it holds is found again)."""
    if folder is None:
        return MemoryStates(shape, dtype, name, recompute=recompute, notify=notify)
    return SpilledStates(shape, dtype, name, folder, recompute=recompute, notify=notify)


class States(ABC):
    """States (N, T, d), written batch by batch in any order, read by global row number.

    Attributes:
        shape: (N, T, d).
        dtype: of all rows.
        name: for messages, "the states entering layer 5".
        recompute: row numbers (b,) → states (b, T, d); asked for rows that are missing or corrupted when they are read.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, name: str, *,
        recompute: Recompute | None = None, notify: Notify = tell,
    ):
        self.shape, self.dtype, self.name = torch.Size(shape), dtype, name
        self.recompute, self.notify = recompute, notify
        self._start()

    def __len__(self) -> int:
        """Number of rows N."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all N rows."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def rows(self) -> LongTensor:
        """Numbers of the rows that are there, in order."""
        return self._there().nonzero().flatten()  # type: ignore[return-value]

    @property
    def missing(self) -> LongTensor:
        """Numbers of the rows that are not there."""
        return (~self._there()).nonzero().flatten()  # type: ignore[return-value]

    def put(self, rows: Rows, values: Tensor) -> None:
        """Writes the states (b, T, d) of these rows (no repeats); rows written before are written over.

        Raises:
            KDPruneError: the disk is full or refuses to be written. Nothing half-written is left behind.
        """
        numbers = self._numbers(rows)
        assert values.shape == (len(numbers), *self.shape[1:]), f"{tuple(values.shape)} for {len(numbers)} rows"
        assert len(numbers.unique()) == len(numbers), "a row stands twice in one batch"
        if len(numbers):
            self._write(numbers, values.detach().to("cpu", self.dtype).contiguous())

    def __getitem__(self, rows: Rows) -> Tensor:
        """The states (b, T, d) of these rows, in any order, repeats allowed.

        Raises:
            KDPruneError: a row is missing or corrupted, and there is no ``recompute``.
        """
        numbers = self._numbers(rows)
        lost = numbers[~self._there()[numbers]].unique()
        if len(lost):
            self._again(lost, f"rows {rows_text(lost)} of {self.name} are missing")
        return self._read(numbers)

    @abstractmethod
    def _start(self) -> None:
        """Makes room, or finds what is there."""

    @abstractmethod
    def forget(self) -> None:
        """Lets go of all rows, and of their files."""

    @abstractmethod
    def _there(self) -> BoolTensor:
        """(N,), True where a row is there."""

    @abstractmethod
    def _write(self, numbers: LongTensor, values: Tensor) -> None: ...

    @abstractmethod
    def _read(self, numbers: LongTensor) -> Tensor: ...

    def _again(self, lost: LongTensor, problem: str) -> None:
        """Rows that are lost are computed and written again."""
        if self.recompute is None:
            raise KDPruneError(f"{problem}, expected whole ones; run the command again to compute them")
        self.notify(f"{problem}; computed again")
        self.put(lost, self.recompute(lost))

    def _numbers(self, rows: Rows) -> LongTensor:
        if isinstance(rows, slice):
            return torch.arange(len(self))[rows]  # type: ignore[return-value]
        assert (rows.dtype, rows.ndim) == (torch.int64, 1), f"row numbers as {rows.dtype} of {tuple(rows.shape)}"
        assert all(0 <= row < len(self) for row in rows.tolist()), f"row numbers beyond {len(self)}"
        return rows.cpu()  # type: ignore[return-value]


class MemoryStates(States):
    """One tensor from the start: joining parts at the end would need twice the memory. Unwritten rows take none yet."""

    def forget(self) -> None:
        """Lets go of all rows."""
        self._start()

    def _start(self) -> None:
        try:
            self._values = torch.empty(self.shape, dtype=self.dtype)
        except RuntimeError as error:  # torch has no class for it on the CPU
            raise KDPruneError(
                f"cannot hold {self.name} in memory ({readable_bytes(self.nbytes)}); let them spill to a --work-dir"
            ) from error
        self._written = torch.zeros(len(self), dtype=torch.bool)

    def _there(self) -> BoolTensor:
        return self._written  # type: ignore[return-value]

    def _write(self, numbers: LongTensor, values: Tensor) -> None:
        self._values[numbers] = values
        self._written[numbers] = True

    def _read(self, numbers: LongTensor) -> Tensor:
        return self._values[numbers]


class SpilledStates(States):
    """Chunk files in a folder; this process holds none of them beyond the rows it was asked for.

    A chunk carries a checksum, and is verified when a process first reads it. Chunks are numbered as they are written;
    where two hold the same row, the later one counts. Several processes may write to one folder, each its own rows;
    :meth:`refresh` finds what others wrote.

    Raises:
        KDPruneError: the folder cannot be made, or holds states of another shape or dtype.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, name: str, folder: str | Path, *,
        recompute: Recompute | None = None, notify: Notify = tell,
    ):
        self.folder = Path(folder)
        super().__init__(shape, dtype, name, recompute=recompute, notify=notify)

    def _start(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(
                f"cannot write {self.name} to {self.folder}: {error.strerror}; give another --work-dir") from error
        self.refresh()

    def refresh(self) -> None:
        """Looks at the folder: every readable chunk counts, in the order of writing; others are removed."""
        self._forget_index()
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                chunk = open_chunk(path)
            except BrokenChunk as error:
                self.notify(f"{path.name} of {self.name} {error}; its rows are computed again")
                path.unlink(missing_ok=True)
                continue
            if (chunk.shape, chunk.dtype) != (self.shape[1:], self.dtype) or int(chunk.rows.max()) >= len(self):
                raise KDPruneError(
                    f"got {path} with rows {tuple(chunk.shape)} in {chunk.dtype} up to number {int(chunk.rows.max())}, "
                    f"expected {tuple(self.shape[1:])} in {self.dtype} and {len(self)} rows; give another --work-dir")
            self._add(chunk)

    def forget(self) -> None:
        """Lets go of all rows and removes their files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._forget_index()

    def _forget_index(self) -> None:
        self._chunks: list[Chunk] = []
        self._owner = torch.full((len(self),), -1, dtype=torch.int32)  # chunk of each row
        self._place = torch.zeros(len(self), dtype=torch.int32)  # and where in it the row stands

    def _there(self) -> BoolTensor:
        return self._owner >= 0  # type: ignore[return-value]

    def _write(self, numbers: LongTensor, values: Tensor) -> None:
        number = max((chunk.number for chunk in self._chunks), default=-1) + 1
        what = (
            f"{self.name} to {self.folder} ({readable_bytes(values.nbytes)} of {readable_bytes(self.nbytes)} in all, "
            f"{len(self.rows)} of {len(self)} rows are there)")
        advice = "give a --work-dir with more room, or take fewer rows (--samples)"
        self._add(write_chunk(self.folder, number, numbers.clone(), values, what, advice))  # type: ignore[arg-type]

    def _add(self, chunk: Chunk) -> None:
        """The chunk's rows are its own from now on; chunks left without rows are removed."""
        before = self._owner[chunk.rows].unique().tolist()
        self._owner[chunk.rows] = len(self._chunks)
        self._place[chunk.rows] = torch.arange(len(chunk.rows), dtype=torch.int32)
        self._chunks.append(chunk)
        for index in before:
            if index >= 0 and not (self._owner == index).any():
                self._chunks[index].path.unlink(missing_ok=True)

    def _read(self, numbers: LongTensor) -> Tensor:
        found = torch.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        if self._read_into(found, numbers, repair=True):
            self._read_into(found, numbers, repair=False)
        return found

    def _read_into(self, found: Tensor, numbers: LongTensor, repair: bool) -> bool:
        """Fills `found` with these rows; True where a broken chunk was written anew and all is to be read again."""
        owner, repaired = self._owner[numbers], False
        for index in owner.unique().tolist():
            chunk, wanted = self._chunks[index], (owner == index).nonzero().flatten()
            try:
                chunk.read(self._place[numbers[wanted]].tolist(), wanted.tolist(), found)
            except BrokenChunk as error:
                problem = f"chunk {chunk.number} of {self.name} {error}"
                if not repair:
                    raise KDPruneError(
                        f"{problem} again, just after it was written to {self.folder}; give another --work-dir"
                    ) from error
                lost = (self._owner == index).nonzero().flatten()
                self._owner[lost] = -1  # whatever happens next, nobody is to find it again
                chunk.path.unlink(missing_ok=True)
                self._again(lost, problem)
                repaired = True
        return repaired
