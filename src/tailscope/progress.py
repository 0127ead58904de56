"""Progress of long work: rich bars on a terminal, a line a minute elsewhere; and ending it in time."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tailscope.errors import one_line


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
        bar = self._bars.add_task(escape(one_line(description)), total=total, completed=done, rate="")

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
        self.console.print(one_line(text), style="dim", highlight=False, markup=False)

    def safe_point(self) -> None:
        """Do nothing: bars have no end of their own."""


class Lines:
    """A plain line every minute for logs: what, how much of it, how fast, and the time left; notes are left out."""

    EVERY = 60.0

    def __init__(self, tell: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._started = self._told = clock()
        self._open: list[_Task] = []

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Count, and tell from time to time."""
        task = _Task(one_line(description), total, done, done, self._clock())
        self._open.append(task)

        def advance(items: int, /) -> None:
            task.done += items
            self.safe_point()

        try:
            yield advance
        finally:
            self._open.remove(task)

    def note(self, text: str) -> None:
        """Do nothing."""

    def safe_point(self) -> None:
        """Tell the innermost task, if the last line is a minute old."""
        now = self._clock()
        if now - self._told >= self.EVERY and self._open:
            self._told = now
            self._tell(f"[{duration(now - self._started)}] {self._open[-1].line(now)}")


@dataclass(eq=False)
class _Task:
    """A piece of work: items done of all, those that were done before, and since when it runs."""

    description: str
    total: int
    done: int
    before: int
    started: float

    def line(self, now: float) -> str:
        text = f"{self.description}: {self.done:,}/{self.total:,}"
        rate = (self.done - self.before) / max(1e-9, now - self.started)
        if rate == 0:
            return text
        left = (self.total - self.done) / rate
        return f"{text}, {rate:,.0f}/s, {duration(left)} left" if rate >= 1 else f"{text}, {duration(left)} left"


def duration(seconds: float) -> str:
    """Return whole minutes, with hours where there are some.

    >>> duration(95), duration(20), duration(7300)
    ('2 min', '1 min', '2 h 2 min')
    """
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def shown_on(console: Console) -> AbstractContextManager[Progress]:
    """Return bars on the console, or where it is no terminal on standard error; where neither is one, lines there."""
    for screen in (console, Console(stderr=True)):
        if screen.is_terminal:
            return Bars(screen)
    return nullcontext(Lines(lambda text: print(text, file=sys.stderr, flush=True)))  # noqa: T201


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
