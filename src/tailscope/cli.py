"""The command line: one verb per experiment, and how each may end.

| exit code | what happened |
|---|---|
| 0 | done; results are written |
| 1 | a bug in tailscope, or standard output could not be written (results in files are there) |
| 2 | a mistake of the user, or of the machine: one line says which |
| 128 + n | ended by signal n: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; 141: nobody reads standard output any more |
"""

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Annotated, TextIO, cast

import typer
from rich.console import Console

import tailscope
from tailscope.cli_diagnose import diagnose
from tailscope.cli_experiments import demo, geometry, ladder, subset, swap
from tailscope.cli_features import features
from tailscope.cli_options import Json
from tailscope.cli_output import Output, open_closed_streams, print_json
from tailscope.cli_paper import reproduce
from tailscope.cli_store import store_app
from tailscope.errors import UserError, one_line
from tailscope.origin import from_command_line

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a process ended by SIGINT, as shells have it."""

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
DEBUG = "TAILSCOPE_DEBUG"
"""Environment variable; where it is set, an unexpected error shows its traceback."""

app = typer.Typer(
    name="tailscope",
    help="Is the classifier or the representation the bottleneck of a long-tailed data set, for which classes, and how "
    "sure is that?",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; the entry point."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without Unicode shows "?" instead of failing
            stream.reconfigure(errors="replace")
    out, err = Output(sys.stdout), Output(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)), _signals() as received:
        code = _run(received)
    sys.exit(code or out.exit_code(err))


def _run(received: list[int]) -> int:
    """Run the verb and return its exit code; `received` gets the signal that ended it, if one did."""
    try:
        with from_command_line(sys.argv[1:]):
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as error:
        code = _fail(str(error))
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:  # the net under everything: no traceback where a line can be told
        code = INTERRUPTED if received else _unexpected(error)  # workers that a signal ended too are no surprise
    if code == INTERRUPTED:  # typer turns the interrupt of a running verb into this code
        print("\ninterrupted; the same command keeps what is finished and does the rest", file=sys.stderr)  # noqa: T201
        return 128 + received[0] if received else INTERRUPTED
    return code if isinstance(code, int) else 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """End at SIGTERM and SIGHUP as at Ctrl-C, and at once if a second one comes; yield the list of what came.

    A signal that is ignored, SIGHUP under `nohup` for instance, stays so.
    """
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        received.append(number)
        for known in handlers:
            signal.signal(known, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {n: h for n in SIGNALS if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, end)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _unexpected(error: Exception) -> int:
    """Print one line on what no check foresaw, and return the exit code: 2 for the machine's faults, 1 for ours."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    # PyTorch has an exception of its own on GPUs, and none at all on CPUs.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return _fail(f"out of memory ({str(error) or 'no details'}); work on less at a time, or on a machine with more")
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return _fail(f"{where}{error.strerror or str(error) or type(error).__name__}")
    *_, last = traceback.extract_tb(error.__traceback__)
    place = f"{Path(last.filename).name} line {last.lineno}"
    _fail(
        f"this is a bug in tailscope: {type(error).__name__}: {error} ({place}); please report it, with the command and"
        f" the traceback that {DEBUG}=1 shows"
    )
    return 1


def _fail(message: str) -> int:
    """Print one line to standard error and return the exit code of a mistake."""
    print(f"error: {one_line(message)}", file=sys.stderr)  # noqa: T201
    return 2


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tailscope {tailscope.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def report(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with result files.")],
    figures: Annotated[bool, typer.Option(help="Also write every chart as SVG, PNG and PDF.")] = True,
) -> None:
    """Build report.html, figures and tables from the stored results in DIR. Nothing is computed anew.

    Example: `tailscope report out`
    """
    from tailscope.report import build

    typer.echo(build(out, figures=figures))


def methods(as_json: Json = False) -> None:
    """List every loss, sampler, augmentation, mixing, model, schedule, profile and recipe with its defaults.

    Example: `tailscope methods --json`
    """
    from tailscope import verbs

    if as_json:
        print_json(verbs.list_methods())
    else:
        verbs.show_methods(Console())


for _verb in (demo, swap, ladder, geometry, subset, report, methods, diagnose, features, reproduce):
    app.command()(_verb)
app.add_typer(store_app)
