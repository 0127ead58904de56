"""From an encoder and images to features: a file of them, resumable, or a table of what a program's batches hold.

Parts of an extraction lie beside the output, in `OUT.shards/`, so that a killed run continues where it stopped:
`spec.json` says what they are parts of; each shard, named by the first of its images, of which it has as many as were
done since the last, holds `features` [n, d] and `rows` [n], and is written whole or not at all, with a digest. Those of
a killed run are checked before it goes on, and a damaged one is extracted again.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import length_hint
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from tailscope.data.decoding import DecodedBatch, Unreadable, decode, from_all_over, refuse, still_unreadable
from tailscope.data.images import Images
from tailscope.device import Runtime
from tailscope.encoders.networks import Encoder
from tailscope.errors import UserError, foreign_code
from tailscope.progress import Progress
from tailscope.results import read_json
from tailscope.spec import digest
from tailscope.store import Damaged, make_folder, try_lock
from tailscope.store.files import check_tensors, load_checkpoint, load_header, save_tensors, write_json, writing
from tailscope.tables import files
from tailscope.tables.checks import listed, require_finite
from tailscope.tables.table import FeatureTable
from tailscope.training.extract import forward

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

    def forget_mended(self, images: Images) -> None:
        """Remove the shards of images that could not be read and can be by now."""
        for start in self.starts:
            rows = np.array([bad[0] for bad in self._meta(start)["unreadable"]], dtype=np.int64)
            if len(still_unreadable(images, rows)) < len(rows):
                self._path(start).unlink(missing_ok=True)

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
    try_first(encoder, images, options)
    return extract_part(encoder, images, out, runtime, options, provenance, spec_of(encoder, images, runtime, options))


class NoneReadable(UserError):
    """There are no images, or none that can be read: `skipped` says why."""

    def __init__(self, images: Images, skipped: list[Unreadable]) -> None:
        """Take in what there is."""
        super().__init__(str(refuse(images, skipped)) if skipped else f"{images.name}: no images")
        self.skipped = skipped


def extract_part(
    encoder: Encoder,
    images: Images,
    out: Path,
    runtime: Runtime,
    options: Options,
    provenance: dict[str, Any] | None,
    made_by: dict[str, Any],
) -> Extraction:
    """Do as `extract_to_file` with some of the images that `made_by` describes, without trying them first.

    Raises:
        NoneReadable: there is nothing to write.
    """
    shards = Shards(out, len(images))
    with shards.opened(made_by):
        shards.forget_mended(images)
        resumed = shards.readable()
        _extract_missing(encoder, images, shards, runtime, options)
        skipped = shards.unreadable()
        if shards.readable() == 0:
            raise NoneReadable(images, skipped)
        features, rows = _merge(shards)
        table = table_of(features, rows, images, {**(provenance or {}), **made_by}, str(out))
        runtime.progress.note(f"writing {out}: {len(table)} rows, d = {table.width}")
        table.save(out)
    return Extraction(table, resumed, skipped)


def spec_of(encoder: Encoder, images: Images, runtime: Runtime, options: Options) -> dict[str, Any]:
    """Return everything that decides an extraction's features, as it stands in their provenance."""
    precision = str(runtime.dtype(options.precision)).removeprefix("torch.")
    return {**encoder.spec(), "precision": precision, "stored": options.stored, "images": images.fingerprint()}


def try_first(encoder: Encoder, images: Images, options: Options) -> None:
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


def table_of(features: Tensor, rows: Tensor, images: Images, provenance: dict[str, Any], source: str) -> FeatureTable:
    """Return the features [n, d] of the images `rows` [n] with their labels, class names and ids."""
    names = images.class_names
    numbered = not images.named and names == tuple(str(k) for k in range(len(names)))
    picked = rows.tolist()
    return FeatureTable.from_arrays(
        features,
        images.labels[rows],
        class_names=None if numbered else names,  # numbers are no names: other files may know more classes
        ids=[images.ids[row] for row in picked],
        provenance=provenance,
        source=source,
    )


@dataclass(frozen=True)
class Batches:
    """Inputs of a network with labels, batch by batch.

    Attributes:
        part: what messages call them.
        batches: what yields pairs (images [b, C, H, W], labels [b]), anew each time it is gone through.
        class_names: what the labels are positions in, where it is known.
        input_of: the image of a row once more, [C, H, W], or None where that fails; None of what comes in any order.
    """

    part: str
    batches: Iterable[Any]
    class_names: tuple[str, ...] | None = None
    input_of: Callable[[int], Tensor | None] | None = None

    @classmethod
    def of(cls, part: str, given: Any, size: int) -> "Batches":
        """Return the batches of a DataLoader, or of a pair (images, labels), `size` at a time.

        Raises:
            UserError: it is neither; a pair's lengths differ; or a loader draws some images several times.
        """
        if isinstance(given, tuple) and len(given) == 2:
            with foreign_code(f"{part}: no pair (images, labels)"):
                images, labels = torch.as_tensor(given[0]), _array(given[1])
            if len(images) != len(labels):
                raise UserError(f"{part}: {len(images)} images and {len(labels)} labels; give one label an image")
            starts = range(0, len(images), size)
            pairs = [(images[start : start + size], labels[start : start + size]) for start in starts]
            return cls(part, pairs, input_of=lambda row: images[row])
        if not isinstance(given, DataLoader):
            kind = type(given).__name__
            raise UserError(f"{part}: a {kind}; beside a network, give a DataLoader or a pair (images, labels)")
        if getattr(given.sampler, "replacement", False):
            twice = "its sampler draws some images several times and others never"
            raise UserError(f"{part}: {twice}; give a DataLoader that goes through the images once")
        dataset: Any = given.dataset
        while hasattr(dataset, "dataset"):  # of a torch.utils.data.Subset
            dataset = dataset.dataset
        names = getattr(dataset, "classes", ())
        named = isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
        return cls(part, given, tuple(names) if named else None, _input_of(given))

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield images and labels; what is no such pair, or not yet what a network takes, is one line."""
        with foreign_code(f"{self.part}: its DataLoader fails"):
            for item in self.batches:
                if not isinstance(item, tuple | list) or len(item) < 2 or not isinstance(item[0], Tensor):
                    what = f"{self.part}: gives batches of type {type(item).__name__}"
                    raise UserError(f"{what}; each must be a pair (images [B, C, H, W], labels [B])")
                images = item[0]
                if images.ndim != 4 or not images.is_floating_point():
                    has = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
                    raise UserError(f"{self.part}: its images are {has}; give floats [N, C, H, W] as the network takes")
                yield images, item[1]

    def first(self) -> Tensor:
        """Return the first images, two at most."""
        images = next((images for images, _ in self), None)
        if images is None:
            raise UserError(f"{self.part}: no images")
        return images[:2]


def _input_of(loader: DataLoader[Any]) -> Callable[[int], Tensor | None] | None:
    """Return what gives the image of a row of a loader that goes through its data set in order; None for others."""
    if type(loader.sampler) is not SequentialSampler or type(loader.batch_sampler) is not BatchSampler:
        return None

    def input_of(row: int) -> Tensor | None:
        try:
            image = loader.collate_fn([loader.dataset[row]])[0][0]
        except Exception:  # a data set may do anything, and this costs a thumbnail, not the diagnosis
            return None
        return image if isinstance(image, Tensor) and image.ndim == 3 and image.numel() else None

    return input_of


def pass_through(
    encoder: Encoder, batches: Batches, class_names: tuple[str, ...] | None, progress: Progress
) -> FeatureTable:
    """Return the features of all batches, on the CPU; `class_names` are those of labels that are numbers.

    Raises:
        UserError: as `Batches`; or the network fails, or gives NaN or infinity.
    """
    device = next((p.device for p in encoder.model.parameters()), torch.device("cpu"))
    features: list[Tensor] = []
    labels: list[npt.NDArray[Any]] = []
    with progress.task(f"features of {batches.part}", length_hint(batches.batches)) as advance:
        for images, of_images in batches:
            features.append(forward(encoder.features, images, device, torch.float32).float().cpu())
            labels.append(_array(of_images))
            advance(1)
    if not features:
        raise UserError(f"{batches.part}: no images")
    together = np.concatenate(labels)
    names = (batches.class_names or class_names) if together.dtype.kind in "iu" else None
    provenance = {**encoder.spec(), "preprocessing": "as given"}
    return FeatureTable.from_arrays(
        torch.cat(features), together, class_names=names, provenance=provenance, source=batches.part
    )


def _array(labels: Any) -> npt.NDArray[Any]:
    return np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
