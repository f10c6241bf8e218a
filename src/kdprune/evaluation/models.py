"""What the measurements need to know of a model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode for a while, then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def longest_context(model: PreTrainedModel) -> int | None:
    """The most positions the model's config allows; None where it sets no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of token ids the model embeds."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)
