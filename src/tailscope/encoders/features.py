"""From names of a network and of images to features: one file of them, or all that a diagnosis takes.

`run_features` is what `tailscope features` does. `extract_parts` is the first half of `tailscope diagnose --model`: it
divides the images into training, unseen and test samples, extracts each part once to OUT/features/PART.npz, and says
which classifier is in use. The files' provenance says what they were made of; files of anything else are refused.
`pass_batches` does the same with a network and batches of a Python program, in memory.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tailscope.data.decoding import find_unreadable, from_all_over, refuse, still_unreadable
from tailscope.data.images import ImageError, Images, Rows
from tailscope.data.sources import Division, OpenedImages, Parts, divide, open_images
from tailscope.data.subsets import read_rows
from tailscope.device import Runtime, Solo, Team
from tailscope.encoders.extract import Batches, Options, extract_to_file, pass_through, spec_of, table_of
from tailscope.encoders.loading import PREFIX, StoredBackbone, find_stored, load, of_module, require_no_logits
from tailscope.encoders.networks import Encoder
from tailscope.encoders.parts import Written, extract_to_folder
from tailscope.encoders.preprocessing import Normalization, Wishes
from tailscope.errors import UserError, unknown
from tailscope.report.diagnosis_schema import Sample
from tailscope.report.thumbnails import Pictures, of_inputs
from tailscope.store import make_folder
from tailscope.tables.checks import listed
from tailscope.tables.table import FeatureTable, LinearLayer, align
from tailscope.training.step import Normalizer

SAW_THE_REST = "it was trained on the other images of this data set, too, without their labels, so that none is unseen"


@dataclass(frozen=True)
class Network:
    """Where a network's weights come from, which images it was trained on, and what it sees of one.

    Attributes:
        checkpoint, checkpoint_key, pretrained: as `load` takes them.
        subset: a `subset.json` of the training images.
        store: the folder of trained stages, for `store:KEY`.
        data_root: where images lie, as `open_images` takes it.
        normalize, image_size, resize: as `Wishes` says.
    """

    checkpoint: Path | None = None
    checkpoint_key: str | None = None
    pretrained: bool = False
    subset: Path | None = None
    store: Path | None = None
    data_root: Path | None = None
    normalize: str | None = None
    image_size: int | None = None
    resize: int | str | None = None


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
    folder: bool = False,
    team: Team | None = None,
) -> FeaturesResult:
    """Extract features with any encoder from any images, to a file or a folder; its classifier goes beside it.

    The arguments are the options of `tailscope features`, which `tailscope.verbs.features` describes; `runtime` is
    automatic and silent by default. To a `folder` the processes of a `team` write together, each its part.

    Raises:
        UserError: as the functions it calls; or `out` is there already.
    """
    options, runtime, team = options or Options(), runtime or Runtime.choose(), team or Solo()
    if out.exists() and not (overwrite or folder):
        raise UserError(f"--out {out}: is there already; --overwrite replaces it")
    network = Network(
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        pretrained=pretrained,
        normalize=normalize,
        image_size=image_size,
        resize=resize,
    )
    opened = open_images(data, data_root=data_root)
    stored = _stored(model, store, checkpoint)
    split, images = opened.split(split)
    rows = _rows(part, subset, stored, split, opened)
    if rows is not None:
        images = images.take(rows)
    if verify:
        _refuse_unreadable(images, options, runtime)
    encoder = _encoder(model, stored, network, opened, images)
    own, said = _own_classifier(encoder, model, images)
    warnings = [*images.notes, *encoder.notes, *said]
    for note in warnings:
        runtime.progress.note(note)
    origin = {"data": data, "split": split, "part": part}
    if folder:
        written = extract_to_folder(encoder, images, out, runtime, options, origin, team=team, overwrite=overwrite)
    else:
        written = Written.of(extract_to_file(encoder, images, out, runtime, options, origin))
    warnings += written.notes(images)
    classifier = out.with_name(f"{out.name if folder else out.stem}.classifier.npz")
    if team.rank == 0 and own is not None:
        own.save(classifier)
    elif team.rank == 0 and overwrite:
        classifier.unlink(missing_ok=True)  # of the network whose features these replace
    return FeaturesResult(
        out,
        written.rows,
        encoder.width,
        len(images.class_names),
        written.resumed,
        len(written.unreadable),
        None if own is None else classifier,
        tuple(warnings),
    )


def _own_classifier(encoder: Encoder, model: str, images: Images) -> tuple[LinearLayer | None, list[str]]:
    """Return the checkpoint's classifier, without names that are not the data's, and what is to be said of it."""
    own = encoder.classifier
    if own is not None and len(own.weight) != (classes := len(images.class_names)):
        return own, [f"{model}: its classifier has {len(own.weight)} outputs, the data {classes} classes"]
    if own is not None and own.class_names is not None and {*own.class_names} != {*images.class_names}:
        otherwise = "its classifier names its classes otherwise; they are taken in the order of the data's"
        return replace(own, class_names=None), [f"{model}: {otherwise}"]
    return own, []


def _stored(model: str, store: Path | None, checkpoint: Path | None) -> StoredBackbone | None:
    """Return the backbone that `store:KEY` names; None for other models."""
    if not model.startswith(PREFIX):
        return None
    stored = find_stored(store, model.removeprefix(PREFIX))
    if checkpoint is not None:
        raise UserError(f"--checkpoint: {model} has its own weights")
    return stored


def _encoder(
    model: str, stored: StoredBackbone | None, network: Network, opened: OpenedImages, images: Images
) -> Encoder:
    """Load the network for these images of a source, which it must get in one size."""
    image_size, checkpoint = network.image_size, network.checkpoint
    if stored is not None:
        model, checkpoint, image_size = stored.model, stored.checkpoint, image_size or stored.image_size
    wishes = Wishes(network.normalize, image_size, network.resize, _statistics(opened), _size_of(images))
    encoder = load(
        model,
        checkpoint,
        checkpoint_key=network.checkpoint_key,
        pretrained=network.pretrained,
        channels=images.channels,
        wishes=wishes,
        classes=len(images.class_names),
        branches=1 if stored is None else stored.branches,
    )
    asked_for = wishes.resize == "none" and wishes.data_size is not None
    if not encoder.preprocessing.one_size and opened.in_memory is None and not asked_for:
        source = opened.source
        raise UserError(
            f"{source}: the images may differ in size, and {model} takes them as they are; give --image-size"
        )
    return encoder


def _refuse_unreadable(images: Images, options: Options, runtime: Runtime) -> None:
    """Decode every image, and name all that cannot be read."""
    progress = runtime.progress
    unreadable = find_unreadable(images, workers=options.workers, progress=progress, tell=progress.note)
    if unreadable and not options.skip_unreadable:
        raise refuse(images, unreadable)


def _rows(
    part: str | None, subset: Path | None, stored: StoredBackbone | None, split: str, opened: OpenedImages
) -> Rows | None:
    """Return which images are asked for; None for all."""
    if part not in (None, "train", "unseen"):
        raise unknown("--part", part, ("train", "unseen"))
    if part is None and subset is None:
        return None
    if part is not None and split != "train":
        raise UserError(f"--part {part}: is a part of the split train, not of {split}")
    if subset is not None and split not in ("train", "all"):
        raise UserError(f"--subset {subset}: says which images of the split train to take, not of {split}")
    if part == "unseen" and stored is not None and stored.saw_the_rest:
        raise UserError(f"--part unseen: {SAW_THE_REST}; take another split, such as --split test")
    labels = opened.splits[split].labels
    rows = _trained_on(subset, stored, opened, labels)
    if rows is None:
        raise UserError(f"--part {part}: needs --subset FILE or --model {PREFIX}KEY, which know the training images")
    return np.setdiff1d(np.arange(len(labels)), rows) if part == "unseen" else rows


def _trained_on(
    subset: Path | None, stored: StoredBackbone | None, opened: OpenedImages, labels: Tensor
) -> Rows | None:
    """Return which images of the training split were trained on, by a subset or by what a stored backbone remembers."""
    if subset is not None:
        return read_rows(subset, labels, partial(_fingerprint, opened))
    if stored is None:
        return None
    rows, counts = stored.rows, stored.counts
    if rows.max() >= len(labels) or tuple(np.bincount(labels[rows], minlength=len(counts))) != counts:
        name = stored.checkpoint.parent.name
        raise UserError(f"--model: {name} was trained on other images than these; check --data")
    return rows


def _fingerprint(opened: OpenedImages) -> str | None:
    """Return what a subset of the source says that it was drawn from; None where none can be, without test images."""
    with suppress(UserError):
        return opened.for_experiment().fingerprint
    return None


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


# -- all parts of a diagnosis ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Extracted:
    """Features by part, the classifier in use where there is one, the data's name, and by part what shows samples."""

    name: str
    tables: dict[str, FeatureTable]
    classifier: LinearLayer | None
    pictures: dict[str, Pictures]


def extract_parts(
    model: str,
    data: str,
    network: Network,
    wanted: Division,
    *,
    out: Path | None,
    options: Options,
    runtime: Runtime,
    overwrite: bool = False,
    tell: Callable[[str], object] = str,
) -> Extracted:
    """Extract what a diagnosis takes from a network and images, or read it where OUT/features has it.

    Args:
        model: as `load` takes it, or `store:KEY`.
        data: a source of images.
        network: its weights and what it sees.
        wanted: how the images are divided.
        out: folder in which `features/` is kept; without, nothing is.
        options: of the extraction.
        runtime: where it runs.
        overwrite: whether features of another network, or of other images, are replaced.
        tell: gets a line on the preprocessing, and on whatever else a user should know.

    Raises:
        UserError: as `divide`, `load` and `extract_to_file`; or OUT/features has something else.
    """
    stored = _stored(model, network.store, network.checkpoint)
    opened = open_images(data, data_root=network.data_root)
    if stored is not None and stored.saw_the_rest and wanted.unseen is None:
        raise UserError(f"--model {model}: {SAW_THE_REST}; give others by --unseen SOURCE")
    parts = divide(opened, partial(_trained_on, network.subset, stored, opened), wanted, network.data_root)
    _require_one_meaning(parts)
    encoder = _encoder(model, stored, network, opened, parts.images["train"])
    notes = list(dict.fromkeys([*parts.notes, *(n for i in parts.images.values() for n in i.notes), *encoder.notes]))
    for note in [*notes, f"{model} sees images as {encoder.preprocessing.in_words()}"]:
        tell(note)
    nowhere = tempfile.TemporaryDirectory() if out is None else nullcontext(make_folder(out / "features", "--out"))
    with nowhere as found:
        folder = Path(found)
        tables = _tables(encoder, parts, folder, options, runtime, overwrite, tell)
        classifier, said = _classifier_in_use(model, encoder.classifier, tables["train"], wanted)
        if classifier is None:
            (folder / "classifier.npz").unlink(missing_ok=True)
        else:
            classifier.save(folder / "classifier.npz")
    for part, images in parts.images.items():
        if lost := len(images) - len(tables[part]):
            said.append(f"{images.name}: {lost:,} of {len(images):,} {part} images cannot be read and were left out")
    for note in said:
        tell(note)
    if out is None:
        tables = {part: replace(table, source=part) for part, table in tables.items()}
    tables["train"] = replace(tables["train"], notes=(*tables["train"].notes, *notes, *said))
    pictures = {part: of_images(images) for part, images in parts.images.items()}
    return Extracted(opened.name, tables, classifier, pictures)


def of_images(images: Images) -> Pictures:
    """Return what decodes the images of samples, which it knows by their ids."""

    def pictures(samples: Sequence[Sample]) -> Iterator[Image.Image | None]:
        rows = {name: row for row, name in enumerate(images.ids)}
        for sample in samples:
            row = rows.get(sample["id"] or "")
            try:
                yield None if row is None else images.image(row)
            except ImageError:
                yield None

    return pictures


def _tables(
    encoder: Encoder,
    parts: Parts,
    folder: Path,
    options: Options,
    runtime: Runtime,
    overwrite: bool,
    tell: Callable[[str], object],
) -> dict[str, FeatureTable]:
    """Return the features of all parts, kept or made; what is of something else is refused before any work."""
    files = {part: folder / f"{part}.npz" for part in parts.images}
    specs = {part: spec_of(encoder, images, runtime, options) for part, images in parts.images.items()}
    kept = {part: _kept(file, specs[part], parts.images[part], overwrite) for part, file in files.items()}
    tables = {}
    for part, file in files.items():
        table = kept[part]
        if table is None:
            origin: dict[str, Any] = dict(parts.origins[part])
            table = extract_to_file(encoder, parts.images[part], file, runtime, options, origin).table
        else:
            tell(f"{file}: {len(table):,} rows of features, kept from before")
        tables[part] = table
    return tables


def _require_one_meaning(parts: Parts) -> None:
    """Refuse, before any work, classes that the training images lack: as `align` does with the features."""
    labelled = [
        table_of(torch.zeros(len(images), 1), torch.arange(len(images)), images, {}, f"{parts.origins[part]['data']}")
        for part, images in parts.images.items()
    ]
    align(*labelled)


def _kept(file: Path, spec: Mapping[str, Any], images: Images, overwrite: bool) -> FeatureTable | None:
    """Return the features that a file has of this very network and these images; None where they are to be made.

    They are made again, too, where the same images have other ids now: a subset of another file, for instance; or
    where one that could not be read can be by now.
    """
    if not file.exists():
        return None
    try:
        table = FeatureTable.load(file)
    except UserError:
        if overwrite:
            return None
        raise
    differing = [field for field in spec if table.provenance.get(field) != spec[field]]
    if differing and not overwrite:
        what = f"has features of another network or of other images ({listed(differing)} differ)"
        raise UserError(f"{file}: {what}; use another --out or --overwrite")
    if differing:
        return None
    ids = images.ids if table.ids is None else table.ids.tolist()
    known, had = iter(images.ids), set(ids)
    lost = np.array([row for row, name in enumerate(images.ids) if name not in had], dtype=np.int64)
    same = all(name in known for name in ids)  # in this order, with gaps
    return table if same and len(still_unreadable(images, lost)) == len(lost) else None


def _classifier_in_use(
    model: str, own: LinearLayer | None, train: FeatureTable, wanted: Division
) -> tuple[LinearLayer | None, list[str]]:
    """Return the network's own classifier if its rows are the training samples' classes, and what is to be said.

    They are the same by name where the checkpoint has names; else they are the classes in their order, of bare numbers
    those from 0 on without a gap.
    """
    if own is None:
        return None, []
    names, misfit = align(train)[0].class_names or (), ""
    numbered = train.class_names is None
    own = replace(own, class_names=None) if numbered else own
    if len(own.weight) != len(names) or (numbered and names != tuple(map(str, range(len(names))))):
        classes = f"{len(names)} classes" + (f" with numbers up to {names[-1]}" if numbered else "")
        misfit = f"has {len(own.weight)} outputs and the training images have {classes}"
    elif own.class_names is not None and {*own.class_names} != {*names}:
        misfit = f"has the classes {listed(own.class_names)} and the training images have {listed(names)}"
    if misfit:
        return None, [f"{model}: its classifier {misfit}, so it is not used; without --classifier, one is fitted"]
    if wanted.holdout is None:
        return own, []
    doubt = f"{model}: its classifier fits these classes, so the network may well have been trained on this data"
    return own, [f"{doubt}; --holdout is right only if these very images were left out then"]


# -- a network and batches of a Python program ----------------------------------------------------------------------


def pass_batches(
    model: nn.Module, batches: Mapping[str, Any], *, batch: int, runtime: Runtime, tell: Callable[[str], object] = str
) -> Extracted:
    """Pass images that are inputs of a network through it, on the device where it lies, and leave it as it was.

    Args:
        model: the network; it runs in evaluation mode.
        batches: of `train`, `unseen` and perhaps `test`: a DataLoader, or a pair (images [N, C, H, W], labels [N]).
        batch: images at a time, of a pair.
        runtime: shows progress.
        tell: gets a line on whatever a user should know.

    Raises:
        UserError: what is given holds no images and labels; or the network fails, or has no features.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        opened = {part: Batches.of(part, given, batch) for part, given in batches.items()}
        images, names = opened["train"].first(), opened["train"].class_names
        encoder = of_module(model.eval(), images)
        tables = {part: pass_through(encoder, of_part, names, runtime.progress) for part, of_part in opened.items()}
    finally:
        for module, training in modes:
            module.training = training
    require_no_logits(encoder.name, encoder.how, encoder.width, tables["train"].num_classes)
    classifier, said = _classifier_in_use(encoder.name, encoder.classifier, tables["train"], Division())
    notes = (*encoder.notes, *said)
    for note in notes:
        tell(note)
    tables["train"] = replace(tables["train"], notes=(*tables["train"].notes, *notes))
    pictures = {part: of_inputs(of_part.input_of) for part, of_part in opened.items() if of_part.input_of is not None}
    return Extracted(encoder.name, tables, classifier, pictures)
