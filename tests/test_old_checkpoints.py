"""Checkpoints of every form, written before: they load and compute what they computed (tests/fixtures/README.md).

tests/test_contract.py loads the one with its code beside it where kdprune is not installed.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdprune.model.modeling_kdp import FAMILIES, PLACES, PREFIX, generated

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())


def record_of(name: str) -> dict:
    return json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))["kdp"]


def test_every_form_is_there() -> None:
    records = [record_of(name) for name in NAMES]
    stand_ins = [stand_in for record in records for stand_in in record["stand_ins"]]
    assert {record["version"] for record in records} == {1, 2}
    assert {stand_in["place"] for stand_in in stand_ins} == set(PLACES)
    assert {stand_in["kind"] for stand_in in stand_ins} == {"fourier", "mlp", "linear"}
    for field in ("hidden", "residual", "normalize"):
        assert {bool(stand_in[field]) for stand_in in stand_ins} == {True, False}
    widths = {frozenset(width) for record in records for width in record.get("widths", ())}
    assert widths == {frozenset(), frozenset({"groups"}), frozenset({"groups", "channels"}), frozenset({"states"})}


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_computes_what_it_computed(name: str) -> None:
    expected = load_file(CHECKPOINTS / name / "expected.safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(
        CHECKPOINTS / name, dtype=torch.float32, output_loading_info=True)
    family = FAMILIES[model.config.model_type.removeprefix(PREFIX)]
    assert type(model) is generated(family, "ForCausalLM")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
