"""The page of benchmarks/generation.py, from its records; what both agree on."""

import math
import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pruned_models import KDP, title
from units_file import COLOURS, Record, by_model, load, table, write_page

RATIO = 0.25
METHODS = ("shortgpt", "linearpatch", "streamline", KDP)
PROMPT, NEW = 64, 64  # tokens of a prompt, and of a continuation
MEASURES = ("rouge1", "rouge2", "rougeL")
AGAINST = {"dense": "the dense model's continuation", "true": "the true text"}
CHANCE = "chance"  # the dense model's continuation of another prompt
RESAMPLES = 2000
SHOWN_SAMPLES = 2


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["method"], record["seed"]


def mean_score(record: Record, against: str, measure: str) -> float:
    """Mean ROUGE over the prompts."""
    return statistics.fmean(record["rouge"][against][measure])


def lead(records: list[Record], method: str, peer: str, against: str, measure: str) -> str:
    """How much higher a method's ROUGE is than a peer's, with the 95 % of a paired bootstrap over prompts.

    Seeds that both have are averaged prompt by prompt first.
    """
    by_seed = [{r["seed"]: r["rouge"][against][measure] for r in records if r["method"] == name and "rouge" in r}
               for name in (method, peer)]
    both = sorted(set(by_seed[0]) & set(by_seed[1]))
    gaps = np.mean([np.subtract(by_seed[0][seed], by_seed[1][seed]) for seed in both], axis=0)
    draws = np.random.default_rng(0).integers(len(gaps), size=(RESAMPLES, len(gaps)))
    low, high = np.percentile(gaps[draws].mean(1), (2.5, 97.5))
    return f"{gaps.mean():+.3f} ({low:+.3f} … {high:+.3f})"


def names_of(records: list[Record]) -> list[str]:
    """Measured: dense, KDP, the peers, chance last."""
    others = (record["method"] for record in records if record["method"] != CHANCE)
    found = dict.fromkeys(["dense", *reversed(METHODS), *others, CHANCE])
    return [name for name in found if any(r["method"] == name and "rouge" in r for r in records)]


def shown(name: str) -> str:
    """As the page calls it."""
    return {"dense": "dense", CHANCE: "dense, another prompt"}.get(name) or title(name)


def score_table(records: list[Record]) -> str:
    """A row a model, means over seeds."""
    rows: list[list[object]] = []
    for name in names_of(records):
        found = [record for record in records if record["method"] == name and "rouge" in record]

        def cell(values: list[float], digits: int = 3) -> str:
            return f"{statistics.fmean(values):.{digits}f}"

        own = [record for record in found if "perplexity" in record]
        rows.append([
            shown(name), f"{statistics.fmean(r.get('net_ratio', 0) for r in found):.1%}",
            cell([r["perplexity"] for r in own], 2) if own else "",
            *(cell([mean_score(r, against, measure) for r in found]) for against in AGAINST for measure in MEASURES),
            cell([statistics.fmean(r["same_prefix"]) for r in found], 1), cell([r["under_dense"] for r in found], 2),
            cell([r["of_dense_text"] for r in own], 2) if own else "",
            f"{statistics.fmean(r['repeated'] for r in found):.0%}"])
    return table(
        "model | net ratio | perplexity | R-1 to dense | R-2 | R-L | R-1 to true text | R-2 | R-L "
        "| tokens as dense | its text under dense | dense's text under it | repeated", rows)


def lead_table(records: list[Record]) -> str:
    """KDP's lead over every peer."""
    rows = [[title(name), *(lead(records, KDP, name, against, measure)
                            for against in AGAINST for measure in ("rouge1", "rougeL"))]
            for name in names_of(records) if name not in ("dense", KDP, CHANCE)]
    return table("over | R-1 to dense | R-L to dense | R-1 to true text | R-L to true text", rows)


def samples(records: list[Record]) -> str:
    """A few continuations, as written."""
    parts = []
    first = {name: next(r for r in records if r["method"] == name and "rouge" in r) for name in names_of(records)}
    first.pop(CHANCE, None)
    for at in range(SHOWN_SAMPLES):
        lines = [f"> {_line(next(iter(first.values()))['samples'][at]['prompt'])} …\n"]
        lines += [f"- **{shown(name)}**: {_line(record['samples'][at]['text'])}" for name, record in first.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(text: str) -> str:
    """On one line, and nothing in it that Markdown would take for its own."""
    return " ".join("".join(f"\\{c}" if c in "*_`<|#[" else c for c in text).split())


def plot(records: list[Record]) -> Figure:
    """A row a model: ROUGE to the dense model's continuations, ROUGE to the true text; bars are means over prompts."""
    models = by_model(records)
    figure = Figure(figsize=(11, 3.8 * len(models)), layout="constrained")
    for row, (name, found) in zip(figure.subplots(len(models), 2, squeeze=False), models.items(), strict=True):
        for axes, (against, what) in zip(row, AGAINST.items(), strict=True):
            # The dense model's ROUGE to itself is 1 and says nothing.
            names = [entry for entry in names_of(found) if (entry, against) != ("dense", "dense")]
            for place, measure in enumerate(MEASURES):
                values = [[score for r in found if r["method"] == entry and "rouge" in r
                           for score in r["rouge"][against][measure]] for entry in names]
                axes.bar([at + (place - 1) * 0.27 for at in range(len(names))], list(map(statistics.fmean, values)),
                         0.25, color=COLOURS[place], label=f"ROUGE-{measure[5:]}", capsize=2, ecolor="#555555",
                         yerr=[statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0 for v in values])
            axes.set_xticks(range(len(names)),
                            [shown(entry).replace(", ", ",\n").replace("-", "-\n") for entry in names], fontsize=8)
            axes.set(ylabel=f"F1 to {what}", title=name, ylim=(0, 1.15 * axes.get_ylim()[1]))
            axes.grid(alpha=0.3, axis="y")
            axes.legend(fontsize=8, ncols=3, loc="upper right")
    return figure


def section(name: str, records: list[Record]) -> str:
    """One model's part of the page."""
    known = names_of(records)
    one = next(record for record in records if record["method"] == "dense")
    lacking = [title(method) for method in METHODS if method not in known]
    cannot = [f"{title(r['method'])} cannot: {r['unreachable']}." for r in records if "unreachable" in r]
    seeds = len({record["seed"] for record in records} - {None})
    lead_part = f"""KDP's lead over each peer, mean difference over prompts (95 % of {RESAMPLES} bootstrap resamples):

{lead_table(records)}

""" if KDP in known and len(known) > 3 else ""
    return f"""## {name}

{one['prompts']} prompts; perplexity on {one['scored']:,} held-out tokens (window {one['window']}, stride
{one['stride']}); {seeds} seed{'s' * (seeds != 1)} at most. \
{f"Not measured yet: {', '.join(lacking)}." if lacking else "Every unit is measured."} {' '.join(cannot)}

{score_table(records)}

{lead_part}Continuations as written, two prompts of them, chosen by place:

{samples(records)}"""


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records = list(load(file, key).values())
    sections = "\n\n".join(section(name, found) for name, found in by_model(records).items())
    page = f"""# Generation: does a pruned model still write what the dense one writes?

In generation the paper finds KDP only comparable with its peers. Here, at {RATIO:.0%} net: greedy continuations of
{NEW} tokens after prompts of {PROMPT} tokens from the held-out text, compared with the dense model's continuations and
with what really follows.

    python benchmarks/generation.py

ROUGE-1, -2 and -L are F1 of words, word pairs and the longest common subsequence of words. **dense, another prompt**
is chance: what the dense model wrote after the next prompt. *Tokens as dense*: how long a continuation is the dense
model's, token by token. *Its text under dense*: perplexity of what it wrote under the dense model, low also for text
that repeats itself; *repeated*: share of runs of four tokens that stood before in the same continuation. Error bars:
one standard error over prompts.

![ROUGE to the dense model's continuations, and to the true text]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))
