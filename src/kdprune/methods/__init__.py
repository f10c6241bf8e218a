"""Pruning methods: each a frozen dataclass; this literal dict is the only registry."""

from collections.abc import Mapping
from typing import Any

from kdprune.methods.common.method import Method
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.peers.drop import SLEB, UIDL, ShortGPT
from kdprune.methods.peers.evopress import EvoPress
from kdprune.methods.peers.flattengpt import FlattenGPT
from kdprune.methods.peers.laco import LaCo
from kdprune.methods.peers.linear import Linear
from kdprune.methods.peers.linearpatch import LinearPatch
from kdprune.methods.peers.llm_pruner import LLMPruner
from kdprune.methods.peers.replaceme import ReplaceMe
from kdprune.methods.peers.slicegpt import SliceGPT
from kdprune.methods.peers.streamline import Streamline
from kdprune.methods.peers.sublayers import Sublayers
from kdprune.options import options_of, reject_unknown, typed_options

METHODS: dict[str, type[Method]] = {
    "kdp": KDP,
    "shortgpt": ShortGPT,
    "uidl": UIDL,
    "sleb": SLEB,
    "evopress": EvoPress,
    "sublayers": Sublayers,
    "flattengpt": FlattenGPT,
    "laco": LaCo,
    "streamline": Streamline,
    "replaceme": ReplaceMe,
    "linear": Linear,
    "linearpatch": LinearPatch,
    "slicegpt": SliceGPT,
    "llm-pruner": LLMPruner,
}


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of this name with these options; raises KDPruneError for names and values that cannot be."""
    reject_unknown([name], METHODS, "method")
    return METHODS[name](**typed_options(options, options_of(METHODS[name]), f"option of {name}"))
