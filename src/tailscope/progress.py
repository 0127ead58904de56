"""Progress of long work: rich bars on a terminal, nothing elsewhere; and ending it in time."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

    def safe_point(self) -> None:
        """Be told that all work so far is saved: who wants to stop it may raise here and loses nothing."""


class Quiet:
    """Tells nobody."""

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Do nothing."""
        yield lambda items: None

    def note(self, text: str) -> None:
        """Do nothing."""

    def safe_point(self) -> None:
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

    def safe_point(self) -> None:
        """Do nothing: bars have no end of their own."""


def shown_on(console: Console) -> AbstractContextManager[Progress]:
    """Return bars on a terminal, silence elsewhere."""
    return Bars(console) if console.is_terminal else nullcontext(Quiet())


class TimeIsUp(Exception):
    """Raised at a safe point by a `Deadline`: what was finished is saved, the rest can go on another time."""


class Deadline:
    """Passes everything on, and ends the work at the first safe point from which the next would come too late.

    The time between two safe points of a task, an epoch's for instance, says how long the next will take. The first
    stretch of a task is always begun while there is time at all, so that every run gets further.
    """

    def __init__(self, progress: Progress, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._clock = progress, clock
        self._end = clock() + seconds
        self._last: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self._clock() >= self._end

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self._end - self._clock()

    def task(self, description: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Pass on."""
        self._last = None
        return self._progress.task(description, total, done)

    def note(self, text: str) -> None:
        """Pass on."""
        self._progress.note(text)

    def safe_point(self) -> None:
        """Stop the work where the next stretch would end after the limit.

        Raises:
            TimeIsUp: it would.
        """
        self._progress.safe_point()
        now = self._clock()
        stretch = 0.0 if self._last is None else now - self._last
        self._last = now
        if now + stretch >= self._end:
            raise TimeIsUp
