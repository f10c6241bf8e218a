"""Heads that classify on pruned models: found by transformers' Auto classes like the causal LM."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import REPRESENTATIVES, build
from pruned import prune, stand_in
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from kdprune.model.edits import Substitute
from kdprune.model.families import family_of
from kdprune.model.modeling_kdp import HEADS, generated
from kdprune.model.surgery import apply_edits
from kdprune.testing import IDS, edits_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*newly initialized")]
SEQUENCE, TOKEN = AutoModelForSequenceClassification, AutoModelForTokenClassification


@pytest.mark.parametrize("auto", [SEQUENCE, TOKEN], ids=["sequence", "token"])
@pytest.mark.parametrize("name", REPRESENTATIVES)
@torch.no_grad()
def test_a_pruned_model_gets_a_head(name: str, auto: Any, tmp_path: Path) -> None:
    dense = build(name)
    model = prune(dense, "mixed" if auto is TOKEN else "mlp")
    model.save_pretrained(tmp_path / "pruned")
    if type(dense.config) not in auto._model_mapping:  # transformers has none for the dense model either
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            auto.from_pretrained(tmp_path / "pruned")
        return
    _check_head(auto, model, tmp_path)


@pytest.mark.parametrize("kind", ["after", "heads", "layer", "channels", "stream", "drop", "twice"])
@pytest.mark.parametrize("name", ["llama3.1", "gpt2"])
@torch.no_grad()
def test_every_kind_of_result_gets_a_head(name: str, kind: str, tmp_path: Path) -> None:
    """Stand-ins, widths, a turned stream; a stock result; stand-ins put in after others, around the same layer."""
    model = build(name)
    if kind == "twice":
        for block in (range(1, 3), range(3, 4), range(1, 2), range(1, 2)):
            model = apply_edits(model, [Substitute(block, stand_in(3))])
    else:
        model = apply_edits(model, edits_of(model, kind))
    model.save_pretrained(tmp_path / "pruned")
    for auto in (SEQUENCE, TOKEN):
        _check_head(auto, model, tmp_path)


def _check_head(auto: Any, model: Any, tmp_path: Path) -> None:
    """The head on what lies in "pruned": of the right class, on the same states, saved and loaded to the bit."""
    head = auto.from_pretrained(tmp_path / "pruned", num_labels=3)
    role = next(role for role, kind in HEADS.items() if kind is auto)
    stock = not model.config.model_type.startswith("kdp_")
    assert type(head) is (auto._model_mapping[type(model.config)] if stock else generated(family_of(model), role))
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
