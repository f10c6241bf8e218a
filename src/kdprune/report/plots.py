"""Pictures of the analysis: how similar the states of the layers are, what blocks cost, where the chosen ones lie; and
of healing."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, LogNorm, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from kdprune.errors import KDPruneError
from kdprune.report.analysis_record import Analysis
from kdprune.report.findings import analysis_of
from kdprune.report.records import Matrix, Number, best_of
from kdprune.report.results import Results, write_file
from kdprune.report.style import (
    BLUE,
    GREEN,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    PANEL,
    PAPER,
    VERMILION,
    Canvas,
    LaidOutOnce,
    legend_below,
    log_axis,
    spread,
    styled,
)
from kdprune.report.summary import count

Blocks = Sequence[tuple[int, int]]

PAIRS = {
    "pair_cosine": "Cosine",
    "pair_linear_cka": "Linear CKA",
    "pair_rbf_cka": "RBF CKA",
}
_CLOSEST = 1e-4  # similarities nearer to 1 than this look alike
_TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)


def heat_map(results: Results, name: str) -> str:
    """Similarity of h_s and h_e for every pair of states; `name` is one of PAIRS."""
    canvas = Canvas(f"{PAIRS[name]} of every pair of states", 3.6, 3.9)
    with canvas as figure:
        _draw_pairs(figure.add_subplot(), analysis_of(results), results.blocks, name)
    return canvas.svg


def update_norms(results: Results) -> str:
    """How much each layer changes the state, and how large the state is."""
    canvas = Canvas("Relative update norm per layer", 5.2, 3.6)
    with canvas as figure:
        change, size = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_updates(change, size, analysis_of(results), results.blocks)
        legend_below(figure, change, 2)
    return canvas.svg


def layer_similarity(results: Results) -> str:
    """Cosine and both CKAs of each layer's input and output."""
    canvas = Canvas("Similarity of each layer's input and output", 5.2, 3.6)
    with canvas as figure:
        axes = figure.add_subplot()
        _draw_similarity(axes, analysis_of(results), results.blocks)
        legend_below(figure, axes, 3)
    return canvas.svg


def massive_tokens(results: Results) -> str:
    """The largest token norm over the median at every boundary, the layers that write and erase such tokens marked."""
    canvas = Canvas("Largest token norm over the median", 5.2, 3.6)
    with canvas as figure:
        axes = figure.add_subplot()
        _draw_massive(axes, analysis_of(results), results.blocks)
        legend_below(figure, axes, 4)
    return canvas.svg


def block_damage(results: Results) -> str:
    """Damage of every block that was measured alone, by its first layer and its length; the chosen ones in frames."""
    damages = analysis_of(results).block_damage
    lengths = range(min(e - s for s, e in damages), max(e - s for s, e in damages) + 1)
    first, last = min(s for s, _ in damages), max(s for s, _ in damages)
    grid = np.full((len(lengths), last - first + 1), np.nan)
    for (start, end), value in damages.items():
        grid[end - start - lengths[0], start - first] = value
    canvas = Canvas("Damage of the blocks that were measured", 5.2, 1.9 + 0.3 * len(lengths))
    with canvas as figure:
        axes = figure.add_subplot()
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        scale = LogNorm(low, high) if 0 < low < high else Normalize(low, max(high, low + 1e-9))
        image = axes.imshow(
            grid, cmap="viridis_r", norm=scale, interpolation="none", aspect="auto", origin="lower",
            extent=(first - 0.5, last + 0.5, lengths[0] - 0.5, lengths[-1] + 0.5))
        axes.set_facecolor(PANEL)
        axes.grid(False)
        for (start, end), value in damages.items():
            dark = float(scale(value)) > 0.45  # of this colour map, turned round, the large values
            axes.text(
                start, end - start, _short(value), ha="center", va="center", color="white" if dark else "black",
                fontsize=7 if last - first < 24 else 5)
        for start, end in results.blocks:
            if (start, end) in damages:
                corner = (start - 0.5, end - start - 0.5)
                for colour, width in ((PAPER, 3.6), (VERMILION, 2.0)):
                    axes.add_patch(Rectangle(
                        corner, 1, 1, fill=False, edgecolor=colour, linewidth=width, clip_on=False, zorder=3))
        axes.set(xlabel="first layer s of the block", ylabel="layers e − s")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=14)
        bar.outline.set_visible(False)
        bar.ax.set_ylabel("nats a token")
        if isinstance(scale, LogNorm):
            log_axis(bar.ax.yaxis)
    return canvas.svg


def _short(value: float) -> str:
    """.043, .61, 2.4: two digits in as little room as there is."""
    return f"{value:.2g}".removeprefix("0") if value >= 1e-3 else f"{value:.0e}"


def healing(results: Results) -> str:
    """Loss of the rows that watch healing over tokens; the best look, and the dense model where it is not 0."""
    heal = results.heal
    assert heal is not None
    canvas = Canvas("Healing", 5.2, 3.3)
    with canvas as figure:
        axes = figure.add_subplot()
        seen = array(heal.tokens_at_looks)
        axes.plot(seen, array(heal.watched), color=VERMILION, marker="o", label="held-out rows")
        best = best_of(heal.watched)
        if best is not None:
            label = "best, kept" if heal.kept else "best"
            axes.plot(seen[best], array(heal.watched)[best], color=INK, marker="*", markersize=12, linestyle="",
                      markeredgecolor=PAPER, label=label, zorder=3)
        if heal.loss == "lm" and heal.language_dense is not None:
            axes.axhline(heal.language_dense, color=MUTED, linestyle="--", linewidth=1.1, label="dense model")
        axes.set(xlabel="calibration tokens", ylabel="next-token loss, nats" if heal.loss == "lm" else "KL, nats")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if value else "0"))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        spread(axes.yaxis, heal.watched, 10)
        legend_below(figure, axes)
    return canvas.svg


def save_analysis_plot(analysis: Analysis, path: str | Path, blocks: Blocks = ()) -> Path:
    """All pictures of the analysis in one file; its ending (.png, .svg, .pdf) says the format."""
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise KDPruneError(f"cannot draw to {path}: expected a file that ends in .png, .svg or .pdf")
    stream = io.BytesIO()
    with styled("analysis", **{"svg.fonttype": "path"}):
        figure = LaidOutOnce(figsize=(11, 7.6), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(4, 3.4))
        top, bottom = parts
        for axes, (name, title) in zip(top.subplots(1, 3), PAIRS.items(), strict=True):
            _draw_pairs(axes, analysis, blocks, name)
            axes.set_title(title)
        grid = bottom.add_gridspec(2, 2, height_ratios=(3, 2))
        change = bottom.add_subplot(grid[0, 0])
        size, similarity = bottom.add_subplot(grid[1, 0], sharex=change), bottom.add_subplot(grid[:, 1])
        change.tick_params(labelbottom=False)
        _draw_updates(change, size, analysis, blocks)
        _draw_similarity(similarity, analysis, blocks)
        similarity.legend(loc="lower center", ncols=3)
        figure.savefig(stream, format=kind, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return write_file(path, stream.getvalue())


def _draw_pairs(axes: Axes, analysis: Analysis, blocks: Blocks, name: str) -> None:
    """A heat map on the scale all three share, with the states of every block in a frame."""
    low, high = _limits(analysis)
    matrix = array(getattr(analysis, name))
    np.fill_diagonal(matrix, np.nan)
    axes.set_facecolor(PANEL)
    norm = FuncNorm((_stretch, _squeeze), vmin=low, vmax=high)
    image = axes.imshow(matrix, cmap="viridis", norm=norm, interpolation="none")
    axes.grid(False)
    for start, end in blocks:
        side, corner = end - start + 1, (start - 0.5, start - 0.5)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=PAPER, linewidth=3.2))
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=VERMILION, linewidth=1.6))
        axes.plot(end, start, marker="o", color=VERMILION, markeredgecolor=PAPER, markersize=6)
    axes.set(xlabel="state hₑ", ylabel="state hₛ")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    bar = axes.figure.colorbar(image, ax=axes, orientation="horizontal", aspect=32, pad=0.02)
    bar.set_ticks(_ticks(low, high), labels=[f"{tick:g}" for tick in _ticks(low, high)])
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)


def _draw_updates(change: Axes, size: Axes, analysis: Analysis, blocks: Blocks) -> None:
    """Bars of the relative update norm above the size of the state, h_l left of layer l."""
    layers = np.arange(len(analysis.relative_update))
    colours = [VERMILION if any(s <= i < e for s, e in blocks) else BLUE for i in layers]
    change.bar(layers, array(analysis.relative_update), width=0.72, color=colours)
    change.set_ylabel("‖hₗ₊₁ − hₗ‖ / ‖hₗ‖")
    spread(change.yaxis, analysis.relative_update, 20)
    if analysis.state_norm:
        size.plot(np.arange(len(analysis.state_norm)) - 0.5, array(analysis.state_norm), color=INK, marker=".")
    size.set(xlabel="layer l", ylabel="‖hₗ‖", ylim=(0, None))
    for axes in (change, size):
        _mark(axes, analysis, blocks)


def _draw_massive(axes: Axes, analysis: Analysis, blocks: Blocks) -> None:
    """A curve over boundaries, h_l left of layer l, on a logarithmic axis; layers that write or erase as bands."""
    for layers, colour, label in ((analysis.writes, ORANGE, "writes"), (analysis.erases, GREEN, "erases")):
        for number, layer in enumerate(layers):
            name = label if number == 0 else None
            axes.axvspan(layer - 0.5, layer + 0.5, color=colour, alpha=0.4, linewidth=0, zorder=0, label=name)
    ratio = array(analysis.largest_norm) / array(analysis.median_norm)
    axes.plot(np.arange(len(ratio)) - 0.5, ratio, color=INK, marker=".")
    if analysis.massive_above is not None:
        axes.axhline(analysis.massive_above, color=MUTED, linestyle="--", linewidth=1, label="massive above")
    log_axis(axes.yaxis)
    axes.set(xlabel="layer l", ylabel="largest / median ‖hₗ‖")
    _mark(axes, analysis, blocks)


def _draw_similarity(axes: Axes, analysis: Analysis, blocks: Blocks) -> None:
    """Three curves on an axis stretched towards 1."""
    curves = {"cosine": analysis.cosine, "linear CKA": analysis.linear_cka, "RBF CKA": analysis.rbf_cka}
    axes.set_yscale("function", functions=(_stretch, _squeeze))
    for (name, values), colour, marker in zip(curves.items(), (BLUE, ORANGE, GREEN), MARKERS, strict=False):
        axes.plot(array(values), color=colour, marker=marker, label=name, markevery=-(-len(values) // 40) or 1)
    known = np.concatenate([array(values) for values in curves.values()])
    known = known[np.isfinite(known)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.99)
    axes.set_ylim(*_squeeze(_stretch(np.array([low, high])) + np.array([-0.15, 0.15])))
    axes.yaxis.set_major_locator(FixedLocator(_ticks(*axes.get_ylim(), most=9)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="layer l", ylabel="similarity of hₗ and hₗ₊₁")
    _mark(axes, analysis, blocks)


def _mark(axes: Axes, analysis: Analysis, blocks: Blocks) -> None:
    """Chosen blocks shaded, protected ends hatched, whole layers on the axis."""
    count = len(analysis.relative_update)
    first, last = analysis.protected
    for number, (start, end) in enumerate(blocks):
        label = "chosen block" if number == 0 else None
        axes.axvspan(start - 0.5, end - 0.5, color=VERMILION, alpha=0.16, linewidth=0, zorder=0, label=label)
    ends = [(-0.6, first - 0.5)] * (first > 0) + [(count - last - 0.5, count - 0.4)] * (last > 0)
    for number, (left, right) in enumerate(ends):
        label = "protected" if number == 0 else None
        axes.axvspan(left, right, fill=False, edgecolor=MUTED, hatch="///", linewidth=0, zorder=0, label=label)
    axes.set_xlim(-0.6, count - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def array(values: Sequence[Number] | Matrix) -> np.ndarray:
    """Numbers with NaN where a value is missing."""
    return np.array(values, dtype=float)


def _stretch(value: np.ndarray) -> np.ndarray:
    """−log10(1 − v): .9, .99 and .999 lie one step apart."""
    return -np.log10(np.maximum(1 - np.asarray(value, dtype=float), 0) + _CLOSEST)


def _squeeze(value: np.ndarray) -> np.ndarray:
    """The inverse of `_stretch`."""
    return 1 + _CLOSEST - 10 ** -np.asarray(value, dtype=float)


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round similarities between two limits, evenly thinned."""
    inside = [tick for tick in _TICKS if low <= tick <= high] or [low, high]
    return inside[:: -(-len(inside) // most)]


def _limits(analysis: Analysis) -> tuple[float, float]:
    """The range of all pairwise similarities of two different states, one scale for all heat maps."""
    values = np.stack([array(getattr(analysis, name)) for name in PAIRS])
    values = values[:, ~np.eye(values.shape[-1], dtype=bool)]
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 0.99
    low = min(max(0.0, float(values.min())), 0.98)
    return low, max(float(values.max()), low + 0.01)
