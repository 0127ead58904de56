"""Content-addressed artifacts on disk: trained stages and extracted features.

An entry is a folder `STORE/kind/key/` with `tensors.safetensors`, `meta.json` and, written last, `DONE`. It is
built in a folder of its own and renamed into place, so a reader sees all of it or nothing. A lock per entry lets two
runs share a store: the second waits for the first and then finds the work done. Nothing is ever pickled.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailscope.errors import UserError, one_line, plain_name
from tailscope.progress import Progress, Quiet

Tensors = dict[str, Tensor]
Meta = dict[str, Any]

STEP = 1.0
"""Seconds between two looks whether the time is up, while another run holds an entry."""

CHECKPOINT = "checkpoint.safetensors"
"""What a training that was killed goes on from, in its scratch folder."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A stored entry: named tensors and a JSON description."""

    tensors: Tensors
    meta: Meta


class Store:
    """A folder of artifacts addressed by kind and key."""

    def __init__(self, root: Path) -> None:
        """Open (and create) the store at `root`.

        Raises:
            UserError: the folder cannot be created or written.
        """
        self.root = root
        make_folder(root, "--store")

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is complete."""
        return (self._entry(kind, key) / "DONE").is_file()

    def keys(self, kind: str) -> list[str]:
        """Return the keys of all complete entries, sorted."""
        return sorted(done.parent.name for done in (self.root / kind).glob("*/DONE"))

    def tensors_file(self, kind: str, key: str) -> Path:
        """Return the path of an entry's tensors."""
        return self._entry(kind, key) / "tensors.safetensors"

    def read(self, kind: str, key: str) -> Artifact:
        """Read a complete entry.

        Raises:
            UserError: a file of the entry is damaged.
        """
        try:
            tensors = load_tensors(self.tensors_file(kind, key))
        except UserError as error:
            raise UserError(f"{error}; delete its folder to compute it again") from None
        return Artifact(tensors, self.meta(kind, key))

    def meta(self, kind: str, key: str) -> Meta:
        """Read only an entry's description."""
        path = self._entry(kind, key) / "meta.json"
        try:
            meta: Meta = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); delete its folder to compute it again") from error
        return meta

    def checkpoint(self, kind: str, key: str) -> Meta | None:
        """Return the description of a killed run's checkpoint, if there is one."""
        path = self._scratch(kind, key) / CHECKPOINT
        return load_header(path) if path.is_file() else None

    def get_or_make(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], tuple[Tensors, Meta]],
        progress: Progress | None = None,
    ) -> tuple[Artifact, bool]:
        """Return the entry and whether it was there already, computing and storing it if not.

        Args:
            kind: the folder that such entries share.
            key: names the entry.
            make: gets a scratch folder that outlives a killed run: a place for checkpoints, removed on success.
            progress: may end the wait for another run that is making the entry, at a safe point every second.

        Raises:
            UserError: the entry is damaged, or cannot be written.
        """
        if self.has(kind, key):
            return self.read(kind, key), True
        with self._locked(kind, key, progress or Quiet()):
            if self.has(kind, key):
                return self.read(kind, key), True
            scratch = self._scratch(kind, key)
            scratch.mkdir(parents=True, exist_ok=True)
            tensors, meta = make(scratch)
            self._write(self._entry(kind, key), scratch / "entry", tensors, meta)
            shutil.rmtree(scratch, ignore_errors=True)
        return Artifact(tensors, meta), False

    def _scratch(self, kind: str, key: str) -> Path:
        return self.root / "scratch" / f"{kind}-{key}"

    def _entry(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    @staticmethod
    def _write(entry: Path, building: Path, tensors: Tensors, meta: Meta) -> None:
        shutil.rmtree(building, ignore_errors=True)  # left by a killed run
        with _writing(entry):
            building.mkdir()
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, building / "tensors.safetensors"
            )
            (building / "meta.json").write_text(json.dumps(meta, indent=1))
            (building / "DONE").write_text("")
            entry.parent.mkdir(parents=True, exist_ok=True)
            if entry.exists():  # without DONE, or get_or_make would not have come here
                shutil.rmtree(entry)
            building.rename(entry)

    @contextmanager
    def _locked(self, kind: str, key: str, progress: Progress) -> Iterator[None]:
        locks = self.root / "locks"
        locks.mkdir(exist_ok=True)
        lock = FileLock(locks / f"{kind}-{key}.lock")
        if not _acquired(lock, 0):
            _log.warning("another run is working on %s; waiting for it", self._entry(kind, key))
            with progress.task("waiting for another run", 1):
                while not _acquired(lock, STEP):
                    progress.safe_point()
        try:
            yield
        finally:
            lock.release()


def _acquired(lock: FileLock, seconds: float) -> bool:
    """Try for some seconds to get a lock; a look every now and then, which Ctrl-C interrupts."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def load_tensors(path: Path) -> Tensors:
    """Read a safetensors file.

    Raises:
        UserError: it is missing, truncated or something else.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({one_line(str(error))})") from error


@contextmanager
def _writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn a full disk and the like into one line, without the partial file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({one_line(str(error))}); free space or take another disk"
        ) from error


def save_tensors(path: Path, tensors: Tensors, meta: Meta) -> None:
    """Write tensors with a JSON description in the file's header, atomically: a checkpoint.

    Raises:
        UserError: the disk is full, or the like.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    header = {"meta": json.dumps(meta)}
    with _writing(path, partial):
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial, metadata=header)
        partial.replace(path)


def load_checkpoint(path: Path) -> Artifact:
    """Read what `save_tensors` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        tensors = load_tensors(path)
    except UserError as error:
        raise UserError(f"{error}; delete it to start again") from None
    return Artifact(tensors, load_header(path))


def load_header(path: Path) -> Meta:
    """Read the description that `save_tensors` wrote, without the tensors.

    Raises:
        UserError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: Meta = json.loads(file.metadata()["meta"])
            return header
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({one_line(str(error))}); delete it to start again") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused: undefined must be None.

    Raises:
        UserError: the disk is full, or the like.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with _writing(path, partial):
        partial.write_text(text + "\n")
        partial.replace(path)


def make_folder(path: Path, option: str) -> Path:
    """Create a folder and check that it can be written.

    Raises:
        UserError: it cannot, naming the command-line option that asked for it; or its name is no UTF-8, which the
            writer of safetensors does not take.
    """
    if plain_name(str(path)) != str(path):
        raise UserError(f"{option} {plain_name(str(path))}: its name is no UTF-8; choose another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); choose another folder") from error
    return path
