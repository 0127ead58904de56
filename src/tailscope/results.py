"""Result files: written without ever losing one silently, and JSON files of anybody read without surprises."""

import json
import math
from pathlib import Path
from typing import Any

from tailscope.errors import UserError, not_a_file
from tailscope.store import write_json

DEEPEST = 100
"""Levels of a JSON file: ours have fewer than 20, and what is written or drawn from it recurses."""

DIGITS = 308
"""Digits of a whole number that every float64 can hold."""


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


def write(out: Path, verb: str, result: dict[str, Any]) -> Path:
    """Write OUT/VERB.json atomically and return its path."""
    path = out / f"{verb}.json"
    write_json(path, result)
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file that anybody may have written: of UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it is no regular file, cannot be read, is no JSON or nests too deep, or holds NaN, infinity or
            numbers beyond float64.
    """
    try:
        problem = not_a_file(path)
        if problem:
            raise UserError(f"{path}: is {problem}")
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
    except RecursionError:  # json's own limit is higher, and another one in every Python
        depth = DEEPEST + 1
    if depth > DEEPEST:
        raise UserError(f"{path}: not valid JSON for us (it nests deeper than {DEEPEST} levels)")
    return value


def _depth(value: Any) -> int:
    """Return how deep a JSON value nests, however deep that is."""
    level, depth = [value], 0
    while level:
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        depth += 1
    return depth


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(_short(text))


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"{_short(text)} has {len(text)} digits, more than the {DIGITS} of the largest float64")
    return int(text)


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:20]}..."
