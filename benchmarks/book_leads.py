"""Is the lead of one method over the others more than chance? A paired bootstrap over items and windows."""

import statistics
from collections.abc import Callable, Mapping

from kdprune.report.bootstrap import RESAMPLES, Lead, lead, loss_lead, without_items
from kdprune.report.comparison_records import Comparison, Row, Unit
from kdprune.report.comparison_table import failure
from kdprune.report.summary import MISSING, SPACE

QUALITY = {"excess loss": "excess_loss", "retained": "retained", "above chance": "above_chance"}
READING = f"""How many points of the dense model's performance KDP keeps more (+) or less (−) than a peer, with a 95 %
interval and a two-sided p from a paired bootstrap: {RESAMPLES:,} times the items of every task are drawn with
replacement, for both methods together; answers are averaged over the seeds first, the dense model's scores are held
fixed (`report/bootstrap.py`). The interval is about items, not about seeds or training text, and p is not corrected for
the number of peers. The best peer by each measure in bold. Excess loss: the difference over the seeds in nats per
token, p from the same bootstrap over the windows of the held-out text, which follow each other, so that p is a little
too small."""
Named = tuple[Comparison, Callable[[str], str]]  # a comparison, and what its variants are called


def leads(models: Mapping[str, Named], ours: str) -> str:
    """Verdicts, how to read them, a table a model and row of ``ours``, and what is missing."""
    verdicts, tables, lacks = [], [], []
    for model, (found, title) in models.items():
        tables.append(f"### {model}")
        for name in _own(found, ours):
            compared = {peer: _compared(found, name, peer) for peer in _peers(found, ours)}
            best = _best(found, ours)
            verdicts.append(f"- **{model}**, {title(name)}: {_verdict(compared, best, title)}")
            tables.append(_table(compared, best, title, title(name), bool(found.signal)))
        lacks += [f"- {model}, {title(row.variant.name)}: {failure(row)}" for row in found.rows if row.failures]
        old = [row.variant.name for row in found.rows
               if any(without_items(found.dense.tasks, unit.tasks) for unit in _units(found, row.variant.name))]
        lacks += [f"- {model}: {', '.join(old)} were measured before items were kept; run them again."] if old else []
    missing = ["## What is missing", "\n".join(lacks)] if lacks else []
    return "\n\n".join(["\n".join(verdicts), READING, *tables, *missing])


def _own(found: Comparison, ours: str) -> list[str]:
    """Rows of the method, the one with default options first."""
    rows = [row for row in found.rows if row.seeds and row.variant.options.get("method") == ours]
    return [row.variant.name for row in sorted(rows, key=lambda row: row.variant.name != ours)]


def _rows(found: Comparison, ours: str) -> list[Row]:
    return [row for row in found.rows if row.seeds and row.variant.options.get("method") != ours]


def _peers(found: Comparison, ours: str) -> list[str]:
    return [row.variant.name for row in _rows(found, ours)]


def _best(found: Comparison, ours: str) -> dict[str, str]:
    """The measure → the best of the other methods by it."""
    best = {}
    for column, field in QUALITY.items():
        known = [(stat.mean, row.variant.name) for row in _rows(found, ours)
                 if (stat := getattr(row, field)) is not None and stat.mean is not None]
        if known:
            best[column] = (min(known) if field == "excess_loss" else max(known))[1]
    return best


def _units(found: Comparison, name: str) -> list[Unit]:
    return [unit for unit in found.units if unit.variant == name]


Compared = tuple[str, Lead | None, Lead | None]  # excess loss in words; points retained, and above chance


def _compared(found: Comparison, ours: str, peer: str) -> Compared:
    """A method and a peer: by loss over the seeds, by both forms of retained performance over the items."""
    scores = [[unit.tasks for unit in _units(found, name) if unit.tasks] for name in (ours, peer)]
    kept, above = (lead(found.dense.tasks, *scores, above_chance=above) for above in (False, True))
    return _seed_lead(found, ours, peer), kept, above


def _seed_lead(found: Comparison, ours: str, peer: str) -> str:
    """Excess loss less the peer's over the seeds both have: mean ± sd, for how many it is less, and p."""
    one, other = ({unit.seed: unit.perplexity.excess_loss for unit in _units(found, name)} for name in (ours, peer))
    pairs = [(one[seed], other[seed]) for seed in one if seed in other]
    values = [left - right for left, right in pairs if left is not None and right is not None]
    if not values:
        return MISSING
    less = sum(value < 0 for value in values)
    spread = f"{SPACE}±{SPACE}{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    windows = loss_lead(*([unit.window_sums for unit in _units(found, name)] for name in (ours, peer)),
                        found.dense.tokens)
    p = "" if windows is None else f", {_likelihood(windows.p)}"
    return f"{statistics.fmean(values):+.3f}{spread}, less for {less} of {len(values)} seeds{p}"


def _table(compared: Mapping[str, Compared], best: Mapping[str, str], title: Callable[[str], str], ours: str,
           signal: bool) -> str:
    """A line a peer; the best by each measure in bold."""
    lines = [f"| {ours} against | excess loss | retained | above chance |", "|---|---|---|---|"]
    for peer, (loss, kept, above) in compared.items():
        texts = {"excess loss": loss, "retained": _points(kept),
                 "above chance": _points(above) if signal else "no signal"}
        marked = [f"**{text}**" if best.get(column) == peer else text for column, text in texts.items()]
        lines.append(f"| {title(peer)} | {' | '.join(marked)} |")
    return "\n".join(lines)


def _points(found: Lead | None) -> str:
    """"+2.1 [+0.4, +3.8], p = .014", in points."""
    if found is None:
        return "not kept item by item"
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.difference:+.1f} [{low:+.1f}, {high:+.1f}], {_likelihood(found.p)}"


def _likelihood(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def _verdict(compared: Mapping[str, Compared], best: Mapping[str, str], title: Callable[[str], str]) -> str:
    """Whether the method leads the best peer by loss and above chance, in one sentence."""
    said = ""
    if peer := best.get("excess loss"):
        said = f"excess loss {compared[peer][0]}, against the best peer, {title(peer)}; "
    peer = best.get("above chance", "")
    found = compared[peer][2] if peer else None
    if found is None:
        return f"{said}no items to compare by."
    word, sure = "keeps" if found.difference >= 0 else "loses", "more" if found.p < 0.05 else "no more"
    return (f"{said}above chance it {word} {abs(100 * found.difference):.1f} points more than the best peer, "
            f"{title(peer)}, {sure} than the choice of {found.items:,} items explains ({_points(found)}).")
