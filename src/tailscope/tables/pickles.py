"""What `torch.save` writes, `.pt` and `.pth`: a dict of tensors, arrays and plain values, a pair or a single one.

`torch.load(weights_only=True)` reads it, after the archive's sizes and checksums and the names in its pickle were
looked at: only the names below may occur. NumPy's own unpickling is not used, since it trusts what it reads: the
classes here stand for NumPy's and rebuild plain numbers and text from their bytes, and nothing else.
"""

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailscope.errors import UserError
from tailscope.tables.arrays import SINGLE, Array, Contents, Header, require_room, resolve, to_array, unread

# What zipfile, PyTorch's restricted unpickler and NumPy raise on damaged files.
UNREADABLE: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
    MemoryError, RuntimeError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_PLAIN = (str, bool, int, float)
_OPERANDS = ("BINUNICODE", "GLOBAL", "BININT", "BININT1", "BININT2", "LONG1")
_ITEM_BYTES = {
    "ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8, "Float": 4, "Int": 4, "QInt32": 4, "Half": 2,
    "BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "QInt8": 1, "QUInt8": 1, "QUInt4x2": 1, "QUInt2x4": 1,
    "Untyped": 1,
}  # fmt: skip
_PLAIN_DTYPE = re.compile(r"[biufSU]\d{1,9}")
_NAMES = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch \w+Storage|torch\.storage \w+Storage|torch Size|"
    r"collections OrderedDict|_codecs encode|numpy (ndarray|dtype)|"
    r"numpy\.(_core|core)\.multiarray (_reconstruct|scalar)"
)


class _Dtype:
    """Stands for `numpy.dtype` while a file is read; without one of Python objects or records."""

    dtype: np.dtype[Any] | None = None

    def __init__(self, code: str, *_: object) -> None:
        if _PLAIN_DTYPE.fullmatch(code):
            self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.dtype is not None and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for `numpy.ndarray` while a file is read; without an array where its values are no plain ones."""

    array: Array | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, raw = state
        if dtype.dtype is not None:
            self.array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if by_columns else "C")


def _empty(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    return None if dtype.dtype is None else np.frombuffer(raw, dtype.dtype)[0].item()


NUMPY_STAND_INS: list[Any] = [
    (_Array, "numpy.ndarray"),
    (_Dtype, "numpy.dtype"),
    *((_empty, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # NumPy 1's name, NumPy 2's
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What stands for NumPy's own classes in `torch.serialization.safe_globals`: those follow pointers from the file."""


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return those of the fields that the file has: a dict's, or those of a pair (features, labels).

    Raises:
        UserError: a field is missing, or the file holds other things than tensors, arrays and plain values.
        Exception: one of `UNREADABLE`, where the file is damaged.
    """
    content = _load(path)
    if isinstance(content, list | tuple) and len(content) == 2 and all(map(_is_array, content)):
        content = {"features": content[0], "labels": content[1]}
    if not isinstance(content, Mapping) and (_is_array(content) or not required):
        return Contents({SINGLE: _array(path, SINGLE, content)})
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: holds {_described(content)}; save a dict of {', '.join(required)}")
    held = {name: _described(value) for name, value in content.items()}
    found = resolve(path, held, required, optional)
    arrays = {field: _array(path, name, content[name]) for field, name in found.items()}
    return Contents(arrays, unread(path, held, found.values()))


def _load(path: Path) -> Any:
    """Load the file after looking at everything that it declares."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("no archive as torch.save writes them since PyTorch 1.6; save it again")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("compressed; torch.save does not compress")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("declares more bytes than the file has")
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"{broken} differs from its checksum")
            _check_names(path, archive)
            require_own_sizes(archive)
        file.seek(0)
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_STAND_INS):
            warnings.simplefilter("ignore")  # of storages' old names
            return torch.load(file, map_location="cpu", weights_only=True)


def require_own_sizes(archive: zipfile.ZipFile) -> None:
    """Check that every tensor's storage is as large as its record: PyTorch reads on where it declares more.

    Raises:
        ValueError: one is not, or the archive is not as `torch.save` writes it.
    """
    sizes = {member.filename.partition("/")[2].lower(): member.file_size for member in archive.infolist()}
    if len(sizes) < len(archive.infolist()):
        raise ValueError("two members have one name")
    for member in archive.namelist():
        if member.endswith(".pkl"):
            for kind, key, count in _storages(archive.read(member)):
                item = _ITEM_BYTES.get(kind.rpartition(" ")[2].removesuffix("Storage"), 0)
                if item == 0 or sizes.get(f"data/{key}".lower()) != count * item:
                    raise ValueError("a tensor declares another size than its bytes have")


def _storages(pickled: bytes) -> Iterator[tuple[str, str, int]]:
    """Yield kind, record and number of values of each storage: what a pickle's persistent ids say, in the one form that
    `torch.save` writes; what is put on the stack in any other way is None here.
    """
    memo: dict[Any, Any] = {}
    top: Any = None
    run: list[Any] | None = None  # since the last mark, of plain operands alone
    for operation, argument, _ in pickletools.genops(pickled):
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = top
        elif name in ("BINGET", "LONG_BINGET", *_OPERANDS):
            top = argument if name in _OPERANDS else memo.get(argument)
            if run is not None:
                run.append(top)
        elif name == "BINPERSID":
            match top:
                case ("storage", str(kind), str(key), str(), int(count)):
                    yield kind, key, count
                case _:
                    raise ValueError("a tensor's bytes are not named as torch.save names them")
            top, run = None, None
        else:
            top = tuple(run) if name == "TUPLE" and run is not None else None
            run = [] if name == "MARK" else None


def _check_names(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse a pickle that names anything but tensors, arrays and plain values; nothing of it has run yet."""
    for member in archive.namelist():
        if not member.endswith(".pkl"):
            continue
        for operation, argument, _ in pickletools.genops(archive.read(member)):
            if "GLOBAL" in operation.name or operation.name in ("INST", "EXT1", "EXT2", "EXT4"):
                name = str(argument)
                if not _NAMES.fullmatch(name):
                    raise UserError(
                        f"{path}: holds {name.replace(' ', '.')!r}, which is no tensor and is never unpickled; save a "
                        "dict of tensors"
                    )


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | _Array)


def _described(value: Any) -> Header:
    if isinstance(value, torch.Tensor):
        return Header(str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if isinstance(value, _Array):
        if value.array is None:
            return Header("a NumPy array of Python objects or records")
        return Header(value.array.dtype.name, value.array.shape)
    if isinstance(value, list | tuple):
        return Header(f"{type(value).__name__} of {len(value)}")
    return Header(f"a {type(value).__name__}")


def _array(path: Path, name: str, value: Any) -> Array:
    """Return a tensor, an array, a text or a list of plain values as an array."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path}: {name} is no plain tensor; save it dense and on the CPU")
        if require_room(path, name, value.shape, value.element_size()) > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} declares more values than the file has; save it after .contiguous()")
        return to_array(value).copy()
    if isinstance(value, _Array) and value.array is not None:
        return value.array
    if isinstance(value, _PLAIN):
        return np.asarray(value)
    if isinstance(value, list | tuple):
        kinds = {type(item) for item in value}
        if len(kinds) == 1 and kinds <= set(_PLAIN):
            return np.asarray(value)
    raise UserError(f"{path}: {name} is {_described(value)}; save it as a tensor or an array")
