"""The documentation holds: its code runs, its commands parse, and nothing that is public is missing or out of date."""

import ast
import importlib.util
import io
import json
import linecache
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.main import get_command

import tailscope
from scripts import docs_pages, docs_reference
from tailscope import classifiers, cli, verbs
from tailscope.training.recipes import RECIPES

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path for path in [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
}
NOTEBOOK = DOCS / "tutorial-arrays.ipynb"
NEEDED = {"docs/howto-hugging-face.md": ("datasets", "transformers"), "docs/integrations.md": ("lightning", "pandas")}
RUN_ELSEWHERE = {"docs/tutorial-digits.md"}  # by tests/test_report_diagnosis.py
BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NAMES = ["ant", "bee", "cat", "dog"]


def blocks(text):
    r"""Return (language, title, text) of every block of code.

    >>> blocks('a\n```python title="not run: x"\nb()\n```\n')
    [('python', 'not run: x', 'b()\n')]
    """
    found = [(block[1], re.search(r'title="([^"]*)"', block[2]), block[3]) for block in BLOCK.finditer(text)]
    return [(language, title[1] if title else "", code) for language, title, code in found]


# -- Python ---------------------------------------------------------------------------------------------------------


def samples(counts, stream):
    labels = np.repeat(np.arange(len(counts)), counts)
    return 2 * np.eye(len(counts), 8)[labels] + stream.normal(size=(len(labels), 8)), labels


@pytest.fixture
def space(tmp_path, monkeypatch):
    """What every page may use: features and labels of four classes, two of them rare; their files; a network."""
    from experiment_setups import TINY

    monkeypatch.setitem(RECIPES, "demo", TINY)
    for registry in verbs.REGISTRIES.values():  # what a page registers ends with it
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setenv("TAILSCOPE_STORE", str(tmp_path / "store"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    stream = np.random.default_rng(0)
    train, held_out = samples([300, 80, 8, 6], stream), samples([80] * 4, stream)
    for name, (features, labels) in (("train", train), ("heldout", held_out)):
        np.savez(f"{name}.npz", features=features, labels=labels)
    images = stream.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    inputs = [
        TensorDataset(torch.from_numpy(X.astype(np.float32)).reshape(-1, 2, 2, 2), torch.from_numpy(y))
        for X, y in (train, held_out)
    ]
    train_loader, heldout_loader = (DataLoader(each, batch_size=64) for each in inputs)
    return {
        **dict(zip(("X_train", "y_train", "X_held_out", "y_held_out"), (*train, *held_out), strict=True)),
        **{"a": images, "b": np.repeat([0, 1], 20), "c": images, "d": np.repeat([0, 1], 20)},
        **{"train_loader": train_loader, "heldout_loader": heldout_loader, "test_loader": heldout_loader},
        "net": nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
        "tailscope": tailscope,
        "__name__": "page",
    }


WITH_CODE = {name for name, path in PAGES.items() if "```python" in path.read_text(encoding="utf-8")}


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(WITH_CODE - RUN_ELSEWHERE))
def test_the_code_of_a_page_runs_or_says_why_not(name, space):
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package, reason=f"{name} shows {package}, which is not installed")
    for language, title, code in blocks(PAGES[name].read_text(encoding="utf-8")):
        if language != "python":
            continue
        compiled = compile(code, name, "exec")
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # as a notebook does
        if title.endswith(".py"):
            Path(title).write_text(code)
        if not title.startswith("not run: "):
            exec(compiled, space)


def cells(kind):
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in stored["cells"] if cell["cell_type"] == kind]


def without_numbers(text):
    return re.sub(r"[-−+]?\d[\d.,]*", "#", text)


def test_the_notebook_holds_what_its_cells_say_now(space):
    """Up to numbers, which other machines round in other ways; to renew it: `examples/tutorials.py execute`."""
    for cell in cells("code"):
        *before, last = ast.parse("".join(cell["source"])).body
        said = io.StringIO()
        with redirect_stdout(said):
            exec(compile(ast.Module(before, []), NOTEBOOK.name, "exec"), space)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), space)
            else:
                value = exec(compile(ast.Module([last], []), NOTEBOOK.name, "exec"), space)
        printed = "".join(text for output in cell["outputs"] for text in output.get("text", ""))
        assert without_numbers(printed) == without_numbers(said.getvalue())
        shown = [output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert bool(shown) == (value is not None)
        if hasattr(value, "headline"):
            assert without_numbers("".join(shown[0]["text/plain"])) == without_numbers(repr(value))


def test_the_notebook_is_small_and_draws_offline():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert "<svg" in text
    assert re.findall(r"<script|base64|https?://(?!www\.w3\.org)", text) == []


def test_the_picture_of_a_diagnosis_has_the_numbers_of_the_notebook():
    picture = (DOCS / "images" / "diagnose.svg").read_text(encoding="utf-8")
    said = NOTEBOOK.read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d+\.\d(?= %| points)|(?<=at most \+)\d\.\d", picture))
    assert len(numbers) == 5
    assert {number for number in numbers if number not in said} == set()
    home = PAGES["docs/index.md"].read_text(encoding="utf-8")
    assert [share for share in re.findall(r"(\d\d\.\d) %", home) if share not in said] == []


@pytest.mark.slow
def test_jupyter_runs_the_notebook(tmp_path):
    execute = runpy.run_path(str(REPOSITORY / "examples" / "tutorials.py"))["execute"]
    text = NOTEBOOK.read_text(encoding="utf-8")
    done, stored = (json.loads(one)["cells"] for one in (execute(text, tmp_path), text))
    assert [cell["source"] for cell in done] == [cell["source"] for cell in stored]


@pytest.mark.slow
def test_the_digits_tutorial_holds_what_it_prints(tmp_path):
    """Up to numbers; to renew it: `examples/tutorials.py page`."""
    tutorials = runpy.run_path(str(REPOSITORY / "examples" / "tutorials.py"))
    text = PAGES["docs/tutorial-digits.md"].read_text(encoding="utf-8")
    parts = tutorials["split"](text)
    assert without_numbers(tutorials["page"](parts, tutorials["run"](parts, tmp_path))) == without_numbers(text)


# -- the command line -----------------------------------------------------------------------------------------------


COMMAND = re.compile(r"^(?:\S*\$ +)?(?:torchrun .* )?tailscope +([a-z].*?)(?: +#.*)?$", flags=re.MULTILINE)


def commands(text):
    r"""Return the commands of a page, in blocks and in the lines of prose, and whether each is whole.

    >>> commands("```\n$ tailscope swap --data x \\\n  --out y  # why\n```\nThen `tailscope report ...`.")
    [('swap --data x   --out y', True), ('report ...', False)]
    """
    text = text.replace("\\\n", "")
    found = []
    for language, _, code in blocks(text):
        if language not in ("python", "text"):
            found += re.findall(
                r"^(?:\S*\$ +)?(?:torchrun .* )?tailscope +([a-z].*?)(?: +#.*)?$", code, flags=re.MULTILINE
            )
    prose = BLOCK.sub("", text)
    inline = [" ".join(line.split()) for line in re.findall(r"`tailscope ([a-z][^`]*)`", prose)]
    return [(line, " ..." not in line) for line in found] + [(line, False) for line in inline]


def check(line, whole):
    """Parse a command, or where it is a part of one look its options up; return what is wrong with it."""
    words = [word for word in shlex.split(line) if word != "..."]
    command = get_command(cli.app)
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return f"no verb {words[0]}" if whole or words[0].islower() else ""
        command, words = command.commands[words[0]], words[1:]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}
    if unknown := [word for word in words if word.startswith("-") and word.partition("=")[0] not in known]:
        return f"no option {', '.join(unknown)}"
    if whole:
        try:
            command.make_context(command.name, words)
        except Exception as error:
            return str(getattr(error, "message", error)) or repr(error)
    return ""


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_exist(name):
    found = {line: check(line, whole) for line, whole in commands(PAGES[name].read_text(encoding="utf-8"))}
    assert {line: wrong for line, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("line", "whole", "wrong"),
    [
        ("diagnose --train a --unseen b", True, ""),
        ("diagnose --train a --unseen b --nothing", True, "no option"),
        ("features --model a", True, "issing"),
        ("features --model a", False, ""),
        ("diagnoze", True, "no verb"),
        ("store pack 2099 --out a.tar", True, ""),
        ("store unpack", False, "no verb"),
    ],
)
def test_the_check_of_commands_finds_what_it_should(line, whole, wrong):
    found = check(line, whole)
    assert wrong in found
    assert bool(found) == bool(wrong)


def test_a_command_that_is_not_there_would_be_seen():
    assert len([line for path in PAGES.values() for line, whole in commands(path.read_text("utf-8")) if whole]) > 40


# -- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", docs_pages.GENERATED)
def test_generated_pages_are_current(name):
    assert (DOCS / name).read_text(encoding="utf-8") == docs_pages.GENERATED[name](), "python scripts/docs_pages.py"


def documented():
    return set(
        re.findall(r"^::: tailscope\.(\S+)$", (DOCS / "reference-api.md").read_text("utf-8"), flags=re.MULTILINE)
    )


def test_every_public_name_has_an_entry():
    of_verbs = {name if name in tailscope.__all__ else f"verbs.{name}" for name in verbs.__all__}
    public = {*tailscope.__all__, *(f"classifiers.{name}" for name in classifiers.__all__), *of_verbs} - {"classifiers"}
    assert public - documented() == set()


def test_every_entry_is_of_something_that_is_there():
    for entry in documented():
        module, _, name = f"tailscope.{entry}".rpartition(".")
        assert hasattr(importlib.import_module(module), name), entry


def test_every_verb_and_option_is_in_the_reference():
    page = (DOCS / "reference-cli.md").read_text(encoding="utf-8")
    for verb, command in get_command(cli.app).commands.items():
        assert f"\n## {verb}\n" in page
        for name, below in getattr(command, "commands", {verb: command}).items():
            section = page.split(f"# {verb}\n" if below is command else f"# {verb} {name}\n")[1].split("\n#")[0]
            wanted = [option.opts[0] for option in below.params if option.opts[0].startswith("-")]
            assert [option for option in wanted if f"`{option}" not in section] == []


def test_result_files_are_described_in_words():
    schema = {
        "properties": {"a": {"$ref": "#/$defs/A"}, "n": {"type": "array", "items": {"type": "integer"}}},
        "required": ["a"],
        "$defs": {"A": {"properties": {"x": {"anyOf": [{"type": "number"}, {"type": "null"}]}}, "type": "object"}},
    }
    assert list(docs_reference._fields(schema, schema, "")) == [
        ("a", "object"),
        ("a.x", "optional: number or `null`"),
        ("n", "optional: list of whole number"),
    ]


# -- the site -------------------------------------------------------------------------------------------------------

needs_mkdocs = pytest.mark.skipif(not importlib.util.find_spec("mkdocs_jupyter"), reason="needs the extra docs")


def test_every_page_is_in_the_navigation():
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"^ +- [^:\n]+: (\S+)$", text, flags=re.MULTILINE)
    assert len(named) == len(set(named))
    assert {path.relative_to(DOCS).as_posix() for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]} == set(named)


def test_doctests_of_docstrings_become_code():
    pytest.importorskip("griffe", reason="griffe comes with the extra docs")
    from scripts.docs_doctests import fenced

    assert fenced("Add.") == "Add."
    assert fenced("Add.\n\n>>> add(1, 2)\n3\n\nMore.") == "Add.\n\n```python\n>>> add(1, 2)\n3\n```\n\nMore."


@pytest.mark.slow
@needs_mkdocs
def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tags = r"<(?:script|img|iframe|source|link)\b[^>]*>"
    asks = r"\b(?:src|href)=\"?https?:"
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES) - 1
    loaded = {
        page.name: [tag for tag in re.findall(tags, page.read_text("utf-8")) if re.search(asks, tag)] for page in pages
    }
    assert {name: found for name, found in loaded.items() if found} == {}
    assert "notebook" in (tmp_path / "tutorial-arrays.html").read_text("utf-8")


# -- the readme -----------------------------------------------------------------------------------------------------


def test_the_readme_has_the_two_commands_first_and_one_block_of_python():
    found = blocks(PAGES["README.md"].read_text(encoding="utf-8"))
    assert re.findall(r"^make (\w+)", found[0][2], flags=re.MULTILINE) == ["demo", "test"]
    assert [language for language, _, _ in found].count("python") == 1


def test_the_citation_file_names_the_version_and_the_paper():
    text = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {tailscope.__version__}\n" in text
    assert "Where are the bottlenecks in long-tailed classification?" in text
