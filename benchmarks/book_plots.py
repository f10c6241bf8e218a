"""The pictures of the book: each takes a page's records and one section of its YAML and gives SVG."""

from collections.abc import Callable, Mapping

from book_records import Page, Section
from book_tables import curve_points
from matplotlib.ticker import FuncFormatter

from kdprune.report.style import MARKERS, SERIES, Canvas, legend_below, log_axis


def curves(page: Page, section: Section) -> str:
    """Excess loss against what was removed of the layers' parameters, net, a panel a model, a curve a variant of
    ``titles``, over all ``records``, as far as it was measured; "" before any variant has two sizes."""
    found = {model: variants for model, variants in curve_points(page, section).items()
             if any(len(points) > 1 for points in variants.values())}
    if not found:
        return ""
    measured = {name: shown for name, shown in section["titles"].items()
                if any(name in variants for variants in found.values())}
    columns, lines = min(2, len(found)), -(-len(found) // 2)
    canvas = Canvas(section["says"], 4.6 * columns, 0.8 + 3.2 * lines)
    with canvas as figure:
        for number, (model, variants) in enumerate(found.items()):
            axes = figure.add_subplot(lines, columns, number + 1)
            for place, (variant, shown) in enumerate(measured.items()):
                points = [(one.net, one.excess_loss) for one in variants.get(variant, []) if one.excess_loss > 0]
                axes.plot(*(zip(*points, strict=True) if points else ([], [])), color=SERIES[place % len(SERIES)],
                          marker=MARKERS[place % len(MARKERS)], label=shown,
                          **({"fillstyle": "none", "linestyle": "--"} if place >= len(SERIES) else {}))
            axes.set(title=model, xlabel="removed of the layers, net", ylabel="excess loss, nats per token")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
            log_axis(axes.yaxis)
        legend_below(figure, axes, columns=3)
    return canvas.svg


PLOTS: Mapping[str, Callable[[Page, Section], str]] = {"curves": curves}
