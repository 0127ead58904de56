"""Result files: written without ever losing one silently, JSON of anybody read without surprises, and where a result
comes from: the command and the versions. Imports nothing that takes time.
"""

import json
import math
import platform
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tailscope.errors import UserError, require_file

_DEEPEST = 100  # levels of a JSON file: ours have fewer than 20, and what is written or drawn from it recurses


def check_free(out: Path | str, verb: str, spec: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse to replace a result of another spec, or one that cannot be read; call it before any work."""
    path = Path(out) / f"{verb}.json"
    if path.is_dir():
        raise UserError(f"{path}: is a folder; use another --out")
    if overwrite or not path.exists():
        return
    stored = stored_spec(path)
    if stored is None:
        raise UserError(f"{path}: exists but is no readable result; use another --out or --overwrite")
    if stored != spec:
        differing = sorted(k for k in {*stored, *spec} if stored.get(k) != spec.get(k))
        raise UserError(
            f"{path}: holds a result of another spec ({', '.join(differing)} differ); use another --out or --overwrite"
        )


def stored_spec(path: Path) -> dict[str, Any] | None:
    """Return the spec of a result file; None where there is none that can be read."""
    try:
        return dict(read_json(path)["spec"])
    except (UserError, KeyError, TypeError, ValueError):
        return None


def write(out: Path | str, verb: str, result: dict[str, Any]) -> Path:
    """Write OUT/VERB.json atomically and return its path."""
    from tailscope.store.files import write_json  # here because it imports PyTorch, which takes seconds

    path = Path(out) / f"{verb}.json"
    write_json(path, result)
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file that anybody may have written: of UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it is no regular file, cannot be read, is no JSON or nests too deep, or holds NaN, infinity or
            numbers beyond float64.
    """
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON (byte {error.start} is no UTF-8)") from None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
        depth = _depth(value)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    except RecursionError:  # another depth in every Python, but a higher one
        depth = _DEEPEST + 1
    if depth > _DEEPEST:
        raise UserError(f"{path}: not valid JSON for us (it nests deeper than {_DEEPEST} levels)")
    return value


def _depth(value: Any) -> int:
    """Return how many levels of lists and objects a JSON value has."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if below is None else 1 + max(map(_depth, below), default=0)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text if len(text) <= 20 else f"{text[:20]}...")


def _whole(text: str) -> int:
    if len(text) > 308:  # more than any float64 can hold
        raise ValueError(f"{text[:20]}... has {len(text)} digits, more than the 308 of the largest float64")
    return int(text)


PACKAGES = ("tailscope", "torch", "torchvision", "numpy", "scikit-learn", "altair")
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
    return "tailscope, called from Python" if (given := _given.get()) is None else command_line(given)


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
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
