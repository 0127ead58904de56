"""Safetensors: numbers as tensors, text of the rows as bytes, class names in the header."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tailscope.array_files.fields import (
    Array,
    Arrays,
    Contents,
    Header,
    arrays_to_header,
    header_to_arrays,
    require_room,
    resolve,
    shown,
    unread,
)
from tailscope.errors import UserError
from tailscope.store.files import write_tensors

# What safetensors raises on damaged files; it checks its header against the size of the file before it reads.
UNREADABLE: tuple[type[Exception], ...] = (
    OSError, ValueError, TypeError, OverflowError, MemoryError, RuntimeError, AttributeError, SafetensorError,
)  # fmt: skip
_TEXT = ("ids", "groups")
_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def read(path: Path, required: Sequence[str], optional: Sequence[str]) -> Contents:
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


def write(path: Path, arrays: Arrays) -> None:
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
