"""Features larger than memory: a folder of Parquet files, each of some of the images, written by one or more processes.

The files are named by the first of their images: file after file, their rows are the images in their order. Each is
extracted as a file by itself is (`extract_part`), written whole or not at all, and left alone by a later run.
`extraction.json` says what they are parts of and how many images each has. A process takes every so manyth file;
batches begin at multiples of their size, so that the files are the same, however many processes write them.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailscope.data.decoding import Unreadable, refuse
from tailscope.data.images import Images
from tailscope.device import Runtime, Team
from tailscope.encoders.extract import Extraction, Options, extract_part, spec_of, try_first
from tailscope.encoders.networks import Encoder
from tailscope.errors import UserError
from tailscope.results import read_json
from tailscope.spec import digest
from tailscope.store import make_folder
from tailscope.store.files import write_json, writing
from tailscope.tables.checks import listed
from tailscope.tables.parquet import rows_in

SAID = "extraction.json"
PART_BYTES = 2**27  # of features in a file: what a process holds, a few times over


def is_folder(out: Path | str) -> bool:
    """Return whether this names a folder: it ends with a slash, or is one.

    >>> is_folder("features/"), is_folder("features.npz")
    (True, False)
    """
    return str(out).endswith("/") or Path(out).is_dir()


@dataclass(frozen=True)
class Written:
    """What a file or folder holds: rows, those that were there before, images that cannot be read, and what they are.

    Those are named of a file by itself; of a folder only their number is known.
    """

    rows: int
    resumed: int
    skipped: int
    unreadable: tuple[Unreadable, ...] = ()

    @classmethod
    def of(cls, extraction: Extraction) -> "Written":
        """Return what was written to a file."""
        skipped = extraction.skipped
        return cls(len(extraction.table), extraction.resumed, len(skipped), tuple(skipped))

    def notes(self, images: Images) -> list[str]:
        """Say which images, or how many, cannot be read."""
        if self.unreadable:
            return [str(refuse(images, self.unreadable))]
        return [f"{images.name}: {self.skipped:,} of {len(images):,} images cannot be read"] * bool(self.skipped)


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

    All processes of the team must call this together; all return when all have done their part.

    Raises:
        UserError: as `extract_to_file`; or the folder holds features of another extraction, or other Parquet files.
    """
    made_by = spec_of(encoder, images, runtime, options)
    part = _rows_of_a_part(encoder, options)
    said = {"schema": "tailscope.features/1", "images": len(images), "part": part}
    if team.rank == 0:
        _prepare(make_folder(folder, "--out"), {**said, "spec": made_by}, overwrite)
        try_first(encoder, images, options)
    team.share(None)  # nobody begins before the folder is ready
    files = {folder / f"{start:012d}.parquet": start for start in range(0, len(images), part)}
    resumed = sum(filter(None, map(rows_in, files)))
    for number, (file, start) in enumerate(files.items()):
        if number % team.size == team.rank and rows_in(file) is None:
            rows = np.arange(start, min(start + part, len(images)))
            resumed += extract_part(encoder, images.take(rows), file, runtime, options, provenance, made_by).resumed
    team.share(None)  # all are done
    written = sum(filter(None, map(rows_in, files)))
    return Written(written, resumed, len(images) - written)


def _rows_of_a_part(encoder: Encoder, options: Options) -> int:
    """Return how many images a file has, a multiple of the batch."""
    row = encoder.width * (2 if options.stored == "float16" else 4)
    return max(1, PART_BYTES // (row * options.batch)) * options.batch


def _prepare(folder: Path, said: dict[str, Any], overwrite: bool) -> None:
    """Say in the folder what is written to it; refuse one that has something else."""
    path = folder / SAID
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
    if digest(found or {}) == digest(said):
        return
    if (found is not None or ours) and not overwrite:
        raise UserError(
            f"--out {folder}: holds features of another extraction{_differing(found, said)}; choose another folder, or"
            " --overwrite"
        )
    with writing(folder):
        for file in ours:
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
