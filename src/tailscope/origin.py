"""How a result says where it comes from: the command and the versions. Imports nothing that takes time."""

import platform
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("tailscope", "torch", "torchvision", "numpy", "scikit-learn", "altair")


FROM_PYTHON = "tailscope, called from Python"


_given: ContextVar[Sequence[str] | None] = ContextVar("given", default=None)


@contextmanager
def from_command_line(arguments: Sequence[str]) -> Iterator[None]:
    """While this lasts, results come from the command `tailscope` with these arguments."""
    token = _given.set(tuple(arguments))
    try:
        yield
    finally:
        _given.reset(token)


def command() -> str:
    """Return the command that asks for a result; of another program, whose arguments may hold anything, not a word."""
    arguments = _given.get()
    return FROM_PYTHON if arguments is None else command_line(arguments)


def command_line(arguments: Sequence[str]) -> str:
    """Return the command with absolute paths cut to their last part: the rest means nothing on another machine.

    >>> command_line(["swap", "--data", "list:/data/a.txt,/data/b.txt", "--data-root", "/data/me", "--out=/data/here"])
    'tailscope swap --data list:a.txt,b.txt --data-root me --out=here'
    """
    shown = [re.sub(r"(?<![^=:,])/[^:,]*", lambda path: Path(path[0]).name, argument) for argument in arguments]
    return shlex.join(["tailscope", *shown])


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed; by default of all that decide results."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
