"""Pruning methods: each a frozen dataclass; this literal dict is the only registry."""

from kdprune.methods.kdp import KDP

METHODS = {"kdp": KDP}
