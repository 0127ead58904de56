"""What long work reports to: bars on a terminal, a line a minute elsewhere, a logger's files, and a deadline."""

import importlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from tailscope.errors import UserError, one_line, unknown

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

    def log(self, run: str, step: int, numbers: Mapping[str, float], *, last: bool = False) -> None:
        """Take numbers of a run, such as the loss of an epoch of a training, for loggers; `last` ends the run."""


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
            self._bars.update(bar, advance=items, rate=_pace(count / max(1e-9, time.monotonic() - started)))

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
            return f"{text}, {_pace(rate)}, about {duration((total - finished) / rate)} left" if rate else text

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


def _pace(rate: float) -> str:
    """Return items a second, or how long each takes.

    >>> _pace(1234.5), _pace(0.08), _pace(0.001), _pace(0.0)
    ('1,234/s', '12 s each', '17 min each', '')
    """
    if not rate:
        return ""
    if rate >= 1:
        return f"{rate:,.0f}/s"
    return f"{1 / rate:.0f} s each" if rate > 1 / 100 else f"{duration(1 / rate)} each"


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

    def log(self, run: str, step: int, numbers: Mapping[str, float], *, last: bool = False) -> None:
        """Pass the numbers on."""
        self._progress.log(run, step, numbers, last=last)

    def safe_point(self) -> None:
        """Raise `TimeIsUp` where the next stretch would end after the limit."""
        self._progress.safe_point()
        now = self._clock()
        stretch = 0.0 if self._last is None else now - self._last
        self._last = now
        if now + stretch >= self._end:
            raise TimeIsUp


# ---- loggers

_NEEDED = {
    "csv": {"lightning.fabric.loggers": "lightning"},
    "tensorboard": {"lightning.fabric.loggers": "tensorboard", "tensorboard": "tensorboard"},
    "wandb": {"wandb": "wandb"},
}
"""Of each logger the modules that it needs, with the extra that installs them."""


class _Run(NamedTuple):
    """What a logger keeps of one run: what takes the numbers of a step, and what ends it."""

    log: Callable[[Mapping[str, float], int], object]
    finish: Callable[[], object]


class Logged(Progress):
    """Passes everything on, and numbers to a logger, which keeps every run apart; threads may report at once."""

    def __init__(self, progress: Progress, begin: Callable[[str], _Run]) -> None:
        self._progress, self._begin = progress, begin
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()

    def task(self, description: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Open a task of the progress that this one passes on to."""
        return self._progress.task(description, total, done)

    def note(self, text: str) -> None:
        """Pass the line on."""
        self._progress.note(text)

    def safe_point(self) -> None:
        """Pass it on."""
        self._progress.safe_point()

    def log(self, run: str, step: int, numbers: Mapping[str, float], *, last: bool = False) -> None:
        """Write the numbers; the first ones begin the run."""
        with self._lock:
            if run not in self._runs:
                self._runs[run] = self._begin(run)
            self._runs[run].log(numbers, step)
            if last:
                self._runs.pop(run).finish()

    def close(self) -> None:
        """End the runs that were interrupted."""
        while self._runs:
            self._runs.popitem()[1].finish()


@contextmanager
def logging_to(progress: Progress, logger: str | None, out: Path | str | None) -> Iterator[Progress]:
    """Yield the progress; with a logger (csv, tensorboard, wandb) one that writes numbers to OUT/logs as well.

    Raises:
        UserError: the logger is unknown or not installed, or there is no OUT.
    """
    if logger is None:
        yield progress
        return
    if logger not in _NEEDED:
        raise unknown("--logger", logger, _NEEDED)
    if out is None:
        raise UserError(f"--logger {logger}: its files are written to OUT/logs; give --out")
    for module, extra in _NEEDED[logger].items():
        try:
            importlib.import_module(module)
        except ImportError:
            package = module.partition(".")[0]
            raise UserError(
                f"--logger {logger}: needs the package {package}; pip install 'tailscope[{extra}]'"
            ) from None
    begin = _wandb_run if logger == "wandb" else _csv_run if logger == "csv" else _tensorboard_run
    logs = Path(out) / "logs"
    both = Logged(progress, lambda run: begin(logs, run))
    try:
        yield both
    finally:
        both.close()


def _as_file(run: str) -> str:
    """Return a run's name as a folder may be called.

    >>> _as_file("seed 0: lt->true")
    'seed-0-lt-true'
    """
    return re.sub(r"[^\w.+]+", "-", run).strip("-")


def _csv_run(folder: Path, run: str) -> _Run:
    from lightning.fabric.loggers.csv_logs import CSVLogger

    logger = CSVLogger(folder, _as_file(run), flush_logs_every_n_steps=1)
    return _Run(lambda numbers, step: logger.log_metrics(dict(numbers), step), lambda: logger.finalize("success"))


def _tensorboard_run(folder: Path, run: str) -> _Run:
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    logger = TensorBoardLogger(folder, _as_file(run))
    return _Run(lambda numbers, step: logger.log_metrics(dict(numbers), step), lambda: logger.finalize("success"))


def _wandb_run(folder: Path, run: str) -> _Run:
    """Begin a run of W&B, which uploads nothing unless the environment asks for it; `wandb sync` does it later."""
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    begun = wandb.init(
        project="tailscope",
        group=folder.absolute().parent.name,
        name=run,
        dir=folder,
        mode=None if os.environ.get("WANDB_MODE") else "offline",  # else W&B reads it itself
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off"),
    )
    return _Run(lambda numbers, step: begun.log(dict(numbers), step=step), begun.finish)
