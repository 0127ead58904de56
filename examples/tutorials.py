"""Run a tutorial as it is written, and keep what it prints: in the page itself, or as a notebook.

python examples/tutorials.py page docs/tutorial-cifar100.md WORK
python examples/tutorials.py notebook docs/tutorial-digits.md WORK examples/tutorial-digits.ipynb
python examples/tutorials.py execute docs/tutorial-arrays.ipynb WORK

`page` and `notebook` run the page's Python and console blocks in the folder WORK, where nothing of an earlier run
should be but trained stages. `page` writes what each block prints below it, in a block of its own. `execute` runs a
notebook with Jupyter, which the extra `docs` brings, and keeps its outputs in it. Data come from $TAILSCOPE_DATA.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

CODE = re.compile(r"(```(?:python|console)\n.*?\n```\n(?:\n```text\n.*?```\n)?)", flags=re.DOTALL)
WIDTH = "120"
LONGEST = 40


def split(text: str) -> list[tuple[str, str]]:
    """Return the page as (kind, text): prose, python or console, without what was printed."""
    parts = []
    for part in CODE.split(text):
        code = re.match(r"```(python|console)\n(.*?)\n```", part, flags=re.DOTALL)
        parts.append((code[1], code[2]) if code else ("prose", part))
    return parts


def run(parts: list[tuple[str, str]], folder: Path) -> list[str]:
    """Run every block in `folder` and return what each part prints.

    Raises:
        subprocess.CalledProcessError: a command fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    space: dict[str, object] = {}
    printed = []
    with contextlib.chdir(folder):
        for kind, text in parts:
            said = io.StringIO()
            if kind == "python":
                with contextlib.redirect_stdout(said):
                    exec(compile(text, "tutorial", "exec"), space)
            for line in text.splitlines() if kind == "console" else []:
                said.write(_command(line.removeprefix("$ ")))
            printed.append(said.getvalue().rstrip())
    return printed


def _command(line: str) -> str:
    """Run one command and return what it says, the installed `tailscope` first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": WIDTH}
    done = subprocess.run(line, shell=True, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return "\n".join(text.rstrip() for text in done.stdout.splitlines()) + "\n"


def shortened(said: str) -> str:
    """Return what was printed, without the middle where it is long: readers want its beginning and its end."""
    lines = said.splitlines()
    if len(lines) <= LONGEST:
        return said
    kept = LONGEST // 4
    return "\n".join([*lines[:kept], f" ... {len(lines) - 2 * kept} lines more ...", *lines[-kept:]])


def page(parts: list[tuple[str, str]], printed: list[str]) -> str:
    """Return the page with what each block prints below it."""
    text = ""
    for (kind, part), said in zip(parts, printed, strict=True):
        below = f"\n```text\n{shortened(said)}\n```\n" if said else ""
        text += part if kind == "prose" else f"```{kind}\n{part}\n```\n{below}"
    return text


def notebook(parts: list[tuple[str, str]], printed: list[str]) -> str:
    """Return the notebook, as JSON: prose in Markdown cells, Python as code, commands as `!` lines."""
    cells = []
    for number, ((kind, part), said) in enumerate(zip(parts, printed, strict=True)):
        if not part.strip():
            continue
        lines = part.strip().splitlines(keepends=True)
        cell: dict[str, object] = {"id": f"cell-{number}", "metadata": {}, "cell_type": "markdown", "source": lines}
        if kind != "prose":
            output = {"name": "stdout", "output_type": "stream", "text": said.splitlines(keepends=True)}
            source = [re.sub(r"^\$ ", "!", line) for line in lines] if kind == "console" else lines
            cell |= {
                "cell_type": "code",
                "execution_count": None,
                "source": source,
                "outputs": [output] if said else [],
            }
        cells.append(cell)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def execute(text: str, folder: Path) -> str:
    """Run a notebook in `folder` and return it with its outputs, without times and versions.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    import nbformat  # here because they are an extra
    from nbclient import NotebookClient

    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.reads(text, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata.pop("language_info", None)
    return f"{nbformat.writes(notebook)}\n"


if __name__ == "__main__":
    what, source, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if what == "execute":
        source.write_text(execute(source.read_text(encoding="utf-8"), work), encoding="utf-8")
        sys.exit()
    written = split(source.read_text(encoding="utf-8"))
    found = run(written, work)
    target, make = (source, page) if what == "page" else (Path(sys.argv[4]), notebook)
    target.write_text(make(written, found), encoding="utf-8")
