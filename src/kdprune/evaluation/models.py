"""What the measurements need to know of a model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_LENGTHS = ("max_position_embeddings", "max_seq_len")  # what configs call it; the latter MPT, for one


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode for a while, then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def longest_context(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """The most positions the config of a model, or this config, allows; None where it sets no limit."""
    config = (model if isinstance(model, PreTrainedConfig) else model.config).get_text_config()
    found = next((value for name in _LENGTHS if (value := getattr(config, name, None))), None)
    return int(found) if found else None


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of token ids the model embeds."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)
