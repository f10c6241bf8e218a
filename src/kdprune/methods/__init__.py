"""Pruning methods: each a frozen dataclass; this literal dict is the only registry."""

from kdprune.methods.drop import SLEB, UIDL, ShortGPT
from kdprune.methods.kdp import KDP
from kdprune.methods.linear import Linear
from kdprune.methods.linearpatch import LinearPatch
from kdprune.methods.llm_pruner import LLMPruner
from kdprune.methods.merge import LaCo
from kdprune.methods.method import Method
from kdprune.methods.replaceme import ReplaceMe
from kdprune.methods.slicegpt import SliceGPT
from kdprune.methods.streamline import Streamline

METHODS: dict[str, type[Method]] = {
    "kdp": KDP,
    "shortgpt": ShortGPT,
    "uidl": UIDL,
    "sleb": SLEB,
    "laco": LaCo,
    "streamline": Streamline,
    "replaceme": ReplaceMe,
    "linear": Linear,
    "linearpatch": LinearPatch,
    "slicegpt": SliceGPT,
    "llm-pruner": LLMPruner,
}
