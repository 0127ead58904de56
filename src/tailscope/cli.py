"""The command line: one verb per experiment, and how each may end.

| exit code | what happened |
|---|---|
| 0 | done; results are written |
| 1 | a bug in tailscope; a check that failed; or standard output could not be written (results in files are there) |
| 2 | a mistake of the user, or of the machine: one line says which |
| 128 + n | ended by signal n: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP; 141: nobody reads standard output any more |
"""

import inspect
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast, get_args

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from typer.models import ParameterInfo

import tailscope
from tailscope import cli_store, plugins, verbs
from tailscope.cli_screen import Output, logged, show_on
from tailscope.cli_store import Options
from tailscope.errors import UserError, one_line, printable
from tailscope.experiments.options import NEGATED, Reproduction, taking
from tailscope.progress import logging_to, shown_on
from tailscope.results import from_command_line
from tailscope.training import REGISTRIES

if TYPE_CHECKING:
    from tailscope.encoders import FeaturesResult
    from tailscope.report.diagnosis_schema import Diagnosis

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
    for number in range(3):  # a closed stream gets a file, lest the next file opened gets its number and the output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
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
        code = INTERRUPTED if received else _fail(str(error))  # such as that another process has ended, by Ctrl-C too
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:  # the net under everything: no traceback where a line can be told
        code = INTERRUPTED if received else _unexpected(error)  # workers that a signal ended too are no surprise
    if code == INTERRUPTED:  # typer turns the interrupt of a running verb into this code
        if not _follows():
            print("\ninterrupted; the same command keeps what is finished and does the rest", file=sys.stderr)  # noqa: T201
        return 128 + received[0] if received else INTERRUPTED
    return code if isinstance(code, int) else 0


def _follows() -> bool:
    """Whether another process of this run leads, which tells what both would; Lightning and torchrun number them."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) not in ("", "0")


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


# -- from functions to commands -------------------------------------------------------------------------------------

_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a summary.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and the path of what was written, no more.")]
_Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print what is read, how long each part takes, and all warnings.")
]
_Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="A module or .py file of yours that registers methods; it is run. Repeat for more.",
    ),
]
_SCREEN = {"quiet": _Quiet, "verbose": _Verbose}
"""What every verb can do besides its own options."""


def _add_command(
    verb: Callable[..., Any],
    show: Callable[[Any, Options], Iterator[RenderableType]],
    *,
    to: typer.Typer = app,
    end: Callable[[Any], object] = bool,
    name: str | None = None,
    with_json: bool = True,
    with_imports: bool = False,
    **defaults: Any,
) -> None:
    """Give a function a command, whose options are the parameters that `typer.Option` annotates.

    A parameter `console` gets the screen that notes and progress go to. `show` yields what people see of the result,
    and `end`, called last, may raise `typer.Exit` or `UserError`. `defaults` are those that differ from Python's.
    `with_imports`: it names methods, which plug-ins may register.
    """
    parameters = [
        parameter.replace(annotation=verb.__annotations__[name], default=defaults.get(name, parameter.default))
        for name, parameter in inspect.signature(verb).parameters.items()
    ]
    negated = {one.name for one in parameters if NEGATED in get_args(one.annotation)}
    options = [option for one in parameters if (option := _option(one)) is not None]
    further: dict[str, Any] = {"imports": _Imports} if with_imports else {}
    further |= {**({"as_json": _Json} if with_json else {}), **_SCREEN}
    options += [
        inspect.Parameter(
            n, inspect.Parameter.KEYWORD_ONLY, default=None if n == "imports" else False, annotation=further[n]
        )
        for n in further
    ]

    def run(
        imports: Sequence[str] | None = None,
        as_json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        **given: Any,
    ) -> None:
        console = Console(stderr=as_json, quiet=quiet)  # standard output carries JSON alone
        for name in imports or ():
            plugins.load(name)
        values = {option: not value if option in negated else value for option, value in given.items()}
        with logged(verbose, quiet):
            result = verb(**values, **({"console": console} if "console" in verb.__annotations__ else {}))
        if as_json:
            plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
            typer.echo(json.dumps(plain, indent=1, default=os.fspath, allow_nan=False))
        elif quiet and (path := result if isinstance(result, Path) else not values.get("plan") and values.get("out")):
            typer.echo(printable(str(path)))
        elif not quiet:
            for shown in show(result, {**values, "verbose": verbose}):
                show_on(console, shown)
        end(result)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__name__, run.__doc__ = verb.__name__, (verb.__doc__ or "").partition("\n\nArgs:")[0]
    to.command(name or verb.__name__)(run)


def _option(parameter: inspect.Parameter) -> inspect.Parameter | None:
    """Return a parameter as typer wants it; None where it is no option."""
    kind, *said = get_args(parameter.annotation) or [None]
    info = next((one for one in said if isinstance(one, ParameterInfo)), None)
    if info is None:
        return None
    return parameter.replace(
        kind=inspect.Parameter.KEYWORD_ONLY,
        default=not parameter.default if NEGATED in said else parameter.default,
        annotation=Annotated[next((one for one in said if one not in (info, NEGATED)), kind), info],
    )


# -- the paper ------------------------------------------------------------------------------------------------------


@taking(Reproduction)
def reproduce(request: Reproduction) -> dict[str, Any]:
    """Reproduce the paper's tables and figures, beside its printed numbers, and check its claims.

    Says first what will be trained, what is stored already and about how long it takes. Interrupted at any point, the
    same command continues. With a time limit it stops in time, says what is left (`finished` in OUT/reproduce.json) and
    exits with 0. Writes swap.json, ladder.json and geometry.json, claims.json, tables/paper-* and the report.

    Examples: `tailscope reproduce table1 --dataset cifar10-lt --data-root DIR --quick --seeds 1`;
    `tailscope reproduce all --dataset cifar10-lt --data-root DIR --plan`;
    `tailscope reproduce everything --data-root DIR --time-limit 9m --out results`;
    `tailscope reproduce all --dataset cifar10-lt --data-root DIR --on ray --gpus 0.25 --out results`;
    `tailscope reproduce table1 --dataset imagenet-lt --data list:TRAIN.txt,TEST.txt --data-root DIR --devices 4`
    """
    request.check()
    from tailscope.reproduce.queue import run_queue
    from tailscope.reproduce.reproduce import draw, run_reproduce

    console = request.console or Console(quiet=True)

    def tell(text: str) -> None:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    with shown_on(console) as shown, logging_to(shown, request.logger, request.out) as progress:
        if request.queued:
            return run_queue(request, tell=tell, progress=progress)
        done = run_reproduce(request, tell=tell, progress=progress)
    if not request.plan:
        draw(request.out, tell)
    return {name: value for name, value in done.items() if name != "results"}


def _show_reproduction(done: dict[str, Any], options: Options) -> Iterator[RenderableType]:
    if "claims" not in done:
        return
    from tailscope.reproduce.claims import tally

    for name in ("table1", "fig3"):
        if name in done["tables"]:
            table = Table("", "paper", "ours, %: mean ± sd (seeds)", "difference, points", box=None)
            for row in done["tables"][name]:
                table.add_row(row["label"], row["paper_written"], row["written"], row["difference_written"])
            yield table
    yield f"claims: {tally(done['claims'])}; {done['label']}"
    yield f"report: {options['out'] / 'report.html'}, tables: {options['out'] / 'tables'}"


def _end_reproduction(done: dict[str, Any]) -> None:
    if done.get("failed"):
        raise typer.Exit(1)


# -- what people see of results -------------------------------------------------------------------------------------


def _plain(text: str) -> Text:
    """Return text in which rich looks for no markup and a terminal for no commands."""
    return Text(one_line(text))


def _show_swap(result: dict[str, Any], options: Options) -> Iterator[RenderableType]:
    if "plan" in result:
        yield from map(_plain, result["told"])
    else:
        yield from _show_story(result, options)


def _show_story(_: object, options: Options) -> Iterator[RenderableType]:
    from tailscope.report import load, story

    results = load(options["out"])
    table = Table(show_header=False, box=None)
    for name, value in story.summary_rows(results):
        table.add_row(_plain(name), _plain(value))
    yield table
    yield ""
    yield one_line(story.conclusion(results))
    if limits := story.caveats(results):
        yield f"Keep in mind: {one_line(limits[0])}"
    yield f"report: {options['out'] / 'report.html'}"


_WORDS = {"compare": "comparison", "memorization": "memorization"}


def _show_words(verb: str, result: dict[str, Any], options: Options) -> Iterator[RenderableType]:
    """Show what a module of `report` says of a result, or its plan."""
    if "plan" in result:
        yield from _show_plan(result)
        return
    said = import_module(f"tailscope.report.{_WORDS[verb]}")
    heading, lines = said.summary_rows(result)
    table = Table(*map(one_line, heading), box=None)
    for line in lines:
        table.add_row(*map(_plain, line))
    yield table
    yield ""
    yield from (f"- {one_line(text)}" for text in said.findings(result))
    yield from (f"Keep in mind: {one_line(text)}" for text in said.caveats(result)[:1])
    yield from (f"What to do: {one_line(text)}" for text in said.advice(result))
    if options["verbose"]:
        yield from (f"warning: {one_line(text)}" for text in result["warnings"])
    yield f"written: {options['out'] / f'{verb}.json'}"
    yield f"report: {options['out'] / import_module('tailscope.report.reading').page_name(options['out'], verb)}"


def _show_plan(result: dict[str, Any]) -> Iterator[RenderableType]:
    table = Table("seed", "what", "name", "stored", box=None)
    for row in result["plan"]:
        table.add_row(str(row["seed"]), row["what"], _plain(row["name"]), "yes" if row["stored"] else "no")
    yield table
    missing = " and ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in result["to_train"].items())
    yield f"to train: {missing}; the rest is stored"


def _show_traps(found: dict[str, Any], _: Options) -> Iterator[RenderableType]:
    yield from (f"- {one_line(trap)}" for trap in found["traps"])
    if not found["traps"]:
        yield "no trap found"


def _show_subset(result: dict[str, Any], options: Options) -> Iterator[RenderableType]:
    counts = result["counts"]
    yield from (f"warning: {one_line(warning)}" for warning in result["warnings"])
    yield f"{sum(counts):,} images, counts {' '.join(map(str, counts))}"
    yield f"sha256 {result['sha256']}"
    table = Table("class", "group", "images", "", box=None)
    for name, group, n in zip(result["dataset"]["class_names"], result["groups"], counts, strict=True):
        table.add_row(_plain(name), group or "-", str(n), "█" * max(1, round(40 * n / max(counts))))
    if len(counts) <= 100:
        yield table
    if options["out"] is not None:
        yield f"written: {options['out'] / 'subset.json'}"


def _show_methods(listed: dict[str, Any], _: Options) -> Iterator[RenderableType]:
    if "checks" in listed:
        yield from _show_checks(listed["checks"])
        return
    for kind, registry in REGISTRIES.items():
        table = Table("call", "what it is", title=kind, title_justify="left")
        for entry in registry:
            table.add_row(_plain(registry.canonical(entry.name)), _plain(entry.summary))
        yield table
    table = Table("recipe", "what it does", title="recipes", title_justify="left")
    for recipe in listed["recipes"]:
        table.add_row(recipe["name"], _plain(recipe["card"]))
    yield table
    yield f"profiles: {', '.join(listed['profiles'])}"


def _show_checks(checks: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    for kind, call in dict.fromkeys((one["kind"], one["call"]) for one in checks):
        table = Table("", "promise", title=_plain(f"{kind} {call}"), title_justify="left", box=None)
        for one in (one for one in checks if (one["kind"], one["call"]) == (kind, call)):
            verdict = Text("passed", "green") if one["passed"] else Text("failed", "bold red")
            table.add_row(verdict, _plain(": ".join(filter(None, [one["promise"], one["reason"]]))))
        yield table
    yield f"{sum(one['passed'] for one in checks)} of {len(checks)} promises are kept"


def _end_methods(listed: dict[str, Any]) -> None:
    if not all(one["passed"] for one in listed.get("checks", [])):
        raise typer.Exit(1)


def _show_features(written: "FeaturesResult", _: Options) -> Iterator[RenderableType]:
    yield from (f"warning: {one_line(warning)}" for warning in written.warnings)
    yield (
        f"{written.features}: {written.rows:,} rows of {written.width} features, {written.classes} classes"
        f" ({written.resumed:,} rows were there, {written.skipped:,} images skipped)"
    )
    if written.classifier is not None:
        yield f"{written.classifier}: the checkpoint's classifier"


_COLOURS = {"classifier": "cyan", "representation": "magenta"}
"""Of the verdict on a terminal; what is undecided is yellow."""


def _show_diagnosis(result: "Diagnosis", options: Options) -> Iterator[RenderableType]:
    from tailscope.report import diagnosis as story
    from tailscope.report import encoders, reading
    from tailscope.report.text import listed, plural

    lines = encoders.lines(result)
    if lines:
        heading, *encoded = lines
        table = Table(*map(one_line, heading), box=None)
        for row in encoded:
            table.add_row(*map(_plain, row))
        yield table
    elif result["accuracy"] is not None:
        table = Table("", "accuracy", "head", "body", "tail", box=None)
        for row in story.accuracy_rows(result):
            table.add_row(*row)
        yield table
    advised = [piece["text"] for piece in result["advice"][1:]]  # the first closes
    yield from (f"- {one_line(text)}" for text in [*story.findings(result), *advised])
    yield ""
    verdict, *closing = map(one_line, story.closing(result))
    blamed = result["verdict"]["bottleneck"] if result["verdict"] else ""
    yield Text(verdict, style=f"bold {_COLOURS.get(blamed, 'yellow')}")
    yield from closing
    if options["verbose"]:
        yield from (f"caveat: {one_line(text)}" for text in story.caveats(result)[1:])
        yield from (f"warning: {one_line(text)}" for text in result["warnings"])
    more = {"other caveat": len(story.caveats(result)) - 1, "warning": len(result["warnings"])}
    held = listed([plural(number, noun) for noun, number in more.items() if number > 0])
    yield f"written: {options['out'] / 'diagnosis.json'}{held and f' (with {held})'}"
    if (options["out"] / verbs.REBALANCED).exists():
        yield f"classifier: {options['out'] / verbs.REBALANCED} (`tailscope rebalance` puts it into a checkpoint)"
    if options["report"]:
        yield f"report: {options['out'] / reading.page_name(options['out'], 'diagnosis')}"


_add_command(verbs.diagnose, _show_diagnosis, with_imports=True, out=Path("out"))
_add_command(verbs.features, _show_features, with_imports=True)
_add_command(verbs.rebalance, lambda path, _: iter([f"written: {path}"]), with_json=False, with_imports=True)
_add_command(verbs.demo, _show_story, out=Path("demo"))
_add_command(verbs.swap, _show_swap, with_imports=True, out=Path("out"))
for _experiment in (verbs.ladder, verbs.geometry):
    _add_command(_experiment, _show_story, with_imports=True, out=Path("out"))
_add_command(verbs.compare, partial(_show_words, "compare"), with_imports=True, out=Path("out"))
_add_command(verbs.memorization, partial(_show_words, "memorization"), with_imports=True, out=Path("out"))
_add_command(verbs.check, _show_traps, with_imports=True)
_add_command(verbs.subset, _show_subset)
_add_command(verbs.report, lambda path, _: iter([str(path)]), with_json=False)
_add_command(verbs.methods, _show_methods, end=_end_methods, with_imports=True)
_add_command(reproduce, _show_reproduction, end=_end_reproduction, with_imports=True)
for _verb, _show, _end in cli_store.COMMANDS:
    _add_command(_verb, _show, to=cli_store.app, end=_end, name=_verb.__name__.strip("_"))
app.add_typer(cli_store.app)
