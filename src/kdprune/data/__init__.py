"""Text and token ids → rows of tokens with their padding mask."""
