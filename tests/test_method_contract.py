"""What every method must leave, in every family it supports; and how it refuses the others (kdprune.testing)."""

from functools import partial
from typing import ClassVar

import pytest
from families import CONFIGS, EARLIER_FAMILIES, TRIED, WIRINGS, build
from methods import FORMS, REFUSED, STOCK, quick

from kdprune.methods import METHODS
from kdprune.testing import MethodContract
from kdprune.testing.method import MethodCase

pytestmark = pytest.mark.usefixtures("one_thread")
# What these make follows from how layers are wired: contexts, merged weights, narrower layers and streams.
WIRED = ("kdp", "sublayers", "laco", "llm-pruner", "slicegpt")
# What later families have of their own that others meet: tuples, multipliers, experts that go with their layers.
LATER = {"sublayers-similar": ("bloom", "falcon", "granite", "qwen3_moe"),
         "sleb": ("bloom",), "uidl": ("falcon",), "streamline": ("bloom",), "replaceme": ("granite", "falcon"),
         "linear": ("bloom", "mixtral"), "shortgpt": ("mixtral", "qwen3_moe"), "kdp-paper": ("mixtral",)}


def _tried(form: str) -> tuple[str, ...]:
    """The models that a form prunes."""
    if form in WIRED:
        return (*TRIED, "gptj", "gemma") if form == "slicegpt" else TRIED
    return (*(EARLIER_FAMILIES if form in METHODS else WIRINGS), *LATER.get(form, ()))


class TestMethods(MethodContract):
    """Every method in every family it supports; its other forms, and variants of families, where layers differ."""

    methods: ClassVar = {form: partial(quick, form) for form in FORMS}
    models: ClassVar = {name: partial(build, name) for name in CONFIGS}
    refused: ClassVar = {form: REFUSED.get(form, REFUSED.get(name, {})) for form, (name, _) in FORMS.items()}
    repeated: ClassVar = ("llama3.1", "gemma3", "gpt2")

    @classmethod
    def cases(cls) -> list[MethodCase]:
        return [case for case in super().cases()
                if case.family in _tried(case.method) or cls.reason(case.method, case.family)]

    def test_it_is_finite_and_smaller_by_the_ratio(self, case: MethodCase) -> None:
        super().test_it_is_finite_and_smaller_by_the_ratio(case)
        assert (type(case.pruned.model) is type(case.pruned.dense)) == (case.method in STOCK)
