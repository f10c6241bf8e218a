"""Pictures of one stand-in: how it was trained, and how far kernel space keeps what theory says of it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kdprune.report.findings import relative_error
from kdprune.report.plots import array
from kdprune.report.records import Curve, Fit, KernelTraining, Outliers, best_of
from kdprune.report.results import Results
from kdprune.report.style import (
    BLUE,
    GREEN,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    SERIES,
    SKY,
    VERMILION,
    Canvas,
    legend_below,
    log_axis,
    spread,
)
from kdprune.report.summary import layer_range


def left_over(results: Results) -> str:
    """What each stand-in leaves of the change the block makes, beside the linear map and dropping."""
    rows = [(f"layers {layer_range(fit.block)}", _leftovers(fit)) for fit in results.fit]
    canvas = Canvas("Error left in the state", 5.2, 0.9 + 0.95 * len(rows))
    with canvas as figure:
        axes = figure.add_subplot()
        for row, (_, bars) in enumerate(rows):
            for place, (label, value, colour) in enumerate(bars):
                if value is not None:
                    height = row + 0.27 * (place - 1)
                    axes.barh(height, value, 0.24, color=colour, label=label if row == 0 else None)
                    axes.annotate(
                        f"{value:.2g}",
                        (value, height),
                        (3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8,
                    )
        axes.set_yticks(range(len(rows)), labels=[name for name, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.1)
        axes.set_xlabel("E‖S(hₛ) − hₑ‖² / E‖hₑ − hₛ‖²  on held-out tokens")
        legend_below(figure, axes, 3)
    return canvas.svg


def _leftovers(fit: Fit) -> tuple[tuple[str, float | None, str], ...]:
    """Label, value and colour of the three errors of one block."""
    return (
        ("dropped", fit.dropped_error, MUTED),
        ("linear map", fit.linear_error, SKY),
        ("stand-in", fit.state_error, VERMILION),
    )


def training(fit: Fit, step: int, wide: bool = False) -> str:
    """Loss of step 1, 2 or 3 and the cosine with the target, over epochs, one under the other or, wide, beside it."""
    curve: KernelTraining | Curve | None = (fit.step1, fit.step2, fit.step3)[step - 1]
    assert curve is not None
    canvas = Canvas(f"Step {step}, layers {layer_range(fit.block)}", *((10.7, 3.1) if wide else (3.6, 3.3)))
    with canvas as figure:
        loss, cosine = (figure.subplots(1, 2) if wide else
                        figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)))
        watched = curve.watched if isinstance(curve, Curve) else []
        _over_epochs(loss, curve.loss, BLUE, "loss", "fitted rows" if watched else None)
        spread(loss.yaxis, [*curve.loss, *watched], 10)
        _over_epochs(cosine, curve.cosine, GREEN, "cosine")
        if watched:
            _over_epochs(loss, watched, VERMILION, "loss", "held-out rows", first=0)
            best = best_of(watched)
            if best is not None:
                loss.plot(best, array(watched)[best], color=INK, marker="*", markersize=11, linestyle="",
                          markeredgecolor=PAPER, label="best, kept", zorder=3)
        # The losses of the two steps are in different units.
        if step == 3 and fit.step2 is not None and fit.step2.cosine and fit.step2.cosine[-1] is not None:
            cosine.axhline(fit.step2.cosine[-1], color=MUTED, linestyle="--", linewidth=1.1, label="after step 2")
            cosine.margins(y=0.15)  # else it lies on the axis
            cosine.legend(loc="lower right")
        legend_below(figure, loss, 3 if wide else 2)
        for axes in (loss, cosine) if wide else (cosine,):
            axes.set_xlabel("epoch")
    return canvas.svg


def constants(fit: Fit) -> str:
    """B_A and R_φ over training, and the share of the features' variance that stays unexplained."""
    assert fit.step1 is not None
    canvas = Canvas(f"Constants over training, layers {layer_range(fit.block)}")
    with canvas as figure:
        norms, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        step = fit.step1
        start = 0 if len(step.spectral_norm) > len(step.loss) else 1  # with the values before training, or without
        _over_epochs(norms, step.spectral_norm, VERMILION, "norm", "B_A = maxᵢ ‖Aᵢ‖₂", start)
        _over_epochs(norms, step.feature_norm, BLUE, "norm", "R_φ = max ‖φ(h)‖", start)
        norms.margins(y=0.2)
        _over_epochs(share, step.unexplained, INK, "unexplained", first=start)
        share.set(xlabel="epoch", ylim=(0, None))
        legend_below(figure, norms)
    return canvas.svg


def norm_decay(fit: Fit) -> str:
    """Norms along the repeated operators, and of the output with and without α."""
    assert fit.norms is not None
    norms = fit.norms
    canvas = Canvas(f"Norm decay, layers {layer_range(fit.block)}")
    with canvas as figure:
        features, output = figure.subplots(1, 2, width_ratios=(3, 2))
        features.plot(array(norms.feature_true), color=INK, linestyle="--", label="true  ‖φ(hₛ₊ⱼ)‖")
        features.plot(array(norms.feature_predicted), color=VERMILION, marker="o", label="predicted  ‖Aⱼ⋯A₁φ(hₛ)‖")
        features.set(xlabel="steps j", ylabel="norm in kernel space", ylim=(0, 1.3 * _largest(features)))
        features.xaxis.set_major_locator(MaxNLocator(integer=True))
        features.legend(loc="lower left")
        bars = (("true", norms.output_true, INK), ("without α", norms.output_without_alpha, ORANGE),
                ("with α", norms.output_with_alpha, VERMILION))  # fmt: skip
        for place, (_, value, colour) in enumerate(bars):
            if value is not None:
                output.bar(place, value, 0.65, color=colour)
                output.annotate(
                    f"{value:.3g}",
                    (place, value),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        output.set_xticks(range(3), labels=[name for name, _, _ in bars])
        output.set_ylabel("norm of the output")
        output.margins(y=0.12)
    return canvas.svg


def error_and_bound(fit: Fit) -> str:
    """Measured k-step error beside Theorem 1's bound."""
    error, bound = array(fit.k_step_error), array(fit.bound)
    canvas = Canvas(f"Measured error and bound, layers {layer_range(fit.block)}")
    with canvas as figure:
        axes = figure.add_subplot()
        if (np.concatenate([error, bound]) > 0).any():
            log_axis(axes.yaxis)
        steps = np.arange(1, max(len(error), len(bound)) + 1)
        axes.plot(steps[: len(bound)], bound, color=PURPLE, marker="s", label="Theorem 1’s bound")
        axes.plot(steps[: len(error)], error, color=BLUE, marker="o", label="measured")
        if len(error) and len(error) == len(bound) and error[-1] > 0 and np.isfinite(bound[-1]):
            end = len(error)
            axes.annotate("", (end, bound[-1]), (end, error[-1]), arrowprops={"arrowstyle": "<->", "color": MUTED})
            middle = float(np.sqrt(error[-1] * bound[-1]))
            axes.annotate(
                f"×{bound[-1] / error[-1]:,.3g}",
                (end, middle),
                (-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
            )
        axes.set(xlabel="steps k", ylabel="error in kernel space (rms)")
        axes.margins(x=0.06, y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, axes)
    return canvas.svg


def risks(fit: Fit) -> str:
    """Theorem 2: held-out risk of a linear fit in kernel space against the original space, by layers."""
    canvas = Canvas(f"Risks, layers {layer_range(fit.block)}")
    with canvas as figure:
        axes = figure.add_subplot()
        pairs = (
            (fit.original_risk_by_step, SKY, "original space"),
            (fit.kernel_risk_by_step, VERMILION, "kernel space"),
        )
        for place, (values, colour, label) in enumerate(pairs):
            steps = np.arange(1, len(values) + 1) + 0.36 * (place - 0.5)
            axes.bar(steps, array(values), 0.34, color=colour, label=label)
        axes.set(xlabel="layers j", ylabel="risk / variance of the target")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, axes)
    return canvas.svg


def outlier_fit(fit: Fit) -> str:
    """Predicted against true coordinates: all, the ordinary dimensions on their own scale, and errors."""
    assert fit.outliers is not None
    points = fit.outliers
    canvas = Canvas(f"Outlier fit, layers {layer_range(fit.block)}", 10.7, 3.5)
    with canvas as figure:
        everything, ordinary, errors = figure.subplots(1, 3, width_ratios=(5, 5, 4))
        _scatter(everything, points, points.dimensions)
        _scatter(ordinary, points, [])
        everything.set(title="all dimensions", ylabel="stand-in")
        ordinary.set_title("ordinary dimensions, magnified")
        names = [-1, *points.dimensions]
        values = array([relative_error(points, name) for name in names])
        colours = [MUTED, *(SERIES[i % len(SERIES)] for i in range(len(names) - 1))]
        errors.bar(range(len(names)), values, 0.65, color=colours)
        errors.set_xticks(range(len(names)), labels=["ordinary", *map(str, names[1:])])
        errors.set(title="relative rms error", xlabel="dimension", ylim=(0, None))
        legend_below(figure, everything, 4, 2.5)
    return canvas.svg


def _scatter(axes: Axes, points: Outliers, dimensions: list[int]) -> None:
    """Ordinary points in grey under the listed outlier dimensions, with the line of a perfect fit."""
    true, predicted, dimension = (
        array(points.true),
        array(points.predicted),
        np.array(points.dimension, dtype=int),
    )
    shown = [(-1, "ordinary dimensions", MUTED, ".")] + [
        (name, f"dimension {name}", SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(dimensions)
    ]
    for name, label, colour, marker in shown:
        mine = (dimension == name) & np.isfinite(true) & np.isfinite(predicted)
        axes.plot(
            true[mine], predicted[mine], marker, color=colour, markersize=3.5, markeredgewidth=0, alpha=0.55,
            label=label, rasterized=len(true) > 400,
        )  # fmt: skip
    axes.axline((0, 0), slope=1, color=INK, linewidth=0.8, linestyle="--")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("true")


def _over_epochs(
    axes: Axes, values: list[float | None], colour: str, name: str, label: str | None = None, first: int = 1
) -> None:
    """A curve over epochs, or a dot where there is a single one."""
    epochs = np.arange(first, first + len(values))
    axes.plot(epochs, array(values), color=colour, label=label, marker="o" if len(values) == 1 else None)
    if len(values) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    axes.set_ylabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _largest(axes: Axes) -> float:
    """The largest y that the lines of `axes` reach."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] + [np.zeros(1)])
    return float(np.nanmax(values)) or 1.0
