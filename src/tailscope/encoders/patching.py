"""Put another classifier into a checkpoint: the same file but for the bytes of one layer's weight and bias.

Nothing is unpickled and written anew, which would lose whatever beside the weights only the user's own code can read.
The tensors are found at their places in a copy of the file, and overwritten there in the type that they have.
"""

import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tailscope.diagnosis.soundness import cycles
from tailscope.encoders.checkpoints import Layer
from tailscope.encoders.unpickling import content
from tailscope.errors import UserError, first_few
from tailscope.store.files import replacing
from tailscope.tables.table import LinearLayer

_DESCRIPTOR = b"PK\x07\x08"
_HAS_DESCRIPTOR = 0x08  # of a zip member's flags: its checksum stands behind the data, too

CLEARLY = 0.25
"""How much more alike, as a cosine, rows must be to others than to their own to mean other classes.

Of two classifiers that were fitted to the same features, rows of one class have cosines of about 0.9, of two classes
of about 0: where classes are exchanged, the difference is far above this, and otherwise far below.
"""


class _Bytes(NamedTuple):
    """Where in a file a tensor's values are, in the order of its elements."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def replace_classifier(checkpoint: Path, layer: Layer, new: LinearLayer, out: Path) -> None:
    """Write a copy of a checkpoint whose layer is another classifier, whole or not at all.

    Args:
        checkpoint: a PyTorch file of the zip kind, or .safetensors; it stays as it is.
        layer: which of its tensors are the classifier's.
        new: of the same shape; rows are the network's outputs, in order.
        out: where to write.

    Raises:
        UserError: `out` is there or cannot be written; the shapes differ; the layer has no bias and the new one needs
            it; or the file is of PyTorch's old kind, or keeps the layer as a part or turned round.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; delete it, or choose another name")
    values = {layer.weight: new.weight}
    if layer.bias is not None:
        values[layer.bias] = new.bias
    elif bool(new.bias.any()):
        raise UserError(f"{checkpoint}: {layer.weight!r} has no bias beside it, which the new classifier needs")
    places = _in_safetensors(checkpoint) if _is_safetensors(checkpoint) else _in_archive(checkpoint, layer)
    with replacing(out) as written:
        shutil.copyfile(checkpoint, written)
        with written.open("r+b") as file:
            for name, value in values.items():
                _overwrite(file, places[name], value, f"{checkpoint}: {name!r}")
        if zipfile.is_zipfile(written):
            _renew_checksums(written, [places[name].start for name in values])


def require_same_order(checkpoint: Path, old: LinearLayer, new: LinearLayer) -> None:
    """Refuse a new classifier whose rows are clearly those of the checkpoint's in another order of the classes.

    Softmax does not see what all rows have in common, so that is taken off first.
    """
    if old.weight.shape != new.weight.shape:
        return  # which is told where it is written
    both = (layer.weight.double() for layer in (new, old))
    mine, theirs = (nn.functional.normalize(rows - rows.mean(dim=0)) for rows in both)
    alike = (mine @ theirs.T).numpy()
    moved: dict[int, int] = {}
    for cycle in cycles(range(len(alike)), -alike):
        given, rows = list(cycle), list(cycle.values())
        if (alike[given, rows] - alike[given, given]).mean() >= CLEARLY:
            moved |= cycle
    if moved:
        names = new.class_names or [str(k) for k in range(len(alike))]
        seen = first_few([f"“{names[k]}” is output {moved[k]} and not {k}" for k in sorted(moved)], 3)
        mend = "diagnose with labels that are the numbers of the network's outputs, and its classifier by --classifier"
        raise UserError(f"{new.source} and {checkpoint}: their classes are in different orders ({seen}); {mend}")


def _overwrite(file: BinaryIO, place: _Bytes, value: Tensor, what: str) -> None:
    if place.shape != tuple(value.shape):
        raise UserError(f"{what} is {list(place.shape)}, the new classifier's {list(value.shape)}")
    cast = value.detach().cpu().to(place.dtype).contiguous()
    if not bool(cast.isfinite().all()):
        raise UserError(f"{what} is {str(place.dtype).removeprefix('torch.')}, which cannot hold the new classifier")
    file.seek(place.start)
    file.write(cast.view(torch.uint8).numpy().tobytes())


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _in_safetensors(path: Path) -> dict[str, _Bytes]:
    """Return where every tensor is; the file was read before, and is sound."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Bytes(8 + length + one["data_offsets"][0], _SAFETENSORS[one["dtype"]], tuple(one["shape"]))
        for name, one in header.items()
        if one["dtype"] in _SAFETENSORS
    }


_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _in_archive(path: Path, layer: Layer) -> dict[str, _Bytes]:
    """Return where the layer's tensors are in what `torch.save` wrote.

    `FakeTensorMode` reads shapes and places without values, as PyTorch's guide to reading storage directly does.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is of PyTorch's old kind of file; load it and torch.save it again, then patch that")
    with FakeTensorMode():
        node = content(path)
    for key in layer.where:
        node = _child(node, key)
    found = {}
    for name in filter(None, (layer.weight, layer.bias)):
        tensor: Tensor = node[name]
        if not tensor.is_contiguous():
            raise UserError(f"{path}: {name!r} is stored turned round; load it and torch.save it again, contiguous")
        offset = tensor.untyped_storage()._checkpoint_offset
        assert offset is not None
        start = offset + int(tensor.storage_offset()) * tensor.element_size()
        found[name] = _Bytes(start, tensor.dtype, tuple(tensor.shape))
    return found


def _child(node: Any, key: str) -> Any:
    """Return what a dictionary or list of a checkpoint has under a key, as text."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    return next(value for name, value in items if str(name) == key)


def _renew_checksums(path: Path, starts: list[int]) -> None:
    """Write the checksums of the changed members anew; PyTorch does not read them, but unzip does."""
    with zipfile.ZipFile(path) as archive:
        directory, members = archive.start_dir, archive.infolist()
    with path.open("r+b") as file:
        entry = directory
        for member in members:
            file.seek(entry + 28)
            entry_length = 46 + sum(struct.unpack("<3H", file.read(6)))
            file.seek(member.header_offset + 26)
            data = member.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            if any(data <= start < data + member.file_size for start in starts):
                file.seek(data)
                _write_checksum(file, zlib.crc32(file.read(member.file_size)), member, entry, data)
            entry += entry_length


def _write_checksum(file: BinaryIO, checksum: int, member: zipfile.ZipInfo, entry: int, data: int) -> None:
    """Write a member's checksum into the directory, and into its own header or what follows its data."""
    places = [entry + 16]
    behind = data + member.file_size
    if member.flag_bits & _HAS_DESCRIPTOR:
        file.seek(behind)
        places.append(behind + 4 if file.read(4) == _DESCRIPTOR else behind)
    else:
        places.append(member.header_offset + 14)
    for place in places:
        file.seek(place)
        file.write(struct.pack("<I", checksum))
