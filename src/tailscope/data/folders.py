"""Image folders: `folder:PATH`, where each class is a sub-folder.

Either PATH itself holds the class folders (one split, "all"), or PATH holds a folder for each split, called as `SPLITS`
says, and those hold the class folders. Files below a class folder count at any depth; the suffix makes an image.
Folders and files that are hidden or the system's count nowhere. What is left out is said in the splits' notes.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from tailscope.data.streams import ImageFiles
from tailscope.errors import UserError, plain_name
from tailscope.field_checks import listed

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "held", "heldout", "holdout"),
}
"""What the folder of a split is called: in capitals too, with `-`, `_` or spaces in between, and with `set` behind."""

_SYSTEM = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "thumbs.db",
    "desktop.ini", "__pycache__",
}  # fmt: skip


def split_of(name: str) -> str | None:
    """Return the split that a folder's name means, or None.

    >>> [split_of(name) for name in ("Train", "valid", "held-out", "test_set", "ant")]
    ['train', 'val', 'test', 'test', None]
    """
    word = re.sub(r"[-_ ]", "", name.casefold()).removesuffix("set")
    return next((split for split, names in SPLITS.items() if word in names), None)


def load(root: Path) -> dict[str, ImageFiles]:
    """Return the splits of an image folder: {"all"}, or those of "train", "val" and "test" that are there.

    Classes are the folders of the training split (or of PATH, or without a training split those of all splits) in
    alphabetical order. A class may lack images in the other splits; ids are paths relative to PATH.

    Raises:
        UserError: the folder is not there, cannot be listed or holds no class folders; splits lie beside other folders
            with images, or one is there twice; a class has no images to train on, or a split has a class that the
            training split lacks.
    """
    if not root.is_dir():
        raise UserError(f"folder:{plain_name(str(root))}: {'no folder' if root.exists() else 'no such directory'}")
    top = _Tree(root, "")
    layout, notes = _layout(top)
    trees = {split: _Tree(root, folder) if folder else top for split, folder in layout.items()}
    flat = [split for split, tree in trees.items() if not tree.folders and len(trees) > 1 and split != "train"]
    for tree in map(trees.pop, flat):
        notes.append(f"{tree.path}: no class folders in it, so it is no split ({_many(len(tree.beside), 'image')})")
    first = next(iter(trees))
    training = first in ("train", "all")
    classes = trees[first].folders if training else sorted({n for tree in trees.values() for n in tree.folders})
    splits = {split: _split(root, tree, classes, trees[first].start) for split, tree in trees.items()}
    if training:
        _refuse_empty(trees[first], splits[first])
    hidden = [*([] if top is trees[first] else top.hidden), *(name for tree in trees.values() for name in tree.hidden)]
    if hidden:
        notes.append(f"hidden or system files and folders left out: {len(hidden):,} ({listed(sorted(hidden))})")
    return {split: replace(images, notes=(*notes, *_notes(trees[split], images))) for split, images in splits.items()}


@dataclass
class _Tree:
    """A folder with class folders, and what lies in them. Names are the system's; lists for messages are plain.

    Attributes:
        root: PATH.
        start: the folder, relative to it.
        folders: of classes, sorted.
        beside: images in no class folder.
        hidden: what is hidden or the system's, and links to a folder above them, at any depth.
        images: of each class, relative to `root`.
        kinds: of each class, how many files of what other suffixes.
    """

    root: Path
    start: str
    folders: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    images: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """List the folder itself; `walk` goes deeper."""
        self.folders, files = self._list(self.start)
        self.beside = [plain_name(_join(self.start, name)) for name in files if _is_image(name)]

    @property
    def path(self) -> str:
        """The folder, for messages."""
        return f"folder:{plain_name(str(self.root / self.start))}"

    def walk(self, name: str) -> list[str]:
        """Return the images of a class folder, in the order that torchvision's ImageFolder has."""
        if name not in self.images:
            found, kinds = [], Counter[str]()
            below = sorted(self._below(_join(self.start, name)), key=lambda item: item[0].replace("/", os.sep))
            for folder, files in below:
                found += [_join(folder, file) for file in files if _is_image(file)]
                kinds.update(_suffix(file) for file in files if not _is_image(file))
            self.images[name], self.kinds[name] = found, kinds
        return self.images[name]

    def inside(self, name: str) -> tuple[list[str], list[str]]:
        """Return the folders and the files directly in a class folder."""
        return self._list(_join(self.start, name), count=False)

    def _below(self, start: str) -> Iterator[tuple[str, list[str]]]:
        """Yield every folder from `start` on with its files; links are followed, but not back to where they lie."""
        roots = frozenset(os.path.realpath(self.root / folder) for folder in ("", self.start))
        todo: list[tuple[str, frozenset[str]]] = [(start, roots)]
        while todo:
            folder, above = todo.pop()
            real = os.path.realpath(self.root / folder)
            if real in above:
                self.hidden.append(plain_name(folder))
                continue
            folders, files = self._list(folder)
            yield folder, files
            todo += [(_join(folder, name), above | {real}) for name in folders]

    def _list(self, folder: str, *, count: bool = True) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files in a folder, sorted."""
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.casefold() in _SYSTEM:
                        self.hidden += [plain_name(_join(folder, entry.name))] * count
                    else:
                        (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            where = plain_name(str(self.root / folder))
            raise UserError(f"folder:{where}: cannot be listed ({error.strerror}); mend its permissions") from None
        return sorted(folders), sorted(files)


def _layout(top: _Tree) -> tuple[dict[str, str], list[str]]:
    """Return the folder of each split, {"all": ""} where PATH holds the classes, and what is to be said of that."""
    named = {name: split for name in top.folders if (split := split_of(name))}
    others = [name for name in top.folders if name not in named]
    nested = [name for name in named if top.inside(name)[0]]
    if not nested and (others or "train" not in named.values()):
        flat = f"{listed(list(named))} taken as class folders, not as splits: no class folders in them"
        return {"all": ""}, [flat] * bool(named) + _looks_like_splits(top)
    others = [name for name in others if top.walk(name)]
    if others:
        raise UserError(
            f"{top.path}: holds {listed(nested or list(named))}, by name a split, beside {listed(others)}, which is "
            f"none; splits are called {_known()}: move one or the other away"
        )
    for split in SPLITS:
        same = [name for name, meant in named.items() if meant == split]
        if len(same) > 1:
            raise UserError(f"{top.path}: {listed(same)} are both names of the split {split}; keep one of them there")
    by_split = {split: name for name, split in named.items()}
    return {split: by_split[split] for split in SPLITS if split in by_split}, []


def _looks_like_splits(top: _Tree) -> list[str]:
    """Warn of class folders that hold nothing but folders of the same names, as splits by other names would."""
    below = [top.inside(name) for name in top.folders]
    shared = set.intersection(*(set(folders) for folders, _ in below)) if below else set()
    if not shared or any(_is_image(file) for _, files in below for file in files):
        return []
    return [
        f"{listed(top.folders)} taken as {'classes' if len(below) > 1 else 'the only class'}, with folders like "
        f"{listed(sorted(shared), 3)} inside; if these are the classes, give {top.path}/{plain_name(top.folders[0])}"
        f"{f' or call the splits {_known()}' if len(below) > 1 else ''}"
    ]


def _known() -> str:
    return ", ".join(name for names in SPLITS.values() for name in names)


def _split(root: Path, tree: _Tree, classes: Sequence[str], training: str) -> ImageFiles:
    if not tree.folders:
        beside = f", but {_many(len(tree.beside), 'image')}; put these into a folder a class" if tree.beside else ""
        raise UserError(f"{tree.path}: no class folders in it{beside}")
    unknown = [name for name in tree.folders if name not in classes and tree.walk(name)]
    if unknown:
        raise UserError(f"{tree.path}: has class {listed(unknown)}, which {plain_name(training)}/ has not")
    names = [plain_name(name) for name in classes]
    if len(set(names)) < len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise UserError(f"{tree.path}: two class folders would both be called {twice!r}; rename one of them")
    found = [tree.walk(name) if name in tree.folders else [] for name in classes]
    paths = tuple(path for of_class in found for path in of_class)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(of_class) for of_class in found]))
    return ImageFiles(plain_name(root.resolve().name), root, paths, labels, tuple(names))


def _refuse_empty(tree: _Tree, images: ImageFiles) -> None:
    empty = [images.class_names[k] for k, n in enumerate(images.counts()) if n == 0]
    if empty:
        kinds = sum((tree.kinds[name] for name in tree.folders if plain_name(name) in empty), Counter())
        instead = f", only {_counted(kinds)}" if kinds else ""
        raise UserError(
            f"{tree.path}: no images ({', '.join(IMG_EXTENSIONS)}) in class folder {listed(empty)}{instead}; convert "
            "or remove what is there"
        )


def _notes(tree: _Tree, images: ImageFiles) -> Iterator[str]:
    """Yield what was left out of a split, and which classes it lacks."""
    kinds = sum(tree.kinds.values(), Counter())
    if kinds:
        files = _many(sum(kinds.values()), "file")
        yield f"{tree.path}: {files} of kinds that are not read left out: {_counted(kinds)}"
    if tree.beside:
        yield f"{tree.path}: {_many(len(tree.beside), 'image')} in no class folder left out: {listed(tree.beside)}"
    absent = [name for name, n in zip(images.class_names, images.counts(), strict=True) if n == 0]
    if absent:
        yield f"{tree.path}: no images of class {listed(absent)}"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _suffix(name: str) -> str:
    return plain_name(Path(name).suffix.lower()) or "without suffix"


def _counted(kinds: Counter[str], most: int = 10) -> str:
    """Return how many there are of each, most first."""
    text = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:most])
    return f"{text} and {len(kinds) - most} kinds more" if len(kinds) > most else text


def _many(n: int, one: str) -> str:
    return f"{n:,} {one}" if n == 1 else f"{n:,} {one}s"
