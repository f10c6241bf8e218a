"""Outlier dimensions and massive activations of a model's layer states."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from kdprune.data.tokens import TokenSet
from kdprune.methods.common.analysis import some_rows
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers
from kdprune.run.session import Session

OUTLIER = 6.0                # times the median: dimensions by their root mean square, tokens by their norm
MASSIVE = (100.0, 1000.0)    # Sun et al. 2024 (arXiv:2402.17762): |entry| above 100 and 1000 times the median |entry|
TOKENS = 16_384              # random rows of the calibration text with so many tokens are looked at, all states at once
SHOWN = 8                    # tokens named


def outliers(run: Session, tokens: TokenSet, batch: int = 16) -> dict[str, Any]:
    """What stands out at every boundary l = 0 … L, h_l the state that enters layer l, h_L before the final norm.

    Returns how many tokens were looked at, a record a boundary, and which tokens stand out where most do.
    """
    rows = some_rows(tokens, TOKENS, run.seed)
    wanted = range(len(decoder_layers(run.model)) + 1)
    kept: dict[int, list[Tensor]] = {index: [] for index in wanted}
    for part, states in layer_states(run.model, rows, wanted, batch):
        for index in wanted:
            kept[index].append(states[index][part.mask.to(states[index].device)].float().cpu())
    found = [_boundary(torch.cat(kept.pop(index))) for index in wanted]
    large = [boundary.pop("large") for boundary in found]
    most = max(wanted, key=lambda index: int(large[index].sum()))
    ids, positions = rows.ids[rows.mask], torch.arange(rows.ids.shape[1]).expand_as(rows.ids)[rows.mask]
    names = Counter(run.tokenizer.decode([int(i)]) for i in ids[large[most]])
    return {
        "tokens": int(rows.mask.sum()), "threshold": OUTLIER, "boundaries": found, "most_at": most,
        "at_first_position": int((positions[large[most]] == 0).sum()), "named": names.most_common(SHOWN),
    }


def _boundary(states: Tensor) -> dict[str, Any]:
    """One boundary, states (n, d): dimensions, tokens ("large": (n,) which) and single entries that stand out."""
    size = states.double().square().mean(0).sqrt()
    share = size / size.median()
    norms, entries = states.norm(dim=1), states.abs()
    middle = entries.median()
    large = norms > OUTLIER * norms.median()
    massive = ((entries > MASSIVE[0]) & (entries > MASSIVE[1] * middle)).any(1)
    dims = [int(index) for index in share.argsort(descending=True) if share[index] > OUTLIER]
    return {
        "dims": dims, "times_median": [float(share[index]) for index in dims], "largest_dim": int(share.argmax()),
        "largest_dim_times_median": float(share.max()), "median_rms": float(size.median()),
        "large_tokens": int(large.sum()), "largest_norm_times_median": float(norms.max() / norms.median()),
        "massive_tokens": int(massive.sum()), "largest_entry_times_median": float(entries.max() / middle),
        "large": large,
    }
