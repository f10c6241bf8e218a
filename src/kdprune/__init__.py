"""kdprune: Kernelized Dynamics Pruning of transformer language models."""

from .model import modeling_kdp

__version__ = "0.1.0"

modeling_kdp.register()  # from here on the Auto classes of transformers load pruned models
