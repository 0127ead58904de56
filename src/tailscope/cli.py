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
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import tailscope
from tailscope import cli_paper, verbs
from tailscope.cli_output import Options, Output, add_command, open_closed_streams
from tailscope.cli_store import store_app
from tailscope.errors import UserError, one_line, printable
from tailscope.results import from_command_line

if TYPE_CHECKING:
    from tailscope.encoders import FeaturesResult
    from tailscope.report.schema import Diagnosis

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


# -- what people see of results -------------------------------------------------------------------------------------


def _plain(text: str) -> Text:
    """Return text in which rich looks for no markup and a terminal for no commands."""
    return Text(one_line(text))


def _tell(console: Console, *lines: str) -> None:
    """Print lines as they are, however long."""
    for line in lines:
        console.out(printable(line), highlight=False)


def _show_story(_: object, options: Options, console: Console) -> None:
    """Print the story in ten lines and name the report."""
    from tailscope.report import load, story

    table = Table(show_header=False, box=None)
    for name, value in story.summary_rows(load(options["out"])):
        table.add_row(_plain(name), _plain(value))
    console.print(table)
    _tell(console, f"report: {options['out'] / 'report.html'}")


def _show_subset(result: dict[str, Any], options: Options, console: Console) -> None:
    """Print a subset's counts as a bar chart, and its fingerprint."""
    counts = result["counts"]
    _tell(console, *(f"warning: {one_line(warning)}" for warning in result["warnings"]))
    _tell(console, f"{sum(counts):,} images, counts {' '.join(map(str, counts))}", f"sha256 {result['sha256']}")
    table = Table("class", "group", "images", "", box=None)
    for name, group, n in zip(result["dataset"]["class_names"], result["groups"], counts, strict=True):
        table.add_row(_plain(name), group or "-", str(n), "█" * max(1, round(40 * n / max(counts))))
    if len(counts) <= 100:
        console.print(table)
    if options["out"] is not None:
        _tell(console, f"written: {options['out'] / 'subset.json'}")


def _show_methods(listed: dict[str, Any], _: Options, console: Console) -> None:
    """Print every registry as a table, then the recipes and profiles."""
    for kind, registry in verbs.REGISTRIES.items():
        table = Table("call", "what it is", title=kind, title_justify="left")
        for entry in registry:
            table.add_row(_plain(registry.canonical(entry.name)), _plain(entry.summary))
        console.print(table)
    table = Table("recipe", "what it does", title="recipes", title_justify="left")
    for recipe in listed["recipes"]:
        table.add_row(recipe["name"], _plain(recipe["card"]))
    console.print(table)
    console.print(f"profiles: {', '.join(listed['profiles'])}", highlight=False)


def _show_features(written: "FeaturesResult", _: Options, console: Console) -> None:
    """Say what was written, and what to mind."""
    _tell(console, *(f"warning: {one_line(warning)}" for warning in written.warnings))
    _tell(
        console,
        f"{written.features}: {written.rows:,} rows of {written.width} features, {written.classes} classes"
        f" ({written.resumed:,} rows were there, {written.skipped:,} images skipped)",
    )
    if written.classifier is not None:
        _tell(console, f"{written.classifier}: the checkpoint's classifier")


def _show_diagnosis(result: "Diagnosis", options: Options, console: Console) -> None:
    """Print the verdict, the accuracies behind it, and the advice."""
    from tailscope.report import diagnosis as story

    _tell(console, one_line(story.headline(result)))
    if result["accuracy"] is not None:
        table = Table("", "accuracy", "head", "body", "tail", box=None)
        for row in story.accuracy_rows(result):
            table.add_row(*row)
        console.print(table)
    shown = story.findings(result)[0 if result["verdict"] is None else 1 :]  # the table says the first
    _tell(console, *(f"- {one_line(text)}" for text in [*shown, *(piece["text"] for piece in result["advice"])]))
    if result["warnings"]:
        _tell(console, f"{len(result['warnings'])} warnings, the first: {one_line(result['warnings'][0])}")
    _tell(console, f"written: {options['out'] / 'diagnosis.json'}")
    if options["report"]:
        _tell(console, f"report: {options['out'] / 'report.html'}")


def _show_path(path: Path, _: Options, console: Console) -> None:
    typer.echo(path)


add_command(app, verbs.demo, _show_story, out=Path("demo"))
for _experiment in (verbs.swap, verbs.ladder, verbs.geometry):
    add_command(app, _experiment, _show_story, out=Path("out"))
add_command(app, verbs.subset, _show_subset)
add_command(app, verbs.report, _show_path, with_json=False)
add_command(app, verbs.methods, _show_methods)
add_command(app, verbs.diagnose, _show_diagnosis, out=Path("out"))
add_command(app, verbs.features, _show_features)
add_command(app, cli_paper.reproduce, cli_paper.show, end=cli_paper.end)
app.add_typer(store_app)
