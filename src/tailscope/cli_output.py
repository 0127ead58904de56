"""From functions to commands, and streams that may fail without costing any work."""

import errno
import inspect
import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any, TextIO, get_args

import typer
from rich.console import Console
from typer.models import ParameterInfo

from tailscope.experiments.options import NEGATED


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


def print_json(value: Any) -> None:
    """Print a result on standard output; paths become text, and NaN or infinity, which JSON does not have, an error."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    typer.echo(json.dumps(value, indent=1, default=os.fspath, allow_nan=False))


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a summary.")]
Options = dict[str, Any]
"""A verb's options as they were given, by the names of its parameters."""


def add_command(
    app: typer.Typer,
    verb: Callable[..., Any],
    show: Callable[[Any, Options, Console], object],
    *,
    end: Callable[[Any], object] = bool,
    name: str | None = None,
    with_json: bool = True,
    **defaults: Any,
) -> None:
    """Give a function a command, whose options are the parameters that `typer.Option` annotates.

    Args:
        app: gets the command.
        verb: the function; a parameter `console` gets the screen that notes and progress go to.
        show: prints the result for people.
        end: is called with the result at last, and may raise `typer.Exit` or `UserError`.
        name: the command's, where it is not the function's.
        with_json: whether there is `--json`, which prints the result as it is.
        defaults: of the command line, where they are others than in Python.
    """
    parameters = [
        parameter.replace(annotation=verb.__annotations__[name], default=defaults.get(name, parameter.default))
        for name, parameter in inspect.signature(verb).parameters.items()
    ]
    negated = {one.name for one in parameters if NEGATED in get_args(one.annotation)}
    options = [option for one in parameters if (option := _option(one)) is not None]
    if with_json:
        options.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))

    def run(as_json: bool = False, **given: Any) -> None:
        console = Console(stderr=as_json)  # standard output carries JSON alone
        values = {option: not value if option in negated else value for option, value in given.items()}
        result = verb(**values, **({"console": console} if "console" in verb.__annotations__ else {}))
        if as_json:
            print_json(result)
        else:
            show(result, values, console)
        end(result)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__name__, run.__doc__ = verb.__name__, (verb.__doc__ or "").partition("\n\nArgs:")[0]
    app.command(name or verb.__name__)(run)


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
