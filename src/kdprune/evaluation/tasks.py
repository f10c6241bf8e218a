"""Scores on tasks: lm-eval's model wrapper, task definitions and metrics, and perplexity on texts."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdprune.errors import KDPruneError
from kdprune.evaluation.models import evaluating, vocabulary_size
from kdprune.evaluation.perplexity import perplexity
from kdprune.evaluation.shared_contexts import SharedContexts
from kdprune.evaluation.suites import SUITES, Row, Text, local_files, suite_rows
from kdprune.evaluation.task_loading import harness, load_task, load_text, silenced, task_names, text_source
from kdprune.model.placement import input_device
from kdprune.report.task_records import TaskScore
from kdprune.runtime.stages import Stages

BOOTSTRAP = 1000  # resamples for standard errors without a formula; accuracies have one
FEWSHOT_SEED = 1234  # lm-eval's own
BATCH, CPU_BATCH = 64, 8  # requests a forward pass; rows differ in length, and a processor pays for the padding
GUESSED = ("acc", "acc_norm", "acc_bytes")  # metrics of multiple choice that guessing scores 1 / choices in
WITHOUT_CHOICE = ("acc", "exact_match", "rouge1")  # of generation and of the likeliest word: guessing scores 0


def check_suite(suite: str | Sequence[str], data: Sequence[Path] = ()) -> None:
    """Finds every task's definition and data, and keeps them for :func:`run_suite`.

    Raises KDPruneError for names that are unknown, folders that are missing or hold nothing of the suite, data that
    cannot be had, and where lm-eval is not installed.
    """
    rows = suite_rows(suite)
    if not rows:
        raise KDPruneError(f"got no task, expected {', '.join(SUITES)} or names of lm-eval's tasks")
    for folder in data:
        _check_folder(Path(folder), rows)
    for row in rows:
        if isinstance(row, Text):
            text_source(row, _paths(data))
        else:
            _tasks(row, _paths(data))


def run_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    suite: str | Sequence[str],
    *,
    data: Sequence[Path] = (),
    limit: int | None = None,
    batch_size: int | None = None,
    stages: Stages | None = None,
) -> list[TaskScore]:
    """Scores of a causal LM on suites ("small", "real", "paper") and tasks (lm-eval's names), in the suite's order.

    data: folders searched for ``<task>.jsonl`` and texts before the hub is; limit: the first `limit` items of every
    task, each of MMLU's subjects and, but for "real", BLiMP's paradigms being one, and 64 · limit tokens of every
    text; batch_size: requests a forward pass (64; 8 on a CPU). Few-shot examples are drawn with lm-eval's seed: same
    arguments, same scores. Log-probabilities are float32. The model's mode is as before afterwards. Raises KDPruneError
    as :func:`check_suite` does, and for counts below 1.
    """
    for name, number in (("limit", limit), ("batch size", batch_size)):
        if number is not None and number < 1:
            raise KDPruneError(f"got {name} {number}, expected at least 1")
    if tokenizer is None:
        raise KDPruneError("got a model without a tokenizer, expected one beside it: tasks are text")
    check_suite(suite, data)
    rows, scores = suite_rows(suite), []
    with silenced(), evaluating(model):
        wrapped = type("SharedHFLM", (SharedContexts, harness().models.huggingface.HFLM), {})(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal",
            batch_size=batch_size or (CPU_BATCH if input_device(model).type == "cpu" else BATCH),
            softmax_dtype="float32")
    with (stages or Stages()).stage("tasks", total=len(rows)) as progress:
        for row in rows:
            if isinstance(row, Text):
                scores.append(_text_score(row, model, tokenizer, _paths(data), limit))
            else:
                with evaluating(model):
                    scores += _row_scores(row, wrapped, _tasks(row, _paths(data)), row.items(limit))
            progress(1)
    return scores


def _paths(data: Sequence[Path]) -> list[Path]:
    return [Path(folder) for folder in data]


def _check_folder(folder: Path, rows: Sequence[Row | Text]) -> None:
    """Refuses a folder that is none, and one without anything of the suite."""
    if not folder.is_dir():
        raise KDPruneError(f"got --suite-data {str(folder)!r}, which is no directory; expected one with <task>.jsonl")
    wanted = [row.file for row in rows if isinstance(row, Text)]
    for row in rows:
        if isinstance(row, Row):
            wanted += [f"{local.file}.jsonl" for name in task_names(row) for local in local_files(name)]
    if not any((folder / name).is_file() for name in wanted):
        raise KDPruneError(
            f"got --suite-data {str(folder)!r} without a file of these tasks, expected for example {wanted[0]}")


def _tasks(row: Row, data: Sequence[Path]) -> dict[str, Any]:
    """The task objects of a row by name."""
    return {name: task for wanted in task_names(row) for name, task in load_task(wanted, data).items()}


def _row_scores(row: Row, wrapped: Any, tasks: Mapping[str, Any], limit: int | None) -> list[TaskScore]:
    """The row's metrics, each over all its tasks."""
    for task in tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        with silenced():
            found = harness().evaluator.evaluate(
                lm=wrapped, task_dict={"tasks": dict(tasks), "groups": {}}, limit=limit, bootstrap_iters=BOOTSTRAP,
                log_samples=True)
    except AssertionError as error:  # lm-eval's way to say that an answer or a prompt does not fit
        raise KDPruneError(
            f"got task {row.task!r} with an answer that has no token of its own or does not fit the model's "
            f"{wrapped.max_length}; leave it out") from error
    except OverflowError as error:  # of lm-eval's perplexity of words, exp of their mean loss
        raise KDPruneError(
            f"got task {row.task!r}, whose loss is too large for a perplexity; the model is broken, or load it in "
            "another dtype (--dtype float32)") from error
    return [_score(row, metric, tasks, found) for metric in row.metrics or (_first_metric(found, tasks),)]


def _first_metric(found: Mapping[str, Any], tasks: Mapping[str, Any]) -> str:
    """The metric a task names first."""
    results = found["results"][next(iter(tasks))]
    return next(key for key in results if "," in key and "_stderr," not in key)


def _score(row: Row, metric: str, tasks: Mapping[str, Any], found: Mapping[str, Any]) -> TaskScore:
    """The mean over a row's tasks; Var(Σ w v) = Σ w² stderr², as they have no item in common."""
    name, _, kind = metric.partition(",")
    kind = kind or "none"
    results = [found["results"][task] for task in tasks]
    sizes = [found["n-samples"][task]["effective"] for task in tasks]
    weights = [size / sum(sizes) if row.by_size else 1 / len(sizes) for size in sizes]
    errors = [result.get(f"{name}_stderr,{kind}") for result in results]
    chances = [_chance(task, name) for task in tasks.values()]
    known = all(isinstance(error, float) and math.isfinite(error) for error in errors)
    pairs = list(zip(weights, results, strict=True))
    return TaskScore(
        task=row.task, group=row.group or row.task, metric=name,
        value=float(sum(weight * result[f"{name},{kind}"] for weight, result in pairs)),
        stderr=math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) if known else None,
        chance=None if None in chances else sum(w * c for w, c in zip(weights, chances, strict=True) if c is not None),
        items=sum(sizes),
        higher_is_better=all(task.higher_is_better().get(name, True) for task in tasks.values()),
        right=_right(row, [_item_scores(found["samples"][task], name, kind) for task in tasks]),
    )


def _item_scores(samples: Sequence[Mapping[str, Any]], name: str, kind: str) -> list[Any]:
    """A metric of every item of a task, in the data's order; lm-eval lists each item once a filter."""
    return [item.get(name) for item in sorted(samples, key=lambda item: item["doc_id"]) if item["filter"] == kind]


def _right(row: Row, scores: Sequence[Sequence[Any]]) -> list[str]:
    """TaskScore's `right` from the scores of every task's items."""
    if not all(isinstance(value, int | float) and value in (0, 1) for values in scores for value in values):
        return []
    strings = ["".join(str(int(value)) for value in values) for values in scores]
    return ["".join(strings)] if row.by_size else strings


def _chance(task: Any, metric: str) -> float | None:
    """What guessing scores: the mean over the items of 1 / choices; 0 where there is nothing to choose from."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0 if metric in WITHOUT_CHOICE else None
    if metric not in GUESSED:
        return None
    choices: dict[int, int] = {}
    for instance in task.instances:
        choices[instance.doc_id] = choices.get(instance.doc_id, 0) + 1
    return sum(1 / count for count in choices.values()) / len(choices)


def _text_score(
    text: Text, model: PreTrainedModel, tokenizer: Any, data: Sequence[Path], limit: int | None
) -> TaskScore:
    """Perplexity as :func:`kdprune.evaluation.perplexity.perplexity` takes it, with its default window and stride."""
    tokens = load_text(text, data, tokenizer, vocabulary_size(model), limit)
    found = perplexity(model, tokens)
    return TaskScore(task="perplexity", group=text.name, metric="perplexity", value=found.value, items=found.tokens,
                     higher_is_better=False)
