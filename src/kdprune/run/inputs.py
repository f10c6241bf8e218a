"""What a run reads, and that nothing it writes lies there: known before any work."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedModel

from kdprune.data.sources import BUNDLED_MODEL, local_paths
from kdprune.errors import KDPruneError
from kdprune.run.resources import AUTO, NONE, Resources
from kdprune.store.cache import cache_dir
from kdprune.store.directories import Inputs
from kdprune.store.files import is_there


def inputs_of(
    model: Any = None, *, texts: Iterable[Any] = (), tokenizer: Any = None, recipe: Any = None,
    folders: Iterable[str | Path] = (), resources: Resources | None = None,
) -> Inputs:
    """The places that a command reads, as :func:`kdprune.store.directories.check_apart` takes them.

    Args:
        model: directory, file, hub id or loaded model, which may come from a directory.
        texts: text sources of any kind.
        tokenizer: as given.
        recipe: file of options, or the options.
        folders: with data of tasks.
        resources: for the work directory.
    """
    named: Any = (model.name_or_path or None) if isinstance(model, PreTrainedModel) else model
    found = {
        "model": _there(named), "tokenizer": _there(tokenizer), "recipe": _there(recipe),
        "text": [path for text in texts for path in local_paths(text)],
        "data of the suite": [path for folder in folders for path in _there(folder)],
        "package": [BUNDLED_MODEL.parent], "cache": [Path(HF_HUB_CACHE)],
    }
    with contextlib.suppress(KDPruneError):  # without a home there is none
        found["cache"].append(cache_dir())
    if resources is not None and resources.work_dir not in (None, NONE, AUTO):
        found["work directory"] = [Path(str(resources.work_dir))]
    return found


def _there(name: Any) -> list[Path]:
    """The path that a name is, if something lies there."""
    return [Path(name)] if isinstance(name, str | Path) and is_there(name) else []
