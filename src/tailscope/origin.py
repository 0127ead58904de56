"""How a result says where it comes from: the command and the versions. Imports nothing that takes time."""

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed; by default of all that decide results."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
