"""Dependencies point one way. The ranks are data: a module imports only from its own room or from rooms above it."""

import ast
import functools
from pathlib import Path

import pytest

import kdprune

ROOT = Path(kdprune.__file__).parent
# Rooms from the top (imported by all) to the bottom (imports all).
RANKS = (
    ("errors",), ("files",), ("runtime", "output", "world", "memory", "tensors"), ("text",), ("data",),
    ("identity", "chunks", "checkpoints"), ("states", "work", "gradients"), ("keeper",),
    ("kernel", "training", "selection"), ("model",), ("evaluation", "methods"), ("report",), ("analysis",),
    ("assemble",), ("resources",), ("recipe", "forecast"), ("session",), ("heal",), ("pipeline",),
    ("variants", "planning"), ("units",), ("comparison",), ("cli",), ("__main__",), ("testing",),
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# What a room must not know, whatever its rank.
FOREIGN = {"kernel": {"transformers"}, "report": {"torch", "transformers"}, "selection": {"transformers"}}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, whether it stands at the top level) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["kdprune", *path.relative_to(ROOT).parts[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            found += [(f"{module}.{alias.name}", node in tree.body) for alias in node.names]
    return found


def test_every_module_has_a_rank() -> None:
    assert {name_of(path).split(".")[0] for path in FILES} <= RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_upwards(path: Path) -> None:
    room = name_of(path).split(".")[0]
    for module, _ in imports(path):
        top, _, rest = module.partition(".")
        if top == "kdprune" and rest and rest.split(".")[0] in RANK:
            other = rest.split(".")[0]
            assert other == room or RANK[other] < RANK[room], f"{name_of(path)} imports {module}, which stands below it"
        assert top not in FOREIGN.get(room, set()), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) not in ("model.serving",)], ids=name_of)
def test_internal_imports_stand_at_the_top(path: Path) -> None:
    inner = [module for module, top_level in imports(path) if not top_level and module.startswith("kdprune")]
    assert not inner, f"{name_of(path)} imports {inner} inside a function"


def test_no_import_cycles_between_modules() -> None:
    names = {name_of(path): path for path in FILES}

    def targets(path: Path) -> set[str]:
        found = set()
        for module, _ in imports(path):
            rest = module.removeprefix("kdprune.")
            found |= {name for name in (rest, rest.rpartition(".")[0]) if name in names and names[name] != path}
        return found

    edges = {name: targets(path) for name, path in names.items()}
    for start in edges:
        seen: set[str] = set()
        todo = list(edges[start])
        while todo:
            name = todo.pop()
            assert name != start, f"{start} takes part in an import cycle"
            if name not in seen:
                seen.add(name)
                todo += edges[name]
