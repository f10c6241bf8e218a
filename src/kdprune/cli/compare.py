"""``kdprune compare`` and ``kdprune ablate``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kdprune.comparison.compare import ablate, compare
from kdprune.errors import KDPruneError
from kdprune.options import options_of, typed_options
from kdprune.report.comparison_records import Comparison
from kdprune.report.comparison_table import print_comparison
from kdprune.run.option_groups import ABLATE, COMPARE
from kdprune.store.cache import MANIFEST

COMPARISON, ABLATION = "comparison", "ablation"  # where the commands write


def compare_command(**options: Any) -> None:
    """Prune MODEL with several methods to one net ratio and measure all alike; run again to continue."""
    options = _checked({"output_dir": COMPARISON, **options}, COMPARE)
    _show(compare(**options, progress=True), options["output_dir"])


def ablate_command(**options: Any) -> None:
    """Change one part of KDP at a time and measure what it buys; run again to continue."""
    options = _checked({"output_dir": ABLATION, **options}, ABLATE)
    _show(ablate(**options, progress=True), options["output_dir"])


def _checked(options: Mapping[str, Any], groups: tuple[type, ...]) -> dict[str, Any]:
    """The options, each of its type. Raises KDPruneError for an output whose runs/ are not of a comparison."""
    chosen = typed_options(options, options_of(*groups))
    runs = Path(chosen["output_dir"]) / "runs"
    if runs.is_dir() and any(runs.iterdir()) and not (runs / MANIFEST).is_file():
        raise KDPruneError(f"got output {chosen['output_dir']}, whose runs/ are not those of a comparison; choose a "
                           "new directory")
    return chosen


def _show(result: Comparison, output: str) -> None:
    folder = Path(output)
    print_comparison(result, Console(), [folder / name for name in ("results.json", "table.md", "report.html")])
