"""Result files: how they say where they come from, and writing them without ever losing one silently."""

import json
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tailscope.errors import UserError
from tailscope.store import write_json

PACKAGES = ("tailscope", "torch", "torchvision", "numpy", "scikit-learn", "altair")


def command_line(arguments: Sequence[str]) -> str:
    """Return the command with absolute paths cut to their last part: the rest means nothing on another machine.

    >>> command_line(["swap", "--data", "cifar10", "--data-root", "/data/cifar", "--out=/data/here"])
    'tailscope swap --data cifar10 --data-root cifar --out=here'
    """
    shown = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        shown.append(f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument)
    return shlex.join(["tailscope", *shown])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_free(out: Path, verb: str, spec: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse to replace a result of another spec; call it before any work.

    Raises:
        UserError: OUT holds a result of this verb from another spec, or one that cannot be read.
    """
    path = out / f"{verb}.json"
    if path.is_dir():
        raise UserError(f"{path}: is a folder; use another --out")
    if overwrite or not path.exists():
        return
    try:
        stored = dict(json.loads(path.read_text())["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: exists but is no readable result; use another --out or --overwrite") from None
    if stored != spec:
        differing = sorted(k for k in {*stored, *spec} if stored.get(k) != spec.get(k))
        raise UserError(
            f"{path}: holds a result of another spec ({', '.join(differing)} differ); use another --out or --overwrite"
        )


def write(out: Path, verb: str, result: dict[str, Any]) -> Path:
    """Write OUT/VERB.json atomically and return its path."""
    path = out / f"{verb}.json"
    write_json(path, result)
    return path
