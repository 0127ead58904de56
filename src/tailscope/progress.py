"""Progress of long work: bars on a terminal, a line a minute elsewhere, and a deadline that ends the work in time."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tailscope.errors import one_line

_log = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Called with the number of items just done."""


class Progress:
    """What long work reports to. This one shows nothing; others override what they show."""

    def task(self, description: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Open a task of `total` items (images, say), `done` of which were done before."""
        return nullcontext(lambda items: None)

    def note(self, text: str) -> None:
        """Take one line, such as what was found in the store."""

    def safe_point(self) -> None:
        """Be told that all work so far is saved: an exception raised here ends the work and loses nothing."""


Quiet = Progress
"""The name where nothing is to be shown."""


class Bars(Progress):
    """Rich progress bars with items a second and the time left; one line for each note."""

    def __init__(self, console: Console) -> None:
        self.console = console
        shown = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
        self._bars = RichProgress(*shown, TimeRemainingColumn(), console=console, transient=True)

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

        def advance(items: int) -> None:
            nonlocal count
            count += items
            rate = count / max(1e-9, time.monotonic() - started)
            self._bars.update(bar, advance=items, rate=f"{rate:,.0f}/s")

        try:
            yield advance
            _log_time(description, started)
        finally:
            self._bars.refresh()  # a task shorter than the time between two redraws is shown at least once
            self._bars.remove_task(bar)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(one_line(text), style="dim", highlight=False, markup=False)


class Lines(Progress):
    """A plain line every minute for logs: what, how much of it, how fast, and the time left; notes are left out."""

    EVERY = 60.0

    def __init__(self, tell: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._started = self._told = clock()
        self._open: list[Callable[[float], str]] = []

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Count items, and print a line from time to time."""
        started, finished = self._clock(), done

        def advance(items: int) -> None:
            nonlocal finished
            finished += items
            self.safe_point()

        def line(now: float) -> str:
            text = f"{one_line(description)}: {finished:,} of {total:,}"
            rate = (finished - done) / max(1e-9, now - started)
            if rate >= 1:
                text += f", {rate:,.0f}/s"
            return f"{text}, about {duration((total - finished) / rate)} left" if rate else text

        self._open.append(line)
        begun = time.monotonic()
        try:
            yield advance
            _log_time(description, begun)
        finally:
            self._open.remove(line)

    def safe_point(self) -> None:
        """Print a line on the innermost task, if the last line is a minute old."""
        now = self._clock()
        if now - self._told >= self.EVERY and self._open:
            self._told = now
            self._tell(f"[{duration(now - self._started)}] {self._open[-1](now)}")


def _log_time(description: str, started: float) -> None:
    """Tell the log how long a task took; the command line shows it with `--verbose`."""
    _log.info("%s: %.1f s", description, time.monotonic() - started)


def duration(seconds: float) -> str:
    """Return whole minutes, with hours where there are some.

    >>> duration(95), duration(20), duration(7300)
    ('2 min', '1 min', '2 h 2 min')
    """
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def shown_on(console: Console | None) -> AbstractContextManager[Progress]:
    """Return bars on the console or on standard error, whichever is a terminal, else lines on standard error.

    Without a console, or on a quiet one, nothing is shown.
    """
    if console is None or console.quiet:
        return nullcontext(Progress())
    for screen in (console, Console(stderr=True)):
        if screen.is_terminal:
            return Bars(screen)
    return nullcontext(Lines(lambda text: print(text, file=sys.stderr, flush=True)))  # noqa: T201


class TimeIsUp(Exception):
    """Raised at a safe point by a `Deadline`: what was finished is saved, the rest can go on another time."""


class Deadline(Progress):
    """Passes everything on, and ends the work at the last safe point before the time is up.

    The time between two safe points of a task, an epoch's for instance, says how long the next stretch will take. The
    first stretch of a task is always begun while there is any time left, so that every run gets further.
    """

    def __init__(self, progress: Progress, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress, self._clock = progress, clock
        self._end = clock() + seconds
        self._last: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self.left <= 0

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self._end - self._clock()

    def task(self, description: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Open a task of the progress that this one passes on to."""
        self._last = None
        return self._progress.task(description, total, done)

    def note(self, text: str) -> None:
        """Pass the line on."""
        self._progress.note(text)

    def safe_point(self) -> None:
        """Raise `TimeIsUp` where the next stretch would end after the limit."""
        self._progress.safe_point()
        now = self._clock()
        stretch = 0.0 if self._last is None else now - self._last
        self._last = now
        if now + stretch >= self._end:
            raise TimeIsUp
