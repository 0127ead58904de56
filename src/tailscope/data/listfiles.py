r"""List files: `list:TRAIN.txt` or `list:TRAIN.txt,TEST.txt`, one `path label` a line, as ImageNet-LT is published.

Paths are relative to `--data-root` (by default to the list's own folder) and use `/`; labels are integers from 0. The
label is what follows the last white space, comma or semicolon, so that paths may hold these. A header may name the
columns, in any order and among others; labels may then be names. Empty lines are skipped, a byte-order mark, the lines'
ends of any system and quotes around a cell are taken, and `\` between folders becomes `/`.
"""

import csv
import os
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tailscope.data.streams import ImageFiles
from tailscope.errors import UserError, expanded, unreadable
from tailscope.field_checks import MAX_CLASSES, listed

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


@dataclass(frozen=True)
class _List:
    """What a list says: a path, a label (as text, without leading zeros) and the line of each image.

    Attributes:
        numbered: whether labels are numbers; only under a header may they be names.
    """

    file: Path
    paths: tuple[str, ...]
    labels: tuple[str, ...]
    lines: npt.NDArray[np.int64]
    numbered: bool


def load(lists: str, data_root: Path | None) -> dict[str, ImageFiles]:
    """Return the split "train" and, with a second list, "test". Nothing is decoded.

    Both know the same classes: "0" up to the largest label of either list, or the sorted names of the training list.

    Raises:
        UserError: a list is missing or empty, or lines have no path, no label from 0 to 9,999, or a path that is
            absolute or climbs out of the root; the message counts them and names the first lines.
    """
    files = [expanded(text) for text in lists.split(",")]
    if len(files) > 2:
        raise UserError(f"list:{lists}: {len(files)} files; give one (train) or two (train,test)")
    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: no such directory")
    read = [_read(file, data_root or file.parent) for file in files]
    classes = _classes(read)
    number = {name: k for k, name in enumerate(classes)}
    splits = {}
    for split, found in zip(("train", "test"), read, strict=False):
        labels = np.array([number[label] for label in found.labels], dtype=np.int64)
        root, notes = data_root or found.file.parent, _notes(read[0], found, labels)
        splits[split] = ImageFiles(
            found.file.stem, root, found.paths, labels, classes, found.file, found.lines, tuple(notes)
        )
    return splits


def _classes(read: Sequence[_List]) -> tuple[str, ...]:
    """Return the names of the classes of all lists."""
    first, last = read[0], read[-1]
    if first.numbered != last.numbered:
        words = ["numbers" if found.numbered else "names" for found in read]
        raise UserError(f"{first.file}: its labels are {words[0]}, those of {last.file} {words[1]}; write both alike")
    if first.numbered:
        return tuple(str(k) for k in range(1 + max(int(label) for found in read for label in found.labels)))
    names = sorted(set(first.labels))
    strange = [i for i, label in enumerate(last.labels) if label not in set(names)]
    if strange:
        name = last.labels[strange[0]]
        raise UserError(f"{last.file}: line {last.lines[strange[0]]}: label {name!r}, which {first.file} has not")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{first.file}: {len(names):,} different labels; at most {MAX_CLASSES:,} classes are supported")
    return tuple(names)


def _notes(first: _List, found: _List, labels: npt.NDArray[np.int64]) -> list[str]:
    """Say which images a list repeats, which it shares with the first list, and which of its classes it lacks."""
    seen: dict[str, int] = {}
    before = [seen.setdefault(posixpath.normpath(path), row) for row, path in enumerate(found.paths)]
    again = np.flatnonzero(np.array(before) < np.arange(len(before)))
    notes = []
    if len(again):
        contrary = int((labels[again] != labels[np.array(before)[again]]).sum())
        also = f", {contrary} of them with another label" if contrary else ""
        line = found.lines[again[0]]
        notes.append(f"{found.file}: lines that repeat an image: {len(again)}{also}; the first is line {line}")
    if found is not first:
        shared = len(seen.keys() & {posixpath.normpath(path) for path in first.paths})
        if shared:
            notes.append(f"{found.file}: images that stand in {first.file} too: {shared} of {len(seen)}")
        absent = sorted({*first.labels} - {*found.labels}, key=lambda name: (len(name) * first.numbered, name))
        if absent:
            notes.append(f"{found.file}: no images of class {listed(absent)}")
    return notes


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
        paths.append(_with_slashes(path, root))
        labels.append(str(int(label)) if numbered else label)
        lines.append(number)
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"{file}: {len(wrong)} wrong lines: {'; '.join(wrong[:_SHOWN])}{more}")
    if not paths:
        raise UserError(f"{file}: lists no images")
    return _List(file, tuple(paths), tuple(labels), np.array(lines, dtype=np.int64), numbered)


def _text(file: Path) -> str:
    """Return a list's text, its lines ended by line feeds."""
    problem = unreadable(file)
    if problem:
        raise UserError(f"list:{file}: cannot be read as text ({'lists no images' if problem == 'empty' else problem})")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"list:{file}: cannot be read as text ({error.strerror})") from None
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
    return tuple(
        cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True))
    )


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


def _with_slashes(path: str, root: Path) -> str:
    r"""Return a path that was written on Windows as one of ours; elsewhere a file may have `\` in its name."""
    if "\\" not in path or (os.sep != "\\" and unreadable(root / path) is None):
        return path
    return path.replace("\\", "/")


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
    depth = 0
    for part in path.replace("\\", "/").split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return f"path {path!r} climbs out of the root"
    return None
