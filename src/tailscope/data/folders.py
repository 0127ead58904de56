r"""Images in folders, `folder:PATH`, and named by lists, `list:TRAIN.txt[,TEST.txt]`.

Either PATH itself holds the class folders (one split, "all"), or PATH holds a folder for each split, called as `SPLITS`
says, and those hold the class folders. Files below a class folder count at any depth; the suffix makes an image.
Folders and files that are hidden or the system's count nowhere. What is left out is said in the splits' notes.

A list has one `path label` a line, as ImageNet-LT is published. Paths are relative to `--data-root` (by default to the
list's own folder) and use `/`; labels are integers from 0. The label is what follows the last white space, comma or
semicolon, so that paths may hold these. A header may name the columns, in any order and among others; labels may then
be names. Empty lines are skipped, a byte-order mark, line ends of any system and quotes around a cell are taken, and
`\` between folders becomes `/`.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from posixpath import join, normpath
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from tailscope.data.images import SPLITS, ImageFiles, Rows, split_of
from tailscope.errors import UserError, expanded, first_few, plain_name, unreadable
from tailscope.tables.checks import MAX_CLASSES, listed

_SYSTEM = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "thumbs.db",
    "desktop.ini", "__pycache__",
}  # fmt: skip
_KNOWN = ", ".join(name for names in SPLITS.values() for name in names)


def load_folder(root: Path) -> dict[str, ImageFiles]:
    """Return the splits of an image folder: {"all"}, or those of "train", "val" and "test" that are there.

    Classes are the folders of the training split (or of PATH, or without a training split those of all splits) in
    alphabetical order. A class may lack images in the other splits; ids are paths relative to PATH.

    Raises:
        UserError: the folder cannot be listed, it is not clear what its splits and classes are, a class has no images
            to train on, or a split has a class that the training split lacks.
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
    """A folder with class folders, and what lies in them. Names are the system's; lists for messages are plain."""

    root: Path
    start: str
    """The folder, relative to `root`, which is PATH."""
    folders: list[str] = field(default_factory=list)
    """Of classes, sorted."""
    beside: list[str] = field(default_factory=list)
    """Images in no class folder."""
    hidden: list[str] = field(default_factory=list)
    """What is hidden or the system's, and links to a folder above them, at any depth."""
    images: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    """Of each class that was walked: its images, relative to `root`, and how many files of what other suffixes."""

    def __post_init__(self) -> None:
        self.folders, files = self._list(self.start)
        self.beside = [plain_name(join(self.start, name)) for name in files if _is_image(name)]

    @property
    def path(self) -> str:
        return f"folder:{plain_name(str(self.root / self.start))}"

    def walk(self, name: str) -> list[str]:
        """Return the images of a class folder, in the order that torchvision's ImageFolder has."""
        if name not in self.images:
            found, kinds = [], Counter[str]()
            below = sorted(self._below(join(self.start, name)), key=lambda item: item[0].replace("/", os.sep))
            for folder, files in below:
                found += [join(folder, file) for file in files if _is_image(file)]
                others = (Path(file).suffix.lower() for file in files if not _is_image(file))
                kinds.update(plain_name(suffix) or "without suffix" for suffix in others)
            self.images[name], self.kinds[name] = found, kinds
        return self.images[name]

    def inside(self, name: str) -> tuple[list[str], list[str]]:
        """Return the folders and the files directly in a class folder."""
        return self._list(join(self.start, name), count=False)

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
            todo += [(join(folder, name), above | {real}) for name in folders]

    def _list(self, folder: str, *, count: bool = True) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files in a folder, sorted."""
        folders, files = list[str](), list[str]()
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.casefold() in _SYSTEM:
                        self.hidden += [plain_name(join(folder, entry.name))] * count
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
            f"none; splits are called {_KNOWN}: move one or the other away"
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
        f"{f' or call the splits {_KNOWN}' if len(below) > 1 else ''}"
    ]


def _split(root: Path, tree: _Tree, classes: Sequence[str], training: str) -> ImageFiles:
    if not tree.folders:
        beside = f", but {_many(len(tree.beside), 'image')}; put these into a folder a class" if tree.beside else ""
        raise UserError(f"{tree.path}: no class folders in it{beside}")
    unknown = [name for name in tree.folders if name not in classes and tree.walk(name)]
    if unknown:
        raise UserError(f"{tree.path}: has class {listed(unknown)}, which {plain_name(training)}/ has not")
    found = [tree.walk(name) if name in tree.folders else [] for name in classes]
    paths = tuple(path for of_class in found for path in of_class)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(of_class) for of_class in found]))
    return ImageFiles(plain_name(root.resolve().name), root, paths, labels, tuple(map(plain_name, classes)))


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


def _counted(kinds: Counter[str]) -> str:
    """Return how many there are of each, most first."""
    return first_few([f"{kind} {n}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))], 10)


def _many(n: int, one: str) -> str:
    return f"{n:,} {one}" if n == 1 else f"{n:,} {one}s"


IMAGE_COLUMNS = (
    "image", "images", "path", "file", "filename", "filepath", "imagepath", "imagefile", "imagename", "imagefilename",
    "img", "imgpath", "imgname", "imageid", "id",
)  # fmt: skip
"""Names of columns, in small letters without `-`, `_` and spaces; the first that is there is taken."""
LABEL_COLUMNS = (
    "label", "labels", "labelid", "class", "classid", "classindex", "classname", "target", "category",
    "categoryid", "y",
)  # fmt: skip

_SHOWN = 10
_Cells: TypeAlias = Callable[[str], tuple[str, ...]]
_ENCODINGS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class _List(NamedTuple):
    """What a list says: a path, a label (as text, without leading zeros) and the line of each image.

    Labels are numbers, or under a header names.
    """

    file: Path
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    lines: Rows
    numbered: bool


def load_lists(lists: str, data_root: Path | None) -> dict[str, ImageFiles]:
    """Return the split "train" and, with a second list, "test". Nothing is decoded.

    Both know the same classes: "0" up to the largest label of either list, or the sorted names of the training list.

    Raises:
        UserError: a list cannot be read or is empty, or lines are wrong: the message counts them and names the first.
    """
    files = [expanded(text) for text in lists.split(",")]
    if len(files) > 2:
        raise UserError(f"list:{lists}: {len(files)} files; give one (train) or two (train,test)")
    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: no such directory")
    roots = [data_root or file.parent for file in files]
    read = [_read(file, root) for file, root in zip(files, roots, strict=True)]
    classes = _classes(read)
    number = {name: k for k, name in enumerate(classes)}
    splits = {}
    for split, root, found in zip(("train", "test"), roots, read, strict=False):
        labels, file = torch.tensor([number[label] for label in found.labels]), found.file
        notes = tuple(_notes_of_lists(read[0], found, labels.numpy()))
        splits[split] = ImageFiles(file.stem, root, found.paths, labels, classes, file, found.lines, notes)
    return splits


def _classes(read: Sequence[_List]) -> tuple[str, ...]:
    first, last = read[0], read[-1]
    if first.numbered != last.numbered:
        words = ["numbers" if found.numbered else "names" for found in read]
        raise UserError(f"{first.file}: its labels are {words[0]}, those of {last.file} {words[1]}; write both alike")
    if first.numbered:
        return tuple(str(k) for k in range(1 + max(int(label) for found in read for label in found.labels)))
    names = {*first.labels}
    for line, name in zip(last.lines, last.labels, strict=True):
        if name not in names:
            raise UserError(f"{last.file}: line {line}: label {name!r}, which {first.file} has not")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{first.file}: {len(names):,} different labels; at most {MAX_CLASSES:,} classes are supported")
    return tuple(sorted(names))


def _notes_of_lists(first: _List, found: _List, labels: Rows) -> Iterator[str]:
    """Say which images a list repeats, which it shares with the first list, and which of its classes it lacks."""
    seen: dict[str, int] = {}
    before = [seen.setdefault(normpath(path), row) for row, path in enumerate(found.paths)]
    again = np.flatnonzero(np.array(before) < np.arange(len(before)))
    if len(again):
        contrary = int((labels[again] != labels[np.array(before)[again]]).sum())
        also = f", {contrary} of them with another label" if contrary else ""
        line = found.lines[again[0]]
        yield f"{found.file}: lines that repeat an image: {len(again)}{also}; the first is line {line}"
    if found is not first:
        shared = len(seen.keys() & {normpath(path) for path in first.paths})
        if shared:
            yield f"{found.file}: images that stand in {first.file} too: {shared} of {len(seen)}"
        absent = sorted({*first.labels} - {*found.labels}, key=lambda name: (len(name) * first.numbered, name))
        if absent:
            yield f"{found.file}: no images of class {listed(absent)}"


def _read(file: Path, root: Path) -> _List:
    rows = [(number, line) for number, line in enumerate(_text(file).split("\n"), start=1) if line.strip()]
    cells = _header(file, *rows[0]) if rows else None
    rows = rows[cells is not None :]
    numbered = cells is None or not rows or _is_number(_or_nothing(cells, rows[0][1])[1])
    paths, labels, lines, wrong = [], [], [], []
    for number, line in rows:
        path, label = _or_nothing(cells or _by_separator, line)
        problem = _problem(path, label, numbered=numbered)
        if problem:
            wrong.append(f"line {number}: {problem}")
            continue
        # Written on Windows; elsewhere a file may have a backslash in its name.
        windows = "\\" in path and (os.sep == "\\" or unreadable(root / path) is not None)
        paths.append(path.replace("\\", "/") if windows else path)
        labels.append(str(int(label)) if numbered else label)
        lines.append(number)
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"{file}: {len(wrong)} wrong lines: {'; '.join(wrong[:_SHOWN])}{more}")
    if not paths:
        raise UserError(f"{file}: lists no images")
    return _List(file, tuple(paths), tuple(labels), np.array(lines, dtype=np.int64), numbered)


def _text(file: Path) -> str:
    problem = unreadable(file)
    if problem:
        raise UserError(f"list:{file}: cannot be read as text ({'lists no images' if problem == 'empty' else problem})")
    raw = file.read_bytes()
    encoding = next((name for mark, name in _ENCODINGS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"list:{file}: cannot be read as text (line {line} is no {encoding.upper()})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _header(file: Path, number: int, line: str) -> _Cells | None:
    """Return what takes a line apart by the columns that the first line names; None where it names none."""
    if _is_number(_by_separator(line)[1]):
        return None
    known = {*IMAGE_COLUMNS, *LABEL_COLUMNS}
    for delimiter in ",;\t":
        names = [re.sub(r"[-_ ]", "", cell.casefold()) for cell in _or_nothing(partial(_cells, delimiter), line)]
        if len(names) > 1 and known & set(names):
            image, label = _column(names, IMAGE_COLUMNS), _column(names, LABEL_COLUMNS)
            if len(names) == 2 and (image is None) != (label is None):
                image, label = (1 - label, label) if label is not None else (image, 1 - (image or 0))
            if image is None or label is None:
                raise UserError(
                    f"{file}: line {number}: the columns {', '.join(_cells(delimiter, line))} do not say which is the"
                    " image and which the only label; call them image and label"
                )
            return partial(_pick, delimiter, image, label)
    words = [word.casefold() for word in line.split()]
    if len(words) == 2 and words[0] in IMAGE_COLUMNS and words[1] in LABEL_COLUMNS:
        return _by_separator
    return None


def _column(names: Sequence[str], known: Sequence[str]) -> int | None:
    """Return the place of the first known name; None where there is none or, of labels, more than one."""
    found = [name for name in known if name in names]
    if not found or names.count(found[0]) > 1 or (known is LABEL_COLUMNS and len(found) > 1):
        return None
    return names.index(found[0])


def _cells(delimiter: str, line: str) -> tuple[str, ...]:
    """Return a line's cells, without quotes."""
    (cells,) = csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True)
    return tuple(map(str.strip, cells))


def _pick(delimiter: str, image: int, label: int, line: str) -> tuple[str, str]:
    cells = _cells(delimiter, line)
    return cells[image], cells[label]


def _by_separator(line: str) -> tuple[str, str]:
    """Return what stands before and behind the last comma, semicolon or white space that a number follows."""
    for separator in ",;":
        path, _, label = line.rpartition(separator)
        if _is_number(_unquoted(label)):
            return _unquoted(path), _unquoted(label)
    path, label = ["", *line.rsplit(maxsplit=1)][-2:]
    return _unquoted(path), _unquoted(label)


def _or_nothing(cells: Callable[[str], tuple[str, ...]], line: str) -> tuple[str, ...]:
    """Return the cells of a line, empty ones where it cannot be taken apart."""
    try:
        return cells(line)
    except (csv.Error, IndexError):  # an open quote, a cell of 128 KiB; fewer cells than the header has
        return "", ""


def _unquoted(cell: str) -> str:
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _problem(path: str, label: str, *, numbered: bool) -> str | None:
    """Say what is wrong with a line, if anything."""
    if not path or not label:
        return "expected 'path label'"
    if numbered and (not _is_number(label) or len(label) > 9 or int(label) >= MAX_CLASSES):
        return f"label {label!r} is not an integer from 0 to {MAX_CLASSES - 1}"
    if "\0" in path:
        return f"path {path!r} holds a zero byte"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor:
        return f"path {path!r} is absolute; give it relative to --data-root"
    if normpath(path.replace("\\", "/")).split("/")[0] == "..":
        return f"path {path!r} climbs out of the root"
    return None
