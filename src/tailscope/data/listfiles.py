"""List files: `list:TRAIN.txt` or `list:TRAIN.txt,TEST.txt`, one `path label` a line, as ImageNet-LT is published.

Paths are relative to `--data-root` (by default to the list's own folder) and use `/`; labels are integers from 0. The
label is what follows the last white space, so that paths may hold spaces. Empty lines are skipped.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import numpy.typing as npt

from tailscope.data.streams import ImageFiles
from tailscope.errors import UserError, expanded
from tailscope.field_checks import MAX_CLASSES

_SHOWN = 10


def load(lists: str, data_root: Path | None) -> dict[str, ImageFiles]:
    """Return the split "train" and, with a second list, "test". Nothing is decoded, nor looked for on the disk.

    Both know the same classes, "0" up to the largest label of either list.

    Raises:
        UserError: a list is missing or empty, or lines have no path, no label from 0 to 9,999, or a path that is
            absolute or climbs out of the root; the message counts them and names the first lines.
    """
    files = [expanded(text) for text in lists.split(",")]
    if len(files) > 2:
        raise UserError(f"list:{lists}: {len(files)} files; give one (train) or two (train,test)")
    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: no such directory")
    read = [_read(file) for file in files]
    classes = tuple(str(k) for k in range(1 + max(int(labels.max()) for _, labels, _ in read)))
    return {
        split: ImageFiles(file.stem, data_root or file.parent, paths, labels, classes, file, lines)
        for split, file, (paths, labels, lines) in zip(("train", "test"), files, read, strict=False)
    }


def _read(file: Path) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return paths, labels and line numbers."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list:{file}: cannot be read as text ({error})") from None
    paths, labels, lines, wrong = [], [], [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        path, label = ["", *line.rsplit(maxsplit=1)][-2:]
        problem = _problem(path.strip(), label)
        if problem:
            wrong.append(f"line {number}: {problem}")
            continue
        paths.append(path.strip())
        labels.append(int(label))
        lines.append(number)
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(f"{file}: {len(wrong)} wrong lines: {'; '.join(wrong[:_SHOWN])}{more}")
    if not paths:
        raise UserError(f"{file}: lists no images")
    return tuple(paths), np.array(labels, dtype=np.int64), np.array(lines, dtype=np.int64)


def _problem(path: str, label: str) -> str | None:
    """Say what is wrong with a line, if anything."""
    if not path:
        return "expected 'path label'"
    if not (label.isascii() and label.isdigit()) or len(label) > 9 or int(label) >= MAX_CLASSES:
        return f"label {label!r} is not an integer from 0 to {MAX_CLASSES - 1}"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor:
        return f"path {path!r} is absolute; give it relative to --data-root"
    depth = 0
    for part in path.replace("\\", "/").split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return f"path {path!r} climbs out of the root"
    return None
