"""The full contract: every kind of edit in every family (kdprune.testing holds the checks)."""

from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from families import (
    ALIKE,
    CONFIGS,
    EARLIER_FAMILIES,
    EXPERTS,
    NORMS_BEHIND,
    REPRESENTATIVES,
    VARIANTS,
    WIRED,
    WIRINGS,
    build,
)
from pruned import prune
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdprune.model.families import normalises_behind
from kdprune.model.modeling_kdp import FAMILIES
from kdprune.testing import IDS, KINDS, FamilyContract, close, logits_of
from kdprune.testing.family import FamilyCase

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
# No narrower stream goes through those, nor through a norm behind the embeddings; experts have no channels.
IMPOSSIBLE = {**dict.fromkeys((*NORMS_BEHIND, "bloom"), ("stream",)),
              **dict.fromkeys(EXPERTS, ("layer", "channels", "stream"))}
# Of a variant the kinds that its difference bears on, of later families those in which they can differ, every place of
# a stand-in among them (the others: -m slow): depth and attention types, heads, what is between the sublayers.
FEWER = {
    "olmo2": ("drop", "last", "mixed", "channels", "sublayers"), "granite": ("last", "mixed", "stream", "sublayers"),
    "falcon": ("drop", "last", "mixed", "heads", "channels", "stream", "sublayers"),
    "falcon-7b": ("mixed", "channels", "sublayers"), "falcon-sequential": ("channels", "stream", "sublayers"),
    "bloom": ("drop", "last", "mixed", "channels", "sublayers"), "phi": ("mixed", "channels", "stream", "sublayers"),
    "gptj": ("mixed", "channels", "stream", "sublayers"), "gemma": ("mixed",),
    "stablelm": ("mixed", "channels", "sublayers"), "stablelm-parallel": ("mixed", "stream", "sublayers"),
    "cohere2": ("mixed", "stream"), "olmo": ("stream",), "nemotron": ("mixed",),
    "smollm3": ("drop", "mixed", "sublayers"), "ministral": ("mixed",), "mixtral": ("drop", "mixed", "sublayers"),
    "qwen3_moe": ("drop", "mixed", "sublayers"), "llama2": ("mixed", "channels"), "llama3": ("mixed", "drop"),
    "qwen2-window": ("drop", "before", "last", "mixed"),
    "qwen3-window": ("drop", "rewrite", "last", "mixed", "sublayers"),
    "gpt_neox-sequential": ("drop", "after", "mlp", "mixed", "heads", "channels", "stream", "sublayers"),
    "opt-350m": ("drop", "after", "before", "mlp", "mixed", "heads", "channels", "sublayers"),
}
# Loaded without the package: every way in which a family's row and classes differ (all: -m slow), and in more kinds
# those that differ in how they count heads, embed or cut.
ELSEWHERE = {
    "mixed": {*EARLIER_FAMILIES, *WIRINGS, *WIRED, "mixtral"}, "whole": ("llama3.1", "gemma3", "gpt2"),
    "layer": ("phi3", "gemma3"), "heads": ("gpt2", "gpt_neox", "llama3.1", "opt"), "channels": ("phi3",),
    "stream": ("gpt2", "gpt_neox"), "sublayers": ("llama3.1", "bloom")}


def test_every_family_is_covered() -> None:
    assert {model_type for model_type, _ in CONFIGS.values()} == set(FAMILIES)
    assert sorted(CONFIGS[name][0] for name in REPRESENTATIVES) == sorted(FAMILIES)
    assert FEWER.keys() == {*VARIANTS, *WIRED, *ALIKE, *EXPERTS}
    assert set(WIRINGS) <= set(CONFIGS)
    assert {name for name in CONFIGS if normalises_behind(build(name))} == set(NORMS_BEHIND)


class TestFamilies(FamilyContract):
    """Every kind of one config of each family; of its variants those that can differ."""

    models: ClassVar = {name: partial(build, name) for name in CONFIGS}
    kinds_in_full: ClassVar = ("mixed", "heads", "channels", "stream", "sublayers")

    @classmethod
    def cases(cls) -> list[FamilyCase]:
        return [case for case in super().cases() if case.kind in FEWER.get(case.name, KINDS)
                and case.kind not in IMPOSSIBLE.get(case.name, ())]

    def checkpoints(self, directory: Path) -> dict[Path, Tensor]:
        """Of every family and wiring; and one that was saved, with its code, by an earlier version."""
        old = CHECKPOINTS / "llama-context-heads"
        found = {old: logits_of(AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32))}
        for case in self.cases():
            if case.name in ELSEWHERE.get(case.kind, ()):
                path = directory / f"{case.name}-{case.kind}"
                case.edited.model.save_pretrained(path)
                found[path] = case.edited.logits
        return found


@pytest.mark.slow
class TestLaterFamilies(FamilyContract):
    """Every kind of the families that the suite tries in few."""

    models: ClassVar = {name: partial(build, name) for name in (*WIRED, *ALIKE, *EXPERTS)}
    kinds_elsewhere: ClassVar = ("mixed", "whole")

    @classmethod
    def cases(cls) -> list[FamilyCase]:
        return [case for case in super().cases() if case.kind not in IMPOSSIBLE.get(case.name, ())]


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
