"""Extract features of images to a file: resumable, and never holding them twice."""

import time
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tailscope import array_files
from tailscope.data.decoding import DecodedBatch, Unreadable, decode, from_all_over, refuse
from tailscope.data.streams import Images
from tailscope.encoders.encoder import Encoder
from tailscope.encoders.shards import Shards
from tailscope.errors import UserError
from tailscope.feature_table import FeatureTable
from tailscope.features import forward
from tailscope.field_checks import listed, require_finite
from tailscope.training.runtime import Runtime


@dataclass(frozen=True)
class Options:
    """How features are extracted.

    Attributes:
        precision: `fp32`, without TF32: what geometry wants; or `auto`: bfloat16 where the device has it.
        stored: the type of the features in the file; float16 halves it, at three significant digits.
        batch: images at a time.
        save_every: seconds between two savings, which a kill costs at most.
        shard: images between two savings, where so many are done before that time.
        workers: processes that decode; None decides by the number and kind of images.
        skip_unreadable: leave out images that cannot be read, instead of stopping at the first batch with some.
    """

    precision: Literal["fp32", "auto"] = "fp32"
    stored: Literal["float32", "float16"] = "float32"
    batch: int = 64
    save_every: float = 30.0
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
    images: Images,
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
            on them; images cannot be read; the user's transform or network fails; or the network gives NaN or infinity.
    """
    options = options or Options()
    array_files.check_writable(out)
    dtype = runtime.dtype(options.precision)
    made_by = {**encoder.spec(), "precision": str(dtype).removeprefix("torch."), "stored": options.stored}
    _try_first(encoder, images, options)
    shards = Shards(out, len(images))
    with shards.opened({**made_by, "images": images.fingerprint()}):
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


def _try_first(encoder: Encoder, images: Images, options: Options) -> None:
    """Preprocess a few images from all over the data, so that what cannot work fails before the work.

    Raises:
        UserError: the user's transform fails, or images come out in several sizes.
    """
    rows = from_all_over(len(images))
    for _ in decode(images, encoder.preprocessing, [rows] if options.batch > 1 else [[row] for row in rows], workers=0):
        pass


def _extract_missing(encoder: Encoder, images: Images, shards: Shards, runtime: Runtime, options: Options) -> None:
    """Write shards of all images that have none yet.

    Batches begin at multiples of their size, whatever was done before: an image's features depend on its batch in the
    last bits, and a killed run ends with the same as one that was not.
    """
    missing = shards.missing()
    batches = [batch for run in missing for batch in _on_grid(run, options.batch)]
    decoding = decode(
        images,
        encoder.preprocessing,
        batches,
        workers=options.workers,
        pin_memory=runtime.device.type == "cuda",
    )
    encoder.model.to(runtime.device)
    dtype = runtime.dtype(options.precision)
    done = shards.total - sum(map(len, missing))
    with runtime.progress.task(f"features of {images.name}", shards.total, done) as advance:
        part = _Part(images.name, shards, options)
        for batch, decoded in zip(batches, decoding, strict=True):
            if decoded.unreadable and not options.skip_unreadable:
                raise refuse(images, decoded.unreadable)
            if batch.start != part.end:
                part = part.save(batch.start)
            features = torch.empty(0, encoder.width)
            if len(decoded.images):
                features = forward(encoder.features, decoded.images, runtime.device, dtype).float().cpu()
            _require_width(encoder, features, decoded, images)
            part.add(batch, features, decoded)
            if part.is_due():
                part = part.save(batch.stop)
                runtime.progress.safe_point()
            advance(len(batch))
        part.save(shards.total)


def _on_grid(run: range, size: int) -> list[range]:
    """Cut a run of images into batches that begin at multiples of their size.

    >>> _on_grid(range(70, 150), 64)
    [range(70, 128), range(128, 150)]
    """
    cuts = [run.start, *range(run.start - run.start % size + size, run.stop, size), run.stop]
    return [range(start, stop) for start, stop in pairwise(cuts)]


class _Part:
    """What was done since the last saving: features, rows and unreadable images of `start` to `end`."""

    def __init__(self, name: str, shards: Shards, options: Options, start: int = 0) -> None:
        self._name, self._shards, self._options = name, shards, options
        self.start = self.end = start
        self._done: list[tuple[Tensor, Tensor, list[Unreadable]]] = []
        self._since = time.monotonic()

    def add(self, batch: range, features: Tensor, decoded: DecodedBatch) -> None:
        """Keep the features of a batch in memory."""
        self.end = batch.stop
        self._done.append((features.to(getattr(torch, self._options.stored)), decoded.rows, decoded.unreadable))

    def is_due(self) -> bool:
        """Whether it is time to save."""
        late = time.monotonic() - self._since >= self._options.save_every
        return late or self.end - self.start >= self._options.shard

    def save(self, start: int) -> "_Part":
        """Write a shard of what there is; return the part that begins anew at an image.

        Raises:
            UserError: features are not finite.
        """
        if self._done:
            features, rows, unreadable = zip(*self._done, strict=True)
            block = torch.cat(features)
            if len(block):
                what = f"{self._name}: {self._options.stored} features of images {self.start} to {self.end - 1}"
                require_finite(what, block)
            self._shards.write(self.start, block, torch.cat(rows), list(chain.from_iterable(unreadable)))
        return _Part(self._name, self._shards, self._options, start)


def _require_width(encoder: Encoder, features: Tensor, decoded: DecodedBatch, images: Images) -> None:
    """Check that a batch has a row of features for each image, as wide as those of the probe.

    Raises:
        UserError: it has not: the width follows the size of the images, or the model drops a dimension.
    """
    if features.shape != (len(decoded.images), encoder.width):
        names = listed([images.ids[row] for row in decoded.rows.tolist()], 3)
        raise UserError(
            f"{encoder.name}: its features of {names}, an input of shape {list(decoded.images.shape)}, are "
            f"{list(features.shape)}, not {[len(decoded.images), encoder.width]}; let the model pool them, or a "
            "transform make images of one size"
        )


def _merge(shards: Shards) -> tuple[Tensor, Tensor]:
    """Return all features [N, d] and rows [N]; beside them, one shard at a time is in memory."""
    features, rows = torch.empty(0), torch.empty(shards.readable(), dtype=torch.int64)
    filled = 0
    for start in shards.starts:
        part, part_rows = shards.read(start)
        if filled == 0:
            features = part.new_empty(len(rows), part.shape[1])
        end = filled + len(part_rows)
        features[filled:end], rows[filled:end] = part, part_rows
        filled = end
    return features, rows


def _table(features: Tensor, rows: Tensor, images: Images, provenance: dict[str, Any], out: Path) -> FeatureTable:
    names = images.class_names
    numbered = not images.named and names == tuple(str(k) for k in range(len(names)))
    picked = rows.tolist()
    return FeatureTable.from_arrays(
        features,
        images.labels[rows],
        class_names=None if numbered else names,  # numbers are no names: other files may know more classes
        ids=[images.ids[row] for row in picked],
        provenance=provenance,
        source=str(out),
    )
