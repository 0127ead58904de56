"""The command line: one verb per experiment. Mistakes of the user are one line and exit code 2."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import tailscope
from tailscope.cli_diagnose import diagnose
from tailscope.cli_experiments import demo, geometry, ladder, subset, swap
from tailscope.cli_features import features
from tailscope.cli_options import Json
from tailscope.cli_output import print_json
from tailscope.cli_paper import reproduce
from tailscope.cli_store import store_app
from tailscope.errors import UserError, one_line
from tailscope.origin import from_command_line

INTERRUPTED = 130
"""The exit code of a process ended by SIGINT, as shells have it."""

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without Unicode shows "?" instead of failing
            stream.reconfigure(errors="replace")
    try:
        with from_command_line(sys.argv[1:]):
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as error:
        code = _fail(str(error))
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer turns the interrupt of a running verb into this code
        print("\ninterrupted; the same command keeps what is finished and does the rest", file=sys.stderr)  # noqa: T201
    sys.exit(code if isinstance(code, int) else 0)


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
