"""What several verbs print, and where."""

import json
import os
from typing import Any

import typer
from rich.console import Console


def console_beside(as_json: bool) -> Console:
    """Return where a verb talks: standard error when standard output carries JSON."""
    return Console(stderr=as_json)


def print_json(value: Any) -> None:
    """Print a result on standard output; paths become text, and NaN or infinity, which JSON does not have, an error."""
    typer.echo(json.dumps(value, indent=1, default=os.fspath, allow_nan=False))
