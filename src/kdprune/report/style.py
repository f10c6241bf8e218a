"""One look for every picture: sizes, colour-blind-safe palette, inline SVG that follows the page's theme."""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Neutral colours become CSS variables of the page (light or dark), with themselves as the fallback.
INK, MUTED, GRID, PANEL, PAPER = "#1b1f24", "#68707b", "#dfe3e8", "#eceff2", "#fefefe"
_THEME = {INK: "ink", MUTED: "muted", GRID: "grid", PANEL: "panel", PAPER: "paper"}

# Okabe and Ito's palette, told apart with every common colour vision deficiency.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9"
SERIES = (VERMILION, GREEN, PURPLE, ORANGE, SKY, BLUE)
MARKERS = ("o", "s", "^", "D", "v", "P")

_FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def styled(name: str, **changes: Any) -> AbstractContextManager[Any]:
    """The look, for figures made and saved inside; ids in SVG files come from `name`, always the same."""
    style: Any = {**_STYLE, "svg.hashsalt": name, **changes}
    return matplotlib.rc_context(style)


class LaidOutOnce(Figure):
    """A figure that is drawn once when it is saved.

    matplotlib draws all of it a first time for its layout, of which nothing is kept but where the parts stand: a
    quarter of the time a page takes.
    """

    def draw(self, renderer: Any) -> None:
        """The layout alone, while there is an engine for it; while a file is written there is none."""
        engine = self.get_layout_engine()
        if isinstance(engine, ConstrainedLayoutEngine):
            engine.execute(self)
        else:
            super().draw(renderer)


class Canvas:
    """A figure to draw on inside ``with``; afterwards ``svg`` holds the picture.

    Args:
        title: what the picture shows, read out by screen readers; unique on a page, as ids are made from it.
        width: inches; a column of the page shows 5.2 inches at its natural size.
        height: inches.
    """

    def __init__(self, title: str, width: float = 5.2, height: float = 3.1):
        self.title, self.svg = title, ""
        self._name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self._context = styled(self._name)
        self._size = (width, height)

    def __enter__(self) -> Figure:
        self._context.__enter__()
        self.figure = LaidOutOnce(figsize=self._size, layout="constrained")
        return self.figure

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.svg = self._export()
        finally:
            self._context.__exit__(kind, error, trace)

    def _export(self) -> str:
        """SVG to put into a page: unique ids, theme colours, no fixed size, no prologue."""
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(stream, format="svg", metadata=nothing, dpi=200)
        text = stream.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self._name}-", text)
        for colour, name in _THEME.items():
            text = text.replace(colour, f"var(--{name}, {colour})")
        text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", _FONTS, text)
        head, rest = text.split(">", 1)
        head = re.sub(r' (width|height)="[^"]*"', "", head) + f' role="img" aria-label="{self.title}"'
        return f"{head}>{rest}".strip()


def legend_below(figure: Figure, axes: Axes, columns: int = 4, markers: float = 1.0) -> None:
    """The legend of `axes` under the whole figure, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, markerscale=markers)
        if markers != 1.0:  # points drawn faint, because there are many, are shown full
            for handle in legend.legend_handles:
                if handle is not None:
                    handle.set_alpha(1.0)


def spread(axis: Axis, values: Sequence[float | None], factor: float) -> None:
    """A logarithmic axis where positive values span more than `factor`."""
    known = [value for value in values if value is not None]
    if known and min(known) > 0 and max(known) > factor * min(known):
        log_axis(axis)


def log_axis(axis: Axis) -> None:
    """A logarithmic axis, x or y, with plain numbers at 1, 2 and 5 times the powers of ten."""
    across = axis is axis.axes.xaxis
    (axis.axes.set_xscale if across else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8 if across else 12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
