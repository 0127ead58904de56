"""Read checkpoint files without running anything in them, and call what is no checkpoint by its name.

PyTorch's files are read with `weights_only=True`: tensors, plain values, and the harmless types listed here. Objects of
other classes, such as a training's options, become empty placeholders: no class is imported, no function called.

Backbones that tailscope trained itself, recalled from a store by key, with the images they were trained on.

A store may come from a stranger. What its descriptions name is looked up among the project's own networks and nowhere
else: nothing is imported, and sizes are bounded by the stored weights, which the network must fit.
"""

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.errors import GIT_LFS, UserError, not_a_file
from tailscope.methods import for_photos
from tailscope.methods.augmentations import size_of
from tailscope.networks import MODELS
from tailscope.store import Artifact, Store, load_tensors
from tailscope.tables.checks import listed
from tailscope.tables.files import message_of
from tailscope.tables.pickles import NUMPY_STAND_INS, UNREADABLE, require_own_sizes

State = dict[str, Tensor]

_PLACEHOLDER_OF = "placeholder_of"
_DEEPEST = 8
_MOST_CONTAINERS = 10_000

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
    (
        re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE),
        "is a web page, not the weights; download the file itself",
    ),
    (re.compile(rb"\x89HDF"), "is an HDF5 file, as Keras writes; a PyTorch state_dict or .safetensors is needed"),
    (re.compile(rb"\x1f\x8b"), "is compressed with gzip; unpack it first"),
    (re.compile(rb"BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"), "is a compressed archive; unpack it first"),
    (re.compile(rb"\x93NUMPY"), "is a NumPy array; a PyTorch state_dict or .safetensors is needed"),
    (re.compile(rb"GGUF"), "is a GGUF file of quantised weights; a PyTorch state_dict or .safetensors is needed"),
    (re.compile(rb"\s*[{\[]"), "is JSON text, an index perhaps, and holds no weights; give the file that it names"),
    (re.compile(rb"(?s).{257}ustar"), "is a tar archive; unpack it first"),
]


@dataclass(frozen=True)
class Container:
    """A dictionary of tensors in a checkpoint, and the keys that lead to it."""

    where: tuple[str, ...]
    state: State


def containers(path: Path) -> list[Container]:
    """Return all dictionaries of a checkpoint that hold tensors, the outermost first.

    Raises:
        UserError: see `tailscope.encoders.checkpoints.read`.
    """
    content = _content(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}; save the model's state_dict")
    if "state_dict_model" in content and "state_dict_block" in content:
        raise UserError(f"{path}: MiSLAS's extra block (Places-LT) is not supported; wrap it as module:factory")
    found = list(_walk(content))
    if not found:
        keys = listed([str(key) for key in content], 5) if content else "nothing"
        raise UserError(f"{path}: holds no tensors; at the top it has {keys}")
    return found


def _content(path: Path) -> Any:
    try:
        problem = not_a_file(path)
        if problem:
            raise UserError(f"--checkpoint {path}: is {problem}")
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f"--checkpoint {path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not head:
        raise UserError(f"{path}: the file is empty")
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
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = {name.partition("/")[2] for name in names}
            if "data.pkl" in inner and "constants.pkl" not in inner:
                require_own_sizes(archive)
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({message_of(error)[:80]})") from None
    if "constants.pkl" in inner:
        raise UserError(f"{path}: is a TorchScript archive, which holds code; save the network's state_dict instead")
    if "data.pkl" not in inner:
        kind = (
            "is NumPy's .npz" if all(n.endswith(".npy") for n in names) else f"is a zip archive of {listed(names, 3)}"
        )
        raise UserError(f"{path}: {kind}, not what torch.save writes; a PyTorch state_dict or .safetensors is needed")


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols; what cannot be read is refused below
            is_zip = zipfile.is_zipfile(path)
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if is_zip else []
            with torch.serialization.safe_globals([(_placeholder(name), name) for name in unknown]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {culprit[1]}, and only tensors are unpickled" if culprit else "is no checkpoint"
        raise UserError(f"{path}: {what}; save the model's state_dict by itself") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({message_of(error)[:80]})") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable checkpoint, or truncated ({message_of(error)[:80]})") from None
    name = getattr(content, _PLACEHOLDER_OF, None)
    if name is not None:
        raise UserError(f"{path}: holds {name}, and only tensors are unpickled; save the model's state_dict by itself")
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


def _walk(content: Mapping[Any, Any]) -> Iterator[Container]:
    """Yield every dictionary that holds tensors, level by level: of any depth that people nest, and no deeper."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen = 0
    while queue and seen < _MOST_CONTAINERS:
        where, node = queue.popleft()
        seen += 1
        items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
        state = {str(key): value for key, value in items if isinstance(value, Tensor)}
        if state and isinstance(node, Mapping):
            yield Container(where, state)
        if len(where) < _DEEPEST:
            queue.extend(((*where, str(k)), v) for k, v in items if isinstance(v, Mapping | list | tuple))


PREFIX = "store:"
_SHOWN = 12
_LARGEST = 1024
"""Side in pixels beyond which no backbone was trained."""


@dataclass(frozen=True, eq=False)
class StoredBackbone:
    """A trained backbone.

    Attributes:
        model: the call-string of its network.
        checkpoint: its weights.
        rows: of the true training set, which it was trained on.
        counts: [C] of those rows.
        image_size: side of the images that it was trained on where they were cropped from files, None elsewhere.
    """

    model: str
    checkpoint: Path
    rows: npt.NDArray[np.int64]
    counts: tuple[int, ...]
    image_size: int | None


def find(root: Path | None, key: str) -> StoredBackbone:
    """Return the backbone whose key begins with `key`: the `key` in a result's `provenance`.

    Raises:
        UserError: no store is given, it is not there or damaged, or not exactly one backbone has such a key.
    """
    if root is None:
        raise UserError(f"--model {PREFIX}{key}: give the store's folder with --store, OUT/store of the experiment")
    if not root.is_dir():
        raise UserError(f"--store {root}: no such folder")
    store = Store(root)
    keys = store.keys("stage1")
    matching = [known for known in keys if known.startswith(key)]
    if not key or len(matching) != 1:
        what = "no such backbone" if not matching else f"{len(matching)} backbones"
        have = listed([f"{known[:_SHOWN]} ({_describe(store.meta('stage1', known))})" for known in keys])
        raise UserError(f"--model {PREFIX}{key}: {what}; {root} has {have if keys else 'none'}")
    path = store.tensors_file("stage1", matching[0])
    return _checked(store.read("stage1", matching[0]), path)


def _checked(artifact: Artifact, path: Path) -> StoredBackbone:
    """Return the backbone of an entry, of which only what a training of ours may have written is believed.

    Raises:
        UserError: a field is missing, of another kind, or names no network of ours.
    """
    try:
        spec = artifact.meta["spec"]
        model, augment = str(spec["model"]), [str(call) for call in spec["augment"]]
        counts = tuple(int(n) for n in spec["data"]["counts"])
        rows = artifact.tensors["rows"].numpy()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path.parent}: is no backbone that tailscope stored ({type(error).__name__}: {error})"
        ) from None
    try:
        MODELS.parse(model)
        size = size_of(augment) if for_photos(augment) else None
    except UserError as error:
        raise UserError(
            f"{path.parent / 'meta.json'}: {error}; names in a file are only looked up, never run"
        ) from None
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0 or rows.min() < 0:
        raise UserError(f"{path}: its rows {list(rows.shape)} are no row numbers of training images")
    if size is not None and not 1 <= size <= _LARGEST:
        raise UserError(f"{path.parent / 'meta.json'}: images of {size} pixels; at most {_LARGEST} are believed")
    return StoredBackbone(model, path, rows, counts, size)


def _describe(meta: dict[str, Any]) -> str:
    try:
        spec = meta["spec"]
        how = "+".join([*spec["augment"], *([spec["mix"]] if spec["mix"] else [])])
        return f"{spec['data']['name']} {spec['data']['profile']}, {how}, seed {meta['seed']}"
    except (KeyError, TypeError, AttributeError):
        return "no description"
