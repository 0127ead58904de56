"""Named arrays in NumPy's files and in safetensors, and what all formats share.

What the formats share: which array is which field, what a file holds in words, whether it fits, text as JSON.

`ALIASES` is the one table of the names that a field may have. The field's own name, the first, wins over the others;
a file that holds two of the others is refused.

NumPy's `.npz` and `.npy`, read without pickle, every size checked against the file before it is allocated.
"""

import json
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from tailscope.errors import UserError, first_few
from tailscope.store.files import write_tensors

ALIASES: dict[str, tuple[str, ...]] = {
    "features": ("features", "feature", "embeddings", "embedding", "X"),
    "labels": ("labels", "label", "targets", "target", "y"),
    "class_names": ("class_names", "classes_"),
    "ids": ("ids", "id"),
    "groups": ("groups", "group"),
    "weight": ("weight", "coef_", "coef"),
    "bias": ("bias", "intercept_", "intercept"),
}
Array = npt.NDArray[Any]
Arrays = dict[str, Array]
SINGLE = "the array"  # the name of an array that a file holds alone
MOST_NAMED = 8


class Header(NamedTuple):
    """What a file says of an array before it is read: its type, and its shape where it has one."""

    dtype: str
    shape: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.dtype if self.shape is None else f"{self.dtype} {list(self.shape)}"


def resolve(
    where: Path | str, held: Mapping[str, Header], required: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Return the name in the file of each field that it holds.

    Args:
        where: the file, for messages.
        held: everything that the file holds, by name.
        required: fields that must be there.
        optional: fields that may be there.

    Raises:
        UserError: a required field is not there, or a field is there under two names, neither its own.
    """
    found = {}
    for field in (*required, *optional):
        names = [name for name in ALIASES.get(field, (field,)) if name in held]
        if len(names) > 1 and names[0] != field:
            raise UserError(f"{where}: holds both {names[0]!r} and {names[1]!r}; keep the one that is the {field}")
        if names:
            found[field] = names[0]
    missing = [field for field in required if field not in found]
    if missing:
        raise UserError(f"{where}: no field {missing[0]!r}; needs {', '.join(required)}, and holds {in_words(held)}")
    return found


def in_words(held: Mapping[str, Header]) -> str:
    """Return what a file holds, in words.

    >>> in_words({"feats": Header("float32", (600, 8)), "y": Header("int64", (600,))})
    "'feats' float32 [600, 8], 'y' int64 [600]"
    """
    return first_few([f"{name!r} {header}" for name, header in held.items()], MOST_NAMED) or "nothing"


def unread(where: Path | str, held: Iterable[str], read: Iterable[str]) -> tuple[str, ...]:
    """Return a note on what the file holds besides what was read, if there is such a thing."""
    left = [repr(name) for name in held if name not in set(read)]
    return (f"{where}: not read: {first_few(left, MOST_NAMED)}",) if left else ()


def require_room(where: Path | str, name: str, shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of an array that a file declares, before any is allocated.

    Raises:
        UserError: a dimension is negative, or the machine's memory could not hold the array.
    """
    if any(length < 0 for length in shape):
        raise UserError(f"{where}: {name} declares the shape {list(shape)}: damaged")
    size = math.prod(shape) * max(itemsize, 1)
    if size > _memory():
        raise UserError(f"{where}: {name} declares {size / 2**30:,.0f} GiB, more than this machine's memory")
    return size


def _memory() -> int:
    """Return the machine's memory in bytes; where the system does not tell, what 48 bits address."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**48


class Contents(NamedTuple):
    """What was read of a file.

    Attributes:
        arrays: by the name of the field.
        notes: what was left out or guessed, one line each.
    """

    arrays: Arrays
    notes: tuple[str, ...] = ()


def message_of(error: BaseException) -> str:
    """Return an exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(path: Path) -> str:
    r"""Return a path as text that any terminal and any file can hold: bytes that are no UTF-8 are replaced.

    >>> shown(Path("caf\udce9.npz"))
    'caf�.npz'
    """
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def parse_json(text: str) -> Any:
    """Return what the text says as JSON, None where it is no JSON or nests deeper than Python follows."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def header_to_arrays(path: Path, header: dict[str, str]) -> Arrays:
    """Return what a file's header of texts says: `class_names`, a JSON list, and `provenance`, taken as it is.

    Raises:
        UserError: `class_names` is no list of text.
    """
    arrays = {}
    if "provenance" in header:
        arrays["provenance"] = np.array(header["provenance"])
    if "class_names" in header:
        names = parse_json(header["class_names"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: class_names in the header is not a JSON list of text")
        arrays["class_names"] = np.array(names, dtype=np.str_)
    return arrays


def arrays_to_header(arrays: Arrays) -> dict[str, str]:
    """Return the header that `header_to_arrays` reads."""
    header = {}
    if "provenance" in arrays:
        header["provenance"] = str(arrays["provenance"])
    if "class_names" in arrays:
        header["class_names"] = json.dumps(arrays["class_names"].tolist())
    return header


# What zipfile, zlib, NumPy's header parser and the file system raise on damaged files.
UNREADABLE_NPZ: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, OverflowError, MemoryError, RuntimeError, SyntaxError,
    tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_MAGIC = b"\x93NUMPY"
_KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BOMB_BYTES, _BOMB_RATIO = 2**28, 100  # features hardly compress; sorted labels do, but are small


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
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


def write_npz(path: Path, arrays: Arrays) -> None:
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


# What safetensors raises on damaged files; it checks its header against the size of the file before it reads.
UNREADABLE_TENSORS: tuple[type[Exception], ...] = (
    OSError, ValueError, TypeError, OverflowError, MemoryError, RuntimeError, AttributeError, SafetensorError,
)  # fmt: skip
_TEXT = ("ids", "groups")
_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def read_safetensors(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return those of the fields that the file has; bfloat16 and smaller floats become float32.

    Raises:
        UserError: a field is missing, or the file's name is no UTF-8.
        Exception: one of `UNREADABLE`, where the file is damaged.
    """
    if shown(path) != str(path):
        raise UserError(f"{path}: safetensors opens only files whose names are UTF-8; rename it")
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        held = {name: Header(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        texts = {k: v for k, v in (file.metadata() or {}).items() if k in optional}
        found = resolve(path, held, required, optional)
        arrays = {}
        for field, name in found.items():
            require_room(path, name, held[name].shape or (), 1)
            arrays[field] = to_array(file.get_tensor(name), text=field in _TEXT)
    return Contents(arrays | header_to_arrays(path, texts), unread(path, held, found.values()))


def write_safetensors(path: Path, arrays: Arrays) -> None:
    """Write the arrays; `class_names` and `provenance` go to the header."""
    header = arrays_to_header(arrays)
    tensors = {name: _to_tensor(array) for name, array in arrays.items() if name not in header}
    write_tensors(path, tensors, header)


def to_array(tensor: torch.Tensor, *, text: bool = False) -> Array:
    """Return a tensor as an array; floats that NumPy lacks become float32, and uint8 [N, longest] text on demand."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS:
        tensor = tensor.float()
    array: Array = tensor.numpy()
    if text and array.dtype == np.uint8 and array.ndim == 2 and array.shape[1]:
        padded: Any = np.ascontiguousarray(array).view(f"S{array.shape[1]}")[:, 0]
        return np.char.decode(padded, "utf-8", "replace")
    return array


def _to_tensor(array: Array) -> torch.Tensor:
    if array.dtype.kind == "U":
        encoded = np.char.encode(array, "utf-8")
        array = encoded.view(np.uint8).reshape(len(array), encoded.itemsize)
    return torch.from_numpy(np.ascontiguousarray(array))
