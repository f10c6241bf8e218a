"""A streamed model at work: the layers are the outer loop, so that each is read once for a group of batches.

Between two layers the states of the group stay on the host, or in files where a scratch folder is there and they take
too much; on the device are one layer and the batch at work.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import DiskError, KDPruneError
from kdprune.model.edits import Substitute
from kdprune.model.families import decoder_layers, state_of
from kdprune.model.losses import batch_logits
from kdprune.model.passes import Arguments, Begin, RowLimit, entering, joined, standing_in
from kdprune.model.placement import input_device
from kdprune.model.streaming import Scratch, is_streamed, resident, scratch_of
from kdprune.store.chunks import BrokenChunk, Chunk, write_chunk
from kdprune.store.files import Notify, tell

ByIndex = dict[int, Tensor]  # boundary → states (B, T, d)


@torch.no_grad()
def streamed_states(
    model: PreTrainedModel, batches: Sequence[TokenSet], wanted: Sequence[Sequence[int]], *,
    begin: Begin | None = None, scratch: Scratch | None = None, notify: Notify = tell,
) -> Iterator[ByIndex]:
    """For each batch its states {l: (B, T, d)} on the model's device, l in its ``wanted``; layers read one at a time.

    Equal bit for bit to what the model computes when it is resident: every layer gets the arguments that the model's
    own forward pass gives it. Without a scratch folder there are as many groups as the states need that are held at
    once; every group reads all layers, those before ``begin`` excepted.
    """
    scratch = scratch or scratch_of(model)
    size = [batch.ids.numel() * model.config.hidden_size * model.dtype.itemsize * (1 + len(own))
            for batch, own in zip(batches, wanted, strict=True)]
    spill = scratch.folder is not None and sum(size) > scratch.host_bytes
    limit = RowLimit(notify)
    for group in [list(range(len(batches)))] if scratch.folder else _groups(size, scratch.host_bytes):
        with _shelf(scratch.folder if spill else None) as shelf:
            own = begin and begin.of(group)
            yield from _Group(
                model, [batches[n] for n in group], [wanted[n] for n in group], own, shelf, limit).states()


@torch.no_grad()
def forward_streamed(
    model: PreTrainedModel, batches: Iterable[TokenSet], last: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Logits (B, T, V) of each batch, of a model that is streamed or not; equal bit for bit.

    What comes behind the layers is the model's own forward pass, with h_L in the place of what its last layer gives.

    Args:
        model: the model.
        batches: rows.
        last: of how many positions at the end of each batch's rows; None: all.
    """
    batches = list(batches)
    counts: Sequence[int | None] = [None] * len(batches) if last is None else last
    if not is_streamed(model):
        yield from (batch_logits(model, batch, count) for batch, count in zip(batches, counts, strict=True))
        return
    end = len(decoder_layers(model))
    found = streamed_states(model, batches, [[end]] * len(batches))
    for batch, count, states in zip(batches, counts, found, strict=True):
        yield logits_behind(model, batch, states[end], count)


@torch.no_grad()
def logits_behind(model: PreTrainedModel, batch: TokenSet, final: Tensor, last: int | None = None) -> Tensor:
    """Logits (B, T, V) of a batch from its h_L (B, T, d), on whatever device: the model's own forward pass, in which no
    layer is run. ``last``: of the positions at the end alone, as of ``batch_logits``."""
    layers = list(decoder_layers(model))
    final = final.to(input_device(model))
    with standing_in(layers, lambda *_: final):
        return batch_logits(model, batch, last)


Way = Mapping[int, Callable[[], Substitute]]  # first layer of a block → what gives the edit that takes its place


@torch.no_grad()
def states_by_ways(
    model: PreTrainedModel, batches: Sequence[TokenSet], ways: Sequence[Way], known: Callable[[int, int], Tensor],
) -> list[list[Tensor]]:
    """h_L (B, T, d) of each batch on each of several ways through the model, on which blocks are replaced.

    All ways take a layer before any takes the next, so that each layer of a streamed model is read once for all of
    them, and their states are on the host between two layers; those of another model stay where they are computed.

    Args:
        model: the dense model; not changed.
        batches: rows.
        ways: each with its edits, of separated blocks, asked for where their block begins and not kept: stand-ins may
            be fitted then, and one is in memory at a time.
        known: the dense model's state at a boundary, of a batch by number: where the first block of a way begins.

    Returns:
        By way, by batch.
    """
    layers, device, streamed = list(decoder_layers(model)), input_device(model), is_streamed(model)
    arguments = [entering(model, batch)[1] for batch in batches]
    states: list[list[Tensor]] = [[] for _ in ways]
    behind = [len(layers)] * len(ways)  # the block that was replaced last

    def through(module: nn.Module, index: int, number: int) -> None:
        """Takes a way's states through a layer, or what stands in its place and is given what it would be."""
        for batch, state in enumerate(states[number]):
            # A stand-in has no hook that would fetch rotations from the device where they were made.
            args, kwargs = send_to_device(arguments[batch][index], device)
            found = state_of(module(state.to(device), *args, **kwargs))
            states[number][batch] = found.cpu() if streamed else found

    for index, layer in enumerate(layers):
        for number, way in enumerate(ways):
            if index not in way:
                continue
            edit = way[index]()
            states[number] = states[number] or [known(index, batch) for batch in range(len(batches))]
            if edit.context is not None:
                through(edit.context.to(model.dtype), edit.origin, number)
            else:
                assert edit.stand_in is not None
                stand_in = edit.stand_in.to(model.dtype)
                states[number] = [stand_in(state.to(device)) for state in states[number]]
            behind[number] = edit.block.stop
        moving = [number for number in range(len(ways)) if states[number] and behind[number] <= index]
        with resident(layer) if streamed and moving else contextlib.nullcontext():
            for number in moving:
                through(layer, index, number)
    return states


def _groups(sizes: list[int], most: int) -> Iterator[list[int]]:
    """Consecutive numbers whose sizes add up to at most ``most``, or single ones."""
    group: list[int] = []
    for number, size in enumerate(sizes):
        if group and sum(sizes[n] for n in group) + size > most:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


class _Group:
    """Batches that go through the layers together."""

    def __init__(
        self, model: PreTrainedModel, batches: list[TokenSet], wanted: list[Sequence[int]], begin: Begin | None,
        shelf: "_Shelf", limit: RowLimit,
    ) -> None:
        self.model, self.batches, self.wanted, self.shelf, self.limit = model, batches, wanted, shelf, limit
        self.begin = begin or Begin(0, self._embedded)
        self._unpadded: dict[torch.Size, list[Arguments]] = {}
        self._padded: tuple[object, list[Arguments]] = (None, [])

    def states(self) -> Iterator[ByIndex]:
        """What is wanted of each batch, batch by batch."""
        layers, top = decoder_layers(self.model), [max(own, default=-1) for own in self.wanted]
        for number in range(len(self.batches)):
            if top[number] >= 0:
                self.shelf.put(self.begin.index, number, self.begin.states(number).cpu())
        for index, layer in list(enumerate(layers))[self.begin.index :]:
            numbers = [number for number in range(len(self.batches)) if top[number] > index]
            if not numbers:
                break
            with resident(layer):
                for number in numbers:
                    self._step(index, number)
        for number, own in enumerate(self.wanted):
            yield {index: self.shelf.get(index, number).to(self.model.device) for index in own}
            for index in own:
                self.shelf.drop(index, number)

    def _embedded(self, number: int) -> Tensor:
        """h_0 of a batch."""
        return torch.cat(self.limit.over(self.batches[number], lambda part, _: entering(self.model, part)[0].cpu()))

    def _step(self, index: int, number: int) -> None:
        """Takes one batch through one layer."""
        layer, state = decoder_layers(self.model)[index], self.shelf.get(index, number)

        def through(part: TokenSet, rows: slice) -> Tensor:
            args, kwargs = self._arguments(part, (number, rows.start, rows.stop))[index]
            return state_of(layer(state[rows].to(self.model.device), *args, **kwargs)).cpu()

        self.shelf.put(index + 1, number, joined(self.limit.over(self.batches[number], through), torch.device("cpu")))
        if index not in self.wanted[number]:
            self.shelf.drop(index, number)

    def _arguments(self, part: TokenSet, key: object) -> list[Arguments]:
        """What each layer gets for these rows.

        Without padding it depends on the shape alone and is kept. Masks of padded rows are made anew for each layer:
        those of a whole calibration set are larger than its states.
        """
        if part.mask.all():
            if part.ids.shape not in self._unpadded:
                self._unpadded[part.ids.shape] = entering(self.model, part)[1]
            return self._unpadded[part.ids.shape]
        if self._padded[0] != key:
            self._padded = (key, entering(self.model, part)[1])
        return self._padded[1]


@contextlib.contextmanager
def _shelf(folder: Path | None) -> Iterator["_Shelf"]:
    """A shelf; its files, in a folder of their own within ``folder``, are gone afterwards."""
    if folder is None:
        yield _Shelf(None)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=".partial-states-", dir=folder))  # whoever opens next removes it
    except OSError as error:
        raise DiskError(f"cannot write to {folder}: {error.strerror}; give another --work-dir") from error
    try:
        yield _Shelf(own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


class _Shelf:
    """States (B, T, d) by boundary and batch: in memory, or each in a file of its own, of which nothing stays in
    memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[tuple[int, int], Tensor | Chunk] = {}
        self._rows: dict[int, Tensor] = {}

    def put(self, index: int, number: int, state: Tensor) -> None:
        """Keeps a state. Raises KDPruneError where the disk is full."""
        if self.folder is None:
            self._held[index, number] = state
            return
        # One tensor of row numbers for all: small ones that stay, made between large ones that go, hole the memory.
        rows = self._rows.setdefault(len(state), torch.arange(len(state)))
        self._held[index, number] = write_chunk(
            self.folder / str(index), number, rows, state.contiguous(),  # type: ignore[arg-type]
            f"states at boundary {index} to {self.folder}", "give a --work-dir with more room, or take fewer rows")

    def get(self, index: int, number: int) -> Tensor:
        """A state on the host. Raises KDPruneError where its file was damaged."""
        held = self._held[index, number]
        if isinstance(held, Tensor):
            return held
        state = torch.empty((len(held.rows), *held.shape), dtype=held.dtype)
        try:
            held.read(list(range(len(state))), list(range(len(state))), state)
        except BrokenChunk as error:
            raise KDPruneError(f"{held.path} {error}, expected what was written; run the command again") from error
        return state

    def drop(self, index: int, number: int) -> None:
        """Lets go of a state."""
        held = self._held.pop((index, number))
        if isinstance(held, Chunk):
            held.path.unlink(missing_ok=True)
