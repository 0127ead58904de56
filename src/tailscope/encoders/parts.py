"""Features larger than memory: a folder of Parquet files, each of some of the images, written by one or more processes.

The files are named by the first of their images: file after file, their rows are the images in their order. Each is
extracted as a file by itself is (`extract_part`), written whole or not at all, and left alone by a later run, unless
an image that could not be read can be by then. `extraction.json` says what they are parts of and how many images each
has, and `START.unreadable.json` which of a file's images cannot be read. A process takes every so manyth file; batches
begin at multiples of their size, so that the files are the same, however many processes write them.
"""

import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.data.decoding import Unreadable, refuse, still_unreadable
from tailscope.data.images import Images
from tailscope.device import Runtime, Team
from tailscope.encoders.extract import Extraction, NoneReadable, Options, extract_part, spec_of, try_first
from tailscope.encoders.networks import Encoder
from tailscope.errors import UserError
from tailscope.results import read_json
from tailscope.spec import digest
from tailscope.store import make_folder
from tailscope.store.files import write_json, writing
from tailscope.tables.checks import listed
from tailscope.tables.parquet import EXTRACTION, EXTRACTION_SCHEMA, UNREADABLE_IMAGES, rows_in

PART_BYTES = 2**27  # of features in a file: what a process holds, a few times over


def is_folder(out: Path | str) -> bool:
    """Return whether this names a folder: it ends with a slash, or is one.

    >>> is_folder("features/"), is_folder("features.npz")
    (True, False)
    """
    return str(out).endswith("/") or Path(out).is_dir()


@dataclass(frozen=True)
class Written:
    """What a file or folder holds: rows, those that were there before, and images that could not be read."""

    rows: int
    resumed: int
    unreadable: tuple[Unreadable, ...] = ()

    @classmethod
    def of(cls, extraction: Extraction) -> "Written":
        """Return what was written to a file."""
        return cls(len(extraction.table), extraction.resumed, tuple(extraction.skipped))

    def notes(self, images: Images) -> list[str]:
        """Say which images cannot be read."""
        return [str(refuse(images, self.unreadable))] if self.unreadable else []


def extract_to_folder(
    encoder: Encoder,
    images: Images,
    folder: Path,
    runtime: Runtime,
    options: Options,
    provenance: dict[str, Any],
    *,
    team: Team,
    overwrite: bool = False,
) -> Written:
    """Write the features of all images to a folder, a part at a time, those of this process's parts.

    All processes of the team must call this together; all return when all have done their part. With `overwrite` what
    the folder has is removed first, else it is kept where it is of the same extraction.

    Raises:
        UserError: as `extract_to_file`; or the folder holds features of another extraction, or other Parquet files.
    """
    made_by = spec_of(encoder, images, runtime, options)
    part = _rows_of_a_part(encoder, options)
    said = {"schema": EXTRACTION_SCHEMA, "images": len(images), "part": part}
    if team.rank == 0:
        make_folder(folder, "--out")
        try_first(encoder, images, options)  # before anything is removed
        _prepare(folder, {**said, "spec": made_by}, overwrite)
    team.share(None)  # nobody begins before the folder is ready
    wanted = [Part(folder, start, min(part, len(images) - start)) for start in range(0, len(images), part)]
    resumed = sum(one.written() for one in wanted)
    for number, one in enumerate(wanted):
        if number % team.size == team.rank and not (one.is_done() and one.is_as_it_was(images)):
            resumed -= one.written()
            one.remove()
            of_part = images.take(np.arange(one.start, one.start + one.images))
            try:
                extraction = extract_part(encoder, of_part, one.file, runtime, options, provenance, made_by)
            except NoneReadable as error:  # in this part; whether there are others is seen at the end
                one.remember(error.skipped)
                one.forget_shards()  # a later run looks at these images again
            else:
                one.remember(extraction.skipped)
                resumed += extraction.resumed
    team.share(None)  # all are done
    written = Written(
        sum(one.written() for one in wanted),
        resumed,
        tuple(chain.from_iterable(one.unreadable() for one in wanted)),
    )
    if not written.rows:
        raise NoneReadable(images, list(written.unreadable))
    return written


@dataclass(frozen=True)
class Part:
    """So many images from `start`, whose features lie in a file; another says which of them cannot be read, if any."""

    folder: Path
    start: int
    images: int

    @property
    def file(self) -> Path:
        """The features."""
        return self.folder / f"{self.start:012d}.parquet"

    def written(self) -> int:
        """Return how many rows the file has."""
        return rows_in(self.file) or 0

    def unreadable(self) -> list[Unreadable]:
        """Return the images that could not be read."""
        try:
            found = [Unreadable(int(row), str(where), str(reason)) for row, where, reason in read_json(self._said)]
        except (UserError, ValueError, TypeError):  # there is none, or it was damaged: the part is not done
            return []
        return found if all(self.start <= bad.row < self.start + self.images for bad in found) else []

    def is_done(self) -> bool:
        """Return whether it is known of every image what became of it."""
        return self.written() + len(self.unreadable()) == self.images

    def is_as_it_was(self, images: Images) -> bool:
        """Return whether none of those of all `images` that could not be read can be by now."""
        rows = np.array([bad.row for bad in self.unreadable()], dtype=np.int64)
        return len(still_unreadable(images, rows)) == len(rows)

    def remove(self) -> None:
        """Begin anew: a file and what is remembered of another one would never make up all images."""
        with writing(self.folder):
            self.file.unlink(missing_ok=True)
            self._said.unlink(missing_ok=True)

    def forget_shards(self) -> None:
        """Remove what a run left that found nothing to write."""
        with writing(self.folder):
            shutil.rmtree(self.folder / f"{self.file.name}.shards", ignore_errors=True)

    def remember(self, unreadable: list[Unreadable]) -> None:
        """Say which images could not be read."""
        if unreadable:
            write_json(self._said, [(self.start + bad.row, bad.where, bad.reason) for bad in unreadable])

    @property
    def _said(self) -> Path:
        return self.file.with_suffix(UNREADABLE_IMAGES)


def _rows_of_a_part(encoder: Encoder, options: Options) -> int:
    """Return how many images a file has, a multiple of the batch."""
    row = encoder.width * (2 if options.stored == "float16" else 4)
    return max(1, PART_BYTES // (row * options.batch)) * options.batch


def _prepare(folder: Path, said: dict[str, Any], overwrite: bool) -> None:
    """Say in the folder what is written to it; refuse one that has something else, or with `overwrite` empty it."""
    path = folder / EXTRACTION
    others = [
        file for file in sorted(folder.rglob("*.parquet")) if not (file.parent == folder and file.stem.isdecimal())
    ]
    if others:
        raise UserError(f"--out {folder}: holds {others[0].name}, which is none of its files; choose another folder")
    ours = sorted(folder.glob("*.parquet"))
    found: Any = None
    if path.exists():
        try:
            found = read_json(path)
        except UserError:
            found = {}
    if digest(found or {}) == digest(said) and not overwrite:
        return
    if (found is not None or ours) and not overwrite:
        raise UserError(
            f"--out {folder}: holds features of another extraction{_differing(found, said)}; choose another folder, or"
            " --overwrite"
        )
    with writing(folder):
        for file in (*ours, *folder.glob(f"*{UNREADABLE_IMAGES}")):
            file.unlink()
        for shards in folder.glob("*.parquet.shards"):
            shutil.rmtree(shards)
    write_json(path, said)


def _differing(found: Any, said: dict[str, Any]) -> str:
    """Say in which fields two extractions differ."""
    if not isinstance(found, dict):
        return ""
    flat = [{**one, **(one.get("spec") or {})} for one in (found, said)]
    fields = [name for name in flat[1] if name != "spec" and flat[0].get(name) != flat[1][name]]
    return f" ({listed(fields)} {'differs' if len(fields) == 1 else 'differ'})"
