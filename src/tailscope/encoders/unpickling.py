"""Read what other people's trainings saved, without running anything: PyTorch's files and safetensors.

PyTorch's are read with `weights_only=True`: tensors, plain values, and the harmless types listed here. Objects of other
classes, such as a training's options, become empty placeholders: no class is imported, no function called. What is no
checkpoint is called by its name.
"""

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from tailscope.errors import GIT_LFS, UserError, message_of, require_file
from tailscope.store.files import load_tensors
from tailscope.tables.arrays import NUMPY_STAND_INS, UNREADABLE, require_own_sizes
from tailscope.tables.checks import listed

_PLACEHOLDER_OF = "placeholder_of"

# What training scripts keep beside the weights: plain values, of which unpickling runs no code of the file's choice.
# NumPy's arrays and numbers, rebuilt without NumPy's own unpickling; paths, and argparse's options.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *NUMPY_STAND_INS,
    *((pathlib.PosixPath, f"pathlib.{module}PosixPath") for module in ("", "_local.")),
    *((pathlib.PureWindowsPath, f"pathlib.{module}WindowsPath") for module in ("", "_local.")),
]

_SIGNATURES: list[tuple[re.Pattern[bytes], str]] = [
    (re.compile(re.escape(GIT_LFS)), "is a Git-LFS pointer, not the weights; fetch them with `git lfs pull`"),
    (re.compile(rb"(?i)\s*<(!doctype|html|\?xml)"), "is a web page, not the weights; download the file itself"),
    (re.compile(rb"\x89HDF"), "is an HDF5 file, as Keras writes; a PyTorch state_dict or .safetensors is needed"),
    (re.compile(rb"\x1f\x8b"), "is compressed with gzip; unpack it first"),
    (re.compile(rb"BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"), "is a compressed archive; unpack it first"),
    (re.compile(rb"\x93NUMPY"), "is a NumPy array; a PyTorch state_dict or .safetensors is needed"),
    (re.compile(rb"GGUF"), "is a GGUF file of quantised weights; a PyTorch state_dict or .safetensors is needed"),
    (re.compile(rb"\s*[{\[]"), "is JSON text, an index perhaps, and holds no weights; give the file that it names"),
    (re.compile(rb"(?s).{257}ustar"), "is a tar archive; unpack it first"),
]


def content(path: Path) -> Any:
    """Return what a file holds: dictionaries of tensors and plain values, or whatever `torch.save` was given.

    Raises:
        UserError: the file is missing, damaged or something else, or holds more than tensors and plain values.
    """
    require_file(path, "--checkpoint ")
    try:
        return _loaded(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {culprit[1]}, and only tensors are unpickled" if culprit else "is no checkpoint"
        raise UserError(f"{path}: {what}; save the model's state_dict by itself") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({message_of(error)[:80]})") from None


def _loaded(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:  # whatever the suffix
        return load_tensors(path)
    for pattern, what in _SIGNATURES:
        if pattern.match(head):
            raise UserError(f"{path}: {what}")
    if head.startswith(b"PK"):
        _require_torch_archive(path)
    elif path.suffix == ".safetensors":
        return load_tensors(path)
    return _unpickle(path)


def _require_torch_archive(path: Path) -> None:
    """Refuse zip archives that `torch.save` did not write."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        inner = {name.partition("/")[2] for name in names}
        if "constants.pkl" in inner:
            raise UserError(
                f"{path}: is a TorchScript archive, which holds code; save the network's state_dict instead"
            )
        if "data.pkl" in inner:
            require_own_sizes(archive)
            return
    kind = "NumPy's .npz" if all(n.endswith(".npy") for n in names) else f"a zip archive of {listed(names, 3)}"
    raise UserError(f"{path}: is {kind}, not what torch.save writes; a PyTorch state_dict or .safetensors is needed")


def _unpickle(path: Path) -> Any:
    with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old pickle protocols; what cannot be read is refused
        is_zip = zipfile.is_zipfile(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if is_zip else []
        with torch.serialization.safe_globals([(_placeholder(name), name) for name in unknown]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    if (name := getattr(content, _PLACEHOLDER_OF, None)) is not None:
        raise pickle.UnpicklingError(f"GLOBAL {name} at the top")
    return content


class _Uncallable(type):
    """Unpickling an object of a class asks `__new__` alone; what calls it may be any function of the file's choice."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise pickle.UnpicklingError(f"GLOBAL {cls.__name__} would be called")


def _placeholder(name: str) -> type:
    """Return a class that stands for the one that a file calls `name`: its objects are empty dictionaries."""

    def make(_: type, *__: Any) -> Any:
        made: OrderedDict[Any, Any] = OrderedDict()  # which `torch.load` lets the file fill
        setattr(made, _PLACEHOLDER_OF, name)
        return made

    return _Uncallable(name, (), {"__new__": make})
