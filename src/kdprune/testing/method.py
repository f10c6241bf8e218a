"""The contract of a method: what it must leave of a model of every family that it does not refuse."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.method import DepthMethod, Method
from kdprune.methods.common.result import MethodResult
from kdprune.methods.common.target import counted
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import apply_edits
from kdprune.runtime.run import Run
from kdprune.testing.models import CALIBRATION, Dense, check_names, dense_of, logits_of, run_checks, saved_and_loaded

Build = Callable[[], PreTrainedModel]
Make = Callable[[], Method]


def run_method(
    method: Method, model: PreTrainedModel, tokens: TokenSet = CALIBRATION, *, seed: int = 0, batch_size: int = 16
) -> MethodResult:
    """What ``method`` returns for ``model``; raises KDPruneError for what its check refuses."""
    method.check(model, tokens)
    return method(model, tokens, Run(seed, batch_size))


@dataclass(frozen=True)
class Pruned:
    """A dense model as it is after it was pruned, as it was when it was made, and what was made of it."""

    dense: PreTrainedModel
    made: Dense
    model: PreTrainedModel
    logits: Tensor


@lru_cache(maxsize=1)
def _pruned(make: Make, build: Build) -> Pruned:
    made = dense_of(build)
    model = apply_edits(made.model, run_method(make(), made.model).edits)
    return Pruned(made.model, made, model, logits_of(model))


@dataclass(frozen=True)
class MethodCase:
    """One method on one dense model; pruned when it is first looked at."""

    method: str
    family: str
    make: Make
    build: Build

    @property
    def pruned(self) -> Pruned:
        """The pruned model with what it was made from."""
        return _pruned(self.make, self.build)


def _prunes_again(check: Callable[..., None]) -> Callable[..., None]:
    """Marks a check that takes as long as the pruning itself."""
    check.prunes_again = True  # type: ignore[attr-defined]
    return check


class MethodContract:
    """Subclasses give ``method``, or several ``methods`` by name, and the dense ``models`` they are tried on.

    pytest collects one test for each pair, which makes every check of it, the methods ``check_…``, and names all that
    fail. A method is made at settings that take no time, for a ratio that tiny models can reach. Calibration rows hold
    24 ids below 64, the last row with padding.

    Attributes:
        refused: by method the models that it cannot prune, each with a part of the reason that it gives (a regular
            expression); with ``method`` alone, by model.
        width_slack: by how much a method that narrows layers may miss the ratio.
        repeated: the models that each method prunes a second time, from the same seed; None: all.
    """

    methods: ClassVar[Mapping[str, Make]] = {}
    models: ClassVar[Mapping[str, Build]] = {}
    refused: ClassVar[Mapping[str, Any]] = {}
    width_slack: ClassVar[float] = 0.005
    repeated: ClassVar[Collection[str] | None] = None

    @staticmethod
    def method() -> Method:
        """The method, if there is one alone."""
        raise NotImplementedError("give method() or methods, what the contract is about")

    @classmethod
    def reason(cls, method: str, family: str) -> str | None:
        """Why a method refuses a model; None: it prunes it."""
        return (cls.refused.get(method, {}) if cls.methods else cls.refused).get(family)

    @classmethod
    def cases(cls) -> list[MethodCase]:
        """Every method on every model, the refused ones too."""
        methods = cls.methods or {cls.__name__: cls.method}
        if not cls.models:
            raise NotImplementedError("give models, functions that make dense models, by name")
        return [MethodCase(method, family, make, build)
                for family, build in cls.models.items() for method, make in methods.items()]

    @classmethod
    def is_repeated(cls, case: MethodCase) -> bool:
        """Whether the method prunes the model a second time."""
        return cls.repeated is None or case.family in cls.repeated

    @classmethod
    def checks(cls, case: MethodCase) -> list[str]:
        """The checks that are made of a case, methods ``check_…``, in the order in which they stand."""
        return [name for name in check_names(cls)
                if cls.is_repeated(case) or not getattr(getattr(cls, name), "prunes_again", False)]

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """pytest's hook: the argument ``case`` is a pair that is pruned, ``refusal`` one that is not."""
        for name, refused in (("case", False), ("refusal", True)):
            if name in metafunc.fixturenames:
                cases = [c for c in self.cases() if (self.reason(c.method, c.family) is not None) == refused]
                metafunc.parametrize(name, cases, ids=[f"{case.family}-{case.method}" for case in cases])

    def test_it_keeps_the_contract(self, case: MethodCase, tmp_path: Path) -> None:
        """Every check of a model that is pruned once, or twice; what fails is told by the names of the checks."""
        run_checks(self, self.checks(case), case, tmp_path)

    def check_it_is_finite_and_smaller_by_the_ratio(self, case: MethodCase) -> None:
        """At least the ratio, what is put in counted; at most a layer more, or ``width_slack``."""
        pruned, method = case.pruned, case.make()
        assert torch.isfinite(pruned.logits).all()
        assert not torch.equal(pruned.logits, logits_of(pruned.dense))
        total = counted(pruned.dense, method.of)
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(pruned.dense))
        removed = 1 - counted(pruned.model, method.of) / total
        slack = layer / total if isinstance(method, DepthMethod) else self.width_slack
        assert method.ratio <= removed < method.ratio + slack

    def check_the_dense_model_is_as_it_was(self, case: MethodCase) -> None:
        """Weights to the bit, config, gradients."""
        assert case.pruned.made.has_its_weights()
        assert case.pruned.made.has_its_config()

    def check_saving_and_loading(self, case: MethodCase, directory: Path) -> None:
        """The same class, record and bits."""
        saved_and_loaded(case.pruned.model, directory, case.pruned.logits)

    @_prunes_again
    def check_the_same_seed_gives_the_same_bits(self, case: MethodCase) -> None:
        """From a dense model made anew."""
        dense = case.build()
        again = apply_edits(dense, run_method(case.make(), dense).edits).state_dict()
        found = case.pruned.model.state_dict()
        assert again.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in again.items())

    def test_what_it_cannot_prune_is_refused_in_one_line(self, refusal: MethodCase) -> None:
        """Before any work."""
        reason = self.reason(refusal.method, refusal.family)
        try:
            refusal.make().check(dense_of(refusal.build).model, CALIBRATION)
        except KDPruneError as error:
            _one_line(str(error), reason or "")
        else:
            raise AssertionError(f"expected a refusal that says {reason!r}")


def _one_line(message: str, reason: str) -> None:
    assert re.search(reason, message), f"got {message!r}, expected it to say {reason!r}"
    assert "\n" not in message
