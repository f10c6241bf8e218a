"""Mathematics of the method: kernels, operators, similarities, bounds. Knows torch, not transformers."""
