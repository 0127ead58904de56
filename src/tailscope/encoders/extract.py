"""From names of a network and of images to a file of features: resumable, and never holding them twice.

Parts of an extraction lie beside the output, in `OUT.shards/`, so that a killed run continues where it stopped:
`spec.json` says what they are parts of; each shard, named by the first of its images, of which it has as many as were
done since the last, holds `features` [n, d] and `rows` [n], and is written whole or not at all, with a digest. Those of
a killed run are checked before it goes on, and a damaged one is extracted again.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from tailscope.encoders.loading import PREFIX, StoredBackbone, find_stored, load
from tailscope.encoders.networks import Encoder
from tailscope.encoders.preprocessing import Normalization, Wishes
from tailscope.errors import UserError, message_of
from tailscope.results import read_json
from tailscope.spec import digest
from tailscope.store import Damaged, make_folder, try_lock
from tailscope.store.files import check_tensors, load_checkpoint, load_header, save_tensors, write_json, writing
from tailscope.tables import files
from tailscope.tables.checks import listed, require_finite
from tailscope.tables.table import FeatureTable
from tailscope.training.extract import forward
from tailscope.training.step import Normalizer

_log = logging.getLogger(__name__)


class Shards:
    """The shards of one extraction of `total` images."""

    def __init__(self, out: Path, total: int) -> None:
        """Create the folder beside `out`."""
        self.folder = make_folder(out.with_name(f"{out.name}.shards"), "--out")
        self.total = total

    @property
    def starts(self) -> list[int]:
        """The first images of the shards that are there, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors") if path.stem.isdecimal())

    def missing(self) -> list[range]:
        """Return which images no shard has, as runs, ascending."""
        runs, end = [], 0
        for start in self.starts:
            meta = self._meta(start)
            runs.append(range(end, start))
            end = start + int(meta["readable"]) + len(meta["unreadable"])
        return [run for run in [*runs, range(end, self.total)] if run]

    def write(self, start: int, features: Tensor, rows: Tensor, unreadable: list[Unreadable]) -> None:
        """Store a shard: features [n, d] of the images `rows` [n], and what could not be read."""
        meta = {"readable": len(rows), "unreadable": unreadable}
        save_tensors(self._path(start), {"features": features, "rows": rows}, meta)

    def read(self, start: int) -> tuple[Tensor, Tensor]:
        """Return features and rows; one that was damaged since it was written tells how to make it again."""
        try:
            tensors = load_checkpoint(self._path(start)).tensors
        except Damaged as error:
            raise UserError(f"{error}; run the same command again, which extracts these images again") from None
        return tensors["features"], tensors["rows"]

    def readable(self) -> int:
        """Return how many images the shards that are there have features of."""
        return sum(int(self._meta(start)["readable"]) for start in self.starts)

    def unreadable(self) -> list[Unreadable]:
        """Return the images that could not be read, in order."""
        return [Unreadable(*bad) for start in self.starts for bad in self._meta(start)["unreadable"]]

    @contextmanager
    def opened(self, spec: dict[str, Any]) -> Iterator[None]:
        """Keep other processes out, and shards of another `spec`; remove the folder on success."""
        with writing(self.folder):
            lock = try_lock(self.folder / ".lock", 0)
        if lock is None:
            raise UserError(f"{self.folder}: another process is extracting these features; wait for it")
        try:
            self._require_same(spec)
            self._remove_damaged()
            yield
            # While the lock is held: a process that got it in between would lose its folder.
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            lock.release()

    def _require_same(self, spec: dict[str, Any]) -> None:
        path = self.folder / "spec.json"
        if not any(self.folder.glob("*.safetensors")):
            write_json(path, spec)
            return
        try:
            found = dict(read_json(path))
        except (UserError, ValueError, TypeError):
            found = {}
        found.pop("shard", None)  # they were once of a fixed number of images
        if digest(found) != digest(spec):
            field = next((k for k in spec if found.get(k) != spec[k]), "fields")
            old, new = (str(s.get(field))[:60] for s in (found, spec))
            what = f"its shards are of another extraction ({field} was {old!r}, is {new!r})"
            raise UserError(f"{self.folder}: {what}; delete the folder or choose another --out")

    def _remove_damaged(self) -> None:
        for start in self.starts:
            try:
                check_tensors(self._path(start))
            except Damaged as error:
                _log.warning("%s; its images are extracted again", error)
                self._path(start).unlink(missing_ok=True)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"

    def _meta(self, start: int) -> dict[str, Any]:
        return load_header(self._path(start))


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

    The rows of the table are the images in their order, with their ids; its provenance is `provenance` and the encoder.

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
    """Preprocess a few images from all over the data, so that what cannot work fails before the work."""
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
    pinned = runtime.device.type == "cuda"
    decoding = decode(images, encoder.preprocessing, batches, workers=options.workers, pin_memory=pinned)
    encoder.model.to(runtime.device)
    dtype = runtime.dtype(options.precision)
    stored = getattr(torch, options.stored)
    done = shards.total - sum(map(len, missing))
    with runtime.progress.task(f"features of {images.name}", shards.total, done) as advance:
        for run in missing:
            part, start, since = [], run.start, time.monotonic()
            for batch in _on_grid(run, options.batch):
                decoded = next(decoding)
                if decoded.unreadable and not options.skip_unreadable:
                    raise refuse(images, decoded.unreadable)
                features = torch.empty(0, encoder.width)
                if len(decoded.images):
                    features = forward(encoder.features, decoded.images, runtime.device, dtype).float().cpu()
                _require_width(encoder, features, decoded, images)
                part.append((features.to(stored), decoded.rows, decoded.unreadable))
                late = time.monotonic() - since >= options.save_every or batch.stop - start >= options.shard
                if late or batch.stop == run.stop:
                    _save(part, shards, range(start, batch.stop), images.name)
                    part, start, since = [], batch.stop, time.monotonic()
                    runtime.progress.safe_point()
                advance(len(batch))


def _save(part: list[tuple[Tensor, Tensor, list[Unreadable]]], shards: Shards, images: range, name: str) -> None:
    """Write a shard: features and rows of those `images` that are readable, and the others."""
    features, rows, unreadable = zip(*part, strict=True)
    block = torch.cat(features)
    if len(block):
        kind = str(block.dtype).removeprefix("torch.")
        require_finite(f"{name}: {kind} features of images {images.start} to {images.stop - 1}", block)
    shards.write(images.start, block, torch.cat(rows), list(chain.from_iterable(unreadable)))


def _on_grid(run: range, size: int) -> list[range]:
    """Cut a run of images into batches that begin at multiples of their size.

    >>> _on_grid(range(70, 150), 64)
    [range(70, 128), range(128, 150)]
    """
    cuts = [run.start, *range(run.start - run.start % size + size, run.stop, size), run.stop]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _require_width(encoder: Encoder, features: Tensor, decoded: DecodedBatch, images: Images) -> None:
    """Check that a batch has a row of features for each image, as wide as those of the probe."""
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
    """What was written: N `rows` of `width` d, and the classifier's file where the checkpoint has one.

    `classes` is what the data set knows; `resumed` rows were there from a killed run, `skipped` images cannot be read.
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

    The arguments are the options of `tailscope features`, which `tailscope.verbs.features` describes; `runtime` is
    automatic and silent by default.

    Raises:
        UserError: as the functions it calls; or `out` is there already.
    """
    options, runtime = options or Options(), runtime or Runtime.choose()
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: is there already; --overwrite replaces it")
    opened = open_images(data, data_root=data_root)
    stored = find_stored(store, model.removeprefix(PREFIX)) if model.startswith(PREFIX) else None
    if stored is not None:
        if checkpoint is not None:
            raise UserError(f"--checkpoint: {model} has its own weights")
        model, checkpoint, image_size = stored.model, stored.checkpoint, image_size or stored.image_size
    split, images = opened.split(split)
    rows = _rows(part, subset, stored, split, images.labels)
    if rows is not None:
        images = images.take(rows)
    if verify:
        _refuse_unreadable(images, options, runtime)
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
    if (own := encoder.classifier) is not None and len(own.weight) != (classes := len(images.class_names)):
        warnings.append(f"{model}: its classifier has {len(own.weight)} outputs, the data {classes} classes")
    for note in warnings:
        runtime.progress.note(note)
    extraction = extract_to_file(encoder, images, out, runtime, options, {"data": data, "split": split, "part": part})
    if extraction.skipped:
        warnings.append(str(refuse(images, extraction.skipped)))
    classifier = None
    if encoder.classifier is not None:
        classifier = out.with_name(f"{out.stem}.classifier.npz")
        encoder.classifier.save(classifier)
    return FeaturesResult(
        out,
        len(extraction.table),
        encoder.width,
        len(images.class_names),
        extraction.resumed,
        len(extraction.skipped),
        classifier,
        tuple(warnings),
    )


def _refuse_unreadable(images: Images, options: Options, runtime: Runtime) -> None:
    """Decode every image, and name all that cannot be read."""
    progress = runtime.progress
    unreadable = find_unreadable(images, workers=options.workers, progress=progress, tell=progress.note)
    if unreadable and not options.skip_unreadable:
        raise refuse(images, unreadable)


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
        rows, counts = stored.rows, stored.counts
        if rows.max() >= len(labels) or tuple(np.bincount(labels[rows], minlength=len(counts))) != counts:
            name = stored.checkpoint.parent.name
            raise UserError(f"--part: {name} was trained on other images than these; check --data")
    else:
        raise UserError(f"--part {part}: needs --subset FILE or --model {PREFIX}KEY, which know the training images")
    return np.setdiff1d(np.arange(len(labels)), rows) if part == "unseen" else rows


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
            sizes.add(images.image(row).size[::-1])
    return sizes.pop() if len(sizes) == 1 and sizes != {(0, 0)} else None


def _statistics(opened: OpenedImages) -> Normalization | None:
    """Return the pixel statistics of the training split, where it is in memory."""
    if opened.in_memory is None:
        return None
    measured = Normalizer.of(opened.in_memory.images)
    mean, std = (tuple(v / 255 for v in t.tolist()) for t in (measured.mean, measured.std))
    return Normalization(mean, std)
