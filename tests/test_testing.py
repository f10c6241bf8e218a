"""The shipped contract is used as its docstring says, and fails where a family or a method breaks it."""

import copy
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
    assert [case.kind for case in cases] == list(KINDS)
    Llama().check_it_computes_what_its_edits_say(cases[0])
    for contract in (FamilyContract, MethodContract):
        with pytest.raises(NotImplementedError, match="give "):
            [case.edited if isinstance(case, FamilyCase) else case for case in contract.cases()]


@pytest.mark.parametrize(("kind", "check"), [
    *((kind, "check_it_computes_what_its_edits_say") for kind in KINDS if kind != "stream"),
    ("drop", "check_its_class_and_its_depth_are_in_step"), ("mixed", "check_its_class_and_its_depth_are_in_step"),
    ("mlp", "check_it_shares_the_dense_models_weights"), ("after", "check_static_cache"),
    ("last", "check_left_padding"),
    ("heads", "check_prefill_in_two_chunks"), ("stream", "check_copies_and_pickles_compute_the_same"),
])
def test_a_model_that_is_not_what_its_edits_say_fails(kind: str, check: str) -> None:
    case = FamilyCase("llama2", kind, partial(build, "llama2"))
    getattr(Llama(), check)(case)

    def off(edited: Edited) -> Edited:
        other = build("llama2", seed=1)
        return dataclasses.replace(edited, logits=edited.logits.flip(0), dense=other, model=other)

    with pytest.raises(AssertionError):
        getattr(Llama(), check)(Other("llama2", kind, case.build, off))


def test_generation_that_leaves_out_what_is_cached_fails() -> None:
    case = FamilyCase("llama2", "sublayers", partial(build, "llama2"))
    Llama().check_generation_with_cache(case)

    def forgetful(edited: Edited) -> Edited:
        model = copy.deepcopy(edited.model)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "past_key_values": None}), with_kwargs=True)
        return dataclasses.replace(edited, model=model)

    with pytest.raises(AssertionError):
        Llama().check_generation_with_cache(Other("llama2", "sublayers", case.build, forgetful))


def cases_of(contract: Any, argument: str) -> list[Any]:
    """The cases that pytest makes a test with this argument of."""
    found: list[Any] = []
    contract().pytest_generate_tests(SimpleNamespace(
        fixturenames=[argument], parametrize=lambda _, cases, **__: found.extend(cases)))
    return found


def checks_of(contract: Any) -> set[str]:
    """The names of all that it checks."""
    return {name for name in dir(contract) if name.startswith("check_")}


def test_every_check_is_made_but_those_that_are_not_about_the_case() -> None:
    class Some(Llama):
        kinds_in_full: ClassVar = ("mixed", "stream")

        def check_more(self, case: FamilyCase) -> None:
            """One of its own."""

    class SomeMethods(MethodContract):
        methods: ClassVar = {"bad": Bad, "refused": Bad}
        models: ClassVar = {"llama2": partial(build, "llama2"), "gpt2": partial(build, "gpt2")}
        refused: ClassVar = {"refused": {"gpt2": "no"}}
        repeated: ClassVar = ("gpt2",)

    every = checks_of(Some)
    full = {f"check_{name}" for name in (
        "generation_with_cache", "copies_and_pickles_compute_the_same", "gradients_with_and_without_checkpointing")}
    pruned = {f"check_{name}" for name in (
        "its_config_says_what_heads_its_layers_have", "left_padding", "prefill_in_two_chunks", "static_cache",
        "hidden_states_are_the_embeddings_and_one_more_a_layer")}
    assert len(every - full - pruned) == 6
    cases = cases_of(Some, "case")
    assert [case.kind for case in cases] == list(KINDS)
    for case in cases:
        made = Some.checks(case)
        left_out = pruned | full if case.what.stock else set() if case.kind in Some.kinds_in_full else full
        assert (len(made), set(made)) == (len(set(made)), every - left_out)
    made, refused = cases_of(SomeMethods, "case"), cases_of(SomeMethods, "refusal")
    assert [(case.method, case.family) for case in made] == [("bad", "llama2"), ("refused", "llama2"), ("bad", "gpt2")]
    assert [(case.method, case.family) for case in refused] == [("refused", "gpt2")]
    again = {"check_the_same_seed_gives_the_same_bits"}
    every = checks_of(SomeMethods)
    assert len(every) == 4
    assert [set(SomeMethods.checks(case)) for case in made] == [every - again, every - again, every]
    SomeMethods.repeated = None
    assert all(set(SomeMethods.checks(case)) == every for case in made)


def test_all_checks_that_fail_are_named(tmp_path: Path) -> None:
    """Those behind a failure are made too; nothing but what is wrong fails."""
    right = FamilyCase("llama2", "heads", partial(build, "llama2"))
    Llama().test_it_keeps_the_contract(right, tmp_path / "right")
    wrong = Other("llama2", "heads", right.build, lambda edited: dataclasses.replace(
        edited, logits=edited.logits.flip(0)))
    with pytest.raises(ExceptionGroup) as failed:
        Llama().test_it_keeps_the_contract(wrong, tmp_path / "wrong")
    names = [f"check_{name}" for name in (
        "it_computes_what_its_edits_say", "saving_and_loading", "left_padding", "prefill_in_two_chunks", "static_cache",
        "copies_and_pickles_compute_the_same")]
    assert [note for error in failed.value.exceptions for note in error.__notes__] == names
    assert f"6 of {len(Llama.checks(wrong))} checks: {', '.join(names)}" in str(failed.value)


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
    ("too little", "check_it_is_finite_and_smaller_by_the_ratio"),
    ("too much", "check_it_is_finite_and_smaller_by_the_ratio"),
    ("changes", "check_the_dense_model_is_as_it_was"), ("draws", "check_the_same_seed_gives_the_same_bits"),
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
