"""What pruning takes, by count: operations, memory and disk of every stage, and seconds on a device from a table.

Counts come from shapes alone. Where a count does not say how long the work takes (solving for operators, say), a
constant does; each is named here and was set from benchmarks/cost_*.json and memory_*.json, which
docs/real-models.md compares with what it gives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kdprune.errors import KDPruneError
from kdprune.methods.common.analysis import CHUNK, ENOUGH
from kdprune.methods.common.shape import Shape
from kdprune.methods.common.stand_in_fit import PASS_TOKENS
from kdprune.methods.kdp.fit_block import FitSettings
from kdprune.methods.kdp.landmarks import inputs_of, tokens_for
from kdprune.methods.kdp.measuring import HELD
from kdprune.model.activations import STATES
from kdprune.runtime.machine import BATCH
from kdprune.runtime.memory import MODEL_SHARE, SCRATCH_SHARE, SHARE
from kdprune.store.files import readable_bytes
from kdprune.train.trial import RATES, trial_rows

# Of operations counted: what a stage takes on one CPU thread over what its count says.
ANALYSE = 1.13    # scores of all pairs beside the pass that gives the states (1.02 to 1.28 measured)
REFINE = 1.15     # optimiser, loss and held-out rows beside three times the stand-in's forward pass
GRADIENT = 10     # float32 operations a token, operator and entry of A in a gradient step of step 1; 6 by count
SOLVE = 22        # float64 operations · D³ to restart one operator: equations, norms, product (12 by count)
RANK = 8          # float64 operations · D³ a block: effective rank and the residuals of the whole map
THEORY = 23       # float64 operations · D³ an operator in the rest: Theorem 2's risks
PATH = 7          # float64 operations · D² a path token and operator in the rest
PASSES = 5        # forward passes of a stand-in over all tokens in the rest: energy, moments, errors
MOMENT = 4        # float64 operations a token and entry of the moments of a regression; 2 by count
TRIED = 0.4       # of the trials that blocks may be chosen by, those that are made (.3 to .5 measured)
INVERSE = 3       # float64 operations · P³ to invert the moments of P inputs, and to multiply by that
# Bytes.
LIBRARIES = 475_000_000  # resident before there is a model: torch and transformers on a CPU
OPERATOR = 30     # · D² an operator of step 1: itself, its gradient, Adam's two moments, A and its gradient
SYSTEM = 45       # · D² once: float64 moments and the system solved for one operator after the other
LOGIT = 12        # a logit of a trial: itself, a copy of those of real tokens, and its exponential
MATRICES = 6      # float64 of P² entries at once, when landmarks are chosen of P inputs


@dataclass(frozen=True)
class Device:
    """What a processor is rated at, and the share of it that is expected.

    Attributes:
        half: peak operations a second in bfloat16, dense.
        single: the same in float32.
        double: the same in float64.
        bandwidth: bytes a second of its memory; None: unknown.
        memory: bytes of it; None: unknown.
        utilisation: share of all peaks.
        source: of the peaks.
    """

    title: str
    half: float
    single: float
    double: float
    bandwidth: float | None
    memory: float | None
    utilisation: float
    source: str

    def rate(self, itemsize: int) -> float:
        """Operations a second expected of numbers of so many bytes."""
        return self.utilisation * {2: self.half, 4: self.single, 8: self.double}[itemsize]


# Share of the peak that is assumed of a GPU: nothing here was measured on one.
UTILISATION = 0.4
# float32 and float64 of a device of which only the bfloat16 peak is given: 1/15 is what H100 and A100 have.
FULL_PRECISION = 1 / 15
DEVICES = {
    "h100": Device("NVIDIA H100 SXM", 989.4e12, 66.9e12, 66.9e12, 3.35e12, 80e9, UTILISATION,
                   "NVIDIA H100 Tensor Core GPU Architecture, white paper, 2022 (dense; float64 in tensor cores)"),
    "h200": Device("NVIDIA H200 SXM", 989.4e12, 66.9e12, 66.9e12, 4.8e12, 141e9, UTILISATION,
                   "NVIDIA H200 Tensor Core GPU, datasheet, 2023 (dense; float64 in tensor cores)"),
    "a100": Device("NVIDIA A100 SXM 80 GB", 312e12, 19.5e12, 19.5e12, 2.039e12, 80e9, UTILISATION,
                   "NVIDIA A100 Tensor Core GPU, datasheet, 2021 (dense; float64 in tensor cores)"),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 1.29e12, 1.008e12, 24e9, UTILISATION,
                      "NVIDIA Ada GPU Architecture, white paper, 2022 (dense, float32 sums)"),
    "cpu": Device("one thread of an AMD EPYC", 168e9, 79e9, 39.5e9, None, None, 1.0,
                  "forward passes of benchmarks/cost_cpu1-amd-epyc_202611.json (7b), float64 at half"),
    "cpu-float32": Device(
        "one thread of an AMD EPYC without bfloat16 products", 70e9, 70e9, 39.5e9, None, None, 1.0,
        "passes, gradient steps and solves of benchmarks/cost_cpu1-amd-epyc_202611.json (0.1b)"),
}


def device_of_name(name: str, tflops: float | None, utilisation: float | None) -> Device:
    """The device of this name; with ``tflops`` one of that bfloat16 peak. Raises KDPruneError for what cannot be."""
    if utilisation is not None and not 0 < utilisation <= 1:
        raise KDPruneError(f"got utilisation {utilisation}, expected a share above 0, up to 1")
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise KDPruneError(f"got tflops {tflops}, expected a positive number: the device's bfloat16 peak")
        full = FULL_PRECISION * tflops * 1e12
        found = Device(
            f"a device of {tflops:g} TFLOP/s", tflops * 1e12, full, full, None, None, UTILISATION, "--tflops")
    elif name in DEVICES:
        found = DEVICES[name]
    else:
        raise KDPruneError(f"got device {name!r}, expected one of {', '.join(DEVICES)}, or --tflops")
    if utilisation is None:
        return found
    return replace(found, utilisation=utilisation)


@dataclass(frozen=True)
class Work:
    """Operations: ``model`` in the model's dtype, the others in bfloat16, float32 and float64."""

    model: float = 0.0
    half: float = 0.0
    single: float = 0.0
    double: float = 0.0

    def seconds(self, device: Device, itemsize: int) -> float:
        """Seconds on a device, of a model whose numbers have so many bytes."""
        return (self.model / device.rate(itemsize) + self.half / device.rate(2) + self.single / device.rate(4)
                + self.double / device.rate(8))

    def __add__(self, other: "Work") -> "Work":
        return Work(self.model + other.model, self.half + other.half, self.single + other.single,
                    self.double + other.double)


class Peaks(NamedTuple):
    """Highest bytes on the host and on the device; ``analysis``: on the host while layers are scored."""

    host: int
    device: int
    analysis: int


@dataclass(frozen=True)
class Choice:
    """What choosing blocks by damage may take, if all its trials are made.

    Attributes:
        collected: tokens whose states are collected first.
        passed: tokens that pass the whole model afterwards.
        fits: stand-ins that are solved for, by their shape.
        fitted: tokens of each.
        boundaries: at so many of them states are collected.
        logits: most logits at once, by which a trial is measured.
    """

    collected: int
    passed: float
    fits: Sequence[tuple[Shape, int]]
    fitted: int
    boundaries: int
    logits: int


def _regressed(shape: Shape) -> int:
    """Bytes of the choice of a stand-in's landmarks, with a pass of their inputs."""
    inputs = inputs_of(shape)
    return 8 * (MATRICES * inputs**2 + 2 * PASS_TOKENS * inputs)


@dataclass(frozen=True)
class Job:
    """What is pruned and how, in numbers.

    Attributes:
        width: d.
        layers: L.
        itemsize: bytes a weight.
        rows: rows of the calibration set.
        length: tokens a row.
        held: rows no fit sees.
        blocks: what is replaced.
        shape: of the stand-ins.
        settings: of the fits.
        path: rows step 1 sees, to fit on and held out.
        sequential: whether later blocks see corrected states.
        layer: operations a token of one decoder layer.
        replacement: operations a token of one stand-in with what stands before it.
        weights: bytes of the model.
        outside: bytes of what is not in its layers.
        added: parameters of one stand-in with what stands before it.
        choice: what choosing blocks by damage may take; None: they are not.
    """

    width: int
    layers: int
    itemsize: int
    rows: int
    length: int
    held: int
    blocks: Sequence[range]
    shape: Shape
    settings: FitSettings
    path: tuple[int, int]
    sequential: bool
    layer: float
    replacement: float
    weights: int
    outside: int
    added: int
    choice: Choice | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the calibration set."""
        return self.rows * self.length

    @property
    def analysed(self) -> int:
        """Tokens that the analysis takes."""
        return min(self.tokens, max(ENOUGH // self.length, 1) * self.length)

    @property
    def size(self) -> int:
        """D = 2m."""
        return 2 * self.shape.features

    def forward(self) -> Work:
        """One pass of the layer stack over the calibration set, the unit of costs."""
        return Work(model=self.tokens * self.layers * self.layer)

    # ------------------------------------------------------------------------------------------- operations

    def stages(self) -> dict[str, Work]:
        """Operations of every stage, blocks added up; saving is left out."""
        depth = max(block.stop for block in self.blocks)
        found = {
            "analyse": Work(model=ANALYSE * self.analysed * self.layers * self.layer),
            "damage": self._tried(),
            "layer states": Work(model=self.tokens * depth * self.layer),
            "corrected states": Work(), "kernel": Work(), "inverse": Work(), "refine": Work(), "rest": Work(),
        }
        # From one block to the next, where a stand-in is a layer: one that is folded into another has no start.
        reached, passed = 0, 0.0
        for number, block in enumerate(self.blocks):
            passed += (block.start - reached) * self.layer
            if self.sequential and number:
                found["corrected states"] += Work(model=self.tokens * passed)
            if self.shape.context:
                passed = 0.0
            reached, passed = block.stop, passed + self.replacement
            for name, work in self._fit(block).items():
                found[name] += work
        return {name: work for name, work in found.items() if work != Work()}

    def _fit(self, block: range) -> dict[str, Work]:
        """Operations of one block's steps, and of what no stage counts."""
        steps, size, fitted = len(block), self.size, (self.rows - self.held) * self.length
        found = {"rest": Work(single=PASSES * self.tokens * self.replacement) + self._solved(self.shape, fitted)}
        if "fourier" in self.shape.parts:
            path, epochs = self.path[0] * self.length, self.settings.step1.epochs
            restarts = epochs + 1
            if "operators" in self.settings.without:  # nothing is learned, nothing solved for
                epochs, restarts = 0, 0
            found["kernel"] = Work(
                single=GRADIENT * epochs * steps * path * size**2,
                double=(SOLVE * restarts * steps + RANK) * size**3 + 4 * restarts * (steps + 1) * path * size**2)
            found["rest"] += Work(double=THEORY * steps * size**3 + PATH * steps * path * size**2)
            if self.shape.hidden:
                found["inverse"] = Work(
                    single=REFINE * 3 * self.settings.step2.epochs * fitted * 2 * self.shape.hidden
                    * (size + self.width))
        if self.settings.refine:
            schedule, passed = self.settings.step3, self.settings.step3.epochs * fitted
            if self.settings.on_trial:  # every rate, at most
                passed += len(RATES) * trial_rows(self.rows - self.held, schedule) * self.length
            trained = REFINE * 3 * passed * self.replacement
            found["refine"] = Work(single=trained) if "fourier" in self.shape.parts else Work(half=trained)
        return found

    def _tried(self) -> Work:
        """Operations of the choice of blocks: states, passes of what is tried, solves for its stand-ins."""
        if self.choice is None:
            return Work()
        found = Work(model=(self.choice.collected + TRIED * self.choice.passed) * self.layers * self.layer)
        for shape, count in self.choice.fits:
            found += Work(double=TRIED * count * self._solved(shape, self.choice.fitted).double)
        return found

    def _solved(self, shape: Shape, tokens: int) -> Work:
        """Operations of a read-out's solve on so many tokens, and of the choice of its landmarks before that."""
        read, inputs = shape.hidden or shape.entries, inputs_of(shape)
        return Work(double=MOMENT * tokens * read * (read + self.width)
                    + MOMENT * min(tokens, tokens_for(inputs)) * inputs * (inputs + self.width) + INVERSE * inputs**3)

    # ------------------------------------------------------------------------------------------------ bytes

    def boundary(self) -> int:
        """Bytes of the calibration set's states at one boundary."""
        return self.tokens * self.width * self.itemsize

    def states(self) -> int:
        """Bytes of all states that fits read: at both ends of every block."""
        return self.boundary() * 2 * len(self.blocks)

    def scratch(self) -> int:
        """Bytes between the layers of a streamed model in its analysis, the widest stage: all boundaries at once."""
        return self.analysed * self.width * self.itemsize * (self.layers + 2)

    def paths(self, block: range | None = None) -> int:
        """Bytes of the float32 states inside one block, or all, that step 1 sees."""
        steps = sum(len(b) + 1 for b in (self.blocks if block is None else [block]))
        return steps * sum(self.path) * self.length * self.width * 4

    def analysis_bytes(self) -> int:
        """States of one batch at all layers, twice, as memory of the batch before is not at once used again, and one
        chunk of them in float32."""
        row = self.length * self.width * self.itemsize * (self.layers + 1)
        rows = min(BATCH, max(1, STATES // row), self.rows)
        return 2 * rows * row + (self.layers + 1) * CHUNK * self.width * 4

    def fit_bytes(self) -> int:
        """The most that the fit of a block takes: step 1 with its path, training the stand-in, or the choice of its
        landmarks with a pass of their inputs."""
        trained = max(16 * self.added, _regressed(self.shape))
        kernel = [
            (OPERATOR * len(block) + SYSTEM) * self.size**2 + self.paths(block) for block in self.blocks]
        return max(trained, *kernel) if "fourier" in self.shape.parts else trained

    def choice_bytes(self, streamed: bool) -> tuple[int, int]:
        """What blocks are chosen with: on the host states at all boundaries, where they stay in memory; where the model
        computes one trial's fit, or its logits, a copy and their exponentials."""
        if self.choice is None:
            return 0, 0
        states = self.choice.collected * self.width * self.itemsize * self.choice.boundaries
        fit = max(_regressed(shape) for shape, _ in self.choice.fits)
        return 0 if streamed or states > HELD else states, max(fit, LOGIT * self.choice.logits)

    def peaks(self, streamed: bool, accelerator: bool, budget: int | None) -> Peaks:
        """Of a run whose states are on disk, as with a work directory.

        ``budget``: of the host, a share of which may hold states between layers; None: they are on disk too.
        """
        layer = (self.weights - self.outside) // self.layers
        model = self.outside + layer if streamed else self.weights
        # Row by row and block by block at once; the block put together last is there once more.
        collected = 2 * self.paths() + max(self.paths(block) for block in self.blocks)
        kept = self.paths() + 4 * self.added * len(self.blocks)
        analysis, (states, trial) = self.analysis_bytes(), self.choice_bytes(streamed)
        held = 0
        if streamed and budget is not None:
            held = min(self.scratch(), int(SCRATCH_SHARE * self.room(budget)))
        if not accelerator:
            analysis = analysis // 2 + held if streamed else analysis
            whole = LIBRARIES + model + max(analysis, collected, states + trial, kept + self.fit_bytes())
            return Peaks(whole, 0, LIBRARIES + model + analysis)
        # Weights pass through the host's memory as they are loaded, one layer or all.
        host = LIBRARIES + max(model, collected, kept, held, states)
        return Peaks(host, model + max(analysis, trial, self.fit_bytes()), LIBRARIES + max(model, held))

    @staticmethod
    def room(budget: int) -> int:
        """What a budget of the host leaves beside the libraries."""
        return max(0, budget - LIBRARIES)

    def streams(self, budget: int | None, device: Device) -> bool | None:
        """Whether ``prune`` reads the model layer by layer under a budget of the host and on an otherwise idle device;
        None where neither is known.

        Raises:
            KDPruneError: the libraries alone take more than the budget.
        """
        if budget is not None and budget <= LIBRARIES:
            raise KDPruneError(f"got host memory of {readable_bytes(budget)}, expected more than "
                               f"{readable_bytes(LIBRARIES)}, which the libraries alone take")
        rooms = [] if budget is None else [self.room(budget)]
        rooms += [] if device.memory is None else [int(SHARE * device.memory)]
        return self.weights > MODEL_SHARE * min(rooms) if rooms else None
