"""What pruning a model would give and take, from its config alone: no weights are read, no data are seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kdprune.data.sources import BUNDLED_MODEL
from kdprune.data.tokens import DEFAULT_SAMPLES, LONGEST_ROW, TokenSet
from kdprune.errors import KDPruneError
from kdprune.evaluation.flops import forward_flops
from kdprune.evaluation.models import longest_context
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods import make_method
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.families import inactive_parameters, outside_embeddings
from kdprune.model.forms import quantised_by
from kdprune.planning.forecast import Device, Job, device_of_name
from kdprune.planning.meta import added_parameters, job_of, layout, meta_model, prune_meta
from kdprune.runtime.memory import parse_bytes


@dataclass(frozen=True)
class Side:
    """The dense or the pruned model.

    Attributes:
        parameters_layers: those outside the embeddings.
        disk_bytes: of the safetensors.
        kv_bytes: of keys and values a token.
        active: parameters that a token goes through: of experts only those chosen for it.
        prefill_flops: operations a token in reading a row, head included.
        decode_flops: operations in writing one token behind it.
    """

    layers: int
    parameters: int
    parameters_layers: int
    active: int
    disk_bytes: int
    kv_bytes: int
    prefill_flops: float
    decode_flops: float


@dataclass(frozen=True)
class Need:
    """Memory of one way to run: whole or streamed; ``device_bytes`` is None where the host computes.

    Attributes:
        analysis_bytes: of the host while layers are scored.
        taken: by ``prune``, as the device and the host's budget have it; None where neither is known.
    """

    streamed: bool
    host_bytes: int
    device_bytes: int | None
    analysis_bytes: int
    taken: bool | None


@dataclass(frozen=True)
class Stage:
    """What a stage takes, in forward passes of the layer stack over the calibration set and in seconds."""

    name: str
    passes: float
    seconds: float


@dataclass(frozen=True)
class PruningPlan:
    """What :func:`plan` finds.

    Attributes:
        ratio: asked for.
        of: what it is a share of: all parameters, or those outside the embeddings (layers).
        net_ratio: what these blocks and stand-ins give, of all parameters.
        net_ratio_layers: the same of those outside the embeddings.
        given: whether the blocks were named.
        kind: feature map of the stand-ins.
        features: m of the first, which is the widest; others may have a unit less.
        channels: c of it.
        hidden: width of the inverse's hidden layer.
        context: whether an attention sublayer stands before them.
        ordinary: whether each is an ordinary decoder layer.
        added: parameters of each with what stands before it.
        states_bytes: on disk, or in memory without a work directory.
        scratch_bytes: of a streamed model's analysis.
        forward_seconds: of one pass of the layer stack over the calibration set.
        stored: method by which the checkpoint's weights are quantised, which are turned back into full precision.
    """

    model: str
    model_type: str
    dtype: str
    ratio: float
    of: str
    net_ratio: float
    net_ratio_layers: float
    blocks: list[tuple[int, int]]
    given: bool
    kind: str
    features: int
    channels: int
    hidden: int
    context: bool
    ordinary: bool
    added: list[int]
    samples: int
    length: int
    dense: Side
    pruned: Side
    states_bytes: int
    scratch_bytes: int
    memory: list[Need]
    device: Device
    forward_seconds: float
    stages: list[Stage]
    stored: str | None = None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)


def plan(
    model: str | Path | None = None, *, ratio: float = 0.25, dtype: str | None = None, samples: int | None = None,
    length: int | None = None, host_memory: str | None = None, device: str = "h100", tflops: float | None = None,
    utilisation: float | None = None, **options: Any,
) -> PruningPlan:
    """What ``prune`` would give and take.

    Args:
        model: directory with config.json, that file, or hub id; None: the bundled reference model.
        ratio: as of :func:`kdprune.prune`, like the following four.
        dtype: of the model.
        samples: rows of calibration text.
        length: tokens a row.
        host_memory: that prune may take.
        device: a name in ``forecast.DEVICES``.
        tflops: its bfloat16 peak instead.
        utilisation: share of the peaks.
        options: fields of KDP. Without ``blocks`` these are the lengths its own selection takes when similarity falls
            evenly with distance: the least net removal at or above the ratio; data would say where they lie.

    Raises:
        KDPruneError: anything wrong with what was given, in one line.
    """
    method = make_method("kdp", {"ratio": ratio, **options})
    assert isinstance(method, KDP)
    place = device_of_name(device, tflops, utilisation)
    dense = meta_model(BUNDLED_MODEL if model is None else model, dtype)
    tokens = _calibration(dense, samples, length)
    method.check(dense, tokens)
    chosen = layout(method, dense)
    pruned, shape = prune_meta(dense, chosen), chosen[0].shape
    row = tokens.ids.shape[1]
    job = job_of(method, dense, pruned, chosen, tokens)
    accelerator = place.bandwidth is not None or tflops is not None
    needs = _needs(job, place, accelerator, None if host_memory is None else parse_bytes(host_memory))
    forward = job.forward().seconds(place, job.itemsize)
    seconds = {name: work.seconds(place, job.itemsize) for name, work in job.stages().items()}
    dense_side, pruned_side = (_side(found, row) for found in (dense, pruned))
    return PruningPlan(
        model="kdprune bundled reference model" if model is None else str(model),
        model_type=dense.config.model_type, dtype=str(dense.dtype).removeprefix("torch."), ratio=ratio,
        of=method.of, net_ratio=1 - pruned_side.parameters / dense_side.parameters,
        net_ratio_layers=1 - pruned_side.parameters_layers / dense_side.parameters_layers,
        blocks=[(found.start, found.stop) for found in chosen], given=method.blocks is not None, kind=shape.kind,
        features=shape.features, channels=shape.channels, hidden=shape.hidden, context=shape.context,
        ordinary=shape.ordinary,
        added=added_parameters(method, dense, chosen),
        samples=len(tokens), length=row, dense=dense_side, pruned=pruned_side, states_bytes=job.states(),
        scratch_bytes=job.scratch(), memory=needs, device=place, forward_seconds=forward,
        stages=[Stage(name, value / forward, value) for name, value in seconds.items()],
        stored=quantised_by(dense))


def _needs(job: Job, place: Device, accelerator: bool, budget: int | None) -> list[Need]:
    """Memory of both ways to run; ``budget``: bytes of the host."""
    streams, needs = job.streams(budget, place), []
    for streamed in (False, True):
        peaks = job.peaks(streamed, accelerator, budget)
        taken = None if streams is None else streams is streamed
        needs.append(Need(streamed, peaks.host, peaks.device if accelerator else None, peaks.analysis, taken))
    return needs


def _calibration(model: PreTrainedModel, samples: int | None, length: int | None) -> TokenSet:
    """A token set of the right shape that takes no memory."""
    rows, row = DEFAULT_SAMPLES if samples is None else samples, LONGEST_ROW if length is None else length
    for name, value, least in (("samples", rows, 2), ("length", row, 1)):
        if value < least:
            raise KDPruneError(f"got {name} {value}, expected a whole number of at least {least}")
    shape = (rows, min(row, longest_context(model) or row))
    ids, mask = torch.zeros((), dtype=torch.long).expand(shape), torch.ones((), dtype=torch.bool).expand(shape)
    return TokenSet(ids, mask, "none")  # type: ignore[arg-type]


def _side(model: PreTrainedModel, length: int) -> Side:
    buffers = [buffer for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
               if name not in module._non_persistent_buffers_set]
    return Side(
        layers=model.config.num_hidden_layers, parameters=model.num_parameters(),
        parameters_layers=outside_embeddings(model), active=model.num_parameters() - inactive_parameters(model),
        disk_bytes=sum(tensor.nbytes for tensor in [*model.parameters(), *buffers]),
        kv_bytes=kv_cache_bytes_per_token(model), prefill_flops=forward_flops(model, 1, length) / length,
        decode_flops=forward_flops(model, 1, 1, length))
