"""What a terminal sees of a verb: words kept whole, as much as is asked for, and streams that may be gone."""

import errno
import io
import logging
import os
import platform
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

import tailscope
from tailscope.errors import one_line, printable


class Output:
    """A standard stream that may be full, closed or without a reader: results are written all the same.

    The first failure is kept for `exit_code`; what comes after it goes nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.StringIO()  # none where the process was started with it closed
        self._failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, if anybody reads it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody reads it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def exit_code(self, beside: "Output") -> int:
        """Return 0, or the exit code of a failed standard output, and say on the stream `beside` it what happened."""
        self.flush()
        if self._failure is None:
            return 0
        if self._failure.errno == errno.EPIPE:  # `| head -1`: its reader has seen enough
            return 128 + getattr(signal, "SIGPIPE", 13)
        beside.write(f"error: standard output cannot be written ({self._failure.strerror}); files are complete\n")
        beside.flush()
        return 1

    def _fail(self, error: OSError) -> None:
        """Lead the stream nowhere: what it still holds must not fail once more when Python ends."""
        self._failure = self._failure or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        except OSError:  # not a stream of the system's
            return
        finally:
            os.close(nowhere)


class _ToScreen(logging.Handler):
    """Shows log lines on what is standard error at that time: above progress bars, where there are some."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print(one_line(record.getMessage()), file=sys.stderr)  # noqa: T201


@contextmanager
def logged(verbose: bool, quiet: bool) -> Iterator[None]:
    """Show what a verb reads, its times and Python's warnings, or none of it."""
    if not (verbose or quiet):
        yield
        return
    log, handler, started = logging.getLogger("tailscope"), _ToScreen(), time.monotonic()
    before = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if quiet else "default")
        if verbose:
            log.addHandler(handler)
            log.setLevel(logging.INFO)
        try:
            log.info("tailscope %s, Python %s", tailscope.__version__, platform.python_version())
            yield
            log.info("done in %.1f s", time.monotonic() - started)
        finally:
            log.removeHandler(handler)
            log.setLevel(before)


def show_on(console: Console, shown: RenderableType) -> None:
    """Print what a verb shows, on a terminal broken between words only; elsewhere a line stays a line."""
    if isinstance(shown, Table):
        before, console.width = console.width, _fit(shown, console)
        console.print(shown)
        console.width = before
        return
    text = shown if isinstance(shown, Text) else Text(printable(str(shown)))
    if console.is_terminal:
        lines = textwrap.fill(text.plain, console.width, break_long_words=False, break_on_hyphens=False)
        text = Text(lines, style=text.style)
    console.print(text, soft_wrap=True, highlight=False)


def _fit(table: Table, console: Console) -> int:
    """Make no column of a table narrower than its longest word; return the width that the table then has."""
    wide = console.options.update(width=10_000)
    found = [
        [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)] for column in table.columns
    ]
    least = [max(one.minimum for one in column) for column in found]
    most = [max(one.maximum for one in column) for column in found]
    frame = Measurement.get(console, wide, table).maximum - sum(most)
    spare = max(0, console.width - frame - sum(least))
    share = min(1.0, spare / max(1, sum(most) - sum(least)))
    for column, low, high in zip(table.columns, least, most, strict=True):
        column.width = low + int(share * (high - low))
    return max(console.width, frame + sum(least))
