"""The end of a run in the terminal: dense against pruned, a sample of both, and what was written where."""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdprune.report import summary
from kdprune.report.results import Results, Sample


def comparison_table(results: Results) -> Table:
    """Dense against pruned: layers, parameters, perplexity, speed, cache."""
    table = Table(title=Text(summary.headline(results)), title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("pruned", justify="right", style="bold")
    table.add_column("", justify="right", style="dim")
    for row in summary.comparison(results):
        table.add_row(row.name, row.dense, row.pruned, row.change)
    return table


def print_summary(results: Results, console: Console, where: Iterable[str | Path] = ()) -> None:
    """Print the table, how its figures were taken, one text sample, and the paths written."""
    console.print(comparison_table(results))
    settings = (
        ("perplexity", summary.perplexity_setting(results)),
        ("speed", summary.speed_setting(results)),
        ("healing", summary.healing(results)),
    )
    if shares := results.calibration.shares if results.calibration else []:
        each = ", ".join(f"{share:,}" for share in shares)
        console.print(Text(f"calibration: {sum(shares):,} tokens in {len(shares)} processes: {each}", style="dim"))
    for name, setting in settings:
        if setting:
            console.print(Text(f"{name}: {setting}", style="dim"))
    for sample in results.samples[:1]:
        _print_sample(sample, console)
    if results.seconds:
        total = summary.duration(sum(value or 0.0 for value in results.seconds.values()))
        memory = f", peak memory {summary.size(results.peak_memory_bytes)}" if results.peak_memory_bytes else ""
        console.print(Text(f"\n{total}{memory}"))
    for path in where:
        console.print(Text(f"wrote {path}"), soft_wrap=True)


def _print_sample(sample: Sample, console: Console) -> None:
    """The prompt and what each model makes of it; text is printed as it is, never as markup."""
    grid = Table.grid(padding=(0, 2))
    for name, text in (("dense", sample.dense), ("pruned", sample.pruned)):
        if text is not None:
            grid.add_row(Text(name, style="bold"), Text(sample.prompt, style="dim").append(text, style="not dim"))
    console.print()
    console.print(grid)
