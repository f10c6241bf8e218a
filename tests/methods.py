"""Every method, in every form whose result is of another kind than the default's, at settings that take no time."""

from typing import Any

from families import EXPERTS, NORMS_BEHIND

from kdprune.methods import METHODS
from kdprune.methods.common.method import Method
from kdprune.run import heal
from kdprune.runtime import machine

# A third of a tiny model, with nothing much to learn; options that a method lacks are left out.
QUICK: dict[str, Any] = {
    "kernel_epochs": 1, "kernel_tokens": 64, "refine_epochs": 1, "inverse_epochs": 1, "rank": 2, "protect": 0.0,
    "epochs": 1, "first": 4, "offspring": 4, "passes": 6.0,
}
_EXPERTS = dict.fromkeys(EXPERTS, "mixtures of experts")
# What a method, or a form of it, cannot prune, and a part of the reason it gives; all else must pass the contract.
REFUSED: dict[str, dict[str, str]] = {
    "slicegpt": {**dict.fromkeys((*NORMS_BEHIND, "bloom"), "norm"), **_EXPERTS},
    "replaceme": {**dict.fromkeys(NORMS_BEHIND, "norm"), **_EXPERTS},
    "kdp": _EXPERTS, "kdp-paper": {}, "kdp-without": {},  # those without the channels of MLPs
    "laco": _EXPERTS, "llm-pruner": _EXPERTS, "flattengpt": {**_EXPERTS, "opt-350m": "norm"},
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "kdp-folded": ("kdp", {"context": "none"}),
    "kdp-learned": ("kdp", {"kernel": "linear+learned+data", "ranking": "similarity"}),
    "kdp-paper": ("kdp", {"preset": "paper"}),
    "streamline-ffn": ("streamline", {"stand_in": "ffn"}),
    "sublayers-similar": ("sublayers", {"ranking": "similarity"}),
    "sublayers-mlp": ("sublayers", {"what": "mlp"}),
    "streamline-none": ("streamline", {"stand_in": "none"}),
    "kdp-without": ("kdp", {"without": ("alpha", "anisotropy", "operators"), "kernel": "learned", "hidden": 4}),
    "replaceme-closed": ("replaceme", {"solver": "least_squares"}),
    "flattengpt-states": ("flattengpt", {"towards": "states", "refit": "both", "ridge": 1e-4}),
    "laco-paper": ("laco", {"form": "paper", "merged": "all"}),
}
# Forms that leave a model of the stock class.
STOCK = {
    "shortgpt", "uidl", "sleb", "evopress", "flattengpt", "flattengpt-states", "laco", "laco-paper", "streamline-none",
    "streamline", "replaceme", "replaceme-closed"}


def quick(form: str, **options: Any) -> Method:
    """A method at settings that take no time, for a ratio that every tiny model can reach."""
    name, own = FORMS[form]
    return METHODS[name](**taken(name, {"ratio": 0.2, **QUICK, **own, **options}))


def taken(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the method has."""
    return {key: value for key, value in options.items() if key in METHODS[method].__dataclass_fields__}


def in_float32() -> None:
    """From here on this process has no products in bfloat16, so that what it computes can be held against another's."""
    machine.computes_in = heal.computes_in = lambda *_: False
