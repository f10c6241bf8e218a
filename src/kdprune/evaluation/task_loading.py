"""Tasks as lm-eval builds them, from the hub or from local rows, loaded once a process."""

import contextlib
import difflib
import functools
import io
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from kdprune.data.tokens import TokenSet, load_stream
from kdprune.errors import KDPruneError, one_line
from kdprune.evaluation.suites import OWN, STOCK, SUITES, Local, Row, Text, local_files, stock_file
from kdprune.runtime.machine import quiet_libraries

TASK_FILES = Path(str(files("kdprune").joinpath("evaluation", "task_files")))
LOGGERS = ("lm_eval", "evaluate", "accelerate", "absl")
TEXT_TOKENS = 65_536  # of each text that are scored at most
TOKENS_PER_ITEM = 64  # of each text, for every item of a limit
CHARACTERS = 8 * TEXT_TOKENS  # read of a hub text: more than the tokens need in any tokenizer in use


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """lm-eval's log, warnings, prints and bars are kept from the user's terminal for a while.

    Its bootstrap runs in this process: its pool of processes would fork a program that has threads.
    """
    start, pool = tqdm.__init__, os.environ.get("DISABLE_MULTIPROC")

    def without_bar(bar: Any, *arguments: Any, **options: Any) -> None:
        start(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = without_bar
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with warnings.catch_warnings(), quiet_libraries(also=LOGGERS), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = start
        os.environ.pop("DISABLE_MULTIPROC") if pool is None else os.environ.update(DISABLE_MULTIPROC=pool)


@functools.cache
def harness() -> Any:
    """lm-eval, imported when it is first needed: it takes seconds. Raises KDPruneError where it is not installed."""
    try:
        with silenced():
            import lm_eval.evaluator
            import lm_eval.models.huggingface
            import lm_eval.tasks
    except ImportError as error:
        raise KDPruneError(
            f"got no lm-eval ({one_line(error)}), which evaluates tasks; install it with pip install 'kdprune[eval]'"
        ) from error
    return lm_eval


def task_names(row: Row) -> list[str]:
    """The tasks of a row, those that a * stands for included; KDPruneError where it stands for none."""
    found = []
    for name in row.tasks:
        pattern = stock_file(name) if name.endswith("*") else None
        matches = sorted(_stock_root().glob(pattern)) if pattern else []
        if pattern and not matches:
            raise KDPruneError(f"got task {name!r}, expected the beginning of one of lm-eval's names before the *")
        found += [path.stem for path in matches] if pattern else [name]
    return found


def load_task(name: str, data: Sequence[Path]) -> dict[str, Any]:
    """lm-eval's task objects of a name by their own names, several for a group.

    data: folders with ``<task>.jsonl``; a task that none of them has comes from the hub. Raises KDPruneError for an
    unknown name, and for data that cannot be had or do not have the fields that the definition asks for.
    """
    local = local_source(name, data)
    if local is None:
        return _load(name, None, None, 0)
    return _load(name, *local, local[1].stat().st_mtime_ns)


def local_source(name: str, data: Sequence[Path]) -> tuple[Local, Path] | None:
    """The first local file a task can be read from, and how."""
    candidates = ((local, folder / f"{local.file}.jsonl") for folder in data for local in local_files(name))
    return next(((local, path) for local, path in candidates if path.is_file()), None)


def _load(name: str, local: Local | None, path: Path | None, changed: int) -> dict[str, Any]:
    # Keyed by what a Local is found by: its own mappings do not hash.
    key = (name, path, changed)
    if key not in _LOADED:
        _LOADED[key] = _build(name, local, path)
    return _LOADED[key]


_LOADED: dict[tuple[str, Path | None, int], dict[str, Any]] = {}


def _build(name: str, local: Local | None, path: Path | None) -> dict[str, Any]:
    tasks = harness().tasks
    definition = _definition(name)
    try:
        with silenced():
            if definition is None:
                return dict(_index().load([name])["tasks"])
            manager = tasks.TaskManager(include_defaults=False)
            if local is None:
                return dict(manager.load([str(definition)])["tasks"])
            with tempfile.TemporaryDirectory() as folder:
                overlay = Path(folder) / "task.yaml"
                overlay.write_text(yaml.safe_dump(_overlay(name, definition, local, path)), encoding="utf-8")
                return dict(manager.load([str(overlay)])["tasks"])
    except Exception as error:  # the hub's, datasets', Jinja's and lm-eval's own, by kind of damage
        where = "from the hub" if path is None else f"from {path}"
        raise KDPruneError(
            f"cannot load task {name!r} {where} ({one_line(error)}); expected rows as lm-eval's definition reads them: "
            f"check the network, or give --suite-data with a directory that holds {local_files(name)[0].file}.jsonl"
        ) from error


def _overlay(name: str, definition: Path, local: Local, path: Path | None) -> dict[str, Any]:
    """A task file that includes the definition and says where the rows are."""
    rows = {"file": str(path), "where": dict(local.where)}
    return {
        "include": [str(definition), str(TASK_FILES / "local.yaml")], "task": name, "dataset_kwargs": rows,
        **local.changes,
    }


def _definition(name: str) -> Path | None:
    """The file that defines a task, or None where lm-eval's index has to be asked. Refuses unknown names."""
    if name in OWN:
        return TASK_FILES / f"{name}.yaml"
    stock = stock_file(name)
    if stock and (_stock_root() / stock).is_file():
        return _stock_root() / stock
    if _mentioned(name):
        with silenced():
            index = _index()
        if name in index.all_tasks:
            path = index.task_index[name].yaml_path
            return path if name in index.all_subtasks and path else None
    known = [*SUITES, *OWN, *STOCK]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(SUITES)} or names of lm-eval's tasks"
    raise KDPruneError(f"got unknown suite or task {name!r}; {hint}")


@functools.cache
def _mentioned(name: str) -> bool:
    """Whether a task file of lm-eval names it: a second's look, before the index is built."""
    word = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
    return bool(name) and any(word.search(path.read_bytes()) for path in _stock_root().rglob("*.yaml"))


def _stock_root() -> Path:
    """lm-eval's directory of task files."""
    return Path(harness().tasks.__file__).parent


@functools.cache
def _index() -> Any:
    """All of lm-eval's tasks; building it takes a quarter of a minute."""
    return harness().tasks.TaskManager()


def load_text(text: Text, data: Sequence[Path], tokenizer: Any, vocabulary: int, limit: int | None) -> TokenSet:
    """The beginning of a text as one row: 65,536 tokens, or 64 for every item of a limit if that is less."""
    most = TEXT_TOKENS if limit is None else min(TEXT_TOKENS, TOKENS_PER_ITEM * limit)
    return load_stream(text_source(text, data), tokenizer, limit=most, vocabulary=vocabulary)


def text_source(text: Text, data: Sequence[Path]) -> Path | list[str]:
    """The local file, or the beginning of the hub's. Raises KDPruneError where neither can be had."""
    found = next((folder / text.file for folder in data if (folder / text.file).is_file()), None)
    return found or _hub_text(text)


@functools.cache
def _hub_text(text: Text) -> list[str]:
    import datasets

    rows, size = [], 0
    try:
        with silenced():
            for row in datasets.load_dataset(text.hub, text.config, split=text.split, streaming=True):
                rows.append(row[text.field])
                size += len(rows[-1])
                if size >= CHARACTERS:
                    break
    except Exception as error:  # network, permission, format and naming errors of several libraries
        raise KDPruneError(
            f"cannot read the text {text.name!r} from {text.hub!r} ({one_line(error)}); "
            f"check the network, or give --suite-data with a directory that holds {text.file}"
        ) from error
    return ["".join(rows)] if text.lines else rows
