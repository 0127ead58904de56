"""Comparing what two runs left, without what may differ between them: times and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TIMES = {"created", "command", "environment", "seconds", "images_per_second"}


def timeless(value: Any) -> Any:
    """Return JSON without times."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """Return what a result or feature file says, in a form that `==` compares bit by bit."""
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text()))
    with np.load(path) as arrays:
        return {name: (arrays[name].dtype.str, arrays[name].shape, arrays[name].tobytes()) for name in arrays}


def contents(out: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what the named files say; None of one that is not there."""
    return {name: content(out / name) if (out / name).exists() else None for name in names}
