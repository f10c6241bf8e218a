"""Theorem 1's bound against measured k-step errors as calibration grows; Theorem 2's two risks as the kernel grows.

    python benchmarks/theorems.py --text DIR                    measures what docs/results/theorems.json lacks, renders
    python benchmarks/theorems.py --model DIR --name llama      the same for another model; the page shows all
    python benchmarks/theorems.py --render                      only rewrites page and plot from that file
    python benchmarks/theorems.py --quick                       few tokens and features, into theorems-quick.json

A unit is one calibration size n (a mean over separate parts of the text), or one kernel of m features. n grows
fourfold from 1,024 as far as the text reaches, to 1 M tokens at most: the bundled text ends at 64 k, a folder of text
goes further.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from theorems_page import EPOCHS, RIDGE, TRAIN_TOKENS, TRAINED_UP_TO, key, render
from torch import Tensor
from units_file import Record, Subject, arguments, compact, keep, load, make_page

from kdprune.data import TokenSet
from kdprune.kernel.bounds import k_step_errors, relative_risk, theorem1_bound
from kdprune.kernel.features import FourierFeatures
from kdprune.kernel.operators import Moments, spectral_norm
from kdprune.methods.dynamics import fit_dynamics, position_weights, solve_operators
from kdprune.methods.kdp import KDP
from kdprune.model.activations import layer_states
from kdprune.model.families import decoder_layers
from kdprune.runtime import generator
from kdprune.session import BATCH
from kdprune.training import Schedule

BASE, SIZES = 1024, 6    # tokens of the smallest n, and how many sizes there are, fourfold each
REPEATS = 4              # separate parts of the text at every n, as far as it reaches
HELD = 8192              # held-out tokens
RISK_TOKENS = 32_768     # fitted tokens of the second part
WIDTHS = (0.25, 0.5, 1, 2, 4)      # m in units of the model's width d


def middle(layers: int) -> range:
    """Half of the layers, as many before as after: K_max steps."""
    length = layers // 2
    return range((layers - length) // 2, (layers - length) // 2 + length)


def paths(subject: Subject, rows: TokenSet, block: range) -> Iterator[Tensor]:
    """The block's k + 1 states of some rows at a time, without padding: (k+1, n, d), float32."""
    for batch, states in layer_states(subject.model, rows, range(block.start, block.stop + 1), BATCH):
        yield torch.stack([states[index][batch.mask].float() for index in sorted(states)])


def drawn(path: Tensor, features: int) -> FourierFeatures:
    """The kernel as KDP draws it: diagonal median heuristic at bandwidth 1 over the whole path, states as they are."""
    draw = generator(0, features)
    kernel = FourierFeatures(path.shape[-1], features, KDP.rank, draw)
    kernel.init_median(path.flatten(0, 1), draw, 1.0)
    return kernel.requires_grad_(False)


# --------------------------------------------------------------------------------------- Theorem 1, n swept


class Growing:
    """Moments of every step's regression at sizes BASE · 4^i at once, each over separate parts of the stream.

    Args:
        steps: k. size: D, entries of φ. held: φ of held-out paths, (k+1, n', D).
    """

    def __init__(self, steps: int, features: int, held: Tensor):
        self.steps, self.features, self.held = steps, features, held
        self.sums = [self._empty() for _ in range(SIZES)]
        self.found: dict[int, list[Record]] = {}

    def _empty(self) -> list[Moments]:
        return [Moments(2 * self.features, 2 * self.features) for _ in range(self.steps)]

    def add(self, lifted: Tensor) -> None:
        """φ of the path of the next BASE tokens, (k+1, BASE, D)."""
        part = self._empty()
        for moments, before, after in zip(part, lifted, lifted[1:], strict=False):
            moments.update(before, after - before)
        for level in range(SIZES):
            for total, moments in zip(self.sums[level], part, strict=True):
                for name in ("xx", "xy", "x", "y", "yy"):
                    getattr(total, name).add_(getattr(moments, name))
                total.n += moments.n
            tokens = BASE * 4**level
            if self.sums[level][0].n == tokens:
                if len(self.found.setdefault(tokens, [])) < REPEATS:
                    self.found[tokens].append(self._measured(self.sums[level]))
                self.sums[level] = self._empty()

    def _measured(self, sums: Sequence[Moments]) -> Record:
        """The least-squares operators of these moments, on their own tokens and on held-out ones."""
        solved = [moments.solve(RIDGE) for moments in sums]
        fitted = [moments.residual(step) / moments.n for moments, step in zip(sums, solved, strict=True)]
        matrices = torch.stack([step + torch.eye(len(step), dtype=step.dtype) for step in solved]).float()
        seen = [float((before @ matrix.T - after).square().sum(-1).mean())
                for matrix, before, after in zip(matrices, self.held, self.held[1:], strict=False)]
        norm, tokens = float(spectral_norm(matrices).max()), sums[0].n
        return {
            "fitted_risk": fitted, "held_risk": seen, "B_A": norm,
            "k_step_error": k_step_errors(matrices, self.held),
            "bound": [theorem1_bound(max(fitted), norm, 1.0, self.features, tokens, k + 1) for k in range(self.steps)],
        }


def sweep(subject: Subject, block: range, quick: bool) -> Iterator[Record]:
    """A record for every n, one pass over the text: held-out rows first, the others after them."""
    held_tokens, most = (1024, 16 * BASE) if quick else (HELD, BASE * 4 ** (SIZES - 1))
    rows = subject.rows(held_tokens + most + 2 * BASE, seed=0)
    count = max(1, held_tokens // rows.ids.shape[1])
    held = torch.cat(list(paths(subject, rows.select(slice(count)), block)), dim=1)
    kernel = drawn(held, features := subject.model.config.hidden_size)
    growing = Growing(len(block), features, kernel(held))
    waiting = held[:, :0]
    for path in paths(subject, rows.select(slice(count, None)), block):
        waiting = torch.cat((waiting, path), dim=1)
        while waiting.shape[1] >= BASE:
            growing.add(kernel(waiting[:, :BASE]))
            waiting = waiting[:, BASE:]
    for tokens, found in growing.found.items():
        mean = {name: np.mean([entry[name] for entry in found], axis=0).tolist() for name in found[0]}
        spread = float(np.std([entry["k_step_error"][-1] for entry in found], ddof=1)) if len(found) > 1 else None
        yield {"unit": "sweep", "tokens": tokens, "m": features, "parts": len(found), "held_tokens": held.shape[1],
               "block": [block.start, block.stop], "spread": spread, **mean}


# --------------------------------------------------------------------------------------- Theorem 2, m swept


def trained(path: Tensor, positions: Tensor, length: int, features: int) -> FourierFeatures:
    """The kernel after step 1 as the default runs it, on the first tokens of the path."""
    kernel = drawn(path, features).requires_grad_(True)
    schedule = Schedule(EPOCHS, 256, 0.384 / path.shape[-1])
    part = path[:, :TRAIN_TOKENS]
    weights = position_weights(positions[: part.shape[1]], length)
    fit_dynamics(kernel, [part], weights, schedule, generator(0, 1), ridge=RIDGE, name="")
    return kernel.requires_grad_(False)


@torch.no_grad()
def risks(path: Tensor, held: Tensor, kernel: FourierFeatures | None) -> Record:
    """Held-out risks as shares of the target's variance, and the k-step error; without a kernel: original space.

    ``in_kernel``: φ(h_s) → φ(h_{s+k}) (``original``: h_s → h_{s+k}), affine least squares, for k = 1 … K.
    ``of_state``: φ(h_s) → h_e − h_s over the variance of h_e, what a residual inverse could read from φ alone.
    """
    last = len(path) - 1
    steps = sorted({1, 2, last // 2, last})
    if kernel is None:
        return {"steps": steps, "original": [relative_risk((path[0], path[k]), (held[0], held[k])) for k in steps]}
    found = [relative_risk((path[0], path[k]), (held[0], held[k]), lift=kernel) for k in steps]
    matrices = torch.stack(list(solve_operators(kernel, path, RIDGE))).float()
    moments = Moments(2 * kernel.features, path.shape[-1])
    for first, end in zip(path[0].split(2048), path[-1].split(2048), strict=True):
        moments.update(kernel(first), end - first)
    matrix, offset = moments.solve_affine(1e-6)
    left = held[-1] - held[0] - kernel(held[0]).double() @ matrix.T - offset
    variance = (held[-1].double() - held[-1].double().mean(0)).square().sum()
    return {"steps": steps, "in_kernel": found, "of_state": float(left.square().sum() / variance),
            "k_step_error": k_step_errors(matrices, kernel(held))}


def compare_spaces(subject: Subject, block: range, name: str, file: Path, quick: bool) -> None:
    """Measures what the file lacks of the risks, a kernel at a time."""
    width = subject.model.config.hidden_size
    sizes = [round(share * width) for share in (WIDTHS[:1] if quick else WIDTHS)]
    units: list[tuple[int, str]] = [(0, "none"), *((m, "drawn") for m in sizes)]
    units += [(m, "trained") for m in sizes if m <= TRAINED_UP_TO * width]
    base = {"model": name, "quick": quick, "unit": "risk", "block": [block.start, block.stop]}
    missing = [unit for unit in units
               if key(base | {"features": unit[0], "kernel": unit[1]}) not in load(file, key)]
    if not missing:
        return
    held_tokens, fitted = (1024, 2048) if quick else (HELD, RISK_TOKENS)
    rows = subject.rows(held_tokens + fitted, seed=1)
    length = rows.ids.shape[1]
    count = max(1, held_tokens // length)
    held = torch.cat(list(paths(subject, rows.select(slice(count)), block)), dim=1)
    path = torch.cat(list(paths(subject, rows.select(slice(count, None)), block)), dim=1)
    positions = torch.arange(length).expand(len(rows) - count, -1)[rows.mask[count:]]
    for features, kind in missing:
        kernel = None
        if features:
            kernel = trained(path, positions, length, features) if kind == "trained" else drawn(path, features)
        record = base | {"features": features, "kernel": kind, "fitted_tokens": path.shape[1],
                         "held_tokens": held.shape[1]} | risks(path, held, kernel)
        keep(compact(record), file, key)
        print(f"{name} {kind} kernel, m = {features}: {record.get('in_kernel', record.get('original'))}", flush=True)


def run(path: Path, text: Path, name: str, file: Path, quick: bool) -> None:
    """Measures what the file lacks of one model."""
    subject = Subject(path, text)
    block = middle(len(decoder_layers(subject.model)))
    with torch.no_grad():
        if not any(record["model"] == name and record["unit"] == "sweep" for record in load(file, key).values()):
            for record in sweep(subject, block, quick):
                keep(compact({"model": name, "quick": quick, **record}), file, key)
                print(f"{name} n = {record['tokens']}: {record['k_step_error'][-1]:.4f}", flush=True)
    compare_spaces(subject, block, name, file, quick)


def main() -> None:
    make_page(
        arguments(__doc__, "theorems"), "theorems",
        lambda options: run(options.model, options.text, options.name, options.file, options.quick), render)


if __name__ == "__main__":
    main()
