"""The option groups of the commands, and Python signatures and docstrings that spell them out."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdprune.data.sources import has_columns, in_column, parse_named, parse_weighted
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.methods.common.method import Method, RankedMethod
from kdprune.options import Option, option, options_of, parse_numbers, parse_seeds, same_option
from kdprune.run.heal import Heal
from kdprune.run.resources import Resources

Command = TypeVar("Command", bound=Callable[..., Any])


LARGEST_SEED = 2**32 - 1  # what every generator of numbers takes
MOST_SEEDS = 1_000


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is read."""

    model: Any = option(
        None, "hub id, directory or .gguf file (the bundled reference model)", group="model", positional=True,
        path=True,
        in_python="or a loaded model, whose weights stay as they are: the result shares those it keeps")
    tokenizer: Any = option(
        None, "of the text, where a loaded model is given: a tokenizer, directory or hub id (the model's)",
        group="model", places=("python", "recipe"), recorded=False, path=True)
    dtype: str | None = option(
        None, "to load the model in: float32, bfloat16, … (the checkpoint's; a CPU that lacks its arithmetic computes "
        "in float32 and saves in the checkpoint's)", group="model",
        in_python="a loaded model keeps its own")
    trust_remote_code: bool = option(
        False, "run code that comes with the checkpoint", group="model", rare=True, recorded=False)


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Which method; its own options are the fields of its dataclass."""

    method: str = option("kdp", f"one of {', '.join(METHODS)}", group="model")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Calibration text."""

    calibration: Any = option(
        None, "text file (.txt, .jsonl, .json, .csv, .parquet, also .gz), directory or hub data set name[:config]; "
        "repeated with =weight: a mixture (the bundled text)", group="data", several=True, parse=parse_weighted,
        path=True, in_python="or a datasets.Dataset, a list of strings, {source: weight}, token ids (N, T)")
    text_field: str | None = option(
        None, "column of the rows that holds the text, or a conversation for the chat template (text, messages, "
        "conversations, prompt with completion, or content)", group="data", rare=True)
    samples: int | None = option(
        None, "rows of calibration text (4000; 64 of the bundled text)", group="data", least=1)
    length: int | None = option(None, "tokens a row (the model's context, at most 512)", group="data", least=2)

    def __post_init__(self) -> None:
        """Every text knows its column, wherever it is read. Raises KDPruneError for a column of no text."""
        texts = (self.calibration, getattr(self, "heldout", None))
        if self.text_field is not None and not any(map(has_columns, texts)):
            raise KDPruneError(f"got text_field {self.text_field!r} without a text that has columns, expected one; "
                               "plain text and the bundled one have none: leave text_field out")
        for name in ("calibration", "heldout"):
            if hasattr(self, name):
                object.__setattr__(self, name, in_column(getattr(self, name), self.text_field))


@dataclass(frozen=True, kw_only=True)
class DataOptions(TextOptions):
    """Calibration and held-out text."""

    heldout: Any = option(
        None, "text for perplexity; repeated, with or without NAME= before it: more texts, each on its own (the "
        "bundled text)", group="data", several=True, parse=parse_named, path=True,
        in_python="or {name: text}, or token ids; without a tokenizer the calibration rows kept out of every fit")
    heldout_tokens: int | None = option(
        None, "tokens of each that are scored (an eighth of the calibration tokens among all texts; 4,096 to 65,536)",
        group="data", least=32, rare=True)
    windows: tuple[int, ...] = option(
        (), "tokens a window of perplexity, with commas (the model's context, at most 2048, and the length of the "
        "calibration rows)", group="data", rare=True, parse=parse_numbers)


@dataclass(frozen=True, kw_only=True)
class SeedOptions:
    """What random draws follow from."""

    seed: int = option(0, "of every random draw", least=0, most=LARGEST_SEED, group="data")


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """What the plots of an analysis mark."""

    protect: float = same_option(RankedMethod, "protect")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go."""

    output_dir: str | Path | None = option(
        None, "directory to write", group="output", flag="--output", short="-o", recorded=False, path=True)
    overwrite: bool = option(
        False, "replace an earlier result there", group="output", recorded=False)
    progress: bool = option(
        False, "show a progress bar a stage, on stderr if that is a terminal", group="output", places=("python",),
        recorded=False)


@dataclass(frozen=True, kw_only=True)
class ComparisonOutput(OutputOptions):
    """Where a comparison goes on, or starts anew."""

    overwrite: bool = option(
        False, "start anew, earlier runs in this directory are deleted", group="output", recorded=False)


@dataclass(frozen=True, kw_only=True)
class SeedsOptions:
    """What all variants of a comparison share."""

    ratio: float = same_option(Method, "ratio")
    of: Literal["all", "layers"] = same_option(Method, "of")
    seeds: int | tuple[int, ...] = option(
        3, "how many (3: 0, 1, 2), or which (0,4,7); a seed orders the calibration text and is that of every draw",
        group="data", parse=parse_seeds)

    def seed_list(self) -> list[int]:
        """N → 0 … N − 1; a list as it is, each once."""
        given = range(min(self.seeds, MOST_SEEDS + 1)) if isinstance(self.seeds, int) else self.seeds
        found = list(dict.fromkeys(given))
        if not 1 <= len(found) <= MOST_SEEDS or min(found) < 0 or max(found) > LARGEST_SEED:
            raise KDPruneError(f"got seeds {self.seeds}, expected a number of seeds from 1 to {MOST_SEEDS}, or a list "
                               f"of them, each from 0 to {LARGEST_SEED}")
        return found


@dataclass(frozen=True, kw_only=True)
class CompareOptions(SeedsOptions):
    """Which variants are compared."""

    methods: str | tuple[str, ...] = option(
        ",".join(METHODS), "variants, with commas: names of methods, with options as in kdp:kernel=fixed:rank=8",
        group="model")
    blocks_from: str | None = option(
        None, "a variant whose blocks all depth methods take that name none, so that only stand-ins differ",
        group="size")


@dataclass(frozen=True, kw_only=True)
class AblateOptions(SeedsOptions):
    """Which parts of KDP are changed."""

    base: str = option(
        "kdp:kernel=linear+learned+data:ranking=similarity",
        "the variant of kdp that is varied; by default with every part of the kernel, so that each can be left out",
        group="model")
    only: str | tuple[str, ...] = option((), "names of parts, with commas (all)", group="model")


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Tasks that models are scored on."""

    suite: str | None = option(
        None, "tasks through lm-eval to score: small, real, paper, or names of its tasks with commas (none)",
        group="data")
    suite_data: tuple[str | Path, ...] = option(
        (), "directory with <task>.jsonl and texts, searched before the hub; repeated for more", group="data",
        several=True, path=True)
    limit: int | None = option(
        None, "items a task, the first; 64 tokens a text for each; real divides it among BLiMP's paradigms (all)",
        group="data", least=1)


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Whether models write."""

    generate: int | None = option(
        None, "prompts, of 64 tokens from the held-out texts, that both models continue by 64, greedily: how long the "
        "text stays the same, and what repeats (none)", group="data", least=1)


PRUNE = (MethodOptions, ModelOptions, DataOptions, SeedOptions, Heal, Resources, OutputOptions)
ANALYZE = (ModelOptions, TextOptions, SeedOptions, AnalysisOptions, Resources, OutputOptions)
COMPARE = (
    CompareOptions, ModelOptions, DataOptions, SuiteOptions, GenerationOptions, Heal, Resources, ComparisonOutput)
ABLATE = (AblateOptions, ModelOptions, DataOptions, SuiteOptions, GenerationOptions, Resources, ComparisonOutput)


class _NotGiven:
    """The default of a parameter that tells what was given, None or the default among it, from what was not."""

    def __repr__(self) -> str:
        return "not given"


NOT_GIVEN: Any = _NotGiven()


def given(options: Mapping[str, Any], **named: Any) -> dict[str, Any]:
    """Named parameters that were given, and all of ``options``."""
    return {**{name: value for name, value in named.items() if value is not NOT_GIVEN}, **options}


def spelled_out(groups: tuple[type, ...], method: type[Method] | None = None) -> Callable[[Command], Command]:
    """Gives a function that takes ``**options`` a signature and a docstring with all options of the groups.

    Args:
        groups: what its options are.
        method: a method whose fields are options too.
    """
    known = {name: item for name, item in options_of(*groups).items() if "python" in item.places}
    own = {} if method is None else options_of(method)

    def spelled(function: Command) -> Command:
        written = inspect.signature(function)
        named = [item for item in written.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        rest = [item for item in written.parameters.values() if item.kind is inspect.Parameter.VAR_KEYWORD]
        parameters = [
            item.replace(default=known[item.name].default, annotation=known[item.name].kind)
            if item.name in known else item for item in named]
        names = {item.name for item in named}
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.kind)
            for name, item in {**known, **own}.items() if name not in names]
        function.__signature__ = written.replace(  # type: ignore[attr-defined]
            parameters=[*parameters, *(rest if own else [])])
        if function.__doc__:  # not there under python -OO
            function.__doc__ = inspect.cleandoc(function.__doc__).replace(
                "{options}", "\n    ".join(_argument(item) for item in {**known, **own}.values()))
        return function

    return spelled


def _argument(item: Option) -> str:
    """A line of an Args section, wrapped."""
    return textwrap.fill(f"{item.name}: {item.python_text}", 110, subsequent_indent=" " * 8, break_on_hyphens=False)
