"""KDP's blocks one after the other, from states to edits; what an earlier run finished is found in the cache."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.result_files import ResultCodec, joined
from kdprune.methods.common.shape import Shape
from kdprune.methods.kdp.fit_block import FitSettings, fit_block
from kdprune.model.block_states import BlockStates, PathRows, boundary_states, collect_block_states
from kdprune.model.surgery import Edit, Substitute, apply_edits
from kdprune.runtime.run import Run
from kdprune.store.hashing import digest


@dataclass(frozen=True)
class FitPlan:
    """What is fitted: the blocks, the forms of their stand-ins, how they are fitted, on which rows.

    Attributes:
        held: rows at the end that no fit sees.
        path: rows whose inner states step 1 sees.
        sequential: later blocks see the states that the pruned model gives.
    """

    blocks: Sequence[range]
    shapes: Sequence[Shape]
    settings: FitSettings
    held: int
    path: PathRows
    sequential: bool

    def identity(self) -> str:
        """A hash of all of it."""
        blocks = [(block.start, block.stop) for block in self.blocks]
        return digest({**dataclasses.asdict(self), "blocks": blocks})


def fit_blocks(model: PreTrainedModel, tokens: TokenSet, plan: FitPlan, run: Run) -> MethodResult:
    """Fits every block of the plan and returns all edits and records."""
    identity, collected = plan.identity(), _Collected(model, tokens, plan, run)
    done: list[MethodResult] = []
    for number, block in enumerate(plan.blocks):
        edits = [edit for part in done for edit in part.edits]

        def fit(number: int = number, edits: Sequence[Edit] = edits) -> MethodResult:
            states = collected.states(number, edits)
            return fit_block(model, states, plan.shapes[number], plan.settings, number, run, [identity, number])

        name = f"fit-{block.start}-{block.stop}"
        done.append(run.cached(name, [identity, number], fit, ResultCodec(model)))
    return joined(done)


@dataclass
class _Collected:
    """States of the plan's blocks, collected when the first block asks for them."""

    model: PreTrainedModel
    tokens: TokenSet
    plan: FitPlan
    run: Run
    _states: list[BlockStates] | None = None

    def states(self, number: int, edits: Sequence[Edit]) -> BlockStates:
        """States of block ``number``: the dense model's, but for what enters a later block in a sequential fit.

        Args:
            edits: of the blocks in front of it.
        """
        plan, run = self.plan, self.run
        if self._states is None:
            self._states = collect_block_states(
                self.model, self.tokens, plan.blocks, run, held=plan.held, path=plan.path)
        states = self._states[number]
        if not (plan.sequential and edits):
            return states
        start = states.block.start
        index, follows_from = index_after(edits, start), [plan.identity(), number]
        found = boundary_states(
            apply_edits(self.model, edits), self.tokens, [index], run, stage="corrected states",
            spill=lambda _: run.spill_directory(start, follows_from))
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
