"""The states at the ends of the blocks to replace, and inside them for a few rows: what stand-ins are fitted from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import BoolTensor, LongTensor, Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.model.activations import layer_states, place
from kdprune.model.passes import Begin
from kdprune.runtime.distributed import world
from kdprune.runtime.run import Run
from kdprune.store.states import States, open_states

Spill = Callable[[int], Path | None]  # boundary → its spill directory; None: memory


@dataclass(frozen=True)
class BlockStates:
    """What the fit of one block's stand-in is made from; padding is marked in ``tokens.mask``.

    Attributes:
        block: the layers replaced.
        tokens: the rows, (N, T); the last ``held`` of them are kept out of every fit.
        inputs: h_s, shape (N, T, d), in the model's dtype; ``states[rows]`` reads rows.
        outputs: h_e, likewise.
        path: all k+1 states h_s … h_e of the tokens of a few rows (step 1), shape (k+1, n, d), float32.
        path_position: position of those tokens among the real ones of their row, shape (n,).
        path_held: the same states for tokens of held-out rows, shape (k+1, n', d).
        local: (N,), which rows this process holds states of. The paths are whole in every process.
    """

    block: range
    tokens: TokenSet
    held: int
    inputs: States
    outputs: States
    path: Tensor
    path_position: Tensor
    path_held: Tensor
    local: BoolTensor

    @property
    def name(self) -> str:
        """The block, for messages and progress."""
        return f"block [{self.block.start}, {self.block.stop})"

    def local_rows(self, rows: Tensor) -> LongTensor:
        """Those of ``rows`` whose states this process holds."""
        return rows[self.local[rows]]  # type: ignore[return-value]


@dataclass(frozen=True)
class PathRows:
    """Which rows contribute all their states to step 1: the first ``fit`` rows and the last ``held``."""

    fit: int
    held: int

    def of(self, count: int) -> list[Tensor]:
        """The numbers of these rows among ``count``: to fit on, held out."""
        return [torch.arange(self.fit), torch.arange(count - self.held, count)]


def collect_block_states(
    model: PreTrainedModel, tokens: TokenSet, blocks: Sequence[range], run: Run, *, held: int, path: PathRows,
    corrected: bool = False,
) -> list[BlockStates]:
    """States of all blocks in one pass over the calibration set; what earlier runs spilled is not computed again.

    Of several processes each takes its share of the batches.

    Args:
        run: gives the size of batches and the spill directories.
        held: how many rows at the end are kept out of fits.
        path: rows whose inner states are kept too.
        corrected: the inputs of all blocks but the first will be others; these are computed only if they are read.
    """
    with run.stage("layer states", len(tokens)) as progress:
        walk = _Walk(run.running(model), tokens, run.batch_size, progress)
        ends = {index: walk.opened(index, run.spill_directory(index))
                for block in blocks for index in (block.start, block.stop)}
        later = {block.start for block in blocks[1:]} if corrected else set()
        paths = walk.run({index: states for index, states in ends.items() if index not in later}, blocks, path)
    local = local_rows(tokens, run)
    fit_rows, held_rows = path.of(len(tokens))
    position = tokens.mask.cumsum(1) - 1
    return [
        BlockStates(
            block, tokens, held, ends[block.start], ends[block.stop], paths(block, fit_rows),
            position[fit_rows][tokens.mask[fit_rows]], paths(block, held_rows), local,
        )
        for block in blocks
    ]


def boundary_states(
    model: PreTrainedModel, tokens: TokenSet, indices: Iterable[int], run: Run, *, stage: str,
    begin: tuple[int, States] | None = None, spill: Spill = lambda _: None,
) -> dict[int, States]:
    """The states at some boundaries of all rows (this process's share of them), in one pass.

    Args:
        model: the model that runs, a pruned one among them.
        stage: the name under which the pass is shown.
        begin: a boundary before all of them with its states, where the pass begins; None: the embeddings.
        spill: the spill directory of a boundary, None: memory.
    """
    with run.stage(stage, len(tokens)) as progress:
        walk = _Walk(model, tokens, run.batch_size, progress, begin)
        states = {index: walk.opened(index, spill(index)) for index in indices}
        walk.run(states, [], PathRows(0, 0))
    return states


def states_between(
    boundaries: Mapping[int, States], block: range, tokens: TokenSet, held: int, path: int, run: Run
) -> BlockStates:
    """What :func:`collect_block_states` gives of a block, from the states at its boundaries; no held-out paths.

    Args:
        boundaries: from :func:`boundary_states`, those inside the block too if a path is wanted.
        tokens: their rows.
        held: how many rows at the end are kept out of fits.
        path: how many rows at the beginning show their inner states.
        run: the one that they were taken with.
    """
    here, mask = local_rows(tokens, run), tokens.mask[:path]
    inside = range(block.start, block.stop + 1) if path else range(0)
    own = {row: [boundaries[index][torch.tensor([row])][0][mask[row]].float() for index in inside]
           for row in range(path) if here[row]}
    rows = {row: states for part in world().gather(own) for row, states in part.items()}
    states = [torch.cat([rows[row][number] for row in range(path)]) for number in range(len(inside))]
    position = (mask.cumsum(1) - 1)[mask]
    return BlockStates(
        block, tokens, held, boundaries[block.start], boundaries[block.stop],
        torch.stack(states) if states else torch.empty(0), position, torch.empty(0), here)


def local_rows(tokens: TokenSet, run: Run) -> BoolTensor:
    """(N,), which rows this process holds states of."""
    local = torch.zeros(len(tokens), dtype=torch.bool)
    local[world().share(len(tokens), run.batch_size)] = True
    return local  # type: ignore[return-value]


@dataclass
class _Walk:
    """Passes over the batches of this process, as many of them as are needed."""

    model: PreTrainedModel
    tokens: TokenSet
    batch_size: int
    progress: Callable[[int], None]
    begin: tuple[int, States] | None = None

    def opened(self, index: int, spill: Path | None) -> States:
        """Room for the states at this boundary, with what is in its spill directory already."""
        return open_states(
            (*self.tokens.ids.shape, self.model.config.hidden_size), self.model.dtype,
            f"the states {place(index, self.model)}", spill, recompute=self.states_of(index))

    def run(
        self, ends: Mapping[int, States], blocks: Sequence[range], path: PathRows
    ) -> Callable[[range, Tensor], Tensor]:
        """Fills ``ends`` and returns what gives the paths: (block, rows) → (k+1, n, d), real tokens, float32."""
        on_path = torch.zeros(len(self.tokens), dtype=torch.bool)
        on_path[torch.cat(path.of(len(self.tokens)))] = True
        inside = sorted({index for block in blocks for index in range(block.start, block.stop + 1)})
        seen: dict[tuple[int, int], Tensor] = {}  # (boundary, row) → its states

        batches = world().share(len(self.tokens), self.batch_size).split(self.batch_size)
        needed: list[Tensor] = [
            rows for rows in batches if on_path[rows].any() or any(_lacks(states, rows) for states in ends.values())]
        self.progress(sum(map(len, batches)) - sum(map(len, needed)))
        chosen = self.tokens.select(torch.cat([torch.empty(0, dtype=torch.long), *needed]))
        wanted = [inside if on_path[rows].any() else sorted(ends) for rows in needed]
        passes = layer_states(
            self.model, chosen, lambda number: wanted[number], self.batch_size, begin=self.beginning(needed))
        for rows, (_, states) in zip(needed, passes, strict=True):
            for index, store in ends.items():
                if _lacks(store, rows):
                    store.put(rows, states[index])
            for at in on_path[rows].nonzero().flatten().tolist():
                row = int(rows[at])
                seen |= {(index, row): states[index][at][self.tokens.mask[row]].float().cpu() for index in inside}
            self.progress(len(rows))
        everywhere = {key: value for part in world().gather(seen) for key, value in part.items()}

        def paths(block: range, rows: Tensor) -> Tensor:
            return torch.stack([
                torch.cat([everywhere[index, int(row)] for row in rows])
                for index in range(block.start, block.stop + 1)]) if len(rows) else torch.empty(0)

        return paths

    def beginning(self, batches: Sequence[Tensor]) -> Begin | None:
        """Where passes over these batches of row numbers begin."""
        if self.begin is None:
            return None
        index, states = self.begin
        return Begin(index, lambda number: states[batches[number]])

    def states_of(self, index: int) -> Callable[[LongTensor], Tensor]:
        """What computes states at this boundary again: (b,) row numbers, a whole batch of them → (b, T, d)."""

        def compute(rows: LongTensor) -> Tensor:
            found = layer_states(
                self.model, self.tokens.select(rows), [index], max(len(rows), 1), begin=self.beginning([rows]))
            return torch.cat([states[index].cpu() for _, states in found])

        return compute


def _lacks(states: States, rows: Tensor) -> bool:
    """Whether some of these rows are not there yet."""
    return bool(torch.isin(rows, states.missing).any())
