"""The page of the theorems, made from its records alone (benchmarks/theorems.py)."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from units_file import COLOURS, Record, by_model, load, table, write_page

from kdprune.kernel.bounds import error_growth
from kdprune.methods.kdp import KDP

RIDGE = KDP.ridge
TRAINED_UP_TO = 2                  # widths up to which the kernel is trained too (its cost grows with m³)
EPOCHS, TRAIN_TOKENS = 10, 8192    # of that training: the default's


def key(record: Record) -> tuple[object, ...]:
    """What makes a unit."""
    return record["model"], record["unit"], record.get("tokens"), record.get("features"), record.get("kernel")



def falling(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Exponent α and limit of v(n) = v∞ + c n^−α at n, 4n, 16n, …, and α between neighbouring pairs.

    v(n) − v(4n) = c n^−α (1 − 4^−α) is free of the limit: α is the slope of its logarithm. NaN where v does not fall.
    """
    drops = -np.diff(np.asarray(values))
    if len(drops) < 2 or (drops <= 0).any():
        return math.nan, values[-1], []
    logs = np.log(drops) / np.log(4)
    exponent = -float(np.polyfit(np.arange(len(drops)), logs, 1)[0])
    limit = values[-1] - float(drops[-1]) * 4**-exponent / (1 - 4**-exponent) if exponent > 0 else math.nan
    return exponent, limit, (-np.diff(logs)).tolist()


def quantities(found: list[Record]) -> dict[str, list[float]]:
    """What may fall with n: squared one-step risk, its gap to the fitted tokens', the K-step error and its square."""
    held, fitted = ([float(np.mean(entry[name])) for entry in found] for name in ("held_risk", "fitted_risk"))
    last = [entry["k_step_error"][-1] for entry in found]
    return {
        "gap: one-step risk, held-out − fitted": [a - b for a, b in zip(held, fitted, strict=True)],
        "one-step risk, held-out": held, "K-step error": last, "K-step error, squared": [value**2 for value in last],
    }


def swept(records: list[Record]) -> list[Record]:
    """Records of the n sweep, in order."""
    return sorted((r for r in records if r["unit"] == "sweep"), key=lambda record: record["tokens"])


def sweep_table(found: list[Record]) -> str:
    """A row an n: risks of one step, error and bound at k = 1 and K."""
    rows = []
    for r in found:
        error, bound = r["k_step_error"], r["bound"]
        spread = "" if r["spread"] is None else f" ± {r['spread']:.4f}"
        rows.append([f"{r['tokens']:,}", r["parts"], f"{np.mean(r['fitted_risk']):.4f}",
                     f"{np.mean(r['held_risk']):.4f}", f"{r['B_A']:.2f}", f"{error[0]:.3f}", f"{bound[0]:.2f}",
                     f"{error[-1]:.4f}{spread}", f"{bound[-1]:.3g}", f"{bound[-1] / error[-1]:.3g}",
                     f"{math.sqrt(max(r['fitted_risk'])) * error_growth(r['B_A'], len(error)):.3g}"])
    return table("n | parts | risk, fitted | risk, held-out | B_A | error, k = 1 | bound, k = 1 | error, k = K | "
                 "bound, k = K | bound / error | bound without its term in n", rows)


def exponent_table(found: list[Record]) -> str:
    """A row a quantity: how fast it falls."""
    rows = []
    for name, values in quantities(found).items():
        exponent, limit, local = falling(values)
        rows.append([name, f"{exponent:.2f}", " ".join(f"{value:.2f}" for value in local), f"{limit:.4f}",
                     f"{values[0] - limit:.4f}", f"{values[-1] - limit:.1e}"])
    titles = "quantity | α | α from 4-fold to 4-fold n | limit | above it at least n | at most n"
    return table(titles, rows)


def risk_table(records: list[Record]) -> str:
    """A row a kernel: held-out risks."""
    found = [record for record in records if record["unit"] == "risk"]
    if not found:
        return ""
    steps = found[0]["steps"]
    rows = []
    for r in sorted(found, key=lambda record: (record["kernel"], record["features"])):
        values = r.get("in_kernel", r.get("original"))
        own = "" if "of_state" not in r else f"{r['of_state']:.4f}"
        name = "original space" if r["kernel"] == "none" else f"{r['kernel']}, m = {r['features']}"
        error = f"{r['k_step_error'][-1]:.3f}" if "k_step_error" in r else ""
        rows.append([name, *(f"{value:.4f}" for value in values), own or f"{values[-1]:.4f}", error])
    titles = " | ".join(f"risk, k = {k}" for k in steps)
    return table(f"space | {titles} | of the state, k = K | K-step error", rows)


def plot(records: list[Record]) -> Figure:
    """A row a model: what falls with n; error and bound against k; risks against m."""
    models = by_model(records)
    figure = Figure(figsize=(13, 3.9 * len(models)), layout="constrained")
    for row, (name, own) in zip(figure.subplots(len(models), 3, squeeze=False), models.items(), strict=True):
        found = swept(own)
        tokens = np.array([record["tokens"] for record in found], dtype=float)
        for colour, (title, values) in zip(COLOURS, quantities(found).items(), strict=False):
            above = np.array(values) - falling(values)[1]
            row[0].plot(tokens, np.where(above > 0, above, np.nan), "o-", color=colour, label=title, markersize=4)
        for power, style in ((0.5, ":"), (1, "--")):
            row[0].plot(tokens, (tokens / tokens[0]) ** -power * 0.1, style, color="#888888", label=f"n^−{power:g}")
        row[0].set(xscale="log", yscale="log", xlabel="n, calibration tokens", ylabel=f"{name}: above its limit")
        for colour, record in zip(COLOURS, found, strict=False):
            steps = range(1, len(record["bound"]) + 1)
            row[1].plot(steps, record["k_step_error"], "o-", color=colour, markersize=3)
            row[1].plot(steps, record["bound"], "--", color=colour, label=f"n = {record['tokens']:,}")
        row[1].set(yscale="log", xlabel="k, layers", ylabel="k-step error (solid) and bound (dashed)")
        _plot_risks(row[2], [record for record in own if record["unit"] == "risk"])
        for axes in row:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    return figure


def _plot_risks(axes: Any, found: list[Record]) -> None:
    """Held-out risks at k = K against m, the original space's as a line."""
    for record in found:
        if record["kernel"] == "none":
            axes.axhline(record["original"][-1], color="#000000", label="original space")
    for colour, (kind, part) in zip(COLOURS, itertools.product(("drawn", "trained"), ("in_kernel", "of_state")),
                                    strict=False):
        chosen = sorted((r for r in found if r["kernel"] == kind), key=lambda record: record["features"])
        values = [r[part][-1] if part == "in_kernel" else r[part] for r in chosen]
        axes.plot([r["features"] for r in chosen], values, "o-" if part == "in_kernel" else "s--", color=colour,
                  markersize=4, label=f"{kind}, {'in kernel space' if part == 'in_kernel' else 'of the state'}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="m, features", ylabel="held-out risk at k = K, share of the variance")


def section(name: str, own: list[Record]) -> str:
    """The page's part on one model."""
    found = swept(own)
    start, stop = found[0]["block"]
    risk = next((record for record in own if record["unit"] == "risk"), None)
    fitted = f"{risk['fitted_tokens']:,} fitted and {risk['held_tokens']:,} held-out tokens" if risk else "not measured"
    return f"""## {name}

Layers {start}–{stop - 1}, K = {stop - start}, m = {found[0]['m']}; {found[0]['held_tokens']:,} held-out tokens.

{sweep_table(found)}

{exponent_table(found)}

Linear risks in kernel space and in the original space ({fitted}):

{risk_table(own)}"""


def render(file: Path) -> None:
    """Writes the page and the plot beside the record."""
    records = list(load(file, key).values())
    sections = "\n\n".join(section(name, own) for name, own in by_model(records).items())
    page = f"""# The theorems beside what is measured

Theorem 1 bounds the error after k steps in kernel space by √(L_ERM + C B_A² √(2m log(2m/δ)/n)) · Σ_(j<k) B_A^(k−1−j).
How far is that from the measured error, and does the error fall as 1/√n with the calibration tokens n? Theorem 2 says
that a linear map errs less in kernel space than in the original one; the paper's Table 3 shows it for LLaMA2. Does it
here?

    python benchmarks/theorems.py --text ../shared/data/heldout

Half of the layers, the middle ones. **n swept**: kernel as drawn (median heuristic at bandwidth 1, scales taken on the
held-out tokens, states as they are, as in `preset=paper`) and least-squares operators with ridge {RIDGE:g}, no
training; figures at one n are means over separate parts of the shuffled text, ± the standard deviation over them;
held-out rows come from the same text and are the same for every n. Risk is the mean over the layers of
E‖A φ(h) − φ(h′)‖², ‖φ‖ = 1; errors are root mean squares. C = 1 and δ = 0.05, as the paper gives no C; R_φ = 1. α is
the exponent of v(n) = v∞ + c n^−α, from the differences v(n) − v(4n), which are free of v∞. **m swept**: affine least
squares in either space, its held-out error as a share of the target's variance; "trained" is the kernel after step 1
({EPOCHS} epochs on {TRAIN_TOKENS:,} tokens) for m up to {TRAINED_UP_TO:g} times the width. *Of the state* is what
φ(h_s) tells of h_e − h_s, over the variance of h_e: the only one of the columns with the same target as the original
space's.

![errors and bounds against n and k, risks against m]({file.stem}.svg)

{sections}
"""
    write_page(file, page, plot(records))
