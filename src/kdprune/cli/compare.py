"""``kdprune compare`` and ``kdprune ablate``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kdprune.cli.options import Calibration, Device, Dtype, Heldout, Length, Model, Samples, Trust
from kdprune.comparison import ablate, compare
from kdprune.errors import KDPruneError
from kdprune.methods import METHODS
from kdprune.report.comparison_records import Comparison
from kdprune.report.comparison_table import print_comparison
from kdprune.text import parse_weighted
from kdprune.variants import PART_NAMES

Ratio = Annotated[float, typer.Option(help="share of all parameters to remove, net")]
Seeds = Annotated[str, typer.Option(help="how many (3: 0, 1, 2), or which, with commas (0,4,7)")]
Suite = Annotated[str | None, typer.Option(help="score tasks too: small, paper or names with commas")]
SuiteData = Annotated[list[str] | None, typer.Option(help="folder with <task>.jsonl; repeat; left out: the hub")]
Limit = Annotated[int | None, typer.Option(help="items of a task (all)")]
Anew = Annotated[bool, typer.Option("--overwrite", help="start anew, earlier runs in this folder are deleted")]


def compare_command(
    model: Model = None,
    methods: Annotated[str, typer.Option(
        help="variants with commas: names of methods, with options as in kdp:kernel=fixed:rank=8")] = ",".join(METHODS),
    output: Annotated[str, typer.Option("--output", "-o", help="directory to write or to continue in")] = "comparison",
    ratio: Ratio = 0.25,
    seeds: Seeds = "3",
    blocks_from: Annotated[str | None, typer.Option(
        help="a variant whose blocks all depth methods take, so that only stand-ins differ")] = None,
    suite: Suite = None,
    suite_data: SuiteData = None,
    limit: Limit = None,
    heal: Annotated[str | None, typer.Option(help="train every pruned model: lm or kl")] = None,
    heal_what: Annotated[str | None, typer.Option(help="what healing trains: stand-ins or lora")] = None,
    heal_tokens: Annotated[int | None, typer.Option(help="tokens healing sees")] = None,
    calibration: Calibration = None,
    heldout: Heldout = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Anew = False,
    trust_remote_code: Trust = False,
) -> None:
    """Prune MODEL with several methods to one net ratio and measure all alike; run again to continue."""
    _show(compare(
        model, methods, ratio=ratio, seeds=_seeds(seeds), output_dir=output, blocks_from=blocks_from, heal=heal,
        heal_what=heal_what, heal_tokens=heal_tokens,
        **_shared(suite, suite_data, limit, calibration, heldout, samples, length, device, dtype, overwrite,
                  trust_remote_code)), output)


def ablate_command(
    model: Model = None,
    output: Annotated[str, typer.Option("--output", "-o", help="directory to write or to continue in")] = "ablation",
    base: Annotated[str, typer.Option(help="the variant of kdp that is varied, as in kdp:refine=no")] = "kdp",
    only: Annotated[str, typer.Option(help=f"parts, with commas: {', '.join(PART_NAMES)} (all)")] = "",
    ratio: Ratio = 0.25,
    seeds: Seeds = "3",
    suite: Suite = None,
    suite_data: SuiteData = None,
    limit: Limit = None,
    calibration: Calibration = None,
    heldout: Heldout = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Anew = False,
    trust_remote_code: Trust = False,
) -> None:
    """Change one part of KDP at a time and measure what it buys; run again to continue."""
    _show(ablate(
        model, base=base, only=only, ratio=ratio, seeds=_seeds(seeds), output_dir=output,
        **_shared(suite, suite_data, limit, calibration, heldout, samples, length, device, dtype, overwrite,
                  trust_remote_code)), output)


def _shared(
    suite: str | None, suite_data: list[str] | None, limit: int | None, calibration: list[str] | None,
    heldout: str | None, samples: int | None, length: int | None, device: str | None, dtype: str | None,
    overwrite: bool, trust_remote_code: bool,
) -> dict[str, Any]:
    """Both commands' options as the functions take them."""
    return {
        "suite": suite, "suite_data": tuple(suite_data or ()), "limit": limit,
        "calibration": parse_weighted(calibration) if calibration else None, "heldout": heldout, "samples": samples,
        "length": length, "device": device or "auto", "dtype": dtype, "overwrite": overwrite,
        "trust_remote_code": trust_remote_code, "progress": True,
    }


def _seeds(text: str) -> int | list[int]:
    """``3`` → three seeds; ``0,4,7`` → these."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise KDPruneError(f"got seeds {text!r}, expected a number, or numbers with commas") from error
    return found if "," in text or not found else found[0]


def _show(result: Comparison, output: str) -> None:
    folder = Path(output)
    print_comparison(result, Console(), [folder / name for name in ("results.json", "table.md", "report.html")])
