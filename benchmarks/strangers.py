"""strangers: three ways from nothing to a result, as the pages show them, in a fresh environment.

What stands in a page's blocks of code between `<!-- stranger:NAME -->` and `<!-- /stranger -->` is run line by line in
a copy of what a user gets: lines of a terminal by bash, Python in a notebook. One environment serves all, so that the
large packages are installed once; every way counts their time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.record import origin

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "demo": ("The demo", "get-started.md"),
    "folder": ("A folder and a checkpoint", "howto-folder.md"),
    "notebook": ("Arrays in a notebook", "howto-embeddings.md"),
}
COPIED = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src")
NOTEBOOK = "strangers.ipynb"
COUNTS = {"ant": 40, "bee": 20, "cat": 10, "dog": 6}
HELD_OUT = 25
ARRAYS = """import numpy as np

stream, labels = np.random.default_rng(0), [np.repeat(np.arange(4), n) for n in ([60, 30, 8, 6], [40] * 4)]
(X_train, y_train), (X_held_out, y_held_out) = [
    (2 * np.eye(4, 8)[y] + stream.normal(size=(len(y), 8)), y) for y in labels
]"""


@dataclass(frozen=True)
class Way:
    """Lines of a page: of a terminal, then of a notebook."""

    terminal: tuple[str, ...]
    notebook: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str) -> "Way":
        """Read it from its page."""
        text = (REPOSITORY / "docs" / PAGES[name][1]).read_text(encoding="utf-8")
        part = text.split(f"<!-- stranger:{name} -->")[1].split("<!-- /stranger -->")[0].replace("\\\n", "")
        lines: dict[str, list[str]] = {"console": [], "python": []}
        for language, code in re.findall(r"^```(console|python)\n(.*?)^```$", part, flags=re.DOTALL | re.MULTILINE):
            lines[language] += [line.removeprefix("$ ") for line in code.splitlines() if line.strip()]
        return cls(*(tuple(one) for one in lines.values()))

    def __len__(self) -> int:
        return len(self.terminal) + len(self.notebook)

    def walk(self, home: Path) -> list[float]:
        """Run the lines in `home`, a notebook as the last one, and return the seconds of each.

        Raises:
            subprocess.CalledProcessError: a line fails.
        """
        lines = [*self.terminal]
        if self.notebook:
            (home / NOTEBOOK).write_text(_notebook([ARRAYS, "\n".join(self.notebook)]), encoding="utf-8")
            lines.append(f"jupyter execute --inplace {NOTEBOOK}")
        times = home / "times"
        stamp = f"date +%s.%N >> {times}"
        script = "\n".join(["set -e", stamp, *(f"{line}\n{stamp}" for line in lines)])
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_"))}
        times.unlink(missing_ok=True)
        subprocess.run(["bash", "-c", script], cwd=home, env=environment | {"PATH": path}, check=True)
        return [after - before for before, after in pairwise(map(float, times.read_text().split()))]


def _notebook(cells: list[str]) -> str:
    made: list[dict[str, Any]] = [
        {"cell_type": "code", "id": f"c{k}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell}
        for k, cell in enumerate(cells)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


def furnish(home: Path) -> None:
    """Put there what a stranger has: the repository, photographs in folders, and a network's weights."""
    import numpy as np  # here, as the others, because they take time to import
    import timm
    import torch
    from PIL import Image

    for name in COPIED:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, home / name)
    stream = np.random.default_rng(0)
    for k, (name, count) in enumerate(COUNTS.items()):
        for split, number in (("train", count), ("val", HELD_OUT)):
            (home / "photos" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = stream.normal(90 + 60 * np.eye(4, 3)[k], 60, (8, 8, 3)).clip(0, 255).astype("u1")
                Image.fromarray(pixels).resize((64, 64)).save(home / "photos" / split / name / f"{i}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet50", num_classes=len(COUNTS)).state_dict(), home / "weights.pth")


def walk_all(home: Path) -> dict[str, dict[str, Any]]:
    """Return of every way its number of lines, and the seconds of installing and of the rest."""
    furnish(home)
    found: dict[str, dict[str, Any]] = {}
    packages = 0.0
    for name in PAGES:
        way = Way.of(name)
        seconds = way.walk(home)
        installed = next(k for k, line in enumerate(way.terminal, 1) if line.startswith("pip install"))
        packages = packages or sum(seconds[:installed])
        install = packages if name == next(iter(PAGES)) else packages + sum(seconds[:installed])
        rest = sum(seconds[installed:])
        found[name] = {"lines": len(way), "install_seconds": round(install, 1), "seconds": round(rest, 1)}
        print(f"{PAGES[name][0]}: {len(way)} lines, {install:.0f} s to install, {rest:.0f} s from there", flush=True)
    return found


def run() -> dict[str, Any]:
    """Walk all ways in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as home:
        return {"ways": walk_all(Path(home))}


def table(document: dict[str, Any]) -> str:
    """Return the result as a Markdown table, with a line about the machine below."""
    lines = ["| | lines | to install | from there |", "|---|---|---|---|"]
    for name, way in document["ways"].items():
        title, page = PAGES[name]
        where = title if page == "get-started.md" else f"[{title}]({page})"
        lines.append(f"| {where} | {way['lines']} | {way['install_seconds']:.0f} s | {way['seconds']:.0f} s |")
    return "\n".join([*lines, "", f"{origin(document)}."])
