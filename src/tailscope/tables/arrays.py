"""Named arrays in one file each: NumPy's `.npz` and `.npy`, safetensors, and what `torch.save` writes.

What the formats share: which array is which field, what a file holds in words, whether it fits, text as JSON.

Nothing in a file is ever run. NumPy's files are read without pickle, every size checked against the file before it is
allocated. `torch.load(weights_only=True)` reads `.pt` and `.pth`, after the archive's sizes and checksums and the names
in its pickle were looked at: only those below may occur. NumPy's own unpickling is not used, since it trusts what it
reads: the classes here stand for NumPy's and rebuild plain numbers and text from their bytes, and nothing else.
"""

import csv
import json
import math
import pickle
import pickletools
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from tailscope.effort import usable_memory
from tailscope.errors import UserError, first_few, plain_name
from tailscope.store.files import write_tensors

UNREADABLE: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, MemoryError,
    RuntimeError, SyntaxError, tokenize.TokenError, struct.error, csv.Error, pickle.UnpicklingError,
    zipfile.BadZipFile, zlib.error, SafetensorError,
)  # fmt: skip
"""What the libraries that read files raise on damaged ones; nothing else is caught."""

ALIASES: dict[str, tuple[str, ...]] = {
    "features": ("features", "feature", "embeddings", "embedding", "X"),
    "labels": ("labels", "label", "targets", "target", "y"),
    "class_names": ("class_names", "classes_"),
    "ids": ("ids", "id"),
    "groups": ("groups", "group"),
    "weight": ("weight", "coef_", "coef"),
    "bias": ("bias", "intercept_", "intercept"),
}
"""The names that a field may have. The first, its own, wins over the others, of which a file may hold only one."""

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
    """Return the name in the file of each field among all that it holds; refuse a file that lacks or doubles one."""
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
    """Return the bytes of an array that a file declares; refuse before it is read what no memory here could hold."""
    if any(length < 0 for length in shape):
        raise UserError(f"{where}: {name} declares the shape {list(shape)}: damaged")
    size = math.prod(shape) * max(itemsize, 1)
    if size > usable_memory():
        raise UserError(f"{where}: {name} declares {size / 2**30:,.0f} GiB, more than the memory here")
    return size


class Contents(NamedTuple):
    """What was read of a file: arrays by the name of the field, and what was left out or guessed, one line each."""

    arrays: Arrays
    notes: tuple[str, ...] = ()


def parse_json(text: str) -> Any:
    """Return what the text says as JSON, None where it is no JSON or nests deeper than Python follows."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def header_to_arrays(path: Path, header: dict[str, str]) -> Arrays:
    """Return what a header of texts says: `class_names`, a JSON list of text, and `provenance`, taken as it is."""
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
    names = arrays.get("class_names")
    texts = {
        "provenance": arrays.get("provenance"),
        "class_names": None if names is None else json.dumps(names.tolist()),
    }
    return {field: str(text) for field, text in texts.items() if text is not None}


_MAGIC = b"\x93NUMPY"
_KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BOMB_BYTES, _BOMB_RATIO = 2**28, 100  # features hardly compress; sorted labels do, but are small


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return those of the fields that an `.npz` has."""
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
    """Return the array of an `.npy` as `SINGLE`, mapped into memory as it is needed; it has no fields."""
    with path.open("rb") as file:
        _check(path, SINGLE, file, path.stat().st_size, mapped=True)
    # Copied where it is written to, which is nowhere: PyTorch wants memory that it may write to.
    return Contents({SINGLE: np.load(path, mmap_mode="c", allow_pickle=False)})


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write the arrays, uncompressed: features do not compress."""
    with path.open("wb") as file:  # to a path, np.savez would append ".npz"
        np.savez(file, allow_pickle=False, **arrays)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members = archive.infolist()
    names = Counter(member.filename.removesuffix(".npy") for member in members)
    if len(names) < len(members):
        raise UserError(f"{path}: holds {names.most_common(1)[0][0]!r} twice; write it anew")
    return dict(zip(names, members, strict=True))


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


def _check(path: Path, name: str, file: IO[bytes], size: int, *, mapped: bool = False) -> None:
    """Check that an open `.npy` of `size` bytes holds plain numbers or text, exactly as many as it declares.

    One that is mapped may be larger than memory.
    """
    shape, dtype = _header(file)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which are never unpickled; save plain arrays")
    if dtype.kind == "V" or (dtype.itemsize == 0 and math.prod(shape) > 0):
        raise UserError(f"{path}: {name} is {dtype}; expected plain numbers or text")
    if not mapped:
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


_TEXT = ("ids", "groups")
_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def read_safetensors(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return those of the fields that the file has; bfloat16 and smaller floats become float32."""
    if plain_name(str(path)) != str(path):
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


_PLAIN = (str, bool, int, float)
_OPERANDS = ("BINUNICODE", "GLOBAL", "BININT", "BININT1", "BININT2", "LONG1")
_ITEM_BYTES = {
    "ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8, "Float": 4, "Int": 4, "QInt32": 4, "Half": 2,
    "BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "QInt8": 1, "QUInt8": 1, "QUInt4x2": 1, "QUInt2x4": 1,
    "Untyped": 1,
}  # fmt: skip
_PLAIN_DTYPE = re.compile(r"[biufSU]\d{1,9}")
_NAMES = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(storage\.)?\w+Storage|torch\.Size|"
    r"collections\.OrderedDict|_codecs\.encode|numpy\.(ndarray|dtype)|"
    r"numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)"
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


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    return None if dtype.dtype is None else np.frombuffer(raw, dtype.dtype)[0].item()


NUMPY_STAND_INS: list[Any] = [
    (_Array, "numpy.ndarray"),
    (_Dtype, "numpy.dtype"),
    *(
        (lambda *_: _Array(), f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
    ),  # NumPy 1's name, NumPy 2's
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""What stands for NumPy's own classes in `torch.serialization.safe_globals`: those follow pointers from the file."""


def read_pickled(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
    """Return those of the fields that the file has: a dict's, or those of a pair (features, labels)."""
    content = _load(path)
    if isinstance(content, list | tuple) and len(content) == 2 and all(map(_is_array, content)):
        content = {"features": content[0], "labels": content[1]}
    if not isinstance(content, Mapping) and (_is_array(content) or not required):
        return Contents({SINGLE: _plain_array(path, SINGLE, content)})
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: holds {_in_pickle(content)}; save a dict of {', '.join(required)}")
    held = {name: _in_pickle(value) for name, value in content.items()}
    found = resolve(path, held, required, optional)
    arrays = {field: _plain_array(path, name, content[name]) for field, name in found.items()}
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
    """Check that every tensor's storage is as large as its record: PyTorch reads on where it declares more."""
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
    """Yield kind, record and number of values of each storage: the persistent ids, in `torch.save`'s one form.

    What is put on the stack in any other way is None here.
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
    pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    for operation, argument, _ in chain.from_iterable(map(pickletools.genops, pickles)):
        if "GLOBAL" in operation.name or operation.name in ("INST", "EXT1", "EXT2", "EXT4"):
            name = str(argument).replace(" ", ".")
            if not _NAMES.fullmatch(name):
                raise UserError(
                    f"{path}: holds {name!r}, which is no tensor and is never unpickled; save a dict of tensors"
                )


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | _Array)


def _in_pickle(value: Any) -> Header:
    if isinstance(value, torch.Tensor):
        return Header(str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if isinstance(value, _Array):
        if value.array is None:
            return Header("a NumPy array of Python objects or records")
        return Header(value.array.dtype.name, value.array.shape)
    if isinstance(value, list | tuple):
        return Header(f"{type(value).__name__} of {len(value)}")
    return Header(f"a {type(value).__name__}")


def _plain_array(path: Path, name: str, value: Any) -> Array:
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
    raise UserError(f"{path}: {name} is {_in_pickle(value)}; save it as a tensor or an array")
