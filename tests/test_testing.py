"""The shipped contract is used as its docstring says, and fails where a family or a method breaks it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from families import build
from transformers import PreTrainedModel

from kdprune.methods.common.method import Method
from kdprune.methods.common.result import MethodResult
from kdprune.methods.peers.drop import ShortGPT
from kdprune.model.edits import Drop
from kdprune.model.families import decoder_layers
from kdprune.testing import KINDS, FamilyContract, MethodContract, saved_and_loaded
from kdprune.testing.family import Edited, FamilyCase
from kdprune.testing.method import MethodCase

pytestmark = pytest.mark.usefixtures("one_thread")


class Llama(FamilyContract):
    @staticmethod
    def model() -> PreTrainedModel:
        return build("llama2")


@dataclass(frozen=True)
class Other(FamilyCase):
    """A case whose edited model has been tampered with."""

    change: Callable[[Edited], Edited] = lambda edited: edited

    @property
    def edited(self) -> Edited:
        return self.change(super().edited)


def test_one_model_is_edited_in_every_way() -> None:
    cases = Llama.cases()
    assert [case.kind for case in cases] == [*(k for k in KINDS if not KINDS[k].stock), "drop", "rewrite", "whole"]
    Llama().test_it_computes_what_its_edits_say(cases[0])
    for contract in (FamilyContract, MethodContract):
        with pytest.raises(NotImplementedError, match="give "):
            [case.edited if isinstance(case, FamilyCase) else case for case in contract.cases()]


@pytest.mark.parametrize(("kind", "check"), [
    *((kind, "test_it_computes_what_its_edits_say") for kind in KINDS if kind != "stream"),
    ("drop", "test_its_class_and_its_depth_are_in_step"), ("mixed", "test_its_class_and_its_depth_are_in_step"),
    ("mlp", "test_it_shares_the_dense_models_weights"), ("after", "test_static_cache"), ("last", "test_left_padding"),
    ("heads", "test_prefill_in_two_chunks"), ("stream", "test_copies_and_pickles_compute_the_same"),
])
def test_a_model_that_is_not_what_its_edits_say_fails(kind: str, check: str) -> None:
    case = FamilyCase("llama2", kind, partial(build, "llama2"))
    getattr(Llama(), check)(case)

    def off(edited: Edited) -> Edited:
        other = build("llama2", seed=1)
        return dataclasses.replace(edited, logits=edited.logits.flip(0), dense=other, model=other)

    with pytest.raises(AssertionError):
        getattr(Llama(), check)(Other("llama2", kind, case.build, off))


def cases_of(contract: Any, check: str, argument: str = "case") -> list[Any]:
    """The cases that pytest makes a check of."""
    found: list[Any] = []
    contract().pytest_generate_tests(SimpleNamespace(
        fixturenames=[argument], function=getattr(contract, check),
        parametrize=lambda _, cases, **__: found.extend(cases)))
    return found


def test_checks_that_take_long_are_of_the_first_cases() -> None:
    """pytest orders by their numbers: all checks of a case follow each other, and it is edited or pruned once."""
    class Some(Llama):
        kinds_in_full: ClassVar = ("mixed", "stream")

    class SomeMethods(MethodContract):
        methods: ClassVar = {"bad": Bad, "refused": Bad}
        models: ClassVar = {"llama2": partial(build, "llama2"), "gpt2": partial(build, "gpt2")}
        refused: ClassVar = {"refused": {"gpt2": "no"}}
        repeated: ClassVar = ("gpt2",)

    every, pruned, full = (cases_of(Some, f"test_{name}") for name in (
        "it_computes_what_its_edits_say", "left_padding", "generation_with_and_without_cache"))
    assert [case.kind for case in full] == ["mixed", "stream"]
    assert (len(pruned), len(every)) == (len(KINDS) - 3, len(KINDS))
    assert every[:len(pruned)] == pruned
    assert pruned[:len(full)] == full
    every, twice, refused = (cases_of(SomeMethods, f"test_{name}", argument) for name, argument in (
        ("saving_and_loading", "case"), ("the_same_seed_gives_the_same_bits", "case"),
        ("what_it_cannot_prune_is_refused_in_one_line", "refusal")))
    assert [(case.method, case.family) for case in twice] == [("bad", "gpt2")]
    assert [(case.method, case.family) for case in every] == [("bad", "gpt2"), ("bad", "llama2"), ("refused", "llama2")]
    assert [(case.method, case.family) for case in refused] == [("refused", "gpt2")]
    SomeMethods.repeated = None
    assert len(cases_of(SomeMethods, "test_the_same_seed_gives_the_same_bits")) == 3


@dataclass(frozen=True, kw_only=True)
class Bad(ShortGPT):
    """Drops a layer, and does one thing that a method must not do."""

    fault: str = ""

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> MethodResult:
        if self.fault == "changes":
            with torch.no_grad():
                next(decoder_layers(model)[0].parameters()).add_(0.1)
        layer = 2 if self.fault != "draws" else int(torch.randint(6, ()))
        gone = {"too little": range(3, 3), "too much": range(2, 5)}.get(self.fault, range(layer, layer + 1))
        return MethodResult([Drop(gone)] if gone else [])


class Methods(MethodContract):
    models: ClassVar = {"llama2": partial(build, "llama2")}


@pytest.mark.parametrize(("fault", "check"), [
    ("too little", "test_it_is_finite_and_smaller_by_the_ratio"),
    ("too much", "test_it_is_finite_and_smaller_by_the_ratio"),
    ("changes", "test_the_dense_model_is_as_it_was"), ("draws", "test_the_same_seed_gives_the_same_bits"),
    ("refuses nothing", "test_what_it_cannot_prune_is_refused_in_one_line"),
])
def test_a_method_that_breaks_the_contract_fails(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(fault: str) -> MethodCase:
        def make() -> Method:
            return Bad(ratio=0.1, fault=fault)

        return MethodCase("bad", "llama2", make, Methods.models["llama2"])

    draws = iter(range(6))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(next(draws)))
    if fault != "refuses nothing":
        getattr(Methods(), check)(case(""))
    with pytest.raises(AssertionError):
        getattr(Methods(), check)(case(fault))


def test_a_checkpoint_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama2")
    saved_and_loaded(model, tmp_path / "good")
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, path: None)
    (tmp_path / "bad").mkdir()
    for file in (tmp_path / "good").iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)  # type: ignore[operator,union-attr]
    with pytest.raises(AssertionError):
        saved_and_loaded(model, tmp_path / "bad")
