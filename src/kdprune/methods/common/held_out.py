"""Errors of a finished stand-in on held-out tokens, and how well it meets outlier dimensions."""

from typing import Any

import torch
from torch import Tensor

from kdprune.methods.common.stand_in_fit import StandInFit
from kdprune.runtime.distributed import world

_OUTLIERS = 3  # outlier dimensions shown
_POINTS = 300  # points of the outlier fit, per group


@torch.no_grad()
def held_out(fitting: StandInFit, energy: float) -> dict[str, Any]:
    """Held-out error of the finished stand-in, of dropping the block and of a linear map, and the outlier fit.

    Errors are Σ‖· − h_e‖² over held-out tokens in units of the fitted tokens' mean ‖h_e − h_s‖².
    """
    matrix, offset = (value.float() for value in fitting.affine(1e-6))
    shown = _shown_tokens(fitting)
    sums, squares = torch.zeros(4, dtype=torch.float64), torch.zeros(len(offset), dtype=torch.float64)
    seen: list[tuple[int, Tensor, Tensor]] = []
    for rows in fitting.passes(held=True):
        target, mask = fitting.target(rows)
        inputs = fitting.states.inputs[rows].to(fitting.device).float()[mask]
        target, predicted = target[mask], fitting.predict(rows)[mask]
        guesses = (predicted, inputs, inputs + inputs @ matrix.T + offset)
        sums[:3] += torch.stack([(guess - target).double().square().sum().cpu() for guess in guesses])
        sums[3] += len(target)
        squares += target.double().square().sum(0).cpu()
        tokens = [(int(row), int(column)) for row, column in zip(*_tokens(rows, mask.cpu()), strict=True)]
        seen += [(shown[token], predicted[index].cpu(), target[index].cpu())
                 for index, token in enumerate(tokens) if token in shown]
    world().sum(sums, squares)
    seen = sorted((entry for part in world().gather(seen) for entry in part), key=lambda entry: entry[0])
    state, dropped, linear_error = (sums[:3] / sums[3] / energy).tolist()
    return {
        "state_error": state, "dropped_error": dropped, "linear_error": linear_error,
        "outliers": outlier_fit(
            torch.stack([guess for _, guess, _ in seen]), torch.stack([true for _, _, true in seen]),
            (squares / sums[3]).sqrt().float()),
    }


def _tokens(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row number and position of the real tokens of some rows, in the order of a mask's selection."""
    row, column = mask.nonzero(as_tuple=True)
    return rows[row], column


def _shown_tokens(fitting: StandInFit) -> dict[tuple[int, int], int]:
    """The held-out tokens the outlier fit shows, evenly spread: (row, position) → their order."""
    held = torch.arange(fitting.fit_rows, fitting.fit_rows + fitting.states.held)
    row, column = _tokens(held, fitting.states.tokens.mask[held])
    chosen = torch.linspace(0, len(row) - 1, min(_POINTS, len(row))).long()
    return {(int(row[index]), int(column[index])): order for order, index in enumerate(chosen)}


def outlier_fit(predicted: Tensor, target: Tensor, size: Tensor) -> dict[str, Any]:
    """True against predicted entries of the outlier dimensions and of a spread of ordinary ones; shapes (n, d).

    ``size`` (d,) is the root mean square of every dimension over all held-out tokens; ``scale`` an outlier dimension's
    over the median one's.
    """
    dimensions = size.topk(min(_OUTLIERS, len(size))).indices.tolist()
    ordinary = [dim for dim in range(len(size)) if dim not in dimensions]
    true, guess, label = [], [], []
    for dim in dimensions:
        true += target[:, dim].tolist()
        guess += predicted[:, dim].tolist()
        label += [dim] * len(target)
    if ordinary:
        # One ordinary dimension a token, walking through all of them.
        tokens = torch.arange(len(target))
        dims = torch.tensor([ordinary[i % len(ordinary)] for i in range(len(target))])
        true += target[tokens, dims].tolist()
        guess += predicted[tokens, dims].tolist()
        label += [-1] * len(target)
    return {
        "dimensions": dimensions, "scale": (size[dimensions] / size.median()).tolist(),
        "true": true, "predicted": guess, "dimension": label,
    }
