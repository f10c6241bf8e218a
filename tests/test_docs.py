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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


NAMED = re.compile(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)(?:: (\w+))?")


@pytest.mark.parametrize("page", [page for page in PAGES if "docs" in page.parts], ids=lambda page: page.stem)
def test_named_code_is_there(page: Path) -> None:
    for path, name in NAMED.findall(page.read_text(encoding="utf-8")):
        files = [folder / path for folder in (ROOT, ROOT / "src" / "kdprune") if (folder / path).is_file()]
        assert files, f"{page.name} names {path}"
        assert not name or re.search(rf"\b{name}\b", files[0].read_text(encoding="utf-8")), f"{path} has no {name}"
