"""Heads that classify on pruned models: found by transformers' Auto classes like the causal LM."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import EARLIER_FAMILIES, build
from pruned import prune
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from kdprune.model.families import family_of
from kdprune.model.modeling_kdp import HEADS, generated
from kdprune.testing import IDS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*newly initialized")]
SEQUENCE, TOKEN = AutoModelForSequenceClassification, AutoModelForTokenClassification
WITHOUT = {"gemma2": (), "gemma3": (TOKEN,), "opt": (TOKEN,)}  # what a family has no class for


@pytest.mark.parametrize(("name", "auto"), [  # without the package test_contract loads both of every family
    *((name, SEQUENCE) for name in EARLIER_FAMILIES),
    *((name, TOKEN) for name in ("llama3.1", "gpt2", *(name for name in WITHOUT if name in EARLIER_FAMILIES)))])
@torch.no_grad()
def test_a_pruned_model_gets_a_head(name: str, auto: Any, tmp_path: Path) -> None:
    model = prune(build(name), "mixed" if auto is TOKEN else "mlp")
    model.save_pretrained(tmp_path / "pruned")
    if auto in WITHOUT.get(name, ()):
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            auto.from_pretrained(tmp_path / "pruned")
        return
    head = auto.from_pretrained(tmp_path / "pruned", num_labels=3)
    assert type(head) is generated(family_of(model), next(role for role, kind in HEADS.items() if kind is auto))
    assert torch.equal(head.base_model(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    expected = head(IDS).logits
    assert expected.shape == ((len(IDS), 3) if auto is SEQUENCE else (*IDS.shape, 3))
    head.save_pretrained(tmp_path / "head")
    again, report = auto.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(IDS).logits, expected)


def test_a_head_trains_its_stand_ins_too(tmp_path: Path) -> None:
    prune(build("llama3"), "after").save_pretrained(tmp_path)
    head = SEQUENCE.from_pretrained(tmp_path, num_labels=2)
    head(IDS, labels=torch.tensor([0, 1])).loss.backward()
    gradients = [p.grad for name, p in head.named_parameters() if ".kdp." in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
