"""Dependencies point one way. The ranks are data: a module imports only from its own room or from rooms above it."""

import ast
import functools
from pathlib import Path

import kdprune

ROOT = Path(kdprune.__file__).parent
# Rooms from the top (imported by all) to the bottom (imports all).
RANKS = (
    ("errors",), ("options",), ("store",), ("runtime",), ("kernel", "train", "data", "report"), ("model",),
    ("evaluation", "methods.common"), ("methods.kdp", "methods.peers"), ("methods",), ("planning",), ("run",),
    ("comparison",), ("cli",), ("__main__", "testing"),
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# What a room must not know, whatever its rank.
FOREIGN = {"kernel": {"transformers"}, "report": {"torch", "transformers"}, "train": {"transformers"}}
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


def room_of(name: str) -> str:
    """The room of a module, or of a name in it: the longest beginning that has a rank."""
    parts = name.split(".")
    return next((room for end in (2, 1) if (room := ".".join(parts[:end])) in RANK), "")


def test_every_module_has_a_rank() -> None:
    assert all(room_of(name_of(path)) for path in FILES)


def test_few_files_stand_at_the_root() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__", "errors", "options"}


def test_imports_point_upwards() -> None:
    wrong = []
    for path in FILES:
        room = room_of(name_of(path))
        for module, _ in imports(path):
            top, _, rest = module.partition(".")
            if top == "kdprune" and (other := room_of(rest)) and other != room and RANK[other] >= RANK[room]:
                wrong.append(f"{name_of(path)} imports {module}, which stands below it")
            if top in FOREIGN.get(room, set()):
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong


def test_internal_imports_stand_at_the_top() -> None:
    assert not [
        f"{name_of(path)} imports {module} inside a function"
        for path in FILES if name_of(path) != "model.serving"
        for module, top_level in imports(path) if not top_level and module.startswith("kdprune")]


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
