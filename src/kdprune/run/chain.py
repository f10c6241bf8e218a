"""How a model had been pruned before: from its config, or from the record of the run that wrote it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel

from kdprune.errors import KDPruneError, one_line
from kdprune.model.surgery import earlier_blocks
from kdprune.report.chain_record import Step
from kdprune.report.results import Results
from kdprune.store.directories import RECORD
from kdprune.store.files import is_there


def chain_of(model: PreTrainedModel) -> list[Step]:
    """The prunings that made this model, the first first; empty for a dense one.

    A model with stand-ins or widths says it in ``config.kdp["chain"]``; a stock one has it in the ``results.json`` that
    was written beside its weights, if they come from there. Of a model edited by hand the blocks alone are known.
    """
    record: dict[str, Any] = getattr(model.config, "kdp", None) or {}
    if "chain" in record:
        return [_step(step, model.config.name_or_path or "a model") for step in record["chain"]]
    found = _beside(model)
    if found is not None:
        return [*found.chain, step_of(found)]
    return [Step(blocks=[(start, end) for start, end in blocks]) for blocks in earlier_blocks(model.config)]


def _step(said: Mapping[str, Any], name: str) -> Step:
    """A step as a config says it; what a later version says besides is passed over."""
    try:
        return Step(**{key: value for key, value in said.items() if key in Step.model_fields})
    except ValidationError as error:
        raise KDPruneError(f"got config.json of {name}, whose kdp.chain is not one of earlier prunings "
                           f"({one_line(error)}); take the entry out, or fetch the model again") from error


def step_of(results: Results) -> Step:
    """What later runs are told of this one."""
    return Step(model=results.model, method=results.method, blocks=results.blocks, layers=results.layers,
                parameters=results.parameters)


def write_chain(model: PreTrainedModel, results: Results) -> None:
    """Puts all of it, this run too, into the config of a pruned model that is not of a stock class."""
    record = getattr(model.config, "kdp", None)
    if record is not None:
        steps = [*results.chain, step_of(results)]
        record["chain"] = [step.model_dump(mode="json", exclude_defaults=True) for step in steps]
        record.pop("earlier", None)  # says less


def _beside(model: PreTrainedModel) -> Results | None:
    """The record of the run that wrote the model's weights, if it lies beside them and is of a model of this size."""
    name = model.config.name_or_path
    if not name or not is_there(name) or not (Path(name) / RECORD).is_file():
        return None
    try:
        found = Results.load(name)
    except KDPruneError:  # of something else
        return None
    return found if found.parameters.pruned == model.num_parameters() else None
