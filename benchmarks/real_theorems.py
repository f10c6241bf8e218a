"""Theorems 1 and 2 on really trained models: the bound beside errors, risks in kernel space beside the original one.

    python benchmarks/real_theorems.py run NAME MODEL TEXTS FIRST-LAST   measures a block (half-open) of a model into
                                                                         docs/results/real-theorems-NAME.json
    python benchmarks/real_theorems.py page                              writes real-theorems.md and its picture there

TEXTS is what benchmarks/texts.py made. States as they are, as in ``preset=paper``; tokens that are massive at a
boundary of the block are left out.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from book_tables import markdown
from real_page import RESULTS, arguments, joined, loaded, publish, write
from torch import Tensor

from kdprune.data.tokens import load_tokens
from kdprune.kernel.bounds import k_step_errors, relative_risk, theorem1_bound
from kdprune.kernel.features import FourierFeatures
from kdprune.kernel.massive import MassiveTokens
from kdprune.kernel.operators import spectral_norm
from kdprune.methods.kdp.step1_dynamics import fit_dynamics, position_weights, solve_operators
from kdprune.model.activations import layer_states
from kdprune.report.style import MARKERS, SERIES, Canvas, legend_below
from kdprune.runtime.run import Run
from kdprune.train.loop import Schedule

PAGE = "real-theorems"
LENGTH, HELD, FITTED = 512, 16, 128  # tokens of a row; held-out rows and rows to fit on
SIZES, PARTS = (1_024, 4_096, 16_384, 65_536), 4  # n of Theorem 1, each over so many separate parts of the text at most
RISK_TOKENS = 32_768  # fitted tokens of Theorem 2
RIDGE, RANK = 1e-4, 16
BANDWIDTHS = (1.0, 0.3)  # of the kernel as drawn; one that is trained starts at the first
WIDTHS = (0.5, 1.0, 2.0)  # m in units of the width d
TRAINED = ((0.5, 1.0), 8_192, 10)  # m in units of d, tokens and epochs of step 1

# ------------------------------------------------------------------------------------------------- measuring


def measure(name: str, model_at: str, texts: Path, block: range) -> None:
    """Measures all of one block and writes the record."""
    model, tokenizer = loaded(model_at)
    tokens = load_tokens(
        f"{texts}/calibration.jsonl", tokenizer, samples=HELD + FITTED, length=LENGTH, seed=0, vocabulary=None)
    boundaries, parts, positions, left_out = range(block.start, block.stop + 1), [], [], 0
    for batch, states in layer_states(model, tokens, boundaries, 4):
        path = torch.stack([states[index][batch.mask].float() for index in boundaries])
        massive = MassiveTokens(len(path)).update(path)
        left_out += int(massive.sum())
        parts.append(path[:, ~massive])
        positions.append(torch.arange(LENGTH).expand(len(batch), -1)[batch.mask.cpu()][~massive])
    path, place = torch.cat(parts, dim=1), torch.cat(positions)
    held, path, place = path[:, : HELD * LENGTH], path[:, HELD * LENGTH :], place[HELD * LENGTH :]
    record = {
        "model": name, "block": [block.start, block.stop], "width": path.shape[-1], "tokens": path.shape[1],
        "held": held.shape[1], "massive": left_out, "sweep": [*bounds(path, held)],
        "risks": [*risks(path, held, place)]}
    write(record, RESULTS / f"{PAGE}-{name}.json")


def drawn(path: Tensor, features: int, bandwidth: float) -> FourierFeatures:
    """The kernel as KDP draws it, at so many times the median heuristic."""
    draw = Run(0).generator(features)
    kernel = FourierFeatures(path.shape[-1], features, RANK, draw).to(path.device)
    kernel.init_median(path.flatten(0, 1), draw, bandwidth)
    return kernel.requires_grad_(False)


def bounds(path: Tensor, held: Tensor) -> Iterator[dict[str, Any]]:
    """Theorem 1 as n grows: least-squares operators of n tokens in one kernel space of m = d features, an entry a size.

    Risks are means over the operators of E‖A φ(h) − φ(h')‖², errors root mean squares over the held-out tokens.
    """
    kernel = drawn(held, path.shape[-1], BANDWIDTHS[0])
    lifted, steps = kernel(held), len(path) - 1
    for size in SIZES:
        parts = [part for part in path.split(size, dim=1)[:PARTS] if part.shape[1] > 0.9 * size]
        found = [one_size(kernel, part, lifted) for part in parts]
        if found:
            means = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
            errors = [one["error_K"] for one in found]
            yield {"n": size, "parts": len(found), "K": steps, **means,
                   "spread": statistics.stdev(errors) if len(errors) > 1 else None}


def one_size(kernel: FourierFeatures, part: Tensor, held: Tensor) -> dict[str, float]:
    """Operators of these tokens, their errors after one step and all K of them, and the theorem's bound on both."""
    matrices, fitted = [], []
    for start, step in enumerate(solve_operators(kernel, part, RIDGE)):
        matrices.append(step.float())
        fitted.append(_squared(kernel, part[start], step.float(), part[start + 1]))
    stacked, n, steps = torch.stack(matrices), part.shape[1], len(part) - 1
    growth, errors = float(spectral_norm(stacked).max()), k_step_errors(stacked, held)
    one_step = [float((before @ matrix.T - after).square().sum(-1).mean())
                for matrix, before, after in zip(stacked, held, held[1:], strict=False)]
    bound = [theorem1_bound(max(fitted), growth, 1.0, kernel.features, n, k) for k in (1, steps)]
    return {"fitted": statistics.fmean(fitted), "held": statistics.fmean(one_step), "B_A": growth,
            "error_1": errors[0], "error_K": errors[-1], "bound_1": bound[0], "bound_K": bound[1]}


def _squared(kernel: FourierFeatures, before: Tensor, matrix: Tensor, after: Tensor) -> float:
    """Mean ‖A φ(h) − φ(h')‖² over tokens."""
    total = sum(float((kernel(x) @ matrix.T - kernel(y)).square().sum())
                for x, y in zip(before.split(2048), after.split(2048), strict=True))
    return total / len(before)


def risks(path: Tensor, held: Tensor, positions: Tensor) -> Iterator[dict[str, Any]]:
    """Theorem 2 as the kernel grows: held-out linear risks as shares of the target's variance, an entry a kernel.

    ``risk`` is of φ(h_s) → φ(h_{s+k}) (without a kernel of h_s → h_{s+k}); ``state`` of φ(h_s) → h_e − h_s over the
    variance of h_e, the only one whose target is the original space's; ``sum`` of [h_s; φ(h_s)] likewise.
    """
    path, width, last = path[:, :RISK_TOKENS], path.shape[-1], len(path) - 1
    steps = sorted({1, 2, -(-last // 2), last})
    yield {"kernel": "none", "features": 0, "bandwidth": None, "steps": steps, "error_K": None, "sum": None,
           "risk": (original := [relative_risk((path[0], path[k]), (held[0], held[k])) for k in steps]),
           "state": original[-1]}
    for share in WIDTHS:
        for bandwidth in BANDWIDTHS:
            yield of_kernel(path, held, steps, drawn(path, round(share * width), bandwidth), "drawn", bandwidth)
    shares, tokens, epochs = TRAINED
    for share in shares:
        kernel, part = drawn(path, round(share * width), BANDWIDTHS[0]).requires_grad_(True), path[:, :tokens]
        with torch.enable_grad():
            fit_dynamics(kernel, part, position_weights(positions[:tokens], LENGTH),
                         Schedule(epochs, 256, 0.384 / width), Run(0).generator(1), ridge=RIDGE, name="")
        yield of_kernel(path, held, steps, kernel.requires_grad_(False), "trained", BANDWIDTHS[0])


def of_kernel(
    path: Tensor, held: Tensor, steps: Sequence[int], kernel: FourierFeatures, kind: str, bandwidth: float,
) -> dict[str, Any]:
    """One entry of :func:`risks`."""
    first, tested = kernel(path[0]), kernel(held[0])
    size = path[0].square().mean().sqrt() * math.sqrt(path.shape[-1])  # states of length 1, as φ is
    update = (path[-1] - path[0], held[-1] - held[0])
    share = _variance(update[1]) / _variance(held[-1])
    matrices = torch.stack([step.float() for step in solve_operators(kernel, path, RIDGE)])
    return {
        "kernel": kind, "features": kernel.features, "bandwidth": bandwidth, "steps": steps,
        "risk": [relative_risk((first, kernel(path[k])), (tested, kernel(held[k]))) for k in steps],
        "error_K": k_step_errors(matrices, kernel(held))[-1],
        "state": share * relative_risk((first, update[0]), (tested, update[1])),
        "sum": share * relative_risk(
            (torch.cat([path[0] / size, first], 1), update[0]), (torch.cat([held[0] / size, tested], 1), update[1])),
    }


def _variance(states: Tensor) -> float:
    """Σ ‖y − mean(y)‖² of (n, d)."""
    states = states.double()
    return float((states - states.mean(0)).square().sum())


# ------------------------------------------------------------------------------------------------- page


def bound_table(record: Mapping[str, Any]) -> str:
    """Theorem 1, a row an n."""
    rows = [[f"{one['n']:,}", one["parts"], f"{one['fitted']:.4f}", f"{one['held']:.4f}", f"{one['B_A']:.2f}",
             f"{one['error_1']:.3f}", f"{one['bound_1']:.2f}", f"{one['error_K']:.3f}"
             + ("" if one["spread"] is None else f" ± {one['spread']:.3f}"), f"{one['bound_K']:.3g}",
             f"{one['bound_K'] / one['error_K']:.3g}"] for one in record["sweep"]]
    return markdown(["n", "parts", "risk, fitted", "risk, held-out", "B_A", "error, k = 1", "bound, k = 1",
                     "error, k = K", "bound, k = K", "bound / error"], rows)


def risk_table(record: Mapping[str, Any]) -> str:
    """Theorem 2, a row a kernel."""
    steps = record["risks"][0]["steps"]
    rows = []
    for one in record["risks"]:
        title = ("original space" if one["kernel"] == "none"
                 else f"{one['kernel']}, m = {one['features']}, bandwidth {one['bandwidth']:g}")
        rows.append([title, *(f"{risk:.4f}" for risk in one["risk"]), f"{one['state']:.4f}",
                     *("—" if one[key] is None else f"{one[key]:.4f}" for key in ("sum", "error_K"))])
    return markdown(["space", *(f"risk, k = {k}" for k in steps), "of the state", "with the state itself",
                     "K-step error"], rows)


def picture(found: Sequence[Mapping[str, Any]]) -> str:
    """Errors and bounds by n, a panel a model."""
    canvas = Canvas("Theorem 1 on real models", 6.4, 1.0 + 1.9 * len(found))
    lines = {"error_1": "error, k = 1", "bound_1": "bound, k = 1", "error_K": "error, k = K", "bound_K": "bound, k = K"}
    with canvas as figure:
        for record, axes in zip(found, figure.subplots(len(found), 1, squeeze=False)[:, 0], strict=True):
            sizes = [one["n"] for one in record["sweep"]]
            for number, (key, label) in enumerate(lines.items()):
                axes.plot(sizes, [one[key] for one in record["sweep"]], marker=MARKERS[number],
                          color=SERIES[number // 2], linestyle="--" if "bound" in key else "-", label=label)
            first, last = record["block"]
            axes.set(title=f"{record['model']}, layers {first} to {last - 1}", xlabel="calibration tokens n",
                     ylabel="rms error of φ", xscale="log", yscale="log")
        legend_below(figure, axes)
    return canvas.svg


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The page, from the records."""
    parts = [
        "# The theorems on real models",
        "How far is Theorem 1's bound from the measured error, does the error fall as 1/√n with the calibration tokens "
        "n, and is the linear risk lower in kernel space than in the original one, as Theorem 2 and the paper's Table "
        "3 have it?",
        "    python benchmarks/real_theorems.py run NAME MODEL TEXTS FIRST-LAST\n"
        "    python benchmarks/real_theorems.py page",
        "Blocks that KDP chooses at 25 % of the layers. States as they are, tokens that are massive at a boundary of "
        "the block left out; random Fourier features as drawn by the median heuristic times a bandwidth, ‖φ‖ = 1, "
        f"least-squares operators with ridge {RIDGE:g}. Theorem 1: m = d, bandwidth {BANDWIDTHS[0]:g}; "
        "√(L_ERM + C B_A² √(2m log(2m/δ)/n)) Σ_(j<k) B_A^(k−1−j) with C = 1, as the paper gives none, and δ = .05; "
        f"means over separate parts of the text. Theorem 2: {RISK_TOKENS:,} fitted tokens, risks as shares of the "
        "target's variance; *trained* is the kernel after step 1. *Of the state* is what φ(h_s) tells of h_e, the only "
        "column whose target is the original space's; *with the state itself* what [h_s; φ(h_s)] does, the sum of the "
        "linear kernel and the Fourier one.",
        "![errors and bounds against n](real-theorems.svg)"]
    for record in found:
        first, last = record["block"]
        parts += [
            f"## {record['model']}, layers {first} to {last - 1}",
            f"d = {record['width']}, K = {last - first}; {record['held']:,} held-out tokens, {record['massive']:,} "
            "massive ones left out.", bound_table(record), risk_table(record)]
    return joined(PAGE, parts)


def main() -> None:
    parser, measuring = arguments(__doc__)
    measuring.add_argument("block", help="FIRST-LAST, half-open")
    given = parser.parse_args()
    if given.what == "run":
        with torch.no_grad():
            measure(given.name, given.model, given.texts, range(*map(int, given.block.split("-"))))
    publish(PAGE, page, picture)


if __name__ == "__main__":
    main()
