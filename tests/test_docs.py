"""What the documentation shows as code runs as it stands there, and its links lead somewhere."""

import re
import textwrap
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from families import build

import kdprune
from kdprune.methods import METHODS
from kdprune.methods.common.method import Method
from kdprune.testing import MethodContract

ROOT = Path(__file__).parent.parent
PAGES = [page for page in sorted(ROOT.rglob("*.md")) if ".git" not in page.parts and "fixtures" not in page.parts]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def example() -> type[Method]:
    """The class of the first code block of docs/add-a-method.md, executed."""
    text = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    block = re.search(r"^    from dataclasses(?:.*\n)(?:    .*\n|\n)+", text, re.M)
    assert block is not None
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(textwrap.dedent(block[0]), "docs/add-a-method.md", "exec"), names)
    found = names["Middle"]
    assert isinstance(found, type)
    assert issubclass(found, Method)
    return found


class TestTheExample(MethodContract):
    """The contract of every method holds for the one that the documentation adds."""

    models: ClassVar = {name: lambda name=name: build(name) for name in ("llama3", "gpt2")}

    @staticmethod
    def method() -> Method:
        return example()(ratio=0.15)


def test_the_method_that_the_documentation_adds_prunes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "middle", example())
    model = build("llama3")
    ids = torch.randint(3, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    result = kdprune.prune(model, method="middle", ratio=0.15, calibration=ids, heldout=ids[:4], place=1.0)
    assert result.blocks[-1].stop == len(model.model.layers)
    assert result.results.parameters.net_ratio >= 0.15


def test_links_lead_to_files() -> None:
    assert not [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()]


NAMED = re.compile(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)(?:: (\w+))?")


def test_named_code_is_there() -> None:
    wrong = []
    for page in (page for page in PAGES if "docs" in page.parts):
        for path, name in NAMED.findall(page.read_text(encoding="utf-8")):
            files = [folder / path for folder in (ROOT, ROOT / "src" / "kdprune") if (folder / path).is_file()]
            if not files:
                wrong.append(f"{page.name} names {path}")
            elif name and not re.search(rf"\b{name}\b", files[0].read_text(encoding="utf-8")):
                wrong.append(f"{page.name} names {name}, which {path} has not")
    assert not wrong
