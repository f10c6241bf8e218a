"""The tables of the book: each takes a page's records and one section of its YAML and gives Markdown."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from book_leads import leads
from book_records import Page, Section, Unit

from kdprune.report import summary
from kdprune.report.comparison_page import headline, ranked
from kdprune.report.comparison_records import Comparison, Row, Stat
from kdprune.report.comparison_table import COLUMNS, UNITS, cells, dense_cells, render_markdown, stat

GAP = "—"  # not measured
LARGEST = ("retained", "above_chance")  # figures of which the largest is the best


def markdown(titles: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; all columns but the first ``left`` to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    return "\n".join([f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± standard deviation over seeds; "" where there are none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


# --------------------------------------------------------------------------------------------- over models


def models(page: Page, section: Section) -> str:
    """What was measured on: a row a model; columns with nothing to say are left out."""
    found, rows = page.comparisons(), []
    for name in page.models:
        units = [unit for unit in page.units() if unit.model == name and not unit.failure]
        if not units:
            continue
        one, row = units[0], {"model": name}
        if comparison := found.get(name):
            dense = comparison.dense
            row |= {"family": comparison.family, "parameters": summary.count(dense.parameters), "layers": dense.layers}
        tokens = comparison.calibration.tokens if comparison else max(unit.tokens or 0 for unit in units)
        row |= {"dense perplexity": summary.decimals(one.dense), "calibration tokens": f"{tokens:,}",
                "held-out tokens": f"{one.scored:,}", "window": one.window, "stride": one.stride,
                "seeds": len({unit.seed for unit in units})}
        if comparison and comparison.signal:
            signal = len(comparison.signal)
            row["rows with signal"] = f"{signal} of {signal + len(comparison.left_out)}"
        rows.append(row)
    titles = list(dict.fromkeys(title for row in rows for title in row))
    return markdown(titles, [[row.get(title, "") for title in titles] for row in rows])


def row_of(found: Comparison, name: str) -> Row | None:
    """The row of a variant; None where this comparison has none of that name."""
    return next((row for row in found.rows if row.variant.name == name), None)


def mean(found: Stat | None) -> float | None:
    """The mean of a figure that there may not be."""
    return None if found is None else found.mean


def order(found: Mapping[str, Comparison]) -> list[str]:
    """Names of all variants, least mean excess loss first, those that lack a model behind the others."""
    names = dict.fromkeys(row.variant.name for comparison in found.values() for row in comparison.rows)

    def place(name: str) -> tuple[int, float]:
        values = [value for comparison in found.values() if (row := row_of(comparison, name))
                  and (value := mean(row.excess_loss)) is not None]
        return len(found) - len(values), statistics.fmean(values) if values else 0.0

    return sorted(names, key=place)


def title(found: Iterable[Comparison], name: str) -> str:
    """A variant as tables show it, with its name where that says more."""
    shown = next(row.variant.title for comparison in found if (row := row_of(comparison, name)))
    return shown if name in (shown, shown.lower()) else f"{shown} `{name}`"


def by_model(page: Page, section: Section) -> str:
    """Methods × models under one ``column`` of the comparisons; the best of a model in bold where there is a best."""
    found = page.comparisons()
    field, form, with_spread = COLUMNS[section["column"]]
    least = field == "excess_loss"
    best: dict[str, str] = {}
    for model, comparison in found.items():
        known = [(value, row.variant.name) for row in comparison.rows
                 if (value := mean(getattr(row, field))) is not None]
        if known and (least or field in LARGEST):
            best[model] = (min(known) if least else max(known))[1]
    rows = []
    for name in order(found):
        shown, values = [title(found.values(), name)], []
        for model, comparison in found.items():
            row = row_of(comparison, name)
            if row is None or not row.seeds:
                shown.append(GAP if row is None else "failed")
                continue
            text = stat(getattr(row, field), form, with_spread, UNITS.get(field, ""))
            values.append(mean(getattr(row, field)))
            shown.append(f"**{text}**" if best.get(model) == name else text)
        if least:
            whole = [value for value in values if value is not None]
            shown.append(form(statistics.fmean(whole)) if len(whole) == len(found) else "")
        rows.append(shown)
    return markdown(["", *found, *(["mean"] if least else [])], rows)


def texts(page: Page, section: Section) -> str:
    """A table a model: what every variant loses, mean over the texts, at each window, and on each text at the first.

    ``record`` names another record than the page's, ``apart`` texts that have a column and do not enter the means.
    """
    parts, apart = [], section.get("apart", [])
    for model, found in page.comparisons(section.get("record")).items():
        rows = [row for row in found.rows if row.texts]
        windows = list(dict.fromkeys(one.window for row in rows for one in row.texts))
        names = list(dict.fromkeys(one.dataset for row in rows for one in row.texts))
        table = []
        for row in sorted(rows, key=lambda row: _text_mean(row, "excess_loss", windows[0], apart)):
            at = {(one.dataset, one.window): mean(one.excess_loss) for one in row.texts}
            table.append([
                title([found], row.variant.name), stat(row.net_ratio_layers, lambda x: f"{100 * x:.1f}", False, " %"),
                *(f"{_text_mean(row, 'excess_loss', window, apart):.3f}" for window in windows),
                f"{_text_mean(row, 'divergence', windows[0], apart):.3f}",
                f"{100 * _text_mean(row, 'agreement', windows[0], apart):.1f} %",
                *(GAP if (value := at.get((name, windows[0]))) is None else f"{value:.3f}" for name in names),
                len(row.seeds), stat(row.seconds, summary.duration, False)])
        heads = ["", "net, of the layers", *(f"excess, window {window}" for window in windows), "KL", "same next token",
                 *names, "seeds", "time"]
        parts += [f"### {model}", markdown(heads, table)]
    return "\n\n".join(parts)


def _text_mean(row: Row, field: str, window: int, apart: Sequence[str] = ()) -> float:
    """A figure of a row at one window, mean over seeds and texts but those ``apart``."""
    found = [mean(getattr(one, field)) for one in row.texts if one.window == window and one.dataset not in apart]
    return statistics.fmean(value for value in found if value is not None)


def failures(page: Page, section: Section) -> str:
    """What failed, and why; "" where nothing did."""
    failed = [unit for unit in page.units() if unit.failure]
    return "\n".join(dict.fromkeys(
        f"- {unit.model}, `{unit.variant}` at {unit.ratio:.0%}: {unit.failure}" for unit in failed))


# --------------------------------------------------------------------------------------------- one comparison


def comparison(page: Page, section: Section) -> str:
    """The whole table of a comparison or ablation (``columns``), with its headline, tasks and protocol."""
    parts = [f"{headline(found)}\n\n{render_markdown(found, section.get('columns'))}".strip()
             for found in page.comparisons(section.get("record")).values()]
    return "\n\n".join(parts)


def short(page: Page, section: Section) -> str:
    """A comparison's ``columns``, least excess loss first, with ``cost_columns`` from the record ``cost``."""
    found = next(iter(page.comparisons().values()))
    cost = next(iter(page.comparisons(section.get("cost")).values()), found)
    plain, dear = section["columns"], section.get("cost_columns", [])
    rows = [["dense", *dense_cells(found, plain), *dense_cells(cost, dear)]]
    for row in ranked(found):
        costs = row_of(cost, row.variant.name)
        rows.append([row.variant.title, *cells(row, plain), *(cells(costs, dear) if costs else [GAP] * len(dear))])
    return markdown(["method", *plain, *dear], rows)


# ------------------------------------------------------------------------------------- rows as the YAML has them


def taken(units: Sequence[Unit], row: Section, model: str | None = None) -> list[Unit]:
    """The units of a row: its ``variant``, and its ``run`` where it names one."""
    return [unit for unit in units if unit.variant == row.get("variant") and not unit.failure
            and unit.run == row.get("run", unit.run) and model in (None, unit.model)]


def losses(units: Sequence[Unit], row: Section, model: str | None = None) -> dict[int, float]:
    """Seed → excess loss."""
    return {unit.seed: unit.excess_loss for unit in taken(units, row, model) if unit.excess_loss is not None}


def gains(units: Sequence[Unit], row: Section, model: str | None = None) -> list[float]:
    """Excess loss less that of the variant ``against``, over the seeds that have both: below 0 the change helps."""
    mine, base = losses(units, row, model), losses(units, {"variant": row.get("against")}, model)
    return [mine[seed] - base[seed] for seed in mine if seed in base]


def changes(page: Page, section: Section) -> str:
    """A row a change: excess loss and what it changes it by, on every model, and on how many it helps."""
    units, rows = page.units(), []
    found = list(dict.fromkeys(unit.model for unit in units))
    for row in section["rows"]:
        if "group" in row:
            rows.append([f"*{row['group']}*", *[""] * (2 + 2 * len(found))])
            continue
        shown, means = [row["says"], f"`{row['variant']}`"], []
        for model in found:
            values = gains(units, row, model)
            means += [statistics.fmean(values)] if values else []
            shown += [_loss(taken(units, row, model)) or GAP, spread(values, 4, "+") or GAP]
        wins = sum(value < 0 for value in means)
        helps = f"{'**all**' if wins == len(means) == len(found) else wins} of {len(means)}" if means else ""
        rows.append([*shown, helps])
    heads = [head for model in found for head in (model, "Δ")]
    return markdown([section.get("what", "what changes"), "variant", *heads, "helps on"], rows, left=2)


def _loss(units: Sequence[Unit]) -> str:
    """Excess loss, and the net ratio where it is not the one asked for."""
    values = [unit.excess_loss for unit in units if unit.excess_loss is not None]
    ratios = [unit.net_ratio for unit in units if unit.net_ratio is not None]
    off = ratios and abs(statistics.fmean(ratios) - units[0].ratio) > 0.002
    return spread(values) + (f" ({statistics.fmean(ratios):.1%})" if off else "")


def variants(page: Page, section: Section) -> str:
    """A row a variant: net ratio, perplexity, excess loss, its share of that of ``over``, seconds."""
    units, over = page.units(), section["over"]
    yardstick = statistics.fmean(losses(units, over).values()) if losses(units, over) else None
    rows = []
    for row in section["rows"]:
        found = taken(units, row)
        if not found:
            rows.append([row["says"], *[GAP] * 5])
            continue
        excess = list(losses(units, row).values())
        rows.append([
            row["says"], f"{_mean(found, 'net_ratio'):.1%}", spread([unit.perplexity or 0.0 for unit in found], 2),
            spread(excess), f"{statistics.fmean(excess) / yardstick:.2f}" if yardstick else GAP,
            f"{_mean(found, 'seconds'):.0f}"])
    titles = ["stand-in", "net ratio", "perplexity", "excess loss", f"of {over['says']}'s", "seconds to fit"]
    return markdown(titles, rows)


def _mean(units: Sequence[Unit], name: str) -> float:
    return statistics.fmean(getattr(unit, name) for unit in units)


# --------------------------------------------------------------------------------------------- over ratios


def by_ratio(page: Page, section: Section) -> str:
    """Excess loss of every variant at every ratio, a table a model, and a second one with the layers that went."""
    parts, units = [], page.units()
    for model in dict.fromkeys(unit.model for unit in units):
        found = [unit for unit in units if unit.model == model]
        ratios = sorted({unit.ratio for unit in found})
        rows, details = [], []
        for variant, shown in section["titles"].items():
            mine = [unit for unit in found if unit.variant == variant]
            here = {ratio: [unit for unit in mine if unit.ratio == ratio] for ratio in ratios}
            rows.append([shown, *(_at(group, ratio) for ratio, group in here.items())])
            details += [[shown, *_detail(group, ratio)] for ratio, group in here.items()
                        if group and not group[0].failure]
        parts += [f"### {model}", markdown(["method", *(f"{ratio:.0%}" for ratio in ratios)], rows), markdown(
            ["method", "asked", "net ratio", "perplexity", "layers that went", "seeds", "seconds"], details)]
    return "\n\n".join(parts)


def _at(units: Sequence[Unit], ratio: float) -> str:
    done = [unit for unit in units if not unit.failure]
    if not done:
        return "cannot" if units else GAP
    net = _mean(done, "net_ratio")
    beside = "" if abs(net - ratio) < 0.0005 else f" ({net:.1%})"
    return spread([unit.excess_loss or 0.0 for unit in done]) + beside


def _detail(units: Sequence[Unit], ratio: float) -> list[object]:
    went = [" ".join(f"{start}–{stop - 1}" if stop - start > 1 else str(start) for start, stop in unit.blocks)
            for unit in units]
    return [f"{ratio:.0%}", f"{_mean(units, 'net_ratio'):.2%}", f"{_mean(units, 'perplexity'):.2f}",
            ", ".join(dict.fromkeys(text or "widths" for text in went)), len(units), f"{_mean(units, 'seconds'):.0f}"]


def lead_tables(page: Page, section: Section) -> str:
    """Whether the lead of the method ``ours`` is more than chance."""
    return leads({model: (found, lambda name, found=found: title([found], name))
                  for model, found in page.comparisons().items()}, section["ours"])


TABLES: Mapping[str, Callable[[Page, Mapping[str, Any]], str]] = {
    "models": models, "by-model": by_model, "failures": failures, "comparison": comparison, "texts": texts,
    "short": short, "changes": changes, "variants": variants, "by-ratio": by_ratio, "leads": lead_tables}
