"""An extension of griffe, which reads docstrings for the site: doctests become blocks of code, not quotations."""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts fences around the doctests in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Return a docstring with its doctests in blocks of code."""
    return re.sub(r"^>>> (?:.+\n?)+", lambda found: f"```python\n{found[0].rstrip()}\n```\n", text, flags=re.M).rstrip()
