"""What every method must leave behind, in every family it supports; and how it refuses the others."""

from typing import Any

import pytest
import torch
from contract import Case, Contract, logits
from families import CONFIGS, build
from transformers import PreTrainedModel

from kdprune.analysis import score_layers
from kdprune.data import TokenSet, load_tokens
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import vocabulary_size
from kdprune.methods import METHODS
from kdprune.methods.method import DepthMethod, Method, RankedMethod
from kdprune.model.families import decoder_layers
from kdprune.model.surgery import apply_edits
from kdprune.runtime import Stages

pytestmark = pytest.mark.usefixtures("one_thread")
# A third of a tiny model, with nothing much to learn; options that a method lacks are left out.
QUICK: dict[str, Any] = {
    "kernel_epochs": 1, "kernel_tokens": 64, "refine_epochs": 1, "inverse_epochs": 1, "rank": 2, "protect": 0.0,
    "epochs": 1,
}
# What a method cannot prune, and a part of the reason it gives; everything else must pass the contract.
REFUSED: dict[str, dict[str, str]] = {
    "slicegpt": {"gemma2": "norm", "gemma3": "norm", "opt-350m": "norm"},
    "replaceme": {"gemma2": "norm", "gemma3": "norm", "opt-350m": "norm"},
}


# Forms of a method whose results are of another kind than the default's.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "streamline-layer": ("streamline", {"stand_in": "layer"}),
    "kdp-context": ("kdp", {"context_from": "last", "context_heads": 0.5}),
    "replaceme-closed": ("replaceme", {"solver": "least_squares"}),
    "laco-paper": ("laco", {"form": "paper", "merged": "all"}),
}


def quick(form: str) -> Method:
    """A method at settings that take no time, for a ratio that every tiny model can reach."""
    name, options = FORMS[form]
    names = METHODS[name].__dataclass_fields__
    return METHODS[name](**{k: v for k, v in {"ratio": 0.2, **QUICK, **options}.items() if k in names})


def supported(family: str, form: str) -> bool:
    return family not in REFUSED.get(FORMS[form][0], ())


def calibration(model: PreTrainedModel) -> TokenSet:
    """Twelve rows, the last of them with padding, which must enter no statistic."""
    ids = torch.randint(3, vocabulary_size(model), (12, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[-1, 18:], mask[-1, 18:] = 0, 0
    return load_tokens({"input_ids": ids, "attention_mask": mask}, None, samples=None, length=24, seed=0)


def by_method(model: PreTrainedModel, form: str) -> PreTrainedModel:
    method, tokens, scores = quick(form), calibration(model), None
    if isinstance(method, RankedMethod):
        scores = score_layers(
            model, tokens, protect=method.protect, seed=0, batch_size=16, stages=Stages()).tensors()
    return apply_edits(model, method(model, tokens, scores, seed=0).edits)


@pytest.fixture(
    scope="module", ids="-".join,
    params=[(n, form) for n in CONFIGS for form in FORMS if supported(n, form)])
def case(request: pytest.FixtureRequest, one_thread: None) -> Case:
    name, form = request.param
    dense = build(name)
    before = logits(dense)
    model = by_method(dense, form)
    return Case(name, form, dense, before, model, logits(model), lambda: by_method(build(name), form))


class TestMethods(Contract):
    """Every method, in every form, in every family it supports."""

    def test_it_is_smaller_by_the_ratio(self, case: Case) -> None:
        removed = 1 - case.model.num_parameters() / case.dense.num_parameters()
        layer = sum(p.numel() for p in decoder_layers(case.dense)[0].parameters()) / case.dense.num_parameters()
        assert 0.2 <= removed < 0.2 + (layer if issubclass(METHODS[FORMS[case.kind][0]], DepthMethod) else 0.005)


@pytest.mark.parametrize(("method", "name"), [(m, n) for m, names in REFUSED.items() for n in names])
def test_a_family_that_a_method_cannot_prune_is_refused_in_one_line(method: str, name: str) -> None:
    model = build(name)
    with pytest.raises(KDPruneError, match=REFUSED[method][name]) as refusal:
        quick(method).check(model, calibration(model))
    assert "\n" not in str(refusal.value)
