"""The tables of the book: each takes a page's records and one section of its YAML and gives Markdown."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from book_records import Page, Section

from kdprune.methods import METHODS
from kdprune.report import summary
from kdprune.report.comparison_records import Comparison, Row, Stat
from kdprune.report.comparison_table import cells, stat, title_of

GAP = "—"  # not measured
SAME_SIZE = 2e-3  # of the layers' parameters: what no table shows apart


def markdown(titles: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; all columns but the first ``left`` to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    return "\n".join([f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


# --------------------------------------------------------------------------------------------- of a record


def mean(found: Stat | None) -> float | None:
    """The mean of a figure that there may not be."""
    return None if found is None else found.mean


def nats(value: float | None) -> str:
    """To a thousandth."""
    return GAP if value is None else f"{value:.3f}"


def title(found: Iterable[Comparison], name: str) -> str:
    """A variant as tables show it: a method's title, and what is typed for one with options."""
    if ":" in name:
        return f"{METHODS[name.partition(':')[0]].title} `{name}`"
    return next(title_of(row) for comparison in found if (row := comparison.row(name)))


def texts(page: Page, section: Section) -> str:
    """A table a model: what every variant loses, mean over the texts, at each window, and on each text at the first.
    Means over seeds, of the losses ± their standard deviation. The first row has the dense model's perplexities.

    ``record`` names another record than the page's, ``apart`` texts that have a column and do not enter the means,
    ``only`` the variants that are shown.
    """
    parts, apart = [], section.get("apart", [])
    for model, found in page.comparisons(section.get("record")).items():
        rows = [row for row in found.rows if row.texts and row.variant.name in section.get("only", [row.variant.name])]
        windows = list(dict.fromkeys(one.window for row in rows for one in row.texts))
        names = list(dict.fromkeys(one.dataset for row in rows for one in row.texts))
        dense = {one.dataset: one.dense for unit in found.units for one in (unit.perplexity, *unit.texts)
                 if one.window == windows[0]}
        table: list[list[object]] = [["dense, perplexity", *[""] * (len(windows) + 3),
                                      *(summary.decimals(dense.get(name), 1) for name in names), "", ""]]
        for row in sorted(rows, key=lambda row: _excess(found, row, windows[0], apart)):
            at = {(one.dataset, one.window): mean(one.excess_loss) for one in row.texts}
            table.append([
                title([found], row.variant.name), stat(row.net_ratio_layers, lambda x: f"{100 * x:.1f}", False, " %"),
                *(stat(_text_mean(found, row, "excess_loss", window, apart), nats) for window in windows),
                stat(_text_mean(found, row, "divergence", windows[0], apart), nats, False),
                stat(_text_mean(found, row, "agreement", windows[0], apart), lambda x: f"{100 * x:.1f}", False, " %"),
                *(nats(at.get((name, windows[0]))) for name in names),
                len(row.seeds), stat(row.seconds, summary.duration, False)])
        heads = ["", "net, of the layers", *(f"excess, window {window}" for window in windows), "KL", "same next token",
                 *names, "seeds", "time"]
        parts += [f"### {model}", markdown(heads, table)]
    return "\n\n".join(parts)


def _text_mean(found: Comparison, row: Row, field: str, window: int, apart: Sequence[str] = ()) -> Stat | None:
    """A figure of a row at one window over its seeds, of each the mean over texts but those ``apart``."""
    every = [[getattr(one, field) for one in (unit.perplexity, *unit.texts)
              if one.window == window and one.dataset not in apart and getattr(one, field) is not None]
             for unit in found.units if unit.variant == row.variant.name]
    return Stat.of(statistics.fmean(values) for values in every if values)


def _excess(found: Comparison, row: Row, window: int, apart: Sequence[str]) -> float:
    """What a row loses: mean over seeds, infinite where that is no number."""
    value = mean(_text_mean(found, row, "excess_loss", window, apart))
    return math.inf if value is None else value


def cost(page: Page, section: Section) -> str:
    """A table a model: what every variant took and what it saves, least time first.

    ``record`` names another record than the page's.
    """
    parts, every = [], ["time", "time, passes", "peak memory", "tokens used", "trained × tokens", "search, passes",
                        "net ratio", "prefill", "decode", "KV cache saved"]
    for model, found in page.comparisons(section.get("record")).items():
        rows = sorted((row for row in found.rows if row.seeds), key=lambda row: mean(row.seconds) or math.inf)
        columns = [one for one in every if any(cells(row, [one]) != [summary.MISSING] for row in rows)]
        parts += [f"### {model}", markdown(["", *columns], [
            [title([found], row.variant.name), *cells(row, columns)] for row in rows])]
    return "\n\n".join(parts)


def failures(page: Page, section: Section) -> str:
    """What failed in any of the page's records, and why; "" where nothing did."""
    records = dict.fromkeys(one.get("record") for one in page.spec["runs"])
    return "\n".join(dict.fromkeys(
        f"- {model}, `{failed.variant}` at {found.ratio:g}: {failed.reason}"
        for record in records for model, found in page.comparisons(record).items() for failed in found.failures))


# --------------------------------------------------------------------------------------------- over records


@dataclass(frozen=True)
class Point:
    """A variant at one size: mean over seeds and texts at the first window. net: of the layers' parameters."""

    net: float
    excess_loss: float


def curve_points(page: Page, section: Section) -> dict[str, dict[str, list[Point]]]:
    """Model → variant → its points by size, of all ``records`` (those that the section names) together."""
    found: dict[str, dict[str, list[Point]]] = {}
    for record in section["records"]:
        for model, comparison in page.comparisons(record).items():
            for row in comparison.rows:
                net = mean(row.net_ratio_layers)
                if row.texts and net is not None:
                    loss = _excess(comparison, row, row.texts[0].window, section.get("apart", []))
                    found.setdefault(model, {}).setdefault(row.variant.name, []).append(Point(net, loss))
    return {model: {name: sorted(points, key=lambda point: point.net) for name, points in variants.items()}
            for model, variants in found.items()}


def at_size(page: Page, section: Section) -> str:
    """A table a model: excess loss at the sizes of ``ours`` exactly, a variant or all of a method, between two measured
    sizes of a variant by a straight line in its logarithm; a gap where it was measured on one side alone. A model
    without two such rows is left out.
    """
    parts = []
    for model, variants in curve_points(page, section).items():
        every = sorted(point.net for name, points in variants.items() for point in points
                       if f"{name}:".startswith(f"{section['ours']}:"))
        sizes = [size for before, size in zip([-math.inf, *every], every, strict=False) if size - before > SAME_SIZE]
        rows = [(name, [_between(points, size) for size in sizes]) for name, points in variants.items()]
        rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
        if len(rows) < 2:
            continue
        rows.sort(key=lambda row: (-sum(value is not None for value in row[1]), sum(value or 0.0 for value in row[1])))
        parts += [f"### {model}", markdown(
            ["", *(f"{100 * size:.1f} %" for size in sizes)],
            [[f"`{name}`", *map(nats, values)] for name, values in rows])]
    return "\n\n".join(parts)


def _between(points: Sequence[Point], size: float) -> float | None:
    """Excess loss at a size within the measured ones."""
    for point in points:
        if math.isclose(point.net, size, abs_tol=SAME_SIZE):
            return point.excess_loss
    for low, high in itertools.pairwise(points):
        if low.net < size < high.net and min(low.excess_loss, high.excess_loss) > 0:
            share = (size - low.net) / (high.net - low.net)
            return low.excess_loss ** (1 - share) * high.excess_loss**share
    return None


TABLES: Mapping[str, Callable[[Page, Mapping[str, Any]], str]] = {
    "texts": texts, "cost": cost, "at-size": at_size, "failures": failures}
