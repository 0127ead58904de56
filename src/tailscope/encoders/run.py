"""From names to a feature file: what `tailscope features` does."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tailscope.array_files import message_of
from tailscope.data.decoding import find_unreadable, from_all_over, refuse
from tailscope.data.pixels import ImageError
from tailscope.data.sources import OpenedImages, open_images
from tailscope.data.streams import Images, Rows
from tailscope.encoders.encoder import Encoder
from tailscope.encoders.extraction import Options, extract_to_file
from tailscope.encoders.loading import load
from tailscope.encoders.preprocessing import Normalization, Wishes
from tailscope.encoders.stored import PREFIX, StoredBackbone, find
from tailscope.errors import UserError
from tailscope.result_files import read_json
from tailscope.training.runtime import Runtime
from tailscope.training.step import Normalizer


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
