"""Where the parts of a model are to be, as ``device_map`` says it."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from kdprune.model.families import family_of


def device_map(
    model: PreTrainedModel, of_layer: Callable[[int], Any], around: Any, behind: Any = None,
) -> dict[str, Any]:
    """Each layer where ``of_layer`` of its number says, all else ``around``, or the parts that come after the layers,
    where the head is not tied to the embeddings, ``behind``."""
    path, found = family_of(model).layers, {}
    place = around
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name.startswith(f"{path}."):
            number = int(name.removeprefix(f"{path}.").partition(".")[0])
            found[f"{path}.{number}"] = of_layer(number)
            if behind is not None and not model.config.tie_word_embeddings:
                place = behind
        else:
            found.setdefault(name.rpartition(".")[0], place)
    return found
