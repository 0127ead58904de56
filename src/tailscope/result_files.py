"""Result files: written without ever losing one silently."""

import json
from pathlib import Path
from typing import Any

from tailscope.errors import UserError
from tailscope.store import write_json


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
