"""Content-addressed entries: trained stages and extracted features under a kind and a key.

An entry is a folder `STORE/kind/key/` with `tensors.safetensors`, `meta.json` and, written last, `DONE`: the SHA-256 of
the other two, as `sha256sum -c` takes it; empty in entries older than digests, which are called unverified.
It is built in a folder of its own and renamed into place, so a reader sees all of it or nothing. A lock per entry lets
two runs share a store: the second waits for the first and then finds the work done. Nothing is ever pickled.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors.torch import load_file

from tailscope.errors import UserError
from tailscope.progress import Progress, Quiet
from tailscope.store import files

STEP = 1.0
"""Seconds between two looks whether the time is up, while another run holds an entry."""

KINDS = {
    "views": "features of augmented images",
    "features": "features of images",
    "shifted": "batch-norm statistics",
    "checked": "list of images that cannot be read",
    "stage2": "classifier",
    "pretrained": "pre-trained backbone",
    "stage1": "backbone",
}
"""What an entry of a kind is, the easiest to make again first."""

CHEAP = ("views", "features", "shifted", "checked")
"""Kinds made again without training: what a power cut takes of them is noticed, so they need not wait for the disk."""

TENSORS, META, DONE = "tensors.safetensors", "meta.json", "DONE"
SCRATCH, LOCKS = "scratch", "locks"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_log = logging.getLogger(__name__)

Digests = dict[str, str]


class Store:
    """A folder of artifacts addressed by kind and key.

    Raises:
        Damaged: by any method that reads an entry, which is then not what was written, or lacks a file.
        UserError: the store, or the entry, may not be read or cannot be written.
    """

    def __init__(self, root: Path, *, create: bool = True) -> None:
        """Open the store at `root`, and create it if it is not there; who only looks needs neither.

        Reading it takes no right to write.
        """
        self.root = root
        files.require_utf8(root, "--store")
        with files.reading(root):
            there = root.is_dir()
        if create and not there:
            files.make_folder(root, "--store")

    # -- looking ------------------------------------------------------------------------------------------------

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is complete."""
        done = self.entry(kind, key) / DONE
        with files.reading(done):
            return done.is_file()

    def kinds(self) -> list[str]:
        """Return the kinds of which there are entries: the easiest to make again first, then unknown ones.

        A known kind that may not be read is among them, for there may be entries of it.
        """
        found = {kind for kind in _names(self.root) if kind not in (SCRATCH, LOCKS) and self._has_kind(kind)}
        return [kind for kind in KINDS if kind in found] + sorted(found - set(KINDS))

    def keys(self, kind: str) -> list[str]:
        """Return the keys of all complete entries, and of those that may not be read, sorted."""
        return [key for key in _names(self.root / kind) if self._may_have(kind, key)]

    def _has_kind(self, kind: str) -> bool:
        try:
            return bool(self.keys(kind))
        except UserError:
            return kind in KINDS  # not the `lost+found` of a disk

    def _may_have(self, kind: str, key: str) -> bool:
        try:
            return self.has(kind, key)
        except UserError:
            return True

    def entry(self, kind: str, key: str) -> Path:
        """Return the folder of an entry."""
        return self.root / kind / key

    def scratch(self, kind: str, key: str) -> Path:
        """Return the folder where an entry is being made, with its checkpoint."""
        return self.root / SCRATCH / f"{kind}-{key}"

    def tensors_file(self, kind: str, key: str) -> Path:
        """Return the path of an entry's tensors."""
        return self.entry(kind, key) / TENSORS

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, kind: str, key: str) -> files.Artifact:
        """Read a complete entry and check every byte of it."""
        self.check(kind, key)  # before the file is mapped into memory, from which the same pages are read
        path = self.tensors_file(kind, key)
        with files.reading(path):
            return files.Artifact(load_file(path), self.meta(kind, key))

    def check(self, kind: str, key: str) -> bool:
        """Check every byte of a complete entry; return whether it had digests. One without gets them now."""
        entry = self.entry(kind, key)
        stored = self.digests(kind, key)
        if stored is None:
            with files.reading(entry / TENSORS):
                load_file(entry / TENSORS)
            self.meta(kind, key)
            # Where the store may be written, and nobody, the caller neither, holds the entry.
            with suppress(UserError), self.held(kind, key) as ours:
                if ours and self.digests(kind, key) is None:
                    with files.replacing(entry / DONE) as partial:
                        write_done(partial, self.compute_digests(kind, key))
            return False
        found = self.compute_digests(kind, key)
        for name, digest in found.items():
            if digest != stored[name]:
                raise files.Damaged(f"{entry / name}: damaged (its bytes do not fit its digest)")
        return True

    def compute_digests(self, kind: str, key: str) -> Digests:
        """Return the digests of an entry's files as they are now."""
        return {name: files.file_digest(self.entry(kind, key) / name) for name in (TENSORS, META)}

    def digests(self, kind: str, key: str) -> Digests | None:
        """Return the digests that a complete entry was written with; None for an entry older than digests."""
        path = self.entry(kind, key) / DONE
        with files.reading(path):
            text = path.read_bytes().decode("ascii")
        if not text:
            return None
        found = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
        if found.keys() != {TENSORS, META} or done_text(found) != text:
            raise files.Damaged(f"{path}: damaged (it does not hold the digests of {TENSORS} and {META})")
        return found

    def meta(self, kind: str, key: str) -> files.Meta:
        """Read only an entry's description, and check it."""
        stored = self.digests(kind, key)
        path = self.entry(kind, key) / META
        if stored is not None and files.file_digest(path) != stored[META]:
            raise files.Damaged(f"{path}: damaged (its bytes do not fit its digest)")
        with files.reading(path):
            return dict(json.loads(path.read_text()))

    def checkpoint(self, kind: str, key: str) -> files.Meta | None:
        """Return the description of the checkpoint that a killed run would go on from, if one is whole."""
        whole = files.whole_checkpoint(self.scratch(kind, key))
        return None if whole is None else whole[1].meta

    # -- making -------------------------------------------------------------------------------------------------

    def get_or_make(
        self,
        kind: str,
        key: str,
        make: Callable[[Path], tuple[files.Tensors, files.Meta]],
        progress: Progress | None = None,
    ) -> tuple[files.Artifact, bool]:
        """Return the entry and whether it was there already, computing and storing it if not.

        A damaged entry is named in a warning and computed again; it stays until the new one is whole. Of a damaged
        checkpoint the one before is taken.

        `make` gets a scratch folder that outlives a killed run, a place for checkpoints, removed on success. At every
        safe point of `progress`, once a second, the wait for another run that is making the entry may end.
        """
        try:
            if self.has(kind, key):
                return self.read(kind, key), True
        except files.Damaged as error:
            _log.warning("%s; it is made again", error)
        with self._locked(kind, key, progress or Quiet()):
            with suppress(files.Damaged):
                if self.has(kind, key):
                    return self.read(kind, key), True
            scratch = self.scratch(kind, key)
            with files.writing(scratch):
                scratch.mkdir(parents=True, exist_ok=True)
                self.mend_checkpoint(kind, key)
            tensors, meta = make(scratch)
            self._write(kind, key, scratch / "entry", tensors, meta)
            shutil.rmtree(scratch, ignore_errors=True)
        return files.Artifact(tensors, meta), False

    def put_in_place(self, kind: str, key: str, building: Path) -> None:
        """Move a whole entry into place, and what is there away; the caller holds its lock."""
        entry, replaced = self.entry(kind, key), building.with_name(f"{building.name}.replaced")
        with files.writing(entry):
            entry.parent.mkdir(parents=True, exist_ok=True)
            if entry.exists():  # without DONE, damaged, or to be replaced
                entry.rename(replaced)
            building.rename(entry)
            if kind not in CHEAP:
                files.sync(entry.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    @contextmanager
    def held(self, kind: str, key: str) -> Iterator[bool]:
        """Hold an entry's lock; False where a running process holds it."""
        lock = self._try_lock(kind, key)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def mend_checkpoint(self, kind: str, key: str) -> None:
        """Put the newest checkpoint that is whole where training looks for it; the caller holds the entry's lock."""
        scratch = self.scratch(kind, key)
        newest, whole = scratch / files.CHECKPOINT, files.whole_checkpoint(scratch)
        if whole is None:
            for path in (newest, files.previous_of(newest)):
                path.unlink(missing_ok=True)
        elif whole[0] != newest:
            whole[0].replace(newest)

    def _write(self, kind: str, key: str, building: Path, tensors: files.Tensors, meta: files.Meta) -> None:
        entry = self.entry(kind, key)
        description = files.to_json(entry / META, meta)
        shutil.rmtree(building, ignore_errors=True)  # left by a killed run
        shutil.rmtree(building.with_name(f"{building.name}.replaced"), ignore_errors=True)
        with files.writing(entry):
            building.mkdir()
            path = building / TENSORS
            files.write_tensors(path, tensors)
            (building / META).write_text(description)
            if kind not in CHEAP:
                files.sync(path)
                files.sync(building / META)
            write_done(building / DONE, {name: files.file_digest(building / name) for name in (TENSORS, META)})
            if kind not in CHEAP:
                files.sync(building)
        self.put_in_place(kind, key, building)

    @contextmanager
    def _locked(self, kind: str, key: str, progress: Progress) -> Iterator[None]:
        """Hold an entry's lock, waiting for whoever has it."""
        lock = self._try_lock(kind, key)
        if lock is None:
            _log.warning("another run is working on %s; waiting for it", self.entry(kind, key))
            with progress.task("waiting for another run", 1):
                while (lock := self._try_lock(kind, key, STEP, quiet=True)) is None:
                    progress.safe_point()
        try:
            yield
        finally:
            lock.release()

    def _try_lock(self, kind: str, key: str, seconds: float = 0, *, quiet: bool = False) -> BaseFileLock | None:
        """Try for some seconds to get a lock; a look every now and then, which Ctrl-C interrupts."""
        path = self.root / LOCKS / f"{kind}-{key}.lock"
        with files.writing(self.entry(kind, key)):
            path.parent.mkdir(exist_ok=True)
            return try_lock(path, seconds, quiet=quiet)


def try_lock(path: Path, seconds: float, *, quiet: bool = False) -> BaseFileLock | None:
    """Return the lock of a file, held, or of one beside it where the file system has no locks.

    None where another process holds it for all the `seconds`; of a file system without locks that is warned of, unless
    `quiet`. An OSError says that the disk refuses.
    """
    for lock in (FileLock(path), SoftFileLock(path.with_suffix(".softlock"))):
        soft = isinstance(lock, SoftFileLock)  # where a file has to do, which a killed run leaves behind
        try:
            lock.acquire(timeout=seconds)
        except Timeout:
            if soft and not quiet:
                said = "this disk has no locks but such files; delete it if no run is at work"
                _log.warning("%s: %s", path.with_suffix(".softlock"), said)
            return None
        except (OSError, NotImplementedError) as error:
            if soft or getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
        else:
            return lock
    return None


def _names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; of none where there is no folder. `glob` hides what may not be read."""
    with files.reading(folder):
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def write_done(path: Path, digests: Digests) -> None:
    """Write an entry's last file, and wait until the disk has it: an empty one means an entry older than digests."""
    path.write_text(done_text(digests), encoding="ascii", newline="\n")
    files.sync(path)


def done_text(digests: Digests) -> str:
    r"""Return what DONE holds.

    >>> done_text({"a": "00ff"})
    '00ff  a\n'
    """
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())
