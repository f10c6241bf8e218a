"""``results.json``: everything one run found, and the only input of the report.

The parts are defined in `records`; ``docs/results-schema.md`` lists every field.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from kdprune.errors import DiskError, KDPruneError
from kdprune.report.analysis_record import Analysis
from kdprune.report.chain_record import Step
from kdprune.report.heal_record import Heal
from kdprune.report.records import (
    Block,
    Calibration,
    Curve,
    Fit,
    FreeForm,
    KernelTraining,
    Norms,
    Number,
    Outliers,
    Pace,
    Perplexity,
    Record,
    Sample,
    Search,
    Speed,
)
from kdprune.report.size_records import KVCache, Layers, LayerWidth, Parameters
from kdprune.store.files import whole_file

__all__ = [
    "SCHEMA_VERSION",
    "Analysis",
    "Calibration",
    "Curve",
    "Fit",
    "Heal",
    "KVCache",
    "KernelTraining",
    "LayerWidth",
    "Layers",
    "Norms",
    "Outliers",
    "Pace",
    "Parameters",
    "Perplexity",
    "Results",
    "Sample",
    "Search",
    "Speed",
    "Step",
]

SCHEMA_VERSION = 1
R = TypeVar("R", bound=Record)


class Results(Record):
    """One run. What a run did not do is left at its default (null, or an empty list)."""

    schema_version: int = Field(SCHEMA_VERSION, description="version of this schema")
    created: str = Field(description="when the run ended, ISO 8601")
    model: str = Field(description="the dense model as the user named it")
    family: str = Field("", description="its model_type")
    method: str = Field(description="kdp, or another method's name")
    recipe: FreeForm = Field(default_factory=dict, description="every option of the run; repeats it")
    seed: int = Field(0, description="seed of the run")
    blocks: list[Block] = Field(default_factory=list, description="[[start, end], …], half-open")
    chain: list[Step] = Field(
        default_factory=list, description="earlier prunings of the model, the first first; empty: it was dense")
    layers: Layers = Field(description="decoder layers")
    parameters: Parameters = Field(description="parameters")
    perplexity: Perplexity | None = Field(None, description="perplexity on held-out text")
    texts: list[Perplexity] = Field(
        default_factory=list, description="the same at other windows and on other held-out texts")
    streamed: bool = Field(
        False, description="whether layers were read from disk as they ran; then neither speed nor samples are taken")
    speed: Speed | None = Field(None, description="tokens per second")
    kv_cache_bytes_per_token: KVCache | None = Field(None, description="key-value cache per token, bytes")
    calibration: Calibration | None = Field(None, description="calibration text")
    analysis: Analysis | None = Field(None, description="similarity of layer states")
    fit: list[Fit] = Field(default_factory=list, description="one entry per stand-in, in the order of blocks")
    search: Search | None = Field(None, description="the search for what goes, where many models were tried")
    heal: Heal | None = Field(None, description="training of the pruned model after pruning")
    widths: list[LayerWidth] = Field(default_factory=list, description="the layers that were made narrower")
    stock: bool | None = Field(
        None, description="whether the checkpoint is of a class of transformers, which loads without kdprune; null in "
        "older records")
    samples: list[Sample] = Field(default_factory=list, description="text from both models")
    seconds: dict[str, Number] = Field(default_factory=dict, description="wall-clock seconds per stage")
    peak_memory_bytes: int | None = Field(None, description="largest memory in use, bytes")
    versions: dict[str, str] = Field(default_factory=dict, description="versions of the software used")
    files: list[str] = Field(
        default_factory=list, description="what was written beside it: with --overwrite nothing else is replaced")

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, record: Any) -> Any:
        """Records had the blocks of earlier prunings alone."""
        if isinstance(record, dict) and "earlier" in record:
            steps = [{"blocks": blocks} for blocks in record["earlier"]]
            return {"chain": steps, **{key: value for key, value in record.items() if key != "earlier"}}
        return record

    @model_validator(mode="after")
    def _within(self) -> "Results":
        """Blocks are of layers that there are."""
        for start, end in self.blocks:
            if not 0 <= start < end <= self.layers.dense:
                raise ValueError(f"block [{start}, {end}) of a model of {self.layers.dense} layers")
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read a results.json (or the one in a run's folder); every mistake is one KDPruneError line."""
        return cls.parse(*read_record(path, "prune"))

    @classmethod
    def parse(cls, record: Any, source: str = "results") -> "Results":
        """Check a parsed record; `source` names it in the error."""
        return parsed(cls, record, source, SCHEMA_VERSION)

    def to_json(self) -> str:
        """Strictly valid JSON (no NaN), one line per list of numbers."""
        return encode(self.model_dump(mode="json")) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write results.json atomically: readers see the old file or the whole new one."""
        return write_file(path, self.to_json())


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write a sibling, then rename it over `path`; on an error nothing half-written is left behind."""
    file, data = Path(path), content.encode() if isinstance(content, str) else content
    try:
        with whole_file(file) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise DiskError(f"cannot write {file}: {error.strerror}") from error
    return file


def first_problem(error: ValidationError) -> str:
    """The first mistake and how many more there are, on one line."""
    details = error.errors(include_url=False)
    where = ".".join(str(part) for part in details[0]["loc"]) or "record"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {details[0]['msg']}{more}"


def encode(value: Any, indent: int = 0) -> str:
    """JSON with objects and lists of objects spread over lines, lists of scalars kept on one."""
    pad, end = "  " * (indent + 1), "\n" + "  " * indent
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(k, ensure_ascii=False)}: {encode(v, indent + 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(pad + item for item in items) + end + "}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(pad + encode(item, indent + 1) for item in value) + end + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_record(path: str | Path, command: str) -> tuple[Any, str]:
    """What a results.json holds, or the one in a folder, and its name; every mistake is one KDPruneError line.

    Args:
        path: the file or the folder.
        command: of kdprune, that writes such a file.
    """
    file = Path(path)
    file = file / "results.json" if file.is_dir() else file
    if not file.is_file():
        raise KDPruneError(f"{file} does not exist: give the results.json that `kdprune {command}` wrote")
    try:
        return json.loads(file.read_text(encoding="utf-8")), str(file)
    except OSError as error:
        raise KDPruneError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise KDPruneError(f"{file} is not valid JSON ({error}): run `kdprune {command}` again") from error


def parsed(kind: type[R], record: Any, source: str, version: int) -> R:
    """A record of this kind and version from what a file holds; ``source`` names it in the KDPruneError."""
    if not isinstance(record, dict):
        raise KDPruneError(f"{source} holds a {type(record).__name__}, expected an object")
    if (found := record.get("schema_version")) != version:
        raise KDPruneError(f"{source} has schema version {found}, this kdprune reads {version}: "
                           "use the kdprune that wrote it, or run again")
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        raise KDPruneError(f"{source} does not follow the schema: {first_problem(error)}") from error
