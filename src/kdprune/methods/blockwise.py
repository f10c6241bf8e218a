"""KDP's blocks one after the other, from states to edits; what an earlier run finished is found again."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from kdprune.data import TokenSet
from kdprune.identity import digest
from kdprune.keeper import Keeper
from kdprune.methods.fitting import FitSettings, fit_block
from kdprune.methods.keeping import joined, kept
from kdprune.methods.result import MethodResult
from kdprune.methods.shape import Shape
from kdprune.model.block_states import BlockStates, PathRows, boundary_states, collect_block_states
from kdprune.model.placement import work_device
from kdprune.model.surgery import Edit, Substitute, apply_edits
from kdprune.runtime import Stages, generator


@dataclass(frozen=True)
class Plan:
    """What is fitted: the blocks, the form of their stand-ins, how they are fitted, on which rows.

    Attributes:
        held: rows at the end that no fit sees. path: rows whose inner states step 1 sees.
        sequential: later blocks see the states that the pruned model gives.
    """

    blocks: Sequence[range]
    shape: Shape
    settings: FitSettings
    held: int
    path: PathRows
    sequential: bool

    def identity(self) -> str:
        """A hash of all of it."""
        blocks = [(block.start, block.stop) for block in self.blocks]
        return digest({**dataclasses.asdict(self), "blocks": blocks})


def fit_blocks(
    model: PreTrainedModel, tokens: TokenSet, plan: Plan, *, seed: int, stages: Stages, batch_size: int, keep: Keeper,
) -> MethodResult:
    """Fits every block of the plan and returns all edits and records; arguments as of :class:`Method`'s call."""
    identity = plan.identity()
    names = [f"fit-{block.start}-{block.stop}" for block in plan.blocks]
    keys = [keep.key("kdp", identity, number) for number in range(len(names))]
    lazy = _Supply(model, tokens, plan, seed, stages, batch_size, keep, identity)
    done: list[MethodResult] = []
    for number, (name, key) in enumerate(zip(names, keys, strict=True)):
        edits = [edit for part in done for edit in part.edits]
        done.append(kept(model, keep.work, name, key, lazy.fitter(number, edits), stages))
    return joined(done)


@dataclass
class _Supply:
    """States of the plan's blocks, collected when the first block asks for them."""

    model: PreTrainedModel
    tokens: TokenSet
    plan: Plan
    seed: int
    stages: Stages
    batch_size: int
    keep: Keeper
    identity: str
    _states: list[BlockStates] | None = None

    def fitter(self, number: int, edits: Sequence[Edit]) -> Callable[[], MethodResult]:
        """What fits block ``number``; ``edits``: of the blocks in front of it."""

        def compute() -> MethodResult:
            edit, record = fit_block(
                self.model, self.of(number, edits), self.plan.shape, self.plan.settings,
                generator(self.seed, number + 1), work_device(self.model), self.stages, self.keep.checkpoints(self.identity, number))
            return MethodResult([edit], [record])

        return compute

    def of(self, number: int, edits: Sequence[Edit]) -> BlockStates:
        """States of block ``number``: the dense model's, but for what enters a later block in a sequential fit."""
        if self._states is None:
            with self.stages.stage("layer states", len(self.tokens)) as advance:
                self._states = collect_block_states(
                    self.model, self.tokens, self.plan.blocks, held=self.plan.held, path=self.plan.path,
                    batch_size=self.batch_size, home=self.keep.home(), advance=advance)
        states = self._states[number]
        if not (self.plan.sequential and edits):
            return states
        start = states.block.start
        with self.stages.stage("corrected states", len(self.tokens)) as advance:
            index = index_after(edits, start)
            found = boundary_states(
                apply_edits(self.model, edits), self.tokens, [index], batch_size=self.batch_size,
                home=lambda _: self.keep.home(digest([self.keep.about, self.identity, number]))(start),
                advance=advance)
        return dataclasses.replace(states, inputs=found[index])


def index_after(edits: Sequence[Edit], boundary: int) -> int:
    """The index, in the pruned model, of the state that enters layer ``boundary`` of the dense one.

    ``edits``: Substitutes in front of that layer. One with context leaves a layer in the block's place.
    """
    removed = 0
    for edit in edits:
        assert isinstance(edit, Substitute)
        assert edit.block.stop <= boundary
        removed += len(edit.block) - (edit.context is not None)
    return boundary - removed
