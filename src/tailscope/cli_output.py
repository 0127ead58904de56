"""What several verbs print, and where; and streams that may fail without costing any work."""

import errno
import io
import json
import os
import signal
from typing import Any, TextIO

import typer
from rich.console import Console


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


def open_closed_streams() -> None:
    """Give closed standard streams a file, lest the next file to be opened gets their number and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def console_beside(as_json: bool) -> Console:
    """Return where a verb talks: standard error when standard output carries JSON."""
    return Console(stderr=as_json)


def print_json(value: Any) -> None:
    """Print a result on standard output; paths become text, and NaN or infinity, which JSON does not have, an error."""
    typer.echo(json.dumps(value, indent=1, default=os.fspath, allow_nan=False))
