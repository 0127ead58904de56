"""NumPy's `.npz` and `.npy`, read without pickle, every size checked against the file before it is allocated."""

import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from tailscope.array_files.fields import SINGLE, Array, Arrays, Contents, Header, require_room, resolve, unread
from tailscope.errors import UserError

# What zipfile, zlib, NumPy's header parser and the file system raise on damaged files.
UNREADABLE: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, OverflowError, MemoryError, RuntimeError, SyntaxError,
    tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_MAGIC = b"\x93NUMPY"
_KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BOMB_BYTES, _BOMB_RATIO = 2**28, 100  # features hardly compress; sorted labels do, but are small


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return those of the fields that an `.npz` has.

    Raises:
        UserError: a field is missing, or holds Python objects.
        Exception: one of `UNREADABLE`, where the file is damaged.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) == _MAGIC:
            raise UserError(f"{path}: holds a single array; save the fields with np.savez, or call the file .npy")
        with zipfile.ZipFile(file) as archive:
            members = _members(path, archive)
            held = {name: _described(archive, member) for name, member in members.items()}
            found = resolve(path, held, required, optional)
            arrays = {field: _array(path, archive, members[name], name) for field, name in found.items()}
    return Contents(arrays, unread(path, held, found.values()))


def read_single(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return the array of an `.npy` as `SINGLE`; it has no fields.

    Raises:
        UserError: it holds Python objects.
        Exception: one of `UNREADABLE`, where the file is damaged.
    """
    with path.open("rb") as file:
        _check(path, SINGLE, file, path.stat().st_size)
        file.seek(0)
        return Contents({SINGLE: np.lib.format.read_array(file, allow_pickle=False)})


def write(path: Path, arrays: Arrays) -> None:
    """Write the arrays, uncompressed: features do not compress."""
    with path.open("wb") as file:  # to a path, np.savez would append ".npz"
        np.savez(file, allow_pickle=False, **arrays)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in members:
            raise UserError(f"{path}: holds {name!r} twice; write it anew")
        members[name] = member
    return members


def _described(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    if member.compress_type not in _KNOWN or not member.filename.endswith(".npy"):
        return Header("no array")
    with archive.open(member) as file:
        shape, dtype = _header(file)
    return Header("Python objects" if dtype.hasobject else dtype.name, shape)


def _array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Array:
    if member.compress_type not in _KNOWN or not member.filename.endswith(".npy"):
        raise UserError(f"{path}: {name} is not an array")
    if member.file_size > max(_BOMB_BYTES, _BOMB_RATIO * member.compress_size):
        ratio = member.file_size // max(member.compress_size, 1)
        raise UserError(f"{path}: {name} would unpack to {ratio:,} times its size; save it with np.savez, uncompressed")
    with archive.open(member) as file:
        _check(path, name, file, member.file_size)
    with archive.open(member) as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _check(path: Path, name: str, file: IO[bytes], size: int) -> None:
    """Check that an open `.npy` of `size` bytes holds plain numbers or text, exactly as many as it declares."""
    shape, dtype = _header(file)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are never unpickled; save plain arrays")
    if dtype.kind == "V" or (dtype.itemsize == 0 and math.prod(shape) > 0):
        raise UserError(f"{path}: {name} is {dtype}; expected plain numbers or text")
    require_room(path, name, shape, dtype.itemsize)
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{name} declares {dtype} {list(shape)}, but {size - file.tell()} bytes follow")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"version {version} of NumPy's format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a header that Python 2 wrote is read all the same
        shape, _, dtype = reader(file)
    return shape, dtype
