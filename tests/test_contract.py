"""The full contract: every kind of edit in every family (kdprune.testing holds the checks)."""

from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from families import CONFIGS, build
from pruned import prune
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdprune.model.families import normalises_behind
from kdprune.model.modeling_kdp import FAMILIES
from kdprune.testing import IDS, FamilyContract, close, logits_of
from kdprune.testing.family import FamilyCase

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
NORMS_BEHIND = ("gemma2", "gemma3", "opt-350m")  # no narrower stream goes through those
# Families that differ in how they count heads, embed, norm or cut: loaded without the package in these kinds too.
ELSEWHERE = {
    "heads": ("gpt2", "gpt_neox", "llama3", "opt", "phi3"), "channels": ("phi3",), "stream": ("gpt2", "gpt_neox")}


def test_every_family_is_covered() -> None:
    assert {model_type for model_type, _ in CONFIGS.values()} == set(FAMILIES)
    assert {name for name in CONFIGS if normalises_behind(build(name))} == set(NORMS_BEHIND)


class TestFamilies(FamilyContract):
    models: ClassVar = {name: partial(build, name) for name in CONFIGS}

    @classmethod
    def cases(cls) -> list[FamilyCase]:
        return [case for case in super().cases() if case.kind != "stream" or case.name not in NORMS_BEHIND]

    def checkpoints(self, directory: Path) -> dict[Path, Tensor]:
        """Of every family; and one that was saved, with its code, by an earlier version."""
        old = CHECKPOINTS / "llama-context-heads"
        found = {old: logits_of(AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32))}
        for case in self.cases():
            if case.kind == "mixed" or case.name in ELSEWHERE.get(case.kind, ()):
                model, path = case.fresh(), directory / f"{case.name}-{case.kind}"
                model.save_pretrained(path)
                found[path] = logits_of(model)
        return found


def test_the_installed_package_wins_over_the_code_beside_the_weights(tmp_path: Path) -> None:
    model = prune(build("llama3"), "mixed")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    model = prune(build("llama3"), "mixed")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(IDS, use_cache=False).logits.detach(), logits_of(model))
