"""Turn the tutorial into a notebook: prose to Markdown cells, Python to code, commands to `!` lines.

python examples/make_notebook.py docs/tutorial-digits.md examples/tutorial-digits.ipynb
"""

import json
import re
import sys
from pathlib import Path


def notebook(text: str) -> str:
    """Return the notebook of a Markdown page, as JSON."""
    cells = []
    for number, part in enumerate(re.split(r"(```(?:python|console)\n.*?```)", text, flags=re.DOTALL)):
        if not part.strip():
            continue
        code = re.fullmatch(r"```(python|console)\n(.*?)\n```", part, flags=re.DOTALL)
        lines = (code[2] if code else part.strip()).splitlines(keepends=True)
        if code and code[1] == "console":
            lines = [re.sub(r"^\$ ", "!", line) for line in lines]
        kind = {"cell_type": "code", "execution_count": None, "outputs": []} if code else {"cell_type": "markdown"}
        cells.append({"id": f"cell-{number}", "metadata": {}, "source": lines, **kind})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    page, target = map(Path, sys.argv[1:])
    target.write_text(notebook(page.read_text(encoding="utf-8")), encoding="utf-8")
