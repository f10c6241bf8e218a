"""How much calibration text, and of which kind? Tokens swept, and news against books, for KDP and its peers.

    python benchmarks/calibration.py                            what docs/results/calibration.json lacks, and the page
    python benchmarks/calibration.py --train DIR --heldout DIR  the domains too: files DOMAIN_*.txt(.xz) in each
    python benchmarks/calibration.py --parts domains --methods linearpatch --train DIR --heldout DIR   only these
    python benchmarks/calibration.py --model DIR --name llama   the same for another model; the page shows all
    python benchmarks/calibration.py --render                   only rewrites page and plot from that file
    python benchmarks/calibration.py --quick                    few tokens and epochs, into calibration-quick.json

A unit is one method at 25 % net with one seed, calibrated on so many tokens of the bundled text, or of one domain and
then measured on all of them.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from pruned_models import (
    KDP,
    LONGEST,
    QUICK_TOKENS,
    TOKENS,
    Pruner,
    add_options,
    compared,
    documents,
    scored_tokens,
    seeds_of,
    title,
)
from stand_ins import spread
from units_file import COLOURS, Record, Subject, arguments, by_model, compact, keep, load, make_page, table, write_page

from kdprune.data import TokenSet, load_stream, load_tokens
from kdprune.errors import KDPruneError
from kdprune.evaluation.models import vocabulary_size
from kdprune.evaluation.perplexity import Perplexity, perplexity

RATIO = 0.25
METHODS = ("linearpatch", "streamline", KDP)
COUNTS = (2048, 8192, 32_768, TOKENS)
DOMAINS = {"news": "wikinews", "books": "gutenberg", "encyclopedia": "wiki_en"}
SHOWN_DOMAINS = ("news", "books")
DOMAIN_TOKENS, DOMAIN_HELD_OUT = 32_768, 32_768
CHARACTERS = 40  # characters read for every calibration token: rows are drawn from several times what is kept
MISSING = "—"


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["part"], record["method"], record["calibrated"], record["seed"]


def order(record: Record) -> tuple[object, ...]:
    """Where it stands in the file."""
    return record["model"] != "bundled", record["model"], record["part"], record["method"], str(
        record["calibrated"]).zfill(12), record["seed"]


def file_of(folder: Path, domain: str) -> Path:
    """The first text file of a domain in a folder."""
    found = sorted(file for file in folder.glob(f"{DOMAINS[domain]}*") if ".txt" in file.suffixes)
    if not found:
        raise KDPruneError(f"got {folder}, expected a file {DOMAINS[domain]}*.txt or .txt.xz in it for {domain}")
    return found[0]


def units_of(options: argparse.Namespace) -> list[Record]:
    """The units asked for, the smallest first; domains only where their texts are given."""
    counts = [count for count in options.tokens if not options.quick or count <= QUICK_TOKENS]
    texts = {"tokens": counts if "tokens" in options.parts else [],
             "domains": options.domains if "domains" in options.parts and options.train and options.heldout else []}
    return [{"model": options.name, "part": part, "method": method, "calibrated": calibrated, "seed": seed}
            for seed in seeds_of(options) for part in texts for method in options.methods for calibrated in texts[part]]


class Texts:
    """Calibration rows and held-out streams, each read once.

    ``dense``: the dense model's perplexity by held-out text.
    """

    def __init__(self, subject: Subject, options: argparse.Namespace):
        self.subject, self.options = subject, options
        self.dense: dict[str, Perplexity] = {}
        self._held: dict[str, TokenSet] = {}

    def rows(self, unit: Record) -> TokenSet:
        """What a unit is calibrated on."""
        if unit["part"] == "tokens":
            return self.subject.rows(unit["calibrated"], unit["seed"])
        tokens = QUICK_TOKENS if self.options.quick else DOMAIN_TOKENS
        like = self.subject.rows(tokens, unit["seed"])
        source = documents(file_of(self.options.train, unit["calibrated"]), CHARACTERS * tokens)
        return load_tokens(source, self.subject.tokenizer, samples=len(like), length=like.ids.shape[1],
                           seed=unit["seed"], vocabulary=vocabulary_size(self.subject.model))

    def held_out(self, unit: Record) -> Iterator[tuple[str, TokenSet]]:
        """What a unit is measured on: name and text."""
        for name in ["bundled"] if unit["part"] == "tokens" else self.options.domains:
            if name not in self._held:
                self._held[name] = self._read(name)
                self.dense[name] = perplexity(self.subject.model, self._held[name])
            yield name, self._held[name]

    def _read(self, name: str) -> TokenSet:
        if name == "bundled":
            return self.subject.held_out(scored_tokens(self.options))
        tokens = QUICK_TOKENS if self.options.quick else DOMAIN_HELD_OUT
        source = documents(file_of(self.options.heldout, name), CHARACTERS * tokens)
        return load_stream(source, self.subject.tokenizer, limit=tokens,
                           vocabulary=vocabulary_size(self.subject.model))


def run(options: argparse.Namespace) -> None:
    """Measures what the file lacks of one model."""
    missing = [unit for unit in units_of(options) if key(unit) not in load(options.file, key)]
    if not missing:
        return
    subject = Subject(options.model, options.text)
    prune, texts = Pruner(subject, options.name, options.pruned, options.quick), Texts(subject, options)
    for unit in missing:
        rows = texts.rows(unit)
        pruned, facts = prune(unit["method"], RATIO, rows, unit["seed"])
        found = {} if pruned is None else {
            name: compared(texts.dense[name], pruned, held_out) for name, held_out in texts.held_out(unit)}
        record = unit | {"quick": options.quick, "rows": len(rows), "row": rows.ids.shape[1]} | facts
        keep(compact(record | {"measured": found}), options.file, key, order)
        said = " ".join(f"{name} {entry['excess_loss']:.4f}" for name, entry in found.items())
        print(f"{options.name} {unit['method']} {unit['calibrated']} seed {unit['seed']}: "
              f"{said or facts['unreachable']}", flush=True)


# ------------------------------------------------------------------------------------------------- figures


def excess(records: list[Record], part: str, method: str, calibrated: object, text: str = "bundled") -> list[float]:
    """Excess losses over the seeds."""
    return [record["measured"][text]["excess_loss"] for record in records
            if (record["part"], record["method"], record["calibrated"]) == (part, method, calibrated)
            and text in record["measured"]]


def cell(values: list[float]) -> str:
    """Mean and spread, or that there is nothing."""
    return spread(values, 4) if values else MISSING


def methods_of(records: list[Record]) -> list[str]:
    """KDP first, then the peers, measured or not."""
    return list(dict.fromkeys([*reversed(METHODS), *(record["method"] for record in records)]))


def token_table(records: list[Record]) -> str:
    """A row a method: excess loss by the number of calibration tokens."""
    counts = sorted({*COUNTS, *(record["calibrated"] for record in records if record["part"] == "tokens")})
    rows = [[title(method), *(cell(excess(records, "tokens", method, count)) for count in counts)]
            for method in methods_of(records)]
    return table("method | " + " | ".join(f"{count:,}" for count in counts), rows)


def domain_names(records: list[Record]) -> list[str]:
    """The domains of a page."""
    return list(dict.fromkeys([*SHOWN_DOMAINS, *(r["calibrated"] for r in records if r["part"] == "domains")]))


def domain_table(records: list[Record]) -> str:
    """A row a method and held-out domain; last, what a foreign calibration costs over the matched one."""
    names, rows = domain_names(records), []
    for method in methods_of(records):
        for held in names:
            found = {name: excess(records, "domains", method, name, held) for name in names}
            worst = [statistics.fmean(values) for name, values in found.items() if name != held and values]
            price = f"{max(worst) - statistics.fmean(found[held]):+.4f}" if worst and found[held] else MISSING
            rows.append([title(method), held, *(cell(found[name]) for name in names), price])
    return table("method | evaluated on | " + " | ".join(f"calibrated on {name}" for name in names)
                 + " | mismatch costs", rows)


def facts(records: list[Record]) -> str:
    """Protocol and what is missing, in words."""
    dense = {name: entry for record in records for name, entry in record["measured"].items()}
    words = "; ".join(f"{name}: {entry['dense']:.2f} on {entry['scored']:,} tokens" for name, entry in dense.items())
    lacking = [f"{title(method)} on {count:,} tokens" for method in methods_of(records) for count in COUNTS
               if not excess(records, "tokens", method, count)]
    lacking += [f"{title(method)} on {name}" for method in methods_of(records) for name in SHOWN_DOMAINS
                if not excess(records, "domains", method, name, name)]
    cannot = [f"{title(r['method'])} on {r['calibrated']}: {r['unreachable']}" for r in records if "unreachable" in r]
    seeds = len({record["seed"] for record in records})
    return " ".join([
        f"Dense perplexity: {words}. {seeds} seed{'s' * (seeds != 1)} at most.",
        f"Not measured yet: {'; '.join(lacking)}." if lacking else "Every unit is measured.",
        *([f"Cannot: {'; '.join(cannot)}."] if cannot else [])])


def _token_plot(axes: Axes, records: list[Record]) -> None:
    for colour, method in zip(COLOURS, methods_of(records), strict=False):
        counts = [count for count in sorted({r["calibrated"] for r in records if r["part"] == "tokens"})
                  if excess(records, "tokens", method, count)]
        axes.plot(counts, [statistics.fmean(excess(records, "tokens", method, count)) for count in counts], "o-",
                  color=colour, markersize=4, label=title(method) + ("" if counts else " (not measured)"))
    axes.set(xlabel="calibration tokens", xscale="log", ylim=(0, None))
    ticks = sorted({record["calibrated"] for record in records if record["part"] == "tokens"})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _domain_plot(axes: Axes, records: list[Record]) -> None:
    names = domain_names(records)
    pairs = [(calibrated, held) for held in names for calibrated in names]
    methods = methods_of(records)
    for colour, (place, method) in zip(COLOURS, enumerate(methods), strict=False):
        found = [excess(records, "domains", method, *pair) for pair in pairs]
        wide = 0.8 / len(methods)
        at = [spot + (place - (len(methods) - 1) / 2) * wide for spot, values in enumerate(found) if values]
        axes.bar(at, [statistics.fmean(values) for values in found if values], 0.9 * wide, color=colour)
    axes.set_xticks(range(len(pairs)), [f"{held}\n(by {calibrated})" for calibrated, held in pairs], fontsize=8)
    axes.set_xlabel("evaluated on (calibrated by)")


def plot(records: list[Record]) -> Figure:
    """A row a model. Left: excess loss against tokens. Right: by domain of calibration and evaluation."""
    models = by_model(records)
    figure = Figure(figsize=(11, 4.2 * len(models)), layout="constrained")
    for row, (name, found) in zip(figure.subplots(len(models), 2, squeeze=False), models.items(), strict=True):
        _token_plot(row[0], found)
        _domain_plot(row[1], found)
        for axes in row:
            axes.set_ylabel("excess loss, nats per token")
            axes.set_title(name)
            axes.grid(alpha=0.3)
        row[0].legend(fontsize=8)
    return figure


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records = list(load(file, key).values())
    sections = "\n\n".join(f"""## {name}

{facts(found)}

Excess loss by the number of calibration tokens of the bundled text:

{token_table(found)}

Excess loss by domain:

{domain_table(found)}""" for name, found in by_model(records).items())
    page = f"""# Calibration: how much text, and of which kind?

At {RATIO:.0%} net: how many calibration tokens does a method need, and what does it cost to calibrate on another kind
of text than the one the model is used on? KDP learns more than its peers, so that it should need more tokens.

    python benchmarks/calibration.py --train DIR --heldout DIR

Tokens are rows of the bundled calibration text, measured on the bundled held-out text. Domains: about
{DOMAIN_TOKENS:,} tokens of Wikinews or of Project Gutenberg's books (the first {LONGEST:,} characters of each document
at most), measured on up to {DOMAIN_HELD_OUT:,} held-out tokens of each; excess loss is over the dense model's on the
same text. {MISSING}: not measured yet.

![excess loss against calibration tokens, and by domain]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))


def main() -> None:
    parser = arguments(__doc__, "calibration")
    add_options(parser, METHODS, fit_tokens=False)
    parser.add_argument("--parts", nargs="+", choices=("tokens", "domains"), default=["tokens", "domains"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(COUNTS), help="calibration tokens that are swept")
    parser.add_argument("--domains", nargs="+", choices=list(DOMAINS), default=list(SHOWN_DOMAINS))
    parser.add_argument("--train", type=Path, help="directory of the domains' calibration texts")
    parser.add_argument("--heldout", type=Path, help="directory of the domains' held-out texts")
    make_page(parser, "calibration", run, render)


if __name__ == "__main__":
    main()
