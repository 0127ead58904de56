"""`docs/methods.md`: every verb, and everything that is registered by name, with its defaults and where it is written.

`python scripts/docs_methods.py docs/methods.md` writes it; a test checks that it is current.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from tailscope import cli
from tailscope.classifiers import CLASSIFIERS
from tailscope.data.profiles import KNOWN
from tailscope.registry import Registry
from tailscope.training.recipes import PARAMETRISED, RECIPES
from tailscope.verbs import REGISTRIES

INTRODUCTION = """# Verbs and methods

What `tailscope --help` and `tailscope methods` list, and the classifiers on features. A name is a call-string: it takes
the hyperparameters that are written behind it here with their defaults, so `focal` is `focal(gamma=2.0)`, and
`--loss 'focal(gamma=1)'` changes it. This page is generated (`python scripts/docs_methods.py docs/methods.md`).
"""


def text() -> str:
    """Return the page in Markdown."""
    verbs = [
        (command.name or "", (command.callback.__doc__ or "").split("\n")[0]) for command in cli.app.registered_commands
    ]
    verbs += [
        (group.typer_instance.info.name or "", group.typer_instance.info.help or "")
        for group in cli.app.registered_groups
    ]
    registries: dict[str, Registry] = {**REGISTRIES, "classifiers on features": CLASSIFIERS}
    recipes = [(f"`{recipe.name}`", recipe.card) for recipe in RECIPES.values()]
    parts = [
        _table("Verbs", ("verb", "what it does"), ((f"`{name}`", summary) for name, summary in verbs)),
        *(_registry(name, registry) for name, registry in registries.items()),
        _table("Recipes", ("recipe", "what it does"), recipes),
        _registry("recipes that take values", PARAMETRISED),
        f"## Profiles\n\n{KNOWN}: see [Data and subsets](data.md).\n",
    ]
    return "\n".join([INTRODUCTION, *parts])


def _registry(title: str, registry: Registry) -> str:
    rows = (
        (
            f"`{registry.canonical(entry.name)}`",
            entry.summary,
            f"`{entry.factory.__module__.removeprefix('tailscope.')}`",
        )
        for entry in registry
    )
    return _table(title[0].upper() + title[1:], ("call", "what it is", "where"), rows)


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [head, ("---",) * len(head), *rows]]
    return "\n".join([f"## {title}", "", *(f"| {line} |" for line in lines), ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(), encoding="utf-8")
