"""The pictures of the book: each takes a page's records and one section of its YAML and gives an SVG."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from book_records import Page, Section, Unit
from book_tables import gains, losses, order, title
from matplotlib.ticker import NullFormatter

from kdprune.report import comparison_plots as plots
from kdprune.report.comparison_page import groups, ranked
from kdprune.report.style import MARKERS, SERIES, Canvas, legend_below

LOSS = "excess loss, nats per token"
TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


def marks(page: Page, section: Section) -> str:
    """Excess loss of the section's rows, or of all variants, a mark a model; with ``gain`` what each row changes."""
    units, gain = page.units(), section.get("gain", False)
    found = list(dict.fromkeys(unit.model for unit in units))
    rows = [row for row in section.get("rows") or _all(page) if "variant" in row]
    canvas = Canvas(section["says"], 6.4, max(2.4, 1.1 + 0.3 * len(rows)))
    with canvas as figure:
        axes = figure.add_subplot()
        for number, model in enumerate(found):
            values = [gains(units, row, model) if gain else list(losses(units, row, model).values()) for row in rows]
            known = [(place, some) for place, some in enumerate(values) if some]
            axes.errorbar(
                [statistics.fmean(some) for _, some in known], [place for place, _ in known],
                xerr=[statistics.stdev(some) if len(some) > 1 else 0.0 for _, some in known],
                fmt=MARKERS[number % len(MARKERS)], color=SERIES[number % len(SERIES)], capsize=2.5, label=model)
        shown = [row["variant"] if gain else _halves(row["says"]) for row in rows]
        axes.set_yticks(range(len(rows)), shown, fontsize=7.5)
        axes.set(xlabel=f"change of {LOSS}" if gain else LOSS, ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="x")
        if section.get("log"):
            axes.set(xscale="log")
            axes.set_xticks(TICKS[3:], [f"{tick:g}" for tick in TICKS[3:]])
            axes.xaxis.set_minor_formatter(NullFormatter())
        if gain:
            axes.axvline(0, color="#68707b", linewidth=0.8)
        if len(found) > 1:
            legend_below(figure, axes)
    return canvas.svg


def _all(page: Page) -> list[Mapping[str, str]]:
    found = page.comparisons()
    return [{"variant": name, "says": title(found.values(), name).split(" `")[0]} for name in order(found)]


def _halves(says: str, most: int = 44) -> str:
    """What a row is called, in one line or two."""
    name = says.replace("**", "").replace("`", "")
    if len(name) <= most or " " not in name[: len(name) // 2 + 8]:
        return name
    cut = name.rfind(" ", 0, len(name) // 2 + 8)
    return f"{name[:cut]}\n{name[cut + 1:]}"


def curves(page: Page, section: Section) -> str:
    """Excess loss against the net ratio that was reached, a panel a model, a curve a variant."""
    units = [unit for unit in page.units() if not unit.failure]
    found = list(dict.fromkeys(unit.model for unit in units))
    columns, lines = min(2, len(found)), -(-len(found) // 2)
    canvas = Canvas(section["says"], 4.6 * columns, 0.6 + 3.2 * lines)
    with canvas as figure:
        for number, model in enumerate(found):
            axes = figure.add_subplot(lines, columns, number + 1)
            for place, (variant, shown) in enumerate(section["titles"].items()):
                here = [unit for unit in units if (unit.model, unit.variant) == (model, variant)]
                points = [_middle([unit for unit in here if unit.ratio == ratio])
                          for ratio in sorted({unit.ratio for unit in here})]
                axes.plot(*(zip(*points, strict=True) if points else ([], [])), color=SERIES[place % len(SERIES)],
                          marker=MARKERS[place % len(MARKERS)], label=shown.replace("`", ""),
                          **({"fillstyle": "none", "linestyle": "--"} if place >= len(SERIES) else {}))
            axes.set(title=model, xlabel="share of the parameters removed, net", yscale="log", ylabel=LOSS)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.yaxis.set_minor_formatter(NullFormatter())
        legend_below(figure, axes, columns=3)
    return canvas.svg


def _middle(units: Sequence[Unit]) -> tuple[float, float]:
    """Mean net ratio and excess loss."""
    return (statistics.fmean(unit.net_ratio or 0.0 for unit in units),
            statistics.fmean(unit.excess_loss or 0.0 for unit in units))


def _of(draw: Callable[..., str]) -> Callable[[Page, Section], str]:
    """One of the report's pictures of the page's comparison, or of another ``record``."""
    return lambda page, section: draw(next(iter(page.comparisons(section.get("record")).values())), section)


def _parts(found: Any, section: Section) -> str:
    rows = [row for row in ranked(found) if row.variant.value is None]
    return plots.excess_by_variant(rows, section["says"], found.rows[0])


def _sweep(found: Any, section: Section) -> str:
    rows = dict(groups(found))[section["group"]]
    return plots.sweep(rows, section["group"], found.rows[0])


PLOTS: Mapping[str, Callable[[Page, Section], str]] = {
    "marks": marks, "curves": curves, "parts": _of(_parts), "sweep": _of(_sweep),
    "size": _of(lambda found, section: plots.quality_against_size(found)),
    "cost": _of(lambda found, section: plots.quality_against_cost(found)),
    "excess": _of(lambda found, section: plots.excess_by_variant(ranked(found), section["says"]))}
