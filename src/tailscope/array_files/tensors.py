"""Safetensors: numbers as tensors, text of the rows as bytes, class names in the header."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tailscope.array_files.text import Array, Arrays, arrays_to_header, header_to_arrays, message_of
from tailscope.errors import UserError


def read(path: Path, wanted: Sequence[str]) -> Arrays:
    """Return those of the wanted fields that the file has; bfloat16 becomes float32.

    Raises:
        UserError: the file is damaged.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable .safetensors, or truncated ({message_of(error)})") from None
    arrays = {name: _to_array(tensors[name]) for name in wanted if name in tensors}
    return arrays | header_to_arrays(path, {k: v for k, v in header.items() if k in wanted})


def write(path: Path, arrays: Arrays) -> None:
    """Write the arrays; `class_names` and `provenance` go to the header.

    Raises:
        OSError: the disk refuses.
    """
    header = arrays_to_header(arrays)
    tensors = {name: _to_tensor(array) for name, array in arrays.items() if name not in header}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise OSError(message_of(error)) from error
    path.chmod(mode)  # safetensors leaves files that only their owner can read


def _to_array(tensor: torch.Tensor) -> Array:
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if array.dtype == np.uint8 and array.ndim == 2:
        padded = np.ascontiguousarray(array).view(f"S{array.shape[1]}")[:, 0]
        return np.char.decode(padded, "utf-8", "replace")
    return array


def _to_tensor(array: Array) -> torch.Tensor:
    if array.dtype.kind == "U":
        encoded = np.char.encode(array, "utf-8")
        array = encoded.view(np.uint8).reshape(len(array), encoded.itemsize)
    return torch.from_numpy(np.ascontiguousarray(array))
