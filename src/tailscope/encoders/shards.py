"""Parts of an extraction on disk, so that a killed run continues where it stopped.

They lie beside the output, in `OUT.shards/`: `spec.json` says what they are parts of; each shard, named by the first of
its images, of which it has as many as were done since the last, holds `features` [n, d] and `rows` [n], and is written
whole or not at all, with a digest. Those of a killed run are checked before it goes on, and a damaged one is extracted
again.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tailscope.data.decoding import Unreadable
from tailscope.errors import UserError
from tailscope.results import read_json
from tailscope.spec import digest
from tailscope.store import (
    Damaged,
    check_tensors,
    load_checkpoint,
    load_header,
    make_folder,
    save_tensors,
    try_lock,
    write_json,
    writing,
)

_log = logging.getLogger(__name__)


class Shards:
    """The shards of one extraction of `total` images."""

    def __init__(self, out: Path, total: int) -> None:
        """Create the folder beside `out`.

        Raises:
            UserError: it cannot be written.
        """
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
        """Return features and rows.

        Raises:
            UserError: the shard was damaged since it was written.
        """
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
        """Keep other processes out, check that shards from before are of the same `spec`; remove the folder on success.

        Raises:
            UserError: another process is at work there, or the shards are of another extraction; the first field of
                the spec that differs is named.
        """
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
            raise UserError(
                f"{self.folder}: its shards are of another extraction ({field} was {old!r}, is {new!r}); delete the "
                "folder or choose another --out"
            )

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
