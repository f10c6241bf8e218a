"""What every method must leave, in every family it supports; and how it refuses the others (kdprune.testing)."""

from functools import partial
from typing import ClassVar

import pytest
import torch
from families import CONFIGS, EARLIER_FAMILIES, TRIED, build
from methods import FORMS, REFUSED, STOCK, quick

from kdprune.methods import METHODS
from kdprune.model.surgery import apply_edits
from kdprune.testing import MethodContract, logits_of
from kdprune.testing.method import MethodCase, run_method

pytestmark = pytest.mark.usefixtures("one_thread")
# What these make follows from how layers are wired: contexts, merged weights, narrower layers and streams.
WIRED = ("kdp", "sublayers", "flattengpt", "flattengpt-states", "laco", "llm-pruner", "slicegpt")
# A method's other forms put other stand-ins into the same places, of which the contract of families has every kind in
# every family: here those of separate projections, norms behind, parallel sublayers and Conv1D; LATER has more.
PLACES = ("llama3.1", "gemma3", "gpt_neox", "gpt2")
# As wired as a family beside them, for a method: Llama and Qwen2 with as many key-value heads, or without a window.
SAME = ("llama2", "llama3", "qwen2-window")
# What later families have of their own that others meet: tuples, multipliers, experts that go with their layers.
LATER = {"sublayers-similar": ("bloom", "falcon", "granite", "qwen3_moe"),
         "sleb": ("bloom",), "uidl": ("falcon",), "streamline": ("bloom",), "replaceme": ("granite", "falcon"),
         "linear": ("bloom", "mixtral"), "shortgpt": ("mixtral", "qwen3_moe"), "kdp-paper": ("mixtral",),
         "kdp-learned": ("phi3",), "kdp-folded": ("opt-350m",), "laco-paper": ("phi3",)}


def _tried(form: str) -> tuple[str, ...]:
    """The models that a form prunes."""
    if form in WIRED:
        return (*(name for name in TRIED if name not in SAME), *(("gptj", "gemma") if form == "slicegpt" else ()))
    return (*(EARLIER_FAMILIES if form in METHODS else PLACES), *LATER.get(form, ()))


class TestMethods(MethodContract):
    """Every method in every family it supports; its other forms, and variants of families, where layers differ."""

    methods: ClassVar = {form: partial(quick, form) for form in FORMS}
    models: ClassVar = {name: partial(build, name) for name in CONFIGS}
    refused: ClassVar = {form: REFUSED.get(form, REFUSED.get(name, {})) for form, (name, _) in FORMS.items()}
    repeated: ClassVar = ("gemma3", "gpt2")

    @classmethod
    def cases(cls) -> list[MethodCase]:
        return [case for case in super().cases()
                if case.family in _tried(case.method) or cls.reason(case.method, case.family)]

    def check_it_is_finite_and_smaller_by_the_ratio(self, case: MethodCase) -> None:
        super().check_it_is_finite_and_smaller_by_the_ratio(case)
        assert (type(case.pruned.model) is type(case.pruned.dense)) == (case.method in STOCK)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_on_an_accelerator(form: str, dtype: torch.dtype) -> None:
    """What it makes there is whole, and in float32 what it makes on the host, but for what is trained in bfloat16."""
    model = build("llama3").to("cuda", dtype)
    pruned = apply_edits(model, run_method(quick(form), model).edits)
    assert {parameter.device.type for parameter in pruned.parameters()} == {"cuda"}
    assert all(parameter.is_contiguous() for parameter in pruned.parameters())
    found = logits_of(pruned).float().cpu()
    assert found.isfinite().all()
    if dtype == torch.float32:
        host = build("llama3")
        expected = logits_of(apply_edits(host, run_method(quick(form), host).edits))
        assert (found - expected).norm() < 0.05 * expected.norm()
