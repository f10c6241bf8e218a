"""What every method has: a ratio, checks before any work, and a call that returns edits."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.selection import open_layers
from kdprune.methods.common.target import Of, Target
from kdprune.model.families import decoder_layers, lacks_sublayers
from kdprune.model.placement import is_dispatched
from kdprune.model.streaming import is_streamed
from kdprune.model.surgery import check_model
from kdprune.options import check_values, option, parse_blocks
from kdprune.runtime.run import Run


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A pruning method: its fields are its hyperparameters, at its paper's defaults.

    Raises:
        KDPruneError: a value is outside its range (says which and what is expected).
    """

    title: ClassVar[str]  # as it stands in tables: "ShortGPT"
    caches_parts: ClassVar[bool] = False  # whether it caches its own parts as it goes; else its whole result is cached
    collects: ClassVar[bool] = False  # all it asks of the running model is hidden states, which another copy may give
    streams: ClassVar[bool] = False  # works on a model whose layers are read from the checkpoint one at a time
    drops: ClassVar[bool] = False  # takes layers out and changes none, so that a list of layers is all it has to know
    narrows: ClassVar[bool] = False  # makes layers narrower, and takes none out
    spreads: ClassVar[bool] = False  # works on a model that device_map has spread over devices or offloaded

    ratio: float = option(0.25, "share of the parameters to remove, what is put in their place counted (net)",
                          group="size")
    of: Of = option("all", "what the ratio is a share of: all parameters, or layers: those outside the embeddings",
                    group="size")
    held: float = option(0.1, "share of the calibration rows kept out of fits, for the reported errors",
                         group="data", rare=True)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise KDPruneError(f"got ratio {self.ratio}, expected a number between 0 and 1 (0.25 removes a quarter)")
        if not 0 < self.held < 1:
            raise KDPruneError(f"got held {self.held}, expected a share between 0 and 1")
        check_values(self)

    def target(self, model: PreTrainedModel) -> Target:
        """The parameters that have to go of this dense model, net."""
        return Target.in_model(model, self.ratio, self.of)

    def check(self, model: PreTrainedModel, tokens: TokenSet) -> None:
        """Raises KDPruneError if this model cannot be pruned so on these tokens: at once, before any work."""
        check_model(model, substitutes=False, drops=self.drops, narrows=self.narrows)
        if self.takes_apart and lacks_sublayers(model.config):
            raise KDPruneError(
                f"got a model some of whose layers have no attention or no MLP any more, which {self.title} takes to "
                "have both; expected another: take layers out whole (shortgpt, uidl, sleb, evopress, sublayers) or "
                "replace them by maps (linear, linearpatch), or start from the model as it was before that")
        if not self.streams and is_streamed(model):
            raise KDPruneError(
                f"got a model too large for the memory allowed, whose layers are read from disk one at a time, which "
                f"{self.title} cannot use; expected one that fits: allow more (--host-memory, --device-memory), and "
                "leave --load-in out, which has layers read so on a device")
        spread = len({parameter.device for parameter in model.parameters()}) > 1 and not is_streamed(model)
        if (spread or is_dispatched(model)) and not (self.spreads and is_dispatched(model)):
            raise KDPruneError(
                f"got a model spread over several devices or offloaded, which {self.title} cannot use; expected one on "
                f"one device: load it without device_map")

    def check_states_model(self) -> None:
        """Raises KDPruneError if hidden states of a copy in fewer bits are not all that the method asks for."""
        if not self.collects:
            raise KDPruneError(
                f"{self.title} needs more of the running model than states; expected it whole: leave load_in out")

    @property
    def takes_apart(self) -> bool:
        """Whether it reads or changes attention and MLP of layers, each of which has to have both then; else a layer
        is what it computes."""
        return True

    @property
    def puts_in(self) -> bool:
        """Whether Substitute or Rewrite edits bring weights that healing can train alone."""
        return False

    def protected(self, model: PreTrainedModel) -> tuple[int, int] | None:
        """Layers at the start and at the end that this method leaves as they are; None: no layer is chosen."""
        return None

    @abstractmethod
    def __call__(self, model: PreTrainedModel, tokens: TokenSet, run: Run = Run()) -> MethodResult:
        """Returns the architecture change as data. What :meth:`check` refuses must not be asked for.

        Args:
            model: the dense model; not changed.
            tokens: calibration tokens, (N, T).
            run: seed, stages, cache and sizes.
        """


def boundaries_held(model: PreTrainedModel, ratio: float, blocks: Sequence[object] | None = None) -> int:
    """Boundaries between layers whose states a method at this ratio may hold at once: both ends of every block. Where
    they are not named, blocks are of two layers, and half as many layers go as the ratio says again, as what is put in
    counts against it."""
    layers = math.ceil(1.5 * ratio * len(decoder_layers(model)))
    return 2 * (max(1, layers // 2) if blocks is None else len(blocks))


@dataclass(frozen=True, kw_only=True)
class DepthMethod(Method):
    """A method that takes whole layers out.

    ``blocks`` chosen by one method can be given to any other, so that what they put in their place is compared on the
    same blocks.

    Attributes:
        ends: layers at the start and at the end that the method's own code never takes, whatever ``protect`` says.
    """

    ends: ClassVar[tuple[int, int]] = (0, 0)

    blocks: tuple[tuple[int, int], ...] | None = option(
        None, "explicit half-open blocks instead of a selection: 4-7,9-12", group="size", parse=parse_blocks)
    protect: float = option(0.0, "share of the layers kept at either end", group="size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.protect < 0.5:
            raise KDPruneError(f"got protect {self.protect}, expected a share from 0 up to 0.5")
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple((int(start), int(end)) for start, end in self.blocks))

    @property
    def puts_in(self) -> bool:
        """Most of these put something in the place of a block; those that only drop layers say so."""
        return True

    @property
    def takes_blocks(self) -> bool:
        """Whether blocks that another method chose can be given to this one."""
        return self.blocks is None

    def allowed(self, model: PreTrainedModel) -> range:
        """The layers that a selection may take out: those that neither ``protect`` nor ``ends`` keep."""
        layers, (first, last) = len(decoder_layers(model)), self.ends
        opened = open_layers(layers, self.protect)
        start = max(opened.start, first)
        return range(start, max(start, min(opened.stop, layers - last)))

    def protected(self, model: PreTrainedModel) -> tuple[int, int] | None:
        """As of every method; None where the blocks are named."""
        allowed = self.allowed(model)
        return None if self.blocks is not None else (allowed.start, len(decoder_layers(model)) - allowed.stop)


@dataclass(frozen=True, kw_only=True)
class ComparingMethod(DepthMethod):
    """A method that ranks layers by how far the states at their ends lie from each other.

    The published codes of such methods read states from the list of ``hidden_states``, whose last entry stands behind
    the model's final norm. Runs that end at the last layer then look farther, or nearer, than they are.
    """

    last_state: Literal["normed", "plain"] = option(
        "normed", "the state behind the last layer as layers are ranked by it: behind the final norm too, as in the "
        "published code, or plain", group="size", rare=True)


@dataclass(frozen=True, kw_only=True)
class RankedMethod(DepthMethod):
    """A method whose blocks the similarity analysis ranks (KDP, section 2); the analysis then runs before it."""

    protect: float = option(0.1, "share of the layers kept at either end", group="size")
    block_length: int | None = option(
        None, "use blocks of this many layers only", least=1, group="size", rare=True)
    max_block: int | None = option(
        None, "longest block considered, K_max (half the layers, at most 8)", least=1, group="size", rare=True)
    similarity: Literal["rbf_cka", "linear_cka", "cosine"] = option(
        "rbf_cka", "score that ranks blocks", group="size", rare=True)
    endpoints: Literal["input", "output"] | None = option(
        "input", "states a block is ranked by: h_s and h_e (input), or outputs of its first and last layer (output)",
        group="size", rare=True)

    @property
    def shortest(self) -> int:
        """Layers of the shortest block considered."""
        return 2
