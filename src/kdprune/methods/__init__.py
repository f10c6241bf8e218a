"""Pruning methods: each a frozen dataclass; this literal dict is the only registry."""

from kdprune.methods.kdp import KDP
from kdprune.methods.method import Method

METHODS: dict[str, type[Method]] = {
    "kdp": KDP,
}
