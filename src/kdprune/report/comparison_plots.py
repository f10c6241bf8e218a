"""Pictures of a comparison: quality against size, cost and speed; what a variant changes; sweeps."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from kdprune.report.comparison_records import Comparison, Row, Stat
from kdprune.report.style import BLUE, INK, MARKERS, SERIES, VERMILION, Canvas, log_axis, spread
from kdprune.report.summary import OUTSIDE

EXCESS = "excess loss, nats per token"
_LOG_FROM = 8.0  # largest over smallest value from which an axis is logarithmic
_LINE = 13.0  # points of height a label takes


def quality_against_size(comparison: Comparison) -> str:
    """Excess loss over the exact net ratio of what was asked for, one labelled point a variant."""
    return _scatter(
        comparison, "Quality against size", f"parameters{OUTSIDE[comparison.of]} removed, net, %",
        lambda row: _scaled(row.net_ratio if comparison.of == "all" else row.net_ratio_layers, 100))


def quality_against_cost(comparison: Comparison) -> str:
    """Excess loss over the seconds pruning took."""
    return _scatter(comparison, "Quality against cost", "seconds of pruning", lambda row: row.seconds, log=True)


def quality_against_speed(comparison: Comparison) -> str:
    """Excess loss over decode speed."""
    return _scatter(
        comparison, "Quality against speed", "decode speed, times the dense model's", lambda row: row.decode)


def excess_by_variant(rows: Sequence[Row], title: str, base: Row | None = None) -> str:
    """A dot with its spread for every variant, best on top; the base as a line."""
    rows = sorted((row for row in rows if _mean(row.excess_loss) is not None), key=_excess, reverse=True)
    canvas = Canvas(title, 5.2, max(2.0, 0.75 + 0.27 * len(rows)))
    with canvas as figure:
        axes = figure.add_subplot()
        _base_line(axes, base, vertical=True)
        for place, row in enumerate(rows):
            colour = VERMILION if row is base or (base is None and place == len(rows) - 1) else BLUE
            axes.errorbar(_excess(row), place, xerr=_sd(row.excess_loss), fmt="o", color=colour, capsize=2.5)
        axes.set_yticks(range(len(rows)), [_short(row, 44) for row in rows])
        axes.set(xlabel=EXCESS, ylim=(-0.6, len(rows) - 0.4))
        axes.grid(axis="x")
        spread(axes.xaxis, [_excess(row) for row in rows], _LOG_FROM)
    return canvas.svg


def sweep(rows: Sequence[Row], title: str, base: Row | None = None) -> str:
    """Excess loss over the number that a sweep varies; the base as a line."""
    rows = sorted((row for row in rows if row.excess_loss and row.variant.value is not None), key=_value)
    canvas = Canvas(title, 3.6, 2.7)
    with canvas as figure:
        axes = figure.add_subplot()
        _base_line(axes, base, vertical=False)
        values = [_value(row) for row in rows]
        errors = [_sd(row.excess_loss) for row in rows]
        axes.errorbar(values, [_excess(row) for row in rows], yerr=errors, fmt="o-", color=BLUE, capsize=2.5)
        axes.set(xlabel=title.lower() if len(title) > 1 else title, ylabel=EXCESS)
        axes.margins(y=0.15)
        if min(values, default=0) > 0 and max(values) >= 4 * min(values):
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xticks(values, [f"{value:g}" for value in values])
    return canvas.svg


def _scatter(
    comparison: Comparison, title: str, label: str, place: Callable[[Row], Stat | None], log: bool = False,
) -> str:
    """Points with error bars, named in a column on the right in the order of their height."""
    rows = [row for row in comparison.rows if _mean(place(row)) is not None and _mean(row.excess_loss) is not None]
    canvas = Canvas(title, 5.2, max(3.3, 0.9 + 0.21 * len(rows)))
    with canvas as figure:
        axes = figure.add_subplot()
        for number, row in enumerate(rows):
            x = place(row)
            axes.errorbar(
                _number(x), _excess(row), xerr=None if log else _sd(x), yerr=_sd(row.excess_loss),
                fmt=MARKERS[number // len(SERIES) % len(MARKERS)], color=SERIES[number % len(SERIES)], capsize=2)
        axes.set(xlabel=label, ylabel=EXCESS)
        axes.grid(axis="both")
        axes.margins(0.08)
        spread(axes.yaxis, [_excess(row) for row in rows], _LOG_FROM)
        if log:
            log_axis(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        _name_points(figure, axes, [(row, _number(place(row)), _excess(row)) for row in rows])
    return canvas.svg


def _name_points(figure: Figure, axes: Axes, points: Sequence[tuple[Row, float, float]]) -> None:
    """Names right of the plot, apart from each other, each with a thin line to its point."""
    if not points:
        return
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    heights = [float(axes.transData.transform((x, y))[1]) for _, x, y in points]
    gap = _LINE * figure.dpi / 72 * 0.92
    order = np.argsort(heights)
    placed = _apart([heights[index] for index in order], gap, float(box.y0), float(box.y1))
    for height, index in zip(placed, order, strict=True):
        row, x, y = points[index]
        colour = SERIES[index % len(SERIES)]
        at = (height - box.y0) / box.height
        axes.annotate(
            _short(row), (x, y), xytext=(1.07, at), textcoords="axes fraction", va="center", fontsize=8, color=INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.75, "shrinkB": 3,
                        "relpos": (0, 0.5)})


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights moved as little as needed to lie ``gap`` apart, within the limits where there is room."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, low))
    top = max(high, low + gap * (len(placed) - 1))
    for index in reversed(range(len(placed))):
        limit = top if index == len(placed) - 1 else placed[index + 1] - gap
        placed[index] = min(placed[index], limit)
    return placed


def _base_line(axes: Axes, base: Row | None, vertical: bool) -> None:
    """The base with its spread."""
    if base is None or _mean(base.excess_loss) is None:
        return
    line, band = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
    line(_excess(base), color=VERMILION, linewidth=1, linestyle="--")
    wide = _sd(base.excess_loss)
    band(_excess(base) - wide, _excess(base) + wide, color=VERMILION, alpha=0.13, linewidth=0)


def _short(row: Row, most: int = 26) -> str:
    title = row.variant.title
    return title if len(title) <= most else title[: most - 1] + "…"


def _scaled(found: Stat | None, factor: float) -> Stat | None:
    if found is None or found.mean is None:
        return None
    return Stat(mean=found.mean * factor, sd=None if found.sd is None else found.sd * factor, count=found.count)


def _mean(found: Stat | None) -> float | None:
    return None if found is None else found.mean


def _number(found: Stat | None) -> float:
    return float("nan") if found is None or found.mean is None else found.mean


def _excess(row: Row) -> float:
    return _number(row.excess_loss)


def _value(row: Row) -> float:
    return float("nan") if row.variant.value is None else row.variant.value


def _sd(found: Stat | None) -> float:
    return 0.0 if found is None or found.sd is None else found.sd
