"""KDP's blocks one after the other, from states to edits; what an earlier run finished is found in the cache."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

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
from kdprune.store.states import States


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
    _dense: list[BlockStates] | None = None
    _inputs: dict[int, States] = field(default_factory=dict)  # of blocks, as the edits in front of them leave them

    def states(self, number: int, edits: Sequence[Edit]) -> BlockStates:
        """States of block ``number``: the dense model's, but for what enters a later block in a sequential fit.

        Args:
            edits: of the blocks in front of it.
        """
        if self._dense is None:
            self._dense = collect_block_states(
                self.model, self.tokens, self.plan.blocks, self.run, held=self.plan.held, path=self.plan.path,
                corrected=self.plan.sequential)
        states = self._dense[number]
        if not (self.plan.sequential and edits):
            return states
        return dataclasses.replace(states, inputs=self._corrected(number, edits))

    def _corrected(self, number: int, edits: Sequence[Edit]) -> States:
        """h_s of block ``number`` in the model with these edits, from that of the last block before it whose stand-in
        is a layer of its own on: of the layers those between the two blocks alone are run. Where states come from a
        copy in fewer bits, which edits are not made to, all layers are."""
        if number in self._inputs:
            return self._inputs[number]
        begin, start = None, self.plan.blocks[number].start
        layered = [before for before, edit in enumerate(edits) if isinstance(edit, Substitute) and edit.context]
        if layered and self.run.states_model is None:
            last = layered[-1]
            known = self.states(last, edits[:last]).inputs
            begin = index_after(edits[:last], self.plan.blocks[last].start), known
        index, follows_from = index_after(edits, start), [self.plan.identity(), number]
        found = boundary_states(
            apply_edits(self.model, edits), self.tokens, [index], self.run, stage="corrected states", begin=begin,
            spill=lambda _: self.run.spill_directory(start, follows_from))
        self._inputs[number] = found[index]
        return found[index]


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
