"""``kdprune compare`` and ``kdprune ablate``."""

from pathlib import Path
from typing import Any

from rich.console import Console

from kdprune.comparison.compare import ablate, compare
from kdprune.options import options_of, typed_options
from kdprune.report.comparison_records import Comparison
from kdprune.report.comparison_table import print_comparison
from kdprune.run.option_groups import ABLATE, COMPARE

COMPARISON, ABLATION = "comparison", "ablation"  # where the commands write


def compare_command(**options: Any) -> None:
    """Prune MODEL with several methods to one net ratio and measure all alike; run again to continue."""
    options = typed_options({"output_dir": COMPARISON, **options}, options_of(*COMPARE))
    _show(compare(**options, progress=True), options["output_dir"])


def ablate_command(**options: Any) -> None:
    """Change one part of KDP at a time and measure what it buys; run again to continue."""
    options = typed_options({"output_dir": ABLATION, **options}, options_of(*ABLATE))
    _show(ablate(**options, progress=True), options["output_dir"])


def _show(result: Comparison, output: str) -> None:
    folder = Path(output)
    print_comparison(result, Console(), [folder / name for name in ("results.json", "table.md", "report.html")])
