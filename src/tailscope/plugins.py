"""Code from outside the package that registers methods: imported when its user names it, and told apart by its source.

A plug-in is a module that the user names with `--import`, that a program imports, or that an installed distribution
declares in the entry-point group `tailscope.plugins`. Nothing that was read from a data file or a store is ever
imported.

What a stage trained with a plug-in is stored under has a digest of the plug-in's source in it, taken when the method
registers, which is when the code is imported: of the module's file, or of all of its package; and of the modules and
packages beside it in the same folder that it imports. What it imports from elsewhere does not count, nor does PyTorch
itself. Of a notebook, which has no file, it is the source of what is registered, alone.
"""

import ast
import atexit
import hashlib
import inspect
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, invalidate_caches
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tailscope.errors import UserError, foreign_code, guess, require_file

GROUP = "tailscope.plugins"
"""The entry-point group of installed plug-ins."""

_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_installed_are_loaded = False


@dataclass(frozen=True)
class Plugin:
    """Which code made a result.

    Attributes:
        name: the module, or the package that it is in.
        version: what it says of itself, or the distribution of that name; None where neither does.
        sha256: of its source.
    """

    name: str
    version: str | None
    sha256: str


@dataclass(frozen=True)
class Named:
    """A plug-in as other processes, on other machines perhaps, load it.

    Attributes:
        name: the module's.
        folder: where it was found.
        files: its sources, by their paths in that folder; not those of what is installed beside it.
    """

    name: str
    folder: Path
    files: Mapping[str, bytes]

    def load(self) -> None:
        """Import it from where it was found; where that place has it not, from a copy of its sources.

        Raises:
            UserError: it cannot be imported.
        """
        if self.name in sys.modules:
            return
        folder = self.folder
        if str(folder) not in _INSTALLED and not all((folder / name).is_file() for name in self.files):
            folder = Path(tempfile.mkdtemp(prefix="tailscope-plugin-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            for name, source in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(source)
        _add_to_path(folder)
        load(self.name)


named: list[Named] = []
"""What `load` has imported."""


def load(name: str, option: str = "--import") -> None:
    """Import a module, or a .py file, as from the current folder, so that what it registers can be named.

    Raises:
        UserError: there is no such module or file; another module has its name; or importing it fails.
    """
    path = Path(name)
    if path.suffix == ".py":
        require_file(path, f"{option} ")
        name, folder = path.stem, path.resolve().parent
    else:
        folder = Path.cwd()
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{option} {name}: no module can have this name; expected letters, digits and underscores")
    _add_to_path(folder)
    if _origin(name, option) is None:
        near = guess(name, [file.stem for file in folder.glob("*.py")])
        raise UserError(
            f"{option} {name}: there is no module of that name in the current folder or on PYTHONPATH;{near} give its"
            " name, or the path of a .py file"
        )
    with foreign_code(f"{option} {name}: cannot be imported"):
        module = import_module(name)
    if path.suffix == ".py" and Path(module.__file__ or "").resolve() != path.resolve():
        raise UserError(f"{option} {path}: there is another module {name}, {module.__file__}; rename the file")
    if module.__file__ is not None and all(name != one.name for one in named):
        root, sources = _sources(Path(module.__file__).resolve(), name.count(".") + hasattr(module, "__path__"))
        named.append(Named(name, root, {path.relative_to(root).as_posix(): sources[path] for path in sources}))


def _origin(name: str, option: str) -> object:
    """Return where a module is found; None if nowhere. Finding it imports the packages that it is in."""
    if name in sys.modules:
        return sys.modules[name]
    invalidate_caches()
    top = name.partition(".")[0]
    if find_spec(top) is None:
        return None
    with foreign_code(f"{option} {name}: cannot be imported"):
        return find_spec(name)


def _add_to_path(folder: Path) -> None:
    """Let modules of a folder be found, after all that are installed: none of those is hidden."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def load_installed() -> None:
    """Import the plug-ins of installed distributions, once.

    Raises:
        UserError: one of them cannot be imported.
    """
    global _installed_are_loaded
    if _installed_are_loaded:
        return
    _installed_are_loaded = True
    for entry in entry_points(group=GROUP):
        owner = entry.dist.name if entry.dist is not None else entry.value
        with foreign_code(f"the installed plug-in {entry.name}: cannot be imported", f"repair or uninstall {owner}"):
            entry.load()


def plugin_of(registering: Mapping[str, Any], registered: object) -> Plugin | None:
    """Return the plug-in that registers something; None for the package's own modules.

    Args:
        registering: the globals of the module that calls `register`.
        registered: what it registers.

    Raises:
        UserError: its source cannot be read.
    """
    module = str(registering.get("__name__")).replace("__mp_main__", "__main__")  # a program, in a process of its own
    top = module.partition(".")[0]
    if top == __package__:
        return None
    file = registering.get("__file__")
    try:
        if file is None:
            text = inspect.getsource(registered)  # type: ignore[arg-type]  # it raises a TypeError for what has none
            return Plugin(top, None, hashlib.sha256(text.encode()).hexdigest())
        depth = module.count(".") + ("__path__" in registering)
        return Plugin(top, _version(top), _digest(Path(str(file)).resolve(), depth))
    except (OSError, TypeError) as error:
        why = f"cannot be read ({error}), and a changed one could not be told from this one"
        raise UserError(f"plug-in {module}: its source {why}; put it into a file") from None


def told(plugins: Sequence[Plugin]) -> dict[str, Any]:
    """Return what a result's environment says of plug-ins: the field `plugins`, or nothing where there are none."""
    return {"plugins": [asdict(plugin) for plugin in plugins]} if plugins else {}


def _version(top: str) -> str | None:
    own = getattr(sys.modules.get(top), "__version__", None)
    try:
        return own if isinstance(own, str) else version(top)
    except PackageNotFoundError:
        return None


def _digest(file: Path, depth: int) -> str:
    """Return the SHA-256 of a module's file, or of the package `depth` folders up, and of what they import beside."""
    root, found = _sources(file, depth)
    parts = ((path.relative_to(root).as_posix(), found[path]) for path in sorted(found))
    return hashlib.sha256(repr([(name, hashlib.sha256(text).hexdigest()) for name, text in parts]).encode()).hexdigest()


def _sources(file: Path, depth: int) -> tuple[Path, dict[Path, bytes]]:
    """Return the folder that a module's top lies in, and the sources that `_digest` is of."""
    root, waiting, found = file.parents[depth], [[file]], dict[Path, bytes]()
    if depth:
        waiting = [_package(file.parents[depth - 1])]
    while waiting:
        for source in waiting.pop():
            if source not in found:
                found[source] = source.read_bytes().replace(b"\r\n", b"\n")
                waiting += [_beside(root, name) for name in _imported(found[source])]
    return root, found


def _package(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _beside(root: Path, name: str) -> list[Path]:
    """Return the files of a module or package in a folder; none where the folder is one that packages install to."""
    if str(root) in _INSTALLED or name == __package__ or name in sys.stdlib_module_names:
        return []
    return [file] if (file := root / f"{name}.py").is_file() else _package(root / name)


def _imported(source: bytes) -> Iterator[str]:
    """Yield the top names of the modules that a source imports by their full names, wherever in it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a file of the package that nothing imports: its text counts all the same
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
