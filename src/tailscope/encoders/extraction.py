"""Extract features of a stream of images to a file: resumable, and never holding them twice."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tailscope import array_files
from tailscope.data.decoding import DecodedBatch, Unreadable, decode, refuse
from tailscope.data.streams import ImageStream
from tailscope.encoders.encoder import Encoder
from tailscope.encoders.shards import Shards
from tailscope.errors import UserError
from tailscope.feature_table import FeatureTable
from tailscope.field_checks import require_finite
from tailscope.training.runtime import Runtime


@dataclass(frozen=True)
class Options:
    """How features are extracted.

    Attributes:
        precision: `fp32`, without TF32: what geometry wants; or `auto`: bfloat16 where the device has it.
        stored: the type of the features in the file; float16 halves it, at three significant digits.
        batch: images at a time.
        shard: images between two savings.
        workers: processes that decode; None decides by the number and kind of images.
        skip_unreadable: leave out images that cannot be read, instead of stopping at the first batch with some.
    """

    precision: Literal["fp32", "auto"] = "fp32"
    stored: Literal["float32", "float16"] = "float32"
    batch: int = 64
    shard: int = 10_000
    workers: int | None = None
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Extraction:
    """What an extraction did: the features as written, how many were there from a killed run, and what it skipped."""

    table: FeatureTable
    resumed: int
    skipped: list[Unreadable]


def extract_to_file(
    encoder: Encoder,
    images: ImageStream,
    out: Path,
    runtime: Runtime,
    options: Options | None = None,
    provenance: dict[str, Any] | None = None,
) -> Extraction:
    """Write the features of all images to `out`, continuing where a killed run of the same stopped.

    Args:
        encoder: the network.
        images: the images, in the order of the table's rows; their ids become the table's.
        out: `.npz`, `.safetensors` or `.parquet`.
        runtime: device and progress.
        options: how.
        provenance: what to record in the file besides the encoder.

    Raises:
        UserError: `out` cannot be written; shards of another extraction lie beside it, or another process is at work
            on them; images cannot be read; or the network gives NaN or infinity.
    """
    options = options or Options()
    array_files.check_writable(out)
    dtype = runtime.dtype(options.precision)
    made_by = {**encoder.spec(), "precision": str(dtype).removeprefix("torch."), "stored": options.stored}
    shards = Shards(out, len(images.labels), options.shard)
    with shards.opened({**made_by, "images": images.fingerprint(), "shard": options.shard}):
        resumed = shards.readable()
        _extract_missing(encoder, images, shards, runtime, options)
        skipped = shards.unreadable()
        if shards.readable() == 0:
            raise refuse(images, skipped) if skipped else UserError(f"{images.name}: no images")
        features, rows = _merge(shards)
        table = _table(features, rows, images, {**(provenance or {}), **made_by}, out)
        runtime.progress.note(f"writing {out}: {len(table)} rows, d = {table.width}")
        table.save(out)
    return Extraction(table, resumed, skipped)


def _extract_missing(encoder: Encoder, images: ImageStream, shards: Shards, runtime: Runtime, options: Options) -> None:
    todo = [shards.images(start) for start in shards.starts if not shards.is_done(start)]
    batches = [rows[i : i + options.batch] for rows in todo for i in range(0, len(rows), options.batch)]
    pin = runtime.device.type == "cuda"
    loader = iter(decode(images, encoder.preprocessing, batches, workers=options.workers, pin_memory=pin))
    encoder.model.to(runtime.device)
    done = shards.total - sum(map(len, todo))
    with runtime.progress.task(f"features of {images.name}", shards.total, done) as advance:
        for rows in todo:
            features, kept, unreadable = [], [], []
            for decoded in _next(loader, -(-len(rows) // options.batch)):
                if decoded.unreadable and not options.skip_unreadable:
                    raise refuse(images, decoded.unreadable)
                features.append(_forward(encoder, decoded.images, runtime.device, runtime.dtype(options.precision)))
                kept.append(decoded.rows)
                unreadable += decoded.unreadable
                advance(len(decoded.rows) + len(decoded.unreadable))
            block = torch.cat(features).to(getattr(torch, options.stored))
            if len(block):
                require_finite(f"{images.name}: {options.stored} features of images {rows[0]} to {rows[-1]}", block)
            shards.write(rows[0], block, torch.cat(kept), unreadable)


def _next(loader: Iterator[DecodedBatch], batches: int) -> Iterator[DecodedBatch]:
    for _ in range(batches):
        yield next(loader)


def _forward(encoder: Encoder, inputs: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the features [b, d], float32 on the CPU."""
    if len(inputs) == 0:
        return torch.empty(0, encoder.width)
    low = dtype != torch.float32
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=dtype, enabled=low),
    ):
        return encoder.features(inputs.to(device, non_blocking=True)).float().cpu()


def _merge(shards: Shards) -> tuple[Tensor, Tensor]:
    """Return all features [N, d] and rows [N]; beside them, one shard at a time is in memory."""
    total, filled = shards.readable(), 0
    first = shards.read(shards.starts[0])[0]
    features = torch.empty(total, first.shape[1], dtype=first.dtype)
    rows = torch.empty(total, dtype=torch.int64)
    for start in shards.starts:
        part, part_rows = shards.read(start)
        end = filled + len(part_rows)
        features[filled:end], rows[filled:end] = part, part_rows
        filled = end
    return features, rows


def _table(features: Tensor, rows: Tensor, images: ImageStream, provenance: dict[str, Any], out: Path) -> FeatureTable:
    names = images.class_names
    numbered = names == tuple(str(k) for k in range(len(names)))
    picked = rows.tolist()
    return FeatureTable.from_arrays(
        features,
        images.labels[rows.numpy()],
        class_names=None if numbered else names,  # numbers are no names: other files may know more classes
        ids=[images.ids[row] for row in picked],
        provenance=provenance,
        source=str(out),
    )
