"""Quality against size: KDP and its peers at 10 to 50 % net.

    python benchmarks/sweep.py                                  measures what docs/results/sweep.json lacks, renders
    python benchmarks/sweep.py --methods kdp --ratios 0.25      only these; the page says what is missing
    python benchmarks/sweep.py --model DIR --name llama         the same for another model; the page shows all
    python benchmarks/sweep.py --render                         only rewrites page and plot from that file
    python benchmarks/sweep.py --quick                          few tokens and epochs, into sweep-quick.json

A unit is one method at one ratio with one seed, kept as soon as it is measured. The units are not those of
`kdprune compare`, which measures speed and tasks too and knows its units by the package's whole source: these are kept
until their record is deleted.
"""

import argparse
import itertools
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from pruned_models import KDP, Pruner, add_options, compared, fitted_tokens, scored_tokens, seeds_of, title
from stand_ins import spread
from units_file import COLOURS, Record, Subject, arguments, by_model, compact, keep, load, make_page, table, write_page

from kdprune.evaluation.perplexity import perplexity

RATIOS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
# The cheap ones first: a run that is stopped has more to show.
SLEB = "sleb:sequences=32"  # as in the main table: about what its published code looks at
METHODS = ("shortgpt", "linearpatch", "slicegpt", "streamline", "replaceme", KDP, SLEB)
SHOWN = (KDP, "streamline", "linearpatch", "replaceme", "shortgpt", SLEB, "slicegpt")
MARKS = "osD^vPX"
MISSING = "—"


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["method"], record["ratio"], record["seed"]


def order(record: Record) -> tuple[object, ...]:
    """Where it stands in the file."""
    return record["model"] != "bundled", *key(record)


def run(options: argparse.Namespace) -> None:
    """Measures what the file lacks of one model."""
    units = [{"model": options.name, "method": method, "ratio": ratio, "seed": seed}
             for seed in seeds_of(options) for method in options.methods for ratio in options.ratios]
    missing = [unit for unit in units if key(unit) not in load(options.file, key)]
    if not missing:
        return
    subject = Subject(options.model, options.text)
    prune = Pruner(subject, options.name, options.pruned, options.quick)
    held_out = subject.held_out(scored_tokens(options))
    dense = perplexity(subject.model, held_out)
    for unit in missing:
        if key(unit) in load(options.file, key):  # by another run, meanwhile
            continue
        rows = subject.rows(fitted_tokens(options), unit["seed"])
        pruned, facts = prune(unit["method"], unit["ratio"], rows, unit["seed"])
        found = compared(dense, pruned, held_out) if pruned is not None else {}
        keep(compact(unit | {"quick": options.quick} | facts | found), options.file, key, order)
        said = f"excess {found['excess_loss']:.4f}" if found else facts["unreachable"]
        print(f"{options.name} {unit['method']} {unit['ratio']:.0%} seed {unit['seed']}: {said}", flush=True)


# ------------------------------------------------------------------------------------------------- figures


def methods_of(records: list[Record]) -> list[str]:
    """The methods a page shows, those that the issue asks for first, measured or not."""
    return list(dict.fromkeys([*SHOWN, *(record["method"] for record in records)]))


def reached(records: list[Record], method: str, ratio: float | None = None) -> list[Record]:
    """Measured units of a method, at one ratio or all."""
    return [record for record in records if record["method"] == method and "unreachable" not in record
            and ratio in (None, record["ratio"])]


def cell(records: list[Record], method: str, ratio: float) -> str:
    """Excess loss over the seeds, with the net ratio where it is not the one asked for."""
    found = reached(records, method, ratio)
    if not found:
        tried = any((r["method"], r["ratio"]) == (method, ratio) for r in records)
        return "cannot" if tried else MISSING
    net = statistics.fmean(record["net_ratio"] for record in found)
    beside = "" if abs(net - ratio) < 0.0005 else f" ({net:.1%})"
    return spread([record["excess_loss"] for record in found]) + beside


def layers(record: Record) -> str:
    """The layers that went."""
    return " ".join(f"{start}–{stop - 1}" if stop - start > 1 else str(start) for start, stop in record["blocks"])


def details(records: list[Record]) -> list[list[object]]:
    """A row a method and ratio: perplexity, layers, seeds, seconds."""
    rows: list[list[object]] = []
    for method, ratio in itertools.product(methods_of(records), sorted({r["ratio"] for r in records})):
        found = reached(records, method, ratio)
        if found:
            rows.append([
                title(method), f"{ratio:.0%}", f"{statistics.fmean(r['net_ratio'] for r in found):.2%}",
                f"{statistics.fmean(r['perplexity'] for r in found):.2f}",
                ", ".join(dict.fromkeys(layers(r) or "widths" for r in found)), len(found),
                f"{statistics.fmean(r['seconds'] for r in found):.0f}"])
    return rows


def lacking(records: list[Record]) -> str:
    """Which units of the issue are not measured, and which cannot be."""
    lines = []
    for method in SHOWN:
        known = {record["ratio"] for record in records if record["method"] == method}
        if gaps := [f"{ratio:.0%}" for ratio in RATIOS if ratio not in known]:
            lines.append(f"{title(method)} ({', '.join(gaps)})")
    text = f"Not measured yet: {'; '.join(lines)}." if lines else "Every unit is measured."
    for record in records:
        if "unreachable" in record:
            text += f"\n{title(record['method'])} cannot at {record['ratio']:.0%}: {record['unreachable']}."
    return text


def plot(records: list[Record]) -> Figure:
    """A panel a model, two in a row: excess loss against net ratio, a curve a method, dots are seeds."""
    models = by_model(records)
    columns, lines = min(2, len(models)), -(-len(models) // 2)
    figure = Figure(figsize=(6.6 * columns, 4.6 * lines), layout="constrained")
    for number, (name, found) in enumerate(models.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        for place, method in enumerate(methods_of(found)):
            colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
            units = reached(found, method)
            points = [(statistics.fmean(r["net_ratio"] for r in here), statistics.fmean(r["excess_loss"] for r in here))
                      for ratio in sorted({r["ratio"] for r in units}) if (here := reached(found, method, ratio))]
            look = {"color": colour, "marker": mark, "markersize": 5,
                    "fillstyle": "full" if title(method).startswith("KDP") else "none"}
            if place >= len(COLOURS):  # the same colour and mark, larger and with an edge
                look |= {"markersize": 8, "markeredgecolor": "black", "linestyle": "--"}
            axes.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1.8 if method == KDP else 1.1,
                      label=title(method).replace("`", "") + ("" if points else " (not measured)"), **look)
            if len({record["seed"] for record in units}) > 1:
                look |= {"linestyle": ""}
                axes.plot([r["net_ratio"] for r in units], [r["excess_loss"] for r in units], **look)
        # Logarithmic: the worst method loses ten times what the best one does.
        axes.set(xlabel="share of the parameters removed, net", title=name, yscale="log",
                 xlim=(0.05, 0.6), ylim=(0.003, 3), ylabel="excess loss ln(ppl / dense ppl), nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    return figure


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records, parts = list(load(file, key).values()), []
    for name, found in by_model(records).items():
        ratios = sorted({*RATIOS, *(record["ratio"] for record in found)})
        seeds = sorted({record["seed"] for record in found})
        one = next((record for record in found if "unreachable" not in record), None)
        protocol = "" if one is None else (
            f"Calibrated on {max(record.get('tokens', 0) for record in found):,} tokens at most. "
            f"Dense perplexity {one['dense']:.2f} on {one['scored']:,} held-out tokens (window {one['window']}, stride "
            f"{one['stride']}); {len(seeds)} seed{'s' * (len(seeds) != 1)} at most.")
        rows = [[title(method), *(cell(found, method, ratio) for ratio in ratios)] for method in methods_of(found)]
        parts.append(f"""## {name}

{protocol} {lacking(found)}

Excess loss in nats per token at the ratio asked for; in brackets the net ratio, where it is another one:

{table("method | " + " | ".join(f"{ratio:.0%}" for ratio in ratios), rows)}

{table("method | asked | net ratio | perplexity | layers that went | seeds | seconds", details(found))}""")
    sections = "\n\n".join(parts)
    page = f"""# Ratio sweep: quality against size

How does the loss grow with the share of parameters that goes, net of what is put in their place, for KDP and for its
peers? Every method meets the ratio from above as nearly as it can; methods that take whole layers out jump from layer
to layer, so curves are drawn at the net ratio that was reached.

    python benchmarks/sweep.py

{MISSING}: not measured yet. Seconds were taken on a shared machine and mean little.

![excess loss against the net ratio, a curve a method]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))


def main() -> None:
    parser = arguments(__doc__, "sweep")
    add_options(parser, METHODS)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    make_page(parser, "sweep", run, render)


if __name__ == "__main__":
    main()
