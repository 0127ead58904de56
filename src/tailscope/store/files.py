"""Files written whole or not at all, with a digest that reading checks. Nothing is ever pickled.

A file of `save_tensors`, a checkpoint or a part of an extraction, carries the SHA-256 of what it says in its own
header: one file, so that no kill can part it from its digest.
"""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailscope.errors import UserError, one_line, plain_name

Tensors = dict[str, Tensor]
Meta = dict[str, Any]

CHECKPOINT = "checkpoint.safetensors"
"""What a training that was killed goes on from, in its scratch folder."""

SYNC_EVERY = 5.0
"""Seconds: a file that is replaced more often, a checkpoint after short epochs, waits for the disk only so often."""

_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "ask for the right to write there, or take another folder"),
    errno.EROFS: "take another folder",
    errno.EXDEV: "all of a store must lie on one disk",
}
_log = logging.getLogger(__name__)


class Damaged(UserError):
    """A stored file is not what was written, or is missing: whoever can make it again may replace it."""


@dataclass(frozen=True)
class Artifact:
    """A stored entry: named tensors and a JSON description."""

    tensors: Tensors
    meta: Meta


# -- errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk and the like into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        advice = _ADVICE.get(getattr(error, "errno", None) or 0, "free space or take another disk")
        raise UserError(f"{path}: cannot be written ({_reason(error)}); {advice}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell what is damaged, or missing, from what may not be read: only the first may be made anew."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(f"{path}: damaged ({_reason(error)})") from error
    except PermissionError as error:
        why = f"may not be read ({_reason(error)})"
        raise UserError(f"{path}: {why}; ask its owner for the right to read it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); see whether its disk is well") from error
    # What safetensors and json raise; a description without its fields, of another type or nested without end.
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}: damaged ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or str(error))


# -- durable files --------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or which names a folder has; where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a path to write to: the file there replaces `path` at the end, and is removed if anything fails.

    At every moment `path` is whole, in its old or its new form; where `durable`, even after a power cut.

    Raises:
        UserError: the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            yield partial
            if durable:
                sync(partial)
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(path: Path, meta: Meta) -> str:
    """Return the description of what is to be stored at `path` as JSON, which has no NaN and no infinity."""
    try:
        return json.dumps(meta, indent=1, allow_nan=False)
    except ValueError as error:
        field = next((name for name, value in meta.items() if not _finite(value)), None)
        if field is None:
            raise
        raise UserError(f"{path}: not stored, for its {one_line(field)} holds NaN or infinity") from error


def _finite(value: Any) -> bool:
    """Whether a JSON value holds no NaN and no infinity."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused: undefined must be None."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n")


def require_utf8(path: Path, option: str) -> None:
    """Refuse a name that is no UTF-8: safetensors cannot write to it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} {plain_name(str(path))}: its name is no UTF-8; choose another folder") from None


def make_folder(path: Path | str, option: str) -> Path:
    """Create a folder, check that it can be written, and return it.

    Raises:
        UserError: it cannot, naming the command-line option that asked for it; or its name is no UTF-8.
    """
    path = Path(path)
    require_utf8(path, option)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); choose another folder") from error
    return path


# -- tensors --------------------------------------------------------------------------------------------------------


def _ready(tensors: Tensors) -> Tensors:
    """Return the tensors as safetensors takes them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_tensors(path: Path) -> Tensors:
    """Read a safetensors file, anybody's; one that is missing, truncated or something else is a `UserError`."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({one_line(str(error))})") from error


def previous_of(path: Path) -> Path:
    """Return where `save_tensors` keeps the file that it replaced."""
    return path.with_name(f"{path.name}.previous")


def write_tensors(path: Path, tensors: Tensors, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that umask gives; safetensors alone lets only the owner read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(_ready(tensors), path, metadata=header)
    path.chmod(mode)


def save_tensors(path: Path, tensors: Tensors, meta: Meta) -> None:
    """Write tensors with a JSON description and a digest of both in the file's header, atomically: a checkpoint.

    The file that it replaces is kept as `previous_of(path)`, of those that come faster than `SYNC_EVERY` some.

    Raises:
        UserError: the disk is full, or the like; or the description holds NaN.
    """
    tensors, text = _ready(tensors), to_json(path, meta)
    header = {"meta": text, "sha256": _digest_of(tensors, text)}
    with replacing(path, durable=False) as partial:
        write_tensors(partial, tensors, header)
        if _keep_previous(path):
            sync(partial)


def check_tensors(path: Path) -> bool:
    """Check all that a file of `save_tensors` says; return whether it has a digest, as older files do not."""
    return _checked(path)[1]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; alone, safetensors says of one that may not be read that it is missing."""
    with reading(path):
        path.open("rb").close()
        with safe_open(path, framework="pt") as file:
            yield file


def _checked(path: Path) -> tuple[Artifact, bool]:
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
        artifact = Artifact(tensors, dict(json.loads(header["meta"])))
    if "sha256" not in header:
        return artifact, False
    if header["sha256"] != _digest_of(tensors, header["meta"]):
        raise Damaged(f"{path}: damaged (its bytes do not fit its digest)")
    return artifact, True


def _digest_of(tensors: Tensors, text: str) -> str:
    """Return the SHA-256 of all that a file of `save_tensors` says: names, types, shapes, numbers and description."""
    ordered = sorted(tensors.items())
    named = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in ordered]
    digest = hashlib.sha256(json.dumps([text, named]).encode())
    for _, tensor in ordered:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path) -> Artifact:
    """Read what `save_tensors` wrote; `Damaged` says what to do."""
    try:
        return _checked(path)[0]
    except Damaged as error:
        raise Damaged(f"{error}; delete it to start again") from None


def check_checkpoint(path: Path, shapes: Mapping[str, torch.Size] | None = None) -> tuple[Artifact, bool]:
    """Read a training's checkpoint and check what it says; return it, and whether it has a digest.

    Raises:
        Damaged: its digest does not fit, its description is not a training's, or its tensors are not of `shapes`.
        UserError: it may not be read.
    """
    artifact, digested = _checked(path)
    for name, value in artifact.meta.items():
        if name not in _FIELDS:
            raise Damaged(f"{path}: damaged (its description has {one_line(name)[:60]!r}, which no checkpoint has)")
        what, fits = _FIELDS[name]
        if not fits(value):
            raise Damaged(f"{path}: damaged (its {name} is {one_line(repr(value))[:60]}, not {what})")
    if "epochs" not in artifact.meta:
        raise Damaged(f"{path}: damaged (it does not say after how many epochs it was written)")
    if shapes is not None:
        _check_shapes(path, artifact.tensors, shapes)
    return artifact, digested


def _check_shapes(path: Path, tensors: Tensors, shapes: Mapping[str, torch.Size]) -> None:
    for name in sorted(tensors.keys() | shapes.keys()):
        if name not in tensors:
            raise Damaged(f"{path}: damaged (its tensor {name} is missing)")
        found = list(tensors[name].shape)
        if name not in shapes:
            raise Damaged(f"{path}: damaged (it has a tensor {one_line(name)[:60]!r}, which this training has not)")
        if found != list(shapes[name]):
            raise Damaged(f"{path}: damaged (its tensor {name} has shape {found}, not {list(shapes[name])})")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": ("a whole number from 0", lambda value: type(value) is int and value >= 0),
    "losses": ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
    "seconds": ("a number", _is_number),
    "engines": ("a list of names", lambda value: isinstance(value, list) and all(isinstance(n, str) for n in value)),
}
"""What a training's checkpoint says of itself: `tailscope.training.loop.History`."""


def load_header(path: Path) -> Meta:
    """Read the description that `save_tensors` wrote, without the tensors and without checking the digest."""
    with opened(path) as file:
        return dict(json.loads(file.metadata()["meta"]))


def whole_checkpoint(folder: Path, shapes: Mapping[str, torch.Size] | None = None) -> tuple[Path, Artifact] | None:
    """Return the newest checkpoint in a scratch folder that is whole, and its path; None where there is no such file.

    A damaged one is named in a warning and left where it is; `shapes` are those of the training's tensors.

    Raises:
        UserError: one may not be read.
    """
    newest = folder / CHECKPOINT
    with reading(folder):
        there = [path for path in (newest, previous_of(newest)) if path.exists()]
    found, damaged = None, []
    for path in there:
        try:
            found = path, check_checkpoint(path, shapes)[0]
            break
        except Damaged as error:
            damaged.append(error)
    for problem in damaged:
        _log.warning("%s; %s", problem, "the one before it is taken" if found else "training starts again")
    return found


def _keep_previous(path: Path) -> bool:
    """Keep a file that is about to be replaced, unless that was just done; return whether the new one is to be synced.

    So of two files, one is on the disk whatever happens, and epochs of milliseconds do not wait for it.
    """
    previous = previous_of(path)
    if not path.exists():
        return True
    if previous.exists() and 0 <= time.time() - previous.stat().st_ctime < SYNC_EVERY:
        return False
    sync(path)
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)  # `path` is there at every moment
    except OSError:  # a file system without hard links
        shutil.copyfile(path, previous)
    return True


def write(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` atomically, making its folder; text is UTF-8 with plain newlines."""
    with replacing(path, durable=False) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
