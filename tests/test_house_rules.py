"""The house rules that no linter checks: sizes, docstrings, types, and no text that only holds on one machine."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.__main__ import page

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50
MAX_LINES_OF_NINE_IN_TEN = 20
MAX_MODULES = 124  # 75 when the house was built; a new subject may have a room
MIN_LINES_FOR_ONE_IMPORTER = 120

# Written in pieces, so that this file passes its own check.
HOSTS = [
    ("python" + "hosted", "org"),
    ("pypi", "org"),
    ("registry", "npmjs"),
    ("download", "pytorch"),
    ("deb", "debian"),
]
FOLDERS = ["root", "work", "home"]
BESIDE = "../" + "shared"
FORBIDDEN = re.compile(
    "|".join([*(re.escape(".".join(host)) for host in HOSTS), *(rf"(?<![\w.]){f'/{folder}/'}" for folder in FOLDERS)])
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.AST, *, public: bool = True) -> Iterator[tuple[Function, bool]]:
    """Yield every function under `node`, and whether users can reach it by name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, public and not child.name.startswith("_")
            yield from functions(child, public=False)
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, public=public and not child.name.startswith("_"))
        else:
            yield from functions(child, public=public)


def lines_without_docstring(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def unannotated(function: Function) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = [a.arg for a in every if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return names if function.returns is not None else [*names, "return"]


def broken_rules(text: str) -> list[str]:
    """Return what a source file does against the rules, one line each."""
    tree = ast.parse(text)
    broken = []
    if len(text.splitlines()) > MAX_FILE_LINES:
        broken.append(f"file has more than {MAX_FILE_LINES} lines")
    if not ast.get_docstring(tree):
        broken.append("module has no docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            broken.append(f"class {node.name} has no docstring")
    for function, public in functions(tree):
        if lines_without_docstring(function) > MAX_FUNCTION_LINES:
            broken.append(f"{function.name} has more than {MAX_FUNCTION_LINES} lines")
        if public and not ast.get_docstring(function):
            broken.append(f"{function.name} has no docstring")
        if public and unannotated(function):
            broken.append(f"{function.name} lacks types: {', '.join(unannotated(function))}")
    return broken


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_sources_keep_the_rules(path: Path) -> None:
    assert broken_rules(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "breaks"),
    [
        ("x = 1", ["module has no docstring"]),
        ('"""M."""\n' + "x = 1\n" * 500, ["file has more than 500 lines"]),
        ('"""M."""\ndef f() -> None:\n    x = 1', ["f has no docstring"]),
        (
            '"""M."""\nclass A:\n    def f(self) -> None:\n        x = 1',
            ["class A has no docstring", "f has no docstring"],
        ),
        ('"""M."""\ndef f(a, *, b: int, **c):\n    "D."', ["f lacks types: a, c, return"]),
        ('"""M."""\ndef _f() -> None:\n    "D."\n' + "    x = 1\n" * 51, ["_f has more than 50 lines"]),
        ('"""M."""\ndef f() -> None:\n    "D."\n' + "    x = 1\n" * 50 + "def _g(a): return a", []),
        ('"""M."""\nclass _A:\n    def f(self): return 1', []),
        ('"""M."""\nif True:\n    async def f() -> None: ...', ["f has no docstring"]),
    ],
)
def test_the_rules_catch_what_breaks_them(text: str, breaks: list[str]) -> None:
    assert broken_rules(text) == breaks


def tracked_text() -> Iterator[tuple[Path, str]]:
    """Yield the repository's text files and their content."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if path.is_file() and b"\0" not in (content := path.read_bytes())[:8000]:
            yield path, content.decode("utf-8", "replace")


def test_no_registry_hosts_and_no_paths_of_one_machine() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}: {m[0]}" for path, text in tracked_text() for m in FORBIDDEN.finditer(text)
    ]
    assert found == []


def test_only_the_fixtures_know_what_lies_beside_the_repository() -> None:
    named = [path.relative_to(REPOSITORY).as_posix() for path, text in tracked_text() if BESIDE in text]
    assert set(named) <= {"tests/conftest.py"}


@pytest.mark.parametrize(
    ("text", "is_forbidden"),
    [
        (f"https://files.{'.'.join(HOSTS[0])}/packages", True),
        (f"index-url = https://{'.'.join(HOSTS[1])}/simple", True),
        (f"open('/{FOLDERS[1]}/data.npz')", True),
        (f"results: /{FOLDERS[0]}/out", True),
        ("docs/work/plan.md, framework/x, see ./home/page", False),
    ],
)
def test_the_search_finds_what_it_should(text: str, is_forbidden: bool) -> None:
    assert bool(FORBIDDEN.search(text)) == is_forbidden


def test_the_page_on_reliability_shows_the_counts_that_are_stored() -> None:
    stored = REPOSITORY / "results" / "faults.json"
    if not stored.is_file():
        pytest.skip("no full round of faults yet")
    text = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert page(text, json.loads(stored.read_text())) == text


LAYERS = [
    ["errors"],
    ["seeds", "spec", "progress", "groups", "intervals", "plugins", "effort"],
    ["registry", "store", "paper"],
    ["tables"],
    ["measures"],
    ["results"],
    ["data"],
    ["methods"],
    ["networks"],
    ["classifiers"],
    ["report"],
    ["device"],
    ["training"],
    ["diagnosis"],
    ["experiments"],
    ["encoders"],
    ["verbs"],
    ["reproduce", "integrations"],
    ["cli", "cli_screen", "cli_store", "__main__"],
]
"""The rooms from the foundations to the command line: none knows anything of those further down, not even in functions.

A name stands for a module, or for a package and what is in it; the longest that fits counts. Rooms on one line may know
each other. `tailscope` itself is above all: what it offers is imported when it is asked for.
"""
ALLOWED: set[tuple[str, str]] = set()
"""Imports against that order which are still there: (importer, imported)."""
PACKAGE = REPOSITORY / "src" / "tailscope"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES if path != PACKAGE / "__init__.py"}


def layer(module: str) -> int | None:
    """Return the line of `LAYERS` that a module stands on."""
    parts = module.split(".")
    lines = {name: line for line, names in enumerate(LAYERS) for name in names}
    return next((lines[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in lines), None)


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that code imports, at the top or in functions, for more than type checks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.startswith("tailscope"))
        elif isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "tailscope":
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                yield submodule if submodule.removeprefix("tailscope.") in MODULES else child.module or ""
        yield from imports(child)


def upward_imports() -> set[tuple[str, str]]:
    return {
        (module, name)
        for module, path in MODULES.items()
        for found in imports(ast.parse(path.read_text(encoding="utf-8")))
        if (name := found.removeprefix("tailscope").removeprefix(".")) and layer(name) > layer(module)
    }


def test_a_room_knows_nothing_of_the_rooms_below_it() -> None:
    assert upward_imports() == ALLOWED


def test_every_module_has_its_layer_and_every_layer_its_modules() -> None:
    assert [module for module in MODULES if layer(module) is None] == []
    for name in (name for names in LAYERS for name in names):
        assert any(module == name or module.startswith(f"{name}.") for module in MODULES), name


def room_of(module: str) -> str:
    return "cli" if module.startswith("cli") else module.split(".")[0]


def test_the_map_shows_every_room_above_those_that_it_stands_on() -> None:
    picture = (REPOSITORY / "docs" / "images" / "house.svg").read_text(encoding="utf-8")
    depth = {name: int(y) for y, name in re.findall(r'<text class="n" x="\d+" y="(\d+)"[^>]*>(\w+)<', picture)}
    assert set(depth) == {room_of(module) for module in MODULES if not module.startswith("__")}
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {name for name in depth if f"`{name}`" not in text and f"`{name}/`" not in text} == set()
    for module, path in MODULES.items():
        for found in imports(ast.parse(path.read_text(encoding="utf-8"))):
            above, below = room_of(module), room_of(found.removeprefix("tailscope").removeprefix("."))
            if above in depth and below in depth and above != below:
                assert depth[above] < depth[below], f"{above} imports {below}"


def test_the_house_has_few_rooms_and_no_closet() -> None:
    rooms = {path for path in SOURCES if path.name != "__init__.py"}
    assert len(rooms) <= MAX_MODULES
    importers: dict[str, set[Path]] = {}
    for path in SOURCES:
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            importers.setdefault(name, set()).add(path)
    small = {module_name(path) for path in rooms if len(path.read_text().splitlines()) < MIN_LINES_FOR_ONE_IMPORTER} - {
        "__main__",
        "methods.sampling",
        "methods.pretraining",
        "integrations.lightning",
    }  # the first is Python's, the second and third are named by registries, as text, the fourth is imported by users
    assert {name for name in small if len(importers.get(f"tailscope.{name}", ())) < 2} == set()


def test_nine_functions_in_ten_are_paragraphs() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    lines = sorted(lines_without_docstring(function) for tree in trees for function, _ in functions(tree))
    assert lines[int(0.9 * len(lines))] <= MAX_LINES_OF_NINE_IN_TEN


def test_the_layers_find_imports_wherever_they_are() -> None:
    code = """
from tailscope import cli, seeds
from tailscope.reproduce import run
if TYPE_CHECKING:
    from tailscope.verbs import swap
def f():
    import tailscope.errors
    from tailscope.report import build
"""
    found = {"cli", "seeds", "reproduce", "errors", "report"}
    assert {name.removeprefix("tailscope.") for name in imports(ast.parse(code))} == found
    assert layer("paper") < layer("report.page") < layer("training.loop") < layer("reproduce")
