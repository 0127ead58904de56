"""Progress of long work: rich bars on a terminal, nothing elsewhere."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Advance(Protocol):
    """Called with the number of items just done."""

    def __call__(self, items: int, /) -> None:
        """Report `items` more as done."""


class Progress(Protocol):
    """Somebody who is told about work."""

    def task(self, description: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Open a task of `total` items (images), `done` of which were done before."""

    def note(self, text: str) -> None:
        """Tell one line, such as what was found in the store."""


class Quiet:
    """Tells nobody."""

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Do nothing."""
        yield lambda items: None

    def note(self, text: str) -> None:
        """Do nothing."""


class Bars:
    """Rich progress bars with images a second and the time left; one line a finished task."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show a bar while the task runs."""
        started, count = time.monotonic(), 0
        bar = self._bars.add_task(description, total=total, completed=done, rate="")

        def advance(items: int, /) -> None:
            nonlocal count
            count += items
            rate = count / max(1e-9, time.monotonic() - started)
            self._bars.update(bar, advance=items, rate=f"{rate:,.0f}/s")

        try:
            yield advance
        finally:
            self._bars.refresh()  # a task shorter than the time between two redraws is shown at least once
            self._bars.remove_task(bar)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, style="dim", highlight=False)
