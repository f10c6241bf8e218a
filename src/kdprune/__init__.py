"""kdprune: Kernelized Dynamics Pruning of transformer language models.

``import kdprune`` registers pruned models with transformers' Auto classes. The rest is imported when first used:

    result = kdprune.prune(model, output_dir=None, ratio=0.25, …)
    scores = kdprune.analyze(model, …)
    table = kdprune.compare(model, ["kdp", "sleb"], ratio=0.25, seeds=3); kdprune.ablate(model)
    kdprune.KDP(ratio=0.25, context="attention", …)
"""

import gc
import importlib
import logging
from typing import TYPE_CHECKING, Any

from kdprune.runtime.interrupts import is_command, stop_in_one_line

stop_in_one_line()  # importing the libraries takes seconds
if is_command():
    gc.disable()  # until the command runs: imports leave nothing to free, and looking for it takes a tenth of the time
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home it cannot write to, fonts it lists at first
# isort: split
from kdprune.model import modeling_kdp  # noqa: E402

if TYPE_CHECKING:
    from kdprune.comparison.compare import ablate, compare
    from kdprune.errors import KDPruneError
    from kdprune.methods.common.analysis import Scores
    from kdprune.methods.kdp.kdp import KDP
    from kdprune.run.pipeline import PruneResult, analyze, prune

__version__ = "0.1.0"
__all__ = ["KDP", "KDPruneError", "PruneResult", "Scores", "ablate", "analyze", "compare", "prune"]

_HOMES = {
    "prune": "run.pipeline", "analyze": "run.pipeline", "PruneResult": "run.pipeline", "KDP": "methods.kdp.kdp",
    "Scores": "methods.common.analysis",
    "KDPruneError": "errors", "compare": "comparison.compare", "ablate": "comparison.compare",
}

modeling_kdp.register()  # from here on the Auto classes of transformers load pruned models


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kdprune.{_HOMES[name]}"), name)
