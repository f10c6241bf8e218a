"""The stages of a run: named, timed and shown, one progress bar each."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kdprune.runtime.machine import release_memory

Advance = Callable[[int], None]


@dataclass
class Stages:
    """Names, times and shows the stages of a run, one progress bar each.

    ``seconds`` maps a stage to the wall time spent in it (a stage entered twice adds up); ``reused`` names those whose
    result an earlier run left behind. ``watch`` is called with a stage's name when it ends.
    """

    show: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    watch: Callable[[str], None] = lambda _: None

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """``with stages.stage("analyse", total=10) as progress: progress(1)``."""
        columns = (
            SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(compact=True),
        )
        start = time.perf_counter()
        # Where stderr is no terminal it is left to errors, and the finished bars go the way of the results.
        console = Console(stderr=sys.stderr.isatty())
        with Progress(*columns, console=console, disable=not self.show) as progress:
            task = progress.add_task(name, total=total)
            yield lambda steps: progress.advance(task, steps)
            # A stage without a known length is complete when it ends.
            progress.update(task, total=total or 1, completed=total or 1)
        release_memory()  # so that the next stage's needs do not come on top of what this one is done with
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.watch(name)

    def found(self, name: str) -> None:
        """Notes, and shows, that an earlier run's result of a stage is used."""
        self.reused.append(name)
        self.tell(f"{name:<24} found in the work directory")

    def tell(self, line: str) -> None:
        """Shows a line among the progress bars."""
        if self.show:
            Console(stderr=sys.stderr.isatty()).print(f"  {line}", highlight=False, markup=False)
