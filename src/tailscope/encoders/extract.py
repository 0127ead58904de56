"""From names of a network and of images to a file of features.

Extract features of images to a file: resumable, and never holding them twice.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tailscope.data.decoding import DecodedBatch, Unreadable, decode, find_unreadable, from_all_over, refuse
from tailscope.data.images import ImageError, Images, Rows
from tailscope.data.sources import OpenedImages, open_images
from tailscope.device import Runtime
from tailscope.encoders.checkpoint_files import PREFIX, StoredBackbone, find
from tailscope.encoders.loading import load
from tailscope.encoders.networks import Encoder
from tailscope.encoders.preprocessing import Normalization, Wishes
from tailscope.encoders.shards import Shards
from tailscope.errors import UserError
from tailscope.results import read_json
from tailscope.tables import files
from tailscope.tables.checks import listed, require_finite
from tailscope.tables.files import message_of
from tailscope.tables.table import FeatureTable
from tailscope.training.extract import forward
from tailscope.training.step import Normalizer


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
    files.check_writable(out)
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


@dataclass(frozen=True)
class FeaturesResult:
    """What was written.

    Attributes:
        features: the feature file.
        rows: N.
        width: d.
        classes: number of classes that the data set knows.
        resumed: rows that were there from a killed run.
        skipped: images that could not be read and are not in the file.
        classifier: the file with the checkpoint's classifier, or None where there is none.
        warnings: what the user should know.
    """

    features: Path
    rows: int
    width: int
    classes: int
    resumed: int
    skipped: int
    classifier: Path | None
    warnings: tuple[str, ...]


def run_features(
    model: str,
    data: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    pretrained: bool = False,
    split: str | None = None,
    subset: Path | None = None,
    part: str | None = None,
    store: Path | None = None,
    data_root: Path | None = None,
    normalize: str | None = None,
    image_size: int | None = None,
    resize: int | str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    options: Options | None = None,
    runtime: Runtime | None = None,
) -> FeaturesResult:
    """Extract features with any encoder from any images, to a file; its classifier goes beside it.

    Args:
        model: see `tailscope.encoders.load`; or `store:KEY`, a backbone of an experiment, with `store`.
        data: see `tailscope.data.sources.open_images`.
        out: the feature file, `.npz`, `.safetensors` or `.parquet`. A checkpoint's classifier goes to
            `NAME.classifier.npz` beside it.
        checkpoint: local weights.
        checkpoint_key: which of the checkpoint's networks, such as `ema`, where several fit.
        pretrained: take published weights of timm or torchvision.
        split: of the data; needed where there are several.
        subset: a `subset.json`: only those images, in its order.
        part: `train`: only the images of `subset`, or those that the stored backbone was trained on; `unseen`: only the
            others of the training split.
        store: folder of trained stages.
        data_root: where CIFAR, or the images of list files, lie.
        normalize: `imagenet`, `cifar`, `data`, `none` or MEANS/DEVIATIONS, in place of the model's own.
        image_size: height and width of the input, in place of the model's own.
        resize: what the shorter side becomes before the centre is cropped, in place of the model's own; `none` leaves
            images as they are.
        verify: decode every image before anything else, and report all that cannot be read.
        overwrite: replace `out`.
        options: precision, batch, workers, what to do with unreadable images.
        runtime: device and progress; default: automatic and silent.

    Raises:
        UserError: as the functions it calls; or `out` is there already.
    """
    options, runtime = options or Options(), runtime or Runtime.choose()
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: is there already; --overwrite replaces it")
    opened = open_images(data, data_root=data_root)
    stored = find(store, model.removeprefix(PREFIX)) if model.startswith(PREFIX) else None
    if stored is not None:
        if checkpoint is not None:
            raise UserError(f"--checkpoint: {model} has its own weights")
        model, checkpoint, image_size = stored.model, stored.checkpoint, image_size or stored.image_size
    split, images = opened.split(split)
    rows = _rows(part, subset, stored, split, images.labels)
    if rows is not None:
        images = images.take(rows)
    if verify:
        tell = runtime.progress.note
        unreadable = find_unreadable(images, workers=options.workers, progress=runtime.progress, tell=tell)
        if unreadable and not options.skip_unreadable:
            raise refuse(images, unreadable)
    wishes = Wishes(normalize, image_size, resize, _statistics(opened), _size_of(images))
    encoder = load(
        model,
        checkpoint,
        checkpoint_key=checkpoint_key,
        pretrained=pretrained,
        channels=images.channels,
        wishes=wishes,
        classes=len(images.class_names),
    )
    asked_for = wishes.resize == "none" and wishes.data_size is not None
    if not encoder.preprocessing.one_size and opened.in_memory is None and not asked_for:
        raise UserError(f"{data}: the images may differ in size, and {model} takes them as they are; give --image-size")
    warnings = [*images.notes, *encoder.notes]
    if encoder.classifier is not None and len(encoder.classifier.weight) != len(images.class_names):
        outputs = len(encoder.classifier.weight)
        warnings.append(f"{model}: its classifier has {outputs} outputs, the data {len(images.class_names)} classes")
    for note in warnings:
        runtime.progress.note(note)
    extraction = extract_to_file(encoder, images, out, runtime, options, {"data": data, "split": split, "part": part})
    if extraction.skipped:
        warnings.append(str(refuse(images, extraction.skipped)))
    return FeaturesResult(
        out,
        len(extraction.table),
        encoder.width,
        len(images.class_names),
        extraction.resumed,
        len(extraction.skipped),
        _write_classifier(encoder, out),
        tuple(warnings),
    )


def _rows(
    part: str | None, subset: Path | None, stored: StoredBackbone | None, split: str, labels: Tensor
) -> Rows | None:
    """Return which images are asked for; None for all."""
    if part not in (None, "train", "unseen"):
        raise UserError(f"--part {part}: known are train and unseen")
    if part is None and subset is None:
        return None
    if part is not None and split != "train":
        raise UserError(f"--part {part}: is a part of the split train, not of {split}")
    if subset is not None:
        rows = _subset_rows(subset, len(labels))
    elif stored is not None:
        rows = _trained_rows(stored, labels)
    else:
        raise UserError(f"--part {part}: needs --subset FILE or --model {PREFIX}KEY, which know the training images")
    return np.setdiff1d(np.arange(len(labels)), rows) if part == "unseen" else rows


def _trained_rows(stored: StoredBackbone, labels: Tensor) -> Rows:
    rows = stored.rows
    if rows.max() >= len(labels) or tuple(np.bincount(labels[rows], minlength=len(stored.counts))) != stored.counts:
        raise UserError(f"--part: {stored.checkpoint.parent.name} was trained on other images than these; check --data")
    return rows


def _subset_rows(path: Path, images: int) -> Rows:
    """Return the rows that a `subset.json` keeps, classes ascending, in the order drawn."""
    try:
        by_class = read_json(path)["indices"]
        rows = np.concatenate([np.asarray(kept, dtype=np.int64) for kept in by_class])
    except UserError as error:
        raise UserError(f"--subset {error}; it is no subset.json") from None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"--subset {path}: no subset.json with 'indices' per class ({message_of(error)})") from None
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= images:
        raise UserError(f"--subset {path}: its indices are not rows of these {images} images; was it drawn from them?")
    return rows


def _size_of(images: Images) -> tuple[int, int] | None:
    """Return height and width of the images if some from all over the data have the same, else None."""
    sizes = set()
    for row in from_all_over(len(images)):
        with suppress(ImageError):  # extraction tells of it, or leaves it out
            sizes.add(images.image(row).size)
    (width, height) = sizes.pop() if len(sizes) == 1 else (0, 0)
    return (height, width) if width else None


def _statistics(opened: OpenedImages) -> Normalization | None:
    """Return the pixel statistics of the training split, where it is in memory."""
    if opened.in_memory is None:
        return None
    measured = Normalizer.of(opened.in_memory.images)
    mean, std = (tuple(v / 255 for v in t.tolist()) for t in (measured.mean, measured.std))
    return Normalization(mean, std)


def _write_classifier(encoder: Encoder, out: Path) -> Path | None:
    """Write the encoder's classifier, if it has one, beside the features."""
    if encoder.classifier is None:
        return None
    path = out.with_name(f"{out.stem}.classifier.npz")
    encoder.classifier.save(path)
    return path
