"""A model without weights, pruned as KDP would prune it, and the work that this is, by count."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError, one_line, shortened
from kdprune.evaluation.flops import forward_flops
from kdprune.evaluation.models import vocabulary_size
from kdprune.evaluation.perplexity import default_batch
from kdprune.methods.common.budget import (
    Budget,
    layer_sizes,
    possible_blocks,
    select_by_similarity,
)
from kdprune.methods.common.shape import Candidate
from kdprune.methods.kdp.damage import trials
from kdprune.methods.kdp.kdp import KDP
from kdprune.methods.kdp.measuring import boundaries_of, damage_rows, fit_rows
from kdprune.model.edits import Substitute
from kdprune.model.families import has_experts
from kdprune.model.forms import check_adapter, check_quantised, located
from kdprune.model.loading import HUB_ID, read_config, resolve_dtype
from kdprune.model.surgery import apply_edits, context_layer, ordinary_layer
from kdprune.planning.forecast import Choice, Job
from kdprune.runtime.machine import generator, quiet_libraries
from kdprune.store.files import is_there

FALL = 0.01  # of log similarity a layer: no data are seen, so that similarity is taken to fall evenly with distance


def meta_model(model: str | Path | PreTrainedConfig, dtype: Any = None) -> PreTrainedModel:
    """The model of a config, or of the one at this place, on the meta device: modules and shapes, no weights.

    Raises:
        KDPruneError: there is no config, it is damaged, or it describes no causal LM of a known family.
    """
    wanted = resolve_dtype(dtype)
    # A copy: what is set of this model's config below is not set of the one that has weights.
    config = copy.deepcopy(model) if isinstance(model, PreTrainedConfig) else _config(model)
    found = getattr(config, "dtype", None)
    try:
        with quiet_libraries(), torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, dtype=wanted or resolve_dtype(found) or torch.float32)
    except KDPruneError:
        raise
    except Exception as error:  # sizes that do not go together fail in many ways
        raise KDPruneError(f"cannot build a model from {str(model)!r} ({one_line(error)}); expected the config of a "
                           "causal LM, check its sizes") from error
    if has_experts(made):  # of the ways to run them the one that takes any dtype without values
        made.set_experts_implementation("batched_mm")
    return made.eval()


def _config(name: str | Path) -> PreTrainedConfig:
    path, there = Path(name), is_there(name)
    if not there and not HUB_ID.fullmatch(str(name)):
        raise KDPruneError(f"got model {shortened(name)}, no such directory or file; expected a directory with "
                           "config.json, that file, a .gguf file, or a hub id")
    check_adapter(name)
    if path.is_dir() and not located(name)[1] and not (path / "config.json").is_file():
        raise KDPruneError(f"got {path} without config.json, expected one in it; check the path")
    try:
        with quiet_libraries():
            config = read_config(name, trust_remote_code=False)
        check_quantised(config, name, packages=False)
        return config
    except KDPruneError:
        raise
    except Exception as error:  # transformers and the hub client raise many kinds
        kind = "cannot read the config" if there else "no such directory here, and the hub gave no config"
        raise KDPruneError(f"got model {str(name)!r}: {kind} ({one_line(error)}); expected the config.json of a causal "
                           "LM") from error


def layout(method: KDP, dense: PreTrainedModel) -> list[Candidate]:
    """Blocks and stand-ins as KDP chooses them by a similarity that falls with distance; what damage it would measure
    is not known."""
    budget = method.budget(dense)
    by = replace(method, ranking="similarity")
    blocks = select_by_similarity(by, even_similarity(len(budget.layers)), budget)
    return budget.candidates(blocks, bool(method.fill))


def even_similarity(layers: int) -> Tensor:
    """Between the states of so many layers, (L+1, L+1), as it may be when no data are seen."""
    index = torch.arange(layers + 1.0)
    return (-FALL * (index[:, None] - index).abs()).exp()


def added_parameters(method: KDP, dense: PreTrainedModel, chosen: list[Candidate]) -> list[int]:
    """Parameters put in the place of every block."""
    budget = Budget(dense, chosen[0].shape, method.target(dense))
    return [sum(budget.layers[index] for index in found.block) - budget.removal(found.block, found.shape)
            for found in chosen]


def prune_meta(dense: PreTrainedModel, chosen: list[Candidate]) -> PreTrainedModel:
    """The meta model with stand-ins in the place of the blocks."""
    edits = []
    for block, shape in ((found.block, found.shape) for found in chosen):
        with torch.device("meta"):
            stand_in = shape.build(generator(0))
        source = shape.source(block)
        if shape.ordinary and source is not None:
            edits.append(Substitute(block, None, ordinary_layer(dense, source, channels=shape.channels), source))
            continue
        context = None if source is None else context_layer(dense, source, stand_in)
        edits.append(Substitute(block, stand_in, context, source))
    return apply_edits(dense, edits).eval()


def job_of(
    method: KDP, dense: PreTrainedModel, pruned: PreTrainedModel, chosen: list[Candidate], tokens: TokenSet,
) -> Job:
    """What the forecast counts from; stand-ins are taken to be as wide as the first, which is the widest."""
    blocks, shape = [found.block for found in chosen], chosen[0].shape
    rows, length = tokens.ids.shape
    sizes, itemsize = layer_sizes(dense), dense.dtype.itemsize
    stack, left = (forward_flops(model, 1, length, logits=0) / length for model in (dense, pruned))
    layer, path = stack / len(sizes), method.path_rows(tokens, shape)
    kept = len(sizes) - sum(map(len, blocks))
    return Job(
        width=dense.config.hidden_size, layers=len(sizes), itemsize=itemsize, rows=rows, length=length,
        held=tokens.held_out(method.held), blocks=blocks, shape=shape, settings=method.settings(shape, tokens),
        path=(path.fit, path.held), sequential=bool(method.sequential), layer=layer,
        replacement=max(left - kept * layer, 0.0) / len(blocks), weights=dense.num_parameters() * itemsize,
        outside=(dense.num_parameters() - sum(sizes)) * itemsize,
        added=max(added_parameters(method, dense, chosen)), choice=choice_of(method, dense, chosen, tokens))


def choice_of(method: KDP, dense: PreTrainedModel, chosen: list[Candidate], tokens: TokenSet) -> Choice | None:
    """What choosing such blocks by damage may take; None where they are not chosen so."""
    if not method.measures:
        return None
    budget, widest = method.budget(dense), chosen[0].shape
    blocks, length = possible_blocks(method, budget), tokens.ids.shape[1]
    start = select_by_similarity(method, even_similarity(len(budget.layers)), budget, blocks)
    alone, sets, passed = trials(tokens, blocks, method.held, dense, len(start))
    fitted, scored = fit_rows(tokens, method.held, widest.width).tokens, damage_rows(tokens, method.held).tokens
    return Choice(
        collected=fitted + scored, passed=passed, fits=[(budget.shape, alone), (widest, sets * len(chosen))],
        fitted=fitted, boundaries=len(boundaries_of(blocks, len(layer_sizes(dense)))),
        logits=min(default_batch(dense, length, copies=2) * length, scored) * vocabulary_size(dense))
