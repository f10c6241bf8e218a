"""How long pruning will take on this machine, before it starts: counted work at the measured pace of a forward pass."""

import time

import torch
from transformers import PreTrainedModel

from kdprune.data.tokens import TokenSet
from kdprune.errors import KDPruneError
from kdprune.methods.common.method import Method
from kdprune.methods.kdp.kdp import KDP
from kdprune.model.passes import run_layers
from kdprune.model.placement import reads_weights
from kdprune.planning.forecast import DEVICES
from kdprune.planning.meta import job_of, layout, meta_model, prune_meta
from kdprune.runtime.machine import computes_in
from kdprune.runtime.run import Run

ROWS = 4  # of the calibration set that the pace is measured on, after one to warm up


def expected_seconds(model: PreTrainedModel, method: Method, tokens: TokenSet, run: Run) -> float | None:
    """Seconds that the method's stages take here, to within a factor of two; None where no count is known.

    Of KDP alone the work is counted (:mod:`kdprune.planning.forecast`). Which layers go is not known yet, only how
    many; steps in float32 and float64 are taken to be as much slower than a forward pass as on the table's devices.
    """
    if not isinstance(method, KDP) or reads_weights(model):
        return None
    dense = meta_model(model.config, model.dtype)
    try:
        chosen = layout(method, dense)
    except KDPruneError:  # only with single layers among its blocks does a linear map reach so large a ratio
        return None
    job = job_of(method, dense, prune_meta(dense, chosen), chosen, tokens)
    cpu = "cpu" if computes_in(torch.bfloat16, model.device) else "cpu-float32"
    like = DEVICES[cpu if model.device.type == "cpu" else "h100"]
    passes = sum(work.seconds(like, job.itemsize) for work in job.stages().values()) / job.forward().seconds(
        like, job.itemsize)
    return passes * _forward_seconds(run.running(model), tokens)


@torch.no_grad()
def _forward_seconds(model: PreTrainedModel, tokens: TokenSet) -> float:
    """Of one pass of the layer stack over these tokens, scaled up from a few rows."""
    some = tokens.select(slice(0, ROWS))
    start = 0.0
    for rows in (some.select(slice(0, 1)), some):
        start = time.perf_counter()
        run_layers(model, rows)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    return (time.perf_counter() - start) * tokens.ids.numel() / some.ids.numel()
