"""Variants by name, ``kdp:kernel=fixed:rank=8``: what a comparison compares, and the predefined ones of an ablation."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdprune.errors import KDPruneError
from kdprune.methods import METHODS, make_method
from kdprune.methods.common.method import DepthMethod, Method
from kdprune.methods.common.target import Of
from kdprune.methods.kdp.kdp import KDP
from kdprune.options import reject_unknown
from kdprune.run.heal import HEAL_OPTIONS, Heal, make_heal
from kdprune.run.recipe import check_options

# What a variant may set beside its method's fields and healing: which calibration rows it sees.
RUN_OPTIONS = ("samples", "length")


@dataclass(frozen=True)
class Variant:
    """A method with its options, and what the run does otherwise for it.

    name: as the user wrote it. given: the options in the name. method: the dataclass. heal: training afterwards.
    samples, length: of its calibration rows, None: as for all. group, label, value: its place in an ablation.
    """

    name: str
    method: Method
    given: Mapping[str, Any]
    heal: Heal | None = None
    samples: int | None = None
    length: int | None = None
    group: str = ""
    label: str = ""
    value: float | None = None

    @property
    def title(self) -> str:
        """As tables show it: the method's title and the options that were given."""
        return self.label or ", ".join([self.method.title, *(f"{key} {value}" for key, value in self.given.items())])

    @property
    def options(self) -> dict[str, Any]:
        """Every option of method and run: the variant's identity, and its record."""
        run = {"samples": self.samples, "length": self.length} | (self.heal.options() if self.heal else {})
        return {"method": self.name.partition(":")[0], **dataclasses.asdict(self.method)} | {
            key: value for key, value in run.items() if value is not None}

    def on(self, blocks: tuple[tuple[int, int], ...] | None) -> "Variant":
        """The same on these blocks; itself where it has none to take, or its own."""
        if blocks is None or not isinstance(self.method, DepthMethod) or not self.takes_blocks:
            return self
        return dataclasses.replace(self, method=dataclasses.replace(self.method, blocks=blocks))

    @property
    def takes_blocks(self) -> bool:
        """Whether blocks chosen by another variant can be given to it."""
        return isinstance(self.method, DepthMethod) and self.method.takes_blocks


def split_methods(methods: str | Sequence[str]) -> list[str]:
    """``"kdp,sleb:blocks=4-7,9-12"`` → two names: a comma before a layer range belongs to the blocks."""
    names = re.split(r",(?!\s*\d+-\d+\s*(?:[,:]|$))", methods) if isinstance(methods, str) else list(methods)
    return [name.strip() for name in names if name.strip()]


def parse_variant(
    name: str, ratio: float, common: Mapping[str, Any] | None = None, of: Of = "all", **place: Any,
) -> Variant:
    """The variant of this name at this ratio.

    Args:
        of: what the ratio is a share of.
        common: options of the run that hold where the name says nothing else: ``heal``, ``heal_what``, ….
        place: ``group``, ``label`` and ``value`` of an ablation.

    Raises:
        KDPruneError: an unknown method or option (says the nearest), or a value that cannot be.
    """
    method, *pairs = name.split(":")
    reject_unknown([method], METHODS, "method")
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not value.strip():
            raise KDPruneError(
                f"got {pair!r} in variant {name!r}, expected option=value, as in kdp:kernel=fixed:rank=8")
        given[key.strip().replace("-", "_")] = value.strip()
    fields = [field.name for field in dataclasses.fields(METHODS[method])]
    reject_unknown(given, [*fields, *RUN_OPTIONS, *HEAL_OPTIONS], f"option of {method}")
    own = {key: value for key, value in given.items() if key in fields}
    own_run = {key: value for key, value in given.items() if key not in fields}
    if own_run.get("heal") == "no":
        common, own_run = {}, {key: value for key, value in own_run.items() if key not in HEAL_OPTIONS}
    run = check_options({"method": method, **(common or {}), **own_run})
    heal = {key: value for key, value in run.items() if key in HEAL_OPTIONS}
    settings = make_method(method, {"ratio": ratio, "of": of, **own})
    return Variant(
        name, settings, given, make_heal(heal, settings), run.get("samples"), run.get("length"), **place)


# ------------------------------------------------------------------------------------------ ablations


@dataclass(frozen=True)
class AblationPart:
    """One question of the ablation: the options that answer it, each with what it is called.

    sweep: whether the options vary a number.
    of: parts of the kernel, one of which the base needs for the question to be one; none: any kernel has it.
    """

    name: str
    title: str
    options: Mapping[str, str]
    sweep: bool = False
    of: tuple[str, ...] = ()

    def applies(self, base: Variant) -> bool:
        """Whether the base has what the question is about."""
        return not self.of or (isinstance(base.method, KDP) and not base.method.parts.isdisjoint(self.of))


def parts_of(width: int, layers: int, rows: int) -> list[AblationPart]:
    """The parts of KDP, for a model of this width and depth calibrated on this many rows."""
    sizes = sorted({max(1, round(width * share)) for share in (0.25, 0.5, 1, 2)})
    learned, drawn = ("learned",), ("learned", "fixed")
    ranks = [rank for rank in (0, 4, 16, 64) if rank <= width]
    samples = sorted({max(2, rows // share) for share in (16, 8, 4, 2)})
    lengths = range(2, min(8, layers // 2) + 1)
    token_wise = "kernel=learned:context=none"
    return [
        AblationPart("kernel", "The kernel", {
            "kernel=linear": "without kernel: a linear map", "kernel=learned": "Fourier features alone",
            "kernel=data": "channels alone", "kernel=linear+learned": "without channels",
            "kernel=linear+data": "without Fourier features", "kernel=learned+data": "without linear part",
            "kernel=linear+fixed+data": "Fourier features as drawn",
            "kernel=mlp": "a GELU layer instead"}),
        AblationPart("anisotropy", "Anisotropy", {"without=anisotropy": "isotropic"}, of=learned),
        AblationPart("start", "Starts of step 1", {"without=ols_start": "without OLS starts"}, of=learned),
        AblationPart("loss", "Loss of step 1", {
            "without=cosine_term": "without the cosine term", "without=position_weights": "without position weights"},
            of=learned),
        AblationPart("operators", "Operators", {"without=operators": "without operators"}, of=drawn),
        AblationPart("alpha", "α", {"without=alpha": "without α"}, of=drawn),
        AblationPart("inverse", "Inverse network of Fourier features, token by token", {
            f"{token_wise}:inverse=residual": "residual", f"{token_wise}:inverse=direct": "direct"}),
        AblationPart("features", "Features m", {f"features={m}": f"m = {m}" for m in sizes}, True, drawn),
        AblationPart("channels", "Channels c", {f"channels={c}": f"c = {c}" for c in sizes}, True, ("data",)),
        AblationPart("rank", "Rank r", {f"rank={r}": f"r = {r}" for r in ranks}, True, learned),
        AblationPart("tokens", "Calibration rows", {f"samples={n}": f"{n} rows" for n in samples}, True),
        AblationPart("length", "Block length", {f"block_length={k}": f"k = {k}" for k in lengths}, True),
    ]


PARTS = {part.name: part for part in parts_of(128, 16, 256)}  # by name; what they vary by, another model says


def ablation_variants(
    base: str, ratio: float, width: int, layers: int, rows: int, only: Sequence[str] = (), of: Of = "all",
) -> list[Variant]:
    """The base, and the base with one part changed at a time.

    Args:
        base: a variant of KDP.
        ratio: net ratio of all.
        width: of the model.
        layers: of the model.
        rows: of calibration text.
        only: names of parts; all that the base has when empty.
        of: what the ratio is a share of.
    """
    found = [parse_variant(base, ratio, of=of, group="Base", label="the base")]
    for part in parts_of(width, layers, rows):
        wanted = part.name in only if only else part.applies(found[0])
        for options, label in part.options.items() if wanted else ():
            value = float(options.rpartition("=")[2]) if part.sweep else None
            found.append(
                parse_variant(f"{base}:{options}", ratio, of=of, group=part.title, label=label, value=value))
    return found


def check_ablation(base: str, only: Sequence[str], ratio: float) -> None:
    """Raises KDPruneError for a base that is not KDP or cannot be, and for unknown parts: before a model is loaded."""
    reject_unknown(only, PARTS, "part")
    if base.partition(":")[0] != "kdp":
        raise KDPruneError(f"got base {base!r}, expected a variant of kdp, as in kdp:refine=no")
    variant = parse_variant(base, ratio)
    for part in map(PARTS.__getitem__, only):
        if not part.applies(variant):
            raise KDPruneError(f"got part {part.name!r} for {base!r}, whose kernel has no part that it is about; "
                               f"expected one with {' or '.join(part.of)}: {base}:kernel={part.of[0]}")
