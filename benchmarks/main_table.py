"""The main table: all methods on several models, a `kdprune compare` each, and whether KDP's lead is more than chance.

    kdprune compare reference/models/llama --methods … --suite small --seeds 3 -o main-llama
    python benchmarks/main_table.py --add main-llama llama      # → docs/results/main-llama.json, and the page
    python benchmarks/main_table.py                             # the page again, from docs/results/main-*.json

Every figure of docs/results/main.md comes from these records; docs/results/main-notes.md, if there is one, is appended.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from publish import command, fill_readme, merged, portable

from kdprune.report import summary
from kdprune.report.bootstrap import RESAMPLES, Lead, lead, loss_lead, without_items
from kdprune.report.comparison_records import Comparison, Row, Stat, Unit
from kdprune.report.comparison_table import COLUMNS, UNITS, failure, stat
from kdprune.report.style import MARKERS, SERIES, Canvas, legend_below
from kdprune.report.summary import MISSING, SPACE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
OURS, QUALITY = "kdp", ("excess loss", "retained", "above chance")
# Title of a table, its column in a comparison's table, what it says.
TABLES = (
    ("Excess loss", "excess loss", "ln(pruned / dense perplexity), nats per token; last, the mean over the models."),
    ("Retained performance, as the paper has it", "retained", "Sum of all scores but perplexities over the dense one."),
    ("Retained performance above chance", "above chance",
     "Mean of (score − chance) / (dense − chance) over the rows with signal, two standard errors of the dense score."),
    ("Net ratio", "net ratio", "Share of the parameters that went, stand-ins counted."),
    ("Time of pruning", "time", "Depends on what else the machine does."),
    ("Peak memory of pruning", "peak memory", "Of the process, model and libraries included."),
    ("Prefill speed", "prefill", "Against the dense model, in turns."),
    ("Decode speed", "decode", "Against the dense model, in turns."),
    ("KV cache saved", "KV cache saved", "Bytes a token."),
)
Models = Mapping[str, Comparison]


def load() -> dict[str, Comparison]:
    """Name of the model → its comparison, by name."""
    return {file.stem.removeprefix("main-"): Comparison.load(file) for file in sorted(RESULTS.glob("main-*.json"))}


def row_of(found: Comparison, name: str) -> Row | None:
    """The row of a variant; None where this comparison has none of that name."""
    return next((row for row in found.rows if row.variant.name == name), None)


def mean(found: Stat | None) -> float | None:
    return None if found is None else found.mean


def order(models: Models) -> list[str]:
    """Names of all variants, least mean excess loss first, those that lack a model behind the others."""
    names = dict.fromkeys(row.variant.name for found in models.values() for row in found.rows)

    def place(name: str) -> tuple[int, float]:
        values = [value for found in models.values() if (row := row_of(found, name))
                  and (value := mean(row.excess_loss)) is not None]
        return len(models) - len(values), statistics.fmean(values) if values else 0.0

    return sorted(names, key=place)


def title(models: Models, name: str) -> str:
    """A variant as tables show it, with its name where that says more."""
    shown = next(row.variant.title for found in models.values() if (row := row_of(found, name)))
    return shown if name in (shown, shown.lower()) else f"{shown} `{name}`"


def table(models: Models, column: str) -> str:
    """Methods × models under one column of the comparisons; the least (excess loss) or largest mean in bold."""
    field, form, spread = COLUMNS[column]
    with_mean = column == "excess loss"
    lines = ["| | " + " | ".join([*models, *(["mean"] if with_mean else [])]) + " |",
             "|---" + "|---:" * (len(models) + with_mean) + "|"]
    best = {model: _best(found, field) for model, found in models.items()} if column in QUALITY else {}
    for name in order(models):
        cells, values = [], []
        for model, found in models.items():
            row = row_of(found, name)
            if row is None or not row.seeds:
                cells.append(MISSING if row is None else "failed")
                continue
            text = stat(getattr(row, field), form, spread, UNITS.get(field, ""))
            values.append(mean(getattr(row, field)))
            cells.append(f"**{text}**" if best.get(model) == name else text)
        if with_mean:
            known = [value for value in values if value is not None]
            cells.append(form(statistics.fmean(known)) if len(known) == len(models) else "")
        lines.append(f"| {title(models, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _best(found: Comparison, field: str) -> str:
    """Name of the variant with the best mean: least excess loss, otherwise the largest."""
    known = [(value, row.variant.name) for row in found.rows if (value := mean(getattr(row, field))) is not None]
    return (min(known) if field == "excess_loss" else max(known))[1] if known else ""


def best_peers(found: Comparison) -> dict[str, str]:
    """The measure → the best of the other methods by it."""
    rows = [row for row in found.rows if row.variant.options.get("method") != OURS and row.seeds]
    peers = found.model_copy(update={"rows": rows})
    return {column: name for column in QUALITY if (name := _best(peers, COLUMNS[column][0]))}


def units_of(found: Comparison, name: str) -> list[Unit]:
    return [unit for unit in found.units if unit.variant == name]


def item_lead(found: Comparison, ours: str, peer: str, above_chance: bool, seed: int) -> Lead | None:
    """What KDP keeps more than the peer, item by item."""
    scores = [[unit.tasks for unit in units_of(found, name)] for name in (ours, peer)]
    return lead(found.dense.tasks, *scores, above_chance=above_chance, seed=seed)


def seed_lead(found: Comparison, ours: str, peer: str) -> str:
    """Excess loss of KDP less the peer's over the seeds both have: mean ± sd, for how many KDP loses less, and p."""
    one, other = ({unit.seed: unit.perplexity.excess_loss for unit in units_of(found, name)} for name in (ours, peer))
    pairs = [(one[seed], other[seed]) for seed in one if seed in other]
    values = [left - right for left, right in pairs if left is not None and right is not None]
    if not values:
        return MISSING
    less = sum(value < 0 for value in values)
    spread = f"{SPACE}±{SPACE}{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    windows = loss_lead(*([unit.window_sums for unit in units_of(found, name)] for name in (ours, peer)),
                        found.dense.tokens)
    p = "" if windows is None else f", {likelihood(windows.p)}"
    return f"{statistics.fmean(values):+.3f}{spread}, less for {less} of {len(values)} seeds{p}"


def significance(found: Comparison, ours: str, seed: int = 0) -> str:
    """A line a peer: what KDP keeps more than it, item by item, in both forms."""
    best = best_peers(found)
    lines = [f"| {title({'': found}, ours)} against | excess loss | retained | above chance |", "|---|---|---|---|"]
    for name in [row.variant.name for row in found.rows if row.seeds and row.variant.options.get("method") != OURS]:
        cells = {"excess loss": seed_lead(found, ours, name)}
        for column, above in (("retained", False), ("above chance", True)):
            measured = item_lead(found, ours, name, above, seed)
            text = "not kept item by item" if measured is None else shown(measured)
            cells[column] = "no signal" if above and not found.signal else text
        marked = [f"**{text}**" if best.get(column) == name else text for column, text in cells.items()]
        lines.append(f"| {title({'': found}, name)} | {' | '.join(marked)} |")
    return "\n".join(lines)


def shown(found: Lead) -> str:
    """"+2.1 [+0.4, +3.8], p = .014", in points."""
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.difference:+.1f} [{low:+.1f}, {high:+.1f}], {likelihood(found.p)}"


def likelihood(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def verdict(model: str, found: Comparison, ours: str, seed: int = 0) -> str:
    """Whether KDP leads the best peer by loss and above chance, in one sentence."""
    best = best_peers(found)
    said = f"- **{model}**, {title({'': found}, ours)}:"
    if "excess loss" in best:
        peer = best["excess loss"]
        said += f" excess loss {seed_lead(found, ours, peer)}, against the best peer, {title({'': found}, peer)};"
    peer = best.get("above chance", "")
    measured = item_lead(found, ours, peer, True, seed)
    if measured is None:
        return f"{said} no items to compare by."
    word = "keeps" if measured.difference >= 0 else "loses"
    sure = "more" if measured.p < 0.05 else "no more"
    points = abs(100 * measured.difference)
    return (f"{said} above chance it {word} {points:.1f} points more than the best peer, "
            f"{title({'': found}, peer)}, {sure} than the choice of {measured.items:,} items explains "
            f"({shown(measured)}).")


def missing(model: str, found: Comparison) -> list[str]:
    """What of this comparison failed, and which rows were measured before items were kept."""
    lines = [f"- {model}, {title({'': found}, row.variant.name)}: {failure(row)}" for row in found.rows if row.failures]
    old = [row.variant.name for row in found.rows
           if any(without_items(found.dense.tasks, unit.tasks) for unit in units_of(found, row.variant.name))]
    if old:
        lines += [f"- {model}: {', '.join(old)} were measured before items were kept; run the comparison again."]
    return lines


def setting(model: str, found: Comparison) -> str:
    """A line of the table of models."""
    dense = found.dense
    return (f"| {model} | {found.family} | {summary.count(dense.parameters)} | {dense.layers} | "
            f"{summary.decimals(dense.perplexity)} | {found.calibration.tokens:,} | {len(found.seeds)} | "
            f"{len(found.signal)} of {len(found.signal) + len(found.left_out)} |")


def picture(models: Models) -> str:
    """Excess loss of every method, a marker a model."""
    names = order(models)[::-1]
    canvas = Canvas("Excess loss of every method on every model", 5.8, max(2.4, 1.1 + 0.3 * len(names)))
    with canvas as figure:
        axes = figure.add_subplot()
        for number, (model, found) in enumerate(models.items()):
            rows = [(place, row.excess_loss) for place, name in enumerate(names)
                    if (row := row_of(found, name)) and mean(row.excess_loss) is not None]
            axes.errorbar([stat.mean for _, stat in rows], [place for place, _ in rows],
                          xerr=[stat.sd or 0.0 for _, stat in rows], fmt=MARKERS[number % len(MARKERS)],
                          color=SERIES[number % len(SERIES)], capsize=2.5, label=model)
        axes.set_yticks(range(len(names)), [title(models, name).split(" `")[0] for name in names])
        axes.set(xlabel="excess loss, nats per token", ylim=(-0.6, len(names) - 0.4))
        axes.grid(axis="x")
        legend_below(figure, axes)
    return canvas.svg


def ours_of(found: Comparison) -> list[str]:
    """KDP's rows, the one with default options first."""
    return [row.variant.name for row in sorted(found.rows, key=lambda row: row.variant.name != OURS)
            if row.variant.options.get("method") == OURS and row.seeds]


def page(models: Models) -> str:
    """docs/results/main.md without its notes."""
    commands = "\n".join(
        f"    {command(found)} -o main-{model}\n    python benchmarks/main_table.py --add main-{model} {model}"
        for model, found in models.items())
    tables = "\n\n".join(
        f"## {heading}\n\n{says}\n\n{table(models, column)}" for heading, column, says in TABLES
        if any(getattr(row, COLUMNS[column][0]) for found in models.values() for row in found.rows))
    tests = "\n\n".join("\n\n".join([f"### {model}", *(significance(found, ours) for ours in ours_of(found))])
                        for model, found in models.items())
    verdicts = "\n".join(verdict(model, found, ours) for model, found in models.items() for ours in ours_of(found))
    lacking = [line for model, found in models.items() for line in missing(model, found)]
    lacks = "\n\n## What is missing\n\n" + "\n".join(lacking) if lacking else ""
    ratios = " and ".join(sorted({summary.percent(found.ratio) for found in models.values()}))
    settings = "\n".join([
        "| model | family | parameters | layers | dense perplexity | calibration tokens | seeds | rows with signal |",
        "|---|---|---:|---:|---:|---:|---:|---:|", *(setting(model, found) for model, found in models.items())])
    count = f"{len(models)} {'model' if len(models) == 1 else 'models'}"
    return f"""# The main table: all methods on {count} at {ratios} net

Does KDP keep more of a model than its peers at equal net parameters, and is its lead more than chance?

{commands}

{settings}

Mean ± standard deviation over seeds; rows by mean excess loss; the best of a column in bold.

![excess loss of every method on every model](main-excess.svg)

{tables}

## Is the lead more than the choice of items?

{verdicts}

How many points of the dense model's performance KDP keeps more (+) or less (−) than a peer, with a 95 % interval and a
two-sided p from a paired bootstrap: {RESAMPLES:,} times the items of every task are drawn with replacement, for both
methods together; answers are averaged over the seeds first, the dense model's scores are held fixed
(`report/bootstrap.py`). The interval is about items, not about seeds or training text, and p is not corrected for the
number of peers. The best peer by each measure in bold. Excess loss: the difference over the seeds in nats per token, p
from the same bootstrap over the windows of the held-out text, which follow each other, so that p is a little too small.

{tests}{lacks}
"""


def add(folders: Sequence[Path], stem: str, model: str) -> None:
    """Puts finished comparisons of one model into docs/results/STEM-MODEL.json."""
    record = portable(merged([Comparison.load(folder) for folder in folders]))
    record.save(RESULTS / f"{stem}-{model}.json")


def render() -> None:
    """Writes the page and its picture."""
    if not (models := load()):
        raise SystemExit("no docs/results/main-*.json: use --add FOLDER MODEL")
    notes = RESULTS / "main-notes.md"
    said = "\n" + notes.read_text() if notes.is_file() else ""
    (RESULTS / "main.md").write_text(page(models) + said)
    (RESULTS / "main-excess.svg").write_text(picture(models))
    fill_readme(RESULTS.parent.parent / "README.md", "main", table(models, "excess loss"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", metavar="FOLDER… MODEL",
                        help="finished comparisons (results.json in each) of one model, and its name in the table")
    options = parser.parse_args(arguments)
    if options.add:
        add([Path(folder) for folder in options.add[:-1]], "main", options.add[-1])
    render()


if __name__ == "__main__":
    main()
