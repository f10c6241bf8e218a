"""What pruning a model would give and take, from its config alone: no weights are read, no data are seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kdprune.data.sources import BUNDLED_MODEL
from kdprune.data.tokens import DEFAULT_SAMPLES, LONGEST_ROW, TokenSet
from kdprune.errors import KDPruneError, one_line
from kdprune.evaluation.flops import forward_flops
from kdprune.evaluation.models import longest_context
from kdprune.evaluation.speed import kv_cache_bytes_per_token
from kdprune.methods import make_method
from kdprune.methods.common.budget import Budget, layer_sizes, select_by_similarity, spare_features
from kdprune.methods.common.shape import Shape
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.edits import Substitute
from kdprune.model.families import decoder_layers, family_of
from kdprune.model.loading import HUB_ID, read_config, resolve_dtype
from kdprune.model.surgery import apply_edits, context_layer, layers_replaced
from kdprune.planning.forecast import Device, Job, device_of_name
from kdprune.runtime.machine import generator, quiet_libraries
from kdprune.runtime.memory import parse_bytes

FALL = 0.01  # of log similarity a layer: no data are seen, so that similarity is taken to fall evenly with distance


@dataclass(frozen=True)
class Side:
    """The dense or the pruned model.

    Attributes:
        disk_bytes: of the safetensors. kv_bytes: of keys and values a token. prefill_flops, decode_flops: operations
            a token, reading a row and writing one token behind it (head included).
    """

    layers: int
    parameters: int
    disk_bytes: int
    kv_bytes: int
    prefill_flops: float
    decode_flops: float


@dataclass(frozen=True)
class Need:
    """Memory of one way to run: whole or streamed; ``device_bytes`` is None where the host computes.

    Attributes:
        analysis_bytes: of the host while layers are scored. taken: by ``prune``, as the device and the host's budget
            have it; None where neither is known.
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
        ratio: asked for; net_ratio: what these blocks and stand-ins give. given: whether the blocks were named.
        kind, features, hidden, context: of the stand-ins.
        added: parameters of each with what stands before it.
        states_bytes: on disk, or in memory without a work directory. scratch_bytes: of a streamed model's analysis.
        forward_seconds: of one pass of the layer stack over the calibration set.
    """

    model: str
    model_type: str
    dtype: str
    ratio: float
    net_ratio: float
    blocks: list[tuple[int, int]]
    given: bool
    kind: str
    features: int
    hidden: int
    context: bool
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
        ratio, dtype, samples, length, host_memory: as of :func:`kdprune.prune`. device: a name in
            ``forecast.DEVICES``; tflops: its bfloat16 peak instead; utilisation: share of the peaks.
        options: fields of KDP. Without ``blocks`` these are the lengths its own selection takes when similarity falls
            evenly with distance: the least net removal at or above the ratio; data would say where they lie.

    Raises:
        KDPruneError: anything wrong with what was given, in one line.
    """
    method = make_method("kdp", {"ratio": ratio, **options})
    assert isinstance(method, KDP)
    place = device_of_name(device, tflops, utilisation)
    dense = outline(model, dtype)
    tokens = _calibration(dense, samples, length)
    method.check(dense, tokens)
    blocks, shape = _layout(method, dense)
    pruned = _pruned(dense, blocks, shape)
    row = tokens.ids.shape[1]
    job = _job(method, dense, pruned, blocks, shape, tokens)
    budget = None if host_memory is None else parse_bytes(host_memory)
    streams = job.streams(budget, place)
    accelerator = place.bandwidth is not None or tflops is not None
    needs = []
    for streamed in (False, True):
        peaks = job.peaks(streamed, accelerator, budget)
        taken = None if streams is None else streams is streamed
        needs.append(Need(streamed, peaks.host, peaks.device if accelerator else None, peaks.analysis, taken))
    forward = job.forward().seconds(place, job.itemsize)
    seconds = {name: work.seconds(place, job.itemsize) for name, work in job.stages().items()}
    cache = _cache_bytes(dense)
    dense_side, pruned_side = (_side(found, row, cache) for found in (dense, pruned))
    return PruningPlan(
        model="kdprune bundled reference model" if model is None else str(model),
        model_type=dense.config.model_type, dtype=str(dense.dtype).removeprefix("torch."), ratio=ratio,
        net_ratio=1 - pruned_side.parameters / dense_side.parameters,
        blocks=[(block.start, block.stop) for block in blocks], given=method.blocks is not None, kind=shape.kind,
        features=shape.features, hidden=shape.hidden, context=shape.context,
        added=_added(method, dense, blocks, shape),
        samples=len(tokens), length=row, dense=dense_side, pruned=pruned_side, states_bytes=job.states(),
        scratch_bytes=job.scratch(), memory=needs, device=place, forward_seconds=forward,
        stages=[Stage(name, value / forward, value) for name, value in seconds.items()])


def outline(model: str | Path | None, dtype: str | None = None) -> PreTrainedModel:
    """The model of a config on the meta device: modules and shapes, no weights.

    Raises:
        KDPruneError: there is no config, it is damaged, or it describes no causal LM of a known family.
    """
    wanted = resolve_dtype(dtype)
    config = _config(BUNDLED_MODEL if model is None else model)
    found = getattr(config, "dtype", None)
    try:
        with quiet_libraries(), torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, dtype=wanted or resolve_dtype(found) or torch.float32)
    except KDPruneError:
        raise
    except Exception as error:  # sizes that do not go together fail in many ways
        raise KDPruneError(f"cannot build a model from {str(model)!r} ({one_line(error)}); expected the config of a "
                           "causal LM, check its sizes") from error
    family_of(made)
    return made.eval()


def _config(name: str | Path) -> PreTrainedConfig:
    path = Path(name)
    if not path.exists() and not HUB_ID.fullmatch(str(name)):
        raise KDPruneError(f"got model {str(name)!r}, no such directory or file; expected a directory with "
                           "config.json, that file, or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise KDPruneError(f"got {path} without config.json, expected one in it; check the path")
    try:
        with quiet_libraries():
            return read_config(name, trust_remote_code=False)
    except KDPruneError:
        raise
    except Exception as error:  # transformers and the hub client raise many kinds
        kind = "cannot read the config" if path.exists() else "no such directory here, and the hub gave no config"
        raise KDPruneError(f"got model {str(name)!r}: {kind} ({one_line(error)}); expected the config.json of a causal "
                           "LM") from error


def _calibration(model: PreTrainedModel, samples: int | None, length: int | None) -> TokenSet:
    """A token set of the right shape that takes no memory."""
    rows, row = DEFAULT_SAMPLES if samples is None else samples, LONGEST_ROW if length is None else length
    for name, value, least in (("samples", rows, 2), ("length", row, 1)):
        if value < least:
            raise KDPruneError(f"got {name} {value}, expected a whole number of at least {least}")
    shape = (rows, min(row, longest_context(model) or row))
    ids, mask = torch.zeros((), dtype=torch.long).expand(shape), torch.ones((), dtype=torch.bool).expand(shape)
    return TokenSet(ids, mask, "none")  # type: ignore[arg-type]


def _layout(method: KDP, dense: PreTrainedModel) -> tuple[list[range], Shape]:
    """Blocks and stand-ins as KDP itself chooses them."""
    budget = method.budget(dense)
    index = torch.arange(len(budget.layers) + 1.0)
    blocks = select_by_similarity(method, (-FALL * (index[:, None] - index).abs()).exp(), budget)
    return blocks, spare_features(budget.shape, budget, blocks) if method.fill else budget.shape


def _added(method: KDP, dense: PreTrainedModel, blocks: list[range], shape: Shape) -> list[int]:
    """Parameters put in the place of every block."""
    budget = Budget(dense, shape, method.ratio)
    return [sum(budget.layers[index] for index in block) - budget.removal(block) for block in blocks]


def _pruned(dense: PreTrainedModel, blocks: list[range], shape: Shape) -> PreTrainedModel:
    """The outline with stand-ins in the place of the blocks."""
    edits = []
    for block in blocks:
        with torch.device("meta"):
            stand_in = shape.build(generator(0))
        source = shape.source(block)
        context = None if source is None else context_layer(dense, source, stand_in)
        edits.append(Substitute(block, stand_in, context, source))
    return apply_edits(dense, edits).eval()


def _cache_bytes(dense: PreTrainedModel) -> int:
    """Bytes that one layer caches a token: all of the dense model have the same heads."""
    with layers_replaced(dense, list(decoder_layers(dense))[:1]):
        return kv_cache_bytes_per_token(dense)


def _side(model: PreTrainedModel, length: int, cache: int) -> Side:
    """``cache``: bytes that a layer of the dense model caches a token."""
    buffers = [buffer for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
               if name not in module._non_persistent_buffers_set]
    return Side(
        layers=model.config.num_hidden_layers, parameters=model.num_parameters(),
        disk_bytes=sum(tensor.nbytes for tensor in [*model.parameters(), *buffers]),
        kv_bytes=cache * model.config.num_hidden_layers, prefill_flops=forward_flops(model, 1, length) / length,
        decode_flops=forward_flops(model, 1, 1, length))


def _job(
    method: KDP, dense: PreTrainedModel, pruned: PreTrainedModel, blocks: list[range], shape: Shape, tokens: TokenSet,
) -> Job:
    """What the forecast counts from."""
    rows, length = tokens.ids.shape
    sizes, itemsize = layer_sizes(dense), dense.dtype.itemsize
    stack, left = (forward_flops(model, 1, length, logits=0) / length for model in (dense, pruned))
    layer, path = stack / len(sizes), method.path_rows(tokens, shape)
    kept = len(sizes) - sum(map(len, blocks))
    return Job(
        width=dense.config.hidden_size, layers=len(sizes), itemsize=itemsize, rows=rows, length=length,
        held=tokens.held_out(method.held), blocks=blocks, shape=shape, settings=method.settings(shape, tokens),
        path=(path.fit, path.held), sequential=bool(method.sequential), layer=layer,
        site=max(left - kept * layer, 0.0) / len(blocks), weights=dense.num_parameters() * itemsize,
        outside=(dense.num_parameters() - sum(sizes)) * itemsize, added=max(_added(method, dense, blocks, shape)))
