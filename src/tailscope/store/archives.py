"""Entries and checkpoints as one archive, so that what one machine trained another recalls.

An archive is a plain, uncompressed tar: the files of the entries as they lie in a store, then `MANIFEST.json` with the
size and the SHA-256 of each. It holds nothing that differs between two packings of the same entries. Adding trusts
nothing: names, types and sizes are checked from the headers, every byte against the manifest and the entries' own
digests, and only then does anything appear in the store. Nothing that is there is replaced silently.
"""

import hashlib
import io
import json
import math
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tailscope.errors import UserError, one_line
from tailscope.progress import Progress, Quiet
from tailscope.store.entries import DONE, KINDS, META, SCRATCH, TENSORS, Digests, Store, done_text
from tailscope.store.files import (
    CHECKPOINT,
    Damaged,
    check_checkpoint,
    load_header,
    previous_of,
    reading,
    replacing,
    sync,
    whole_checkpoint,
    writing,
)

MANIFEST, SCHEMA = "MANIFEST.json", "tailscope.store/1"
_BLOCK = tarfile.BLOCKSIZE
_MOST_TEXT = 64 << 20
"""Bytes of the manifest or of a description: more is no text of ours."""
_KIND = "|".join(KINDS)
_NAME = re.compile(
    rf"({_KIND})/[0-9A-Za-z_]{{1,64}}/({re.escape(TENSORS)}|{re.escape(META)}|{DONE})"
    rf"|{SCRATCH}/({_KIND})-[0-9A-Za-z_]{{1,64}}/{re.escape(CHECKPOINT)}"
)

Entry = tuple[str, str]
"""Kind and key."""


# -- packing --------------------------------------------------------------------------------------------------------


def pack(
    store: Store,
    to: Path,
    entries: Sequence[Entry],
    checkpoints: Sequence[Entry] = (),
    limit: int | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write complete entries and checkpoints, each (kind, key), to an archive in this order; return what was written.

    Every byte is checked on the way; what a running training goes on to write does not disturb. What does not fit into
    `limit` bytes is cut, between entries, into `stages-1.tar`, `stages-2.tar` ..., each an archive of its own.

    Raises:
        UserError: one is not there, damaged or larger than the limit; a file is there that may not be overwritten; or
            the disk refuses.
    """
    things = [(_pack_entry, *entry) for entry in entries] + [(_pack_checkpoint, *entry) for entry in checkpoints]
    sizes = [packed_bytes(store, kind, key, checkpoint=write is _pack_checkpoint) for write, kind, key in things]
    groups = _groups(things, sizes, limit)
    paths = [to] if len(groups) == 1 else [to.with_name(f"{to.stem}-{n}{to.suffix}") for n in range(1, len(groups) + 1)]
    if taken := next((path for path in paths if path.exists()), None) if not overwrite else None:
        raise UserError(f"{taken}: exists; use another --out or --overwrite")
    with (progress or Quiet()).task("packing", len(things)) as advance:
        for path, group in zip(paths, groups, strict=True):
            with _new_archive(path) as archive:
                for write, kind, key in group:
                    write(store, kind, key, archive)
                    advance(1)
    return paths


def packed_bytes(store: Store, kind: str, key: str, *, checkpoint: bool = False) -> int:
    """Return at most how many bytes an entry, or a checkpoint, takes of an archive."""
    if checkpoint:
        sizes = [_checkpoint_of(store, kind, key).stat().st_size]
    else:
        entry = store.entry(kind, key)
        with reading(entry):
            sizes = [(entry / name).stat().st_size for name in (TENSORS, META)] + [_BLOCK]
    # A header before each file and a line of the manifest for it, and zeros after it up to the next block.
    return sum(size + 3 * _BLOCK for size in sizes)


def _groups(things: Sequence[Any], sizes: Sequence[int], limit: int | None) -> list[list[Any]]:
    """Cut things, in their order, into groups that fit into the limit; without one there is one group."""
    room = math.inf if limit is None else limit - tarfile.RECORDSIZE - 4 * _BLOCK  # what ends an archive
    groups: list[list[Any]] = [[]]
    filled = 0
    for thing, size in zip(things, sizes, strict=True):
        if size > room:
            raise UserError(f"{thing[1]} {thing[2]}: takes {size:,} bytes, more than the limit of {limit:,} allows")
        if filled + size > room:
            groups.append([])
            filled = 0
        groups[-1].append(thing)
        filled += size
    return groups


class _Archive:
    """An archive being written, and the digests of what went in."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, file: io.BufferedReader | io.BytesIO) -> str:
        """Append a file; return its SHA-256."""
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        info = tarfile.TarInfo(name)  # of mode 644, owner 0 and 1970: the same for everybody
        info.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._tar.addfile(info, file)
        self.files[name] = {"bytes": info.size, "sha256": digest}
        return digest


@contextmanager
def _new_archive(path: Path) -> Iterator[_Archive]:
    """Write an archive, whole or not at all, and its manifest at the end."""
    with (
        replacing(path) as partial,
        partial.open("wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        archive = _Archive(tar)
        yield archive
        manifest = json.dumps({"schema": SCHEMA, "files": archive.files}, indent=0).encode()
        archive.add(MANIFEST, io.BytesIO(manifest))


def _pack_entry(store: Store, kind: str, key: str, archive: _Archive) -> None:
    entry = store.entry(kind, key)
    stored = store.digests(kind, key)
    found: Digests = {}
    for name in (TENSORS, META):
        with reading(entry / name), (entry / name).open("rb") as file:
            found[name] = archive.add(f"{kind}/{key}/{name}", file)
        if stored is not None and found[name] != stored[name]:
            raise Damaged(f"{entry / name}: damaged (its bytes do not fit its digest)")
    archive.add(f"{kind}/{key}/{DONE}", io.BytesIO(done_text(found).encode()))


def _pack_checkpoint(store: Store, kind: str, key: str, archive: _Archive) -> None:
    path = _checkpoint_of(store, kind, key)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with reading(path):
            shutil.copyfile(path, copy)  # a running training may replace it at any moment
        check_checkpoint(copy)
        with copy.open("rb") as file:
            archive.add(f"{SCRATCH}/{kind}-{key}/{CHECKPOINT}", file)


def _checkpoint_of(store: Store, kind: str, key: str) -> Path:
    whole = whole_checkpoint(store.scratch(kind, key))
    if whole is None:
        raise UserError(f"{store.scratch(kind, key)}: no checkpoint there")
    return whole[0]


# -- adding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Added:
    """What became of an archive's entries and checkpoints, each named `kind/key`.

    Attributes:
        added: entries and checkpoints that are in the store now.
        replaced: entries that were there damaged, or different, and were replaced by the archive's.
        equal: entries that were there already, the same to the bit.
        differing: entries that are there with another content; they were left.
        busy: entries that a running process is making; they were left.
        unneeded: checkpoints of entries that are whole, or not newer than the store's own.
    """

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    unneeded: list[str] = field(default_factory=list)


def add(store: Store, *files: Path, replace: bool = False, progress: Progress | None = None) -> Added:
    """Put what archives hold into a store; all of them are checked before anything appears in it.

    With `replace` an entry of an archive replaces one of another content that is in the store.

    Raises:
        UserError: an archive is damaged, or holds what `pack` does not write; nothing was added. Or the disk refuses.
    """
    done = Added()
    with ExitStack() as stack:
        listed = [_listed(file, stack.enter_context(_opened(file))) for file in files]
        staging = stack.enter_context(_staging(store, sum(m.size for members in listed for m in members.values())))
        with (progress or Quiet()).task("checking", sum(map(len, listed))) as advance:
            for number, (file, members) in enumerate(zip(files, listed, strict=True)):
                _unpack(file, members, staging / str(number), advance)
        for folder in (staging / str(number) for number in range(len(files))):
            for building in sorted(folder.glob(f"*/*/{DONE}")):
                _place_entry(store, building.parent, done, replace)
            for path in sorted(folder.glob(f"{SCRATCH}/*/{CHECKPOINT}")):
                _place_checkpoint(store, path, done)
    return done


@dataclass(frozen=True)
class _Member:
    """Where a file lies in an archive."""

    archive: IO[bytes]
    start: int
    size: int

    def copy(self, to: IO[bytes]) -> str:
        """Write the content to another file; return its SHA-256."""
        self.archive.seek(self.start)
        digest, left = hashlib.sha256(), self.size
        while left and (data := self.archive.read(min(left, 1 << 20))):
            digest.update(data)
            to.write(data)
            left -= len(data)
        return digest.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    if not file.is_file():
        raise UserError(f"{file}: {'a folder, not an archive' if file.is_dir() else 'no such file'}")
    with reading(file):
        opened = file.open("rb")
    with opened:
        yield opened


@contextmanager
def _staging(store: Store, size: int) -> Iterator[Path]:
    """Give a folder on the store's disk, with room for `size` bytes."""
    scratch = store.root / SCRATCH
    with writing(store.root):
        scratch.mkdir(exist_ok=True)
        free = shutil.disk_usage(scratch).free
        if size > free:
            raise UserError(f"{store.root}: the archives hold {size:,} bytes, and {free:,} are free")
        staging = Path(tempfile.mkdtemp(prefix="adding-", dir=scratch))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _listed(file: Path, archive: IO[bytes]) -> dict[str, _Member]:
    """Return an archive's files by name, from its headers alone, as the manifest lists them too; without the manifest.

    The headers are read here and not by `TarFile`, which would follow extensions that no archive of ours has.
    """
    end = archive.seek(0, io.SEEK_END)
    members: dict[str, _Member] = {}
    position = 0
    while MANIFEST not in members:
        archive.seek(position)
        try:
            info = tarfile.TarInfo.frombuf(archive.read(_BLOCK), "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            reason = "it ends without a manifest" if position else "it is no tar"
            raise UserError(f"{file}: no whole archive of `store pack` ({reason}: {one_line(str(error))})") from None
        position += _BLOCK
        if info.type != tarfile.REGTYPE or (info.name != MANIFEST and not _NAME.fullmatch(info.name)):
            raise UserError(
                f"{file}: holds {one_line(info.name)!r}, which `store pack` does not write; nothing was added"
            )
        if info.name in members or not 0 <= info.size <= end - position:
            raise UserError(f"{file}: damaged or cut off at {info.name}; nothing was added")
        if info.size > _MOST_TEXT and not info.name.endswith(".safetensors"):
            raise UserError(f"{file}: {info.name} is too large, {info.size:,} bytes; nothing was added")
        members[info.name] = _Member(archive, position, info.size)
        position += -(-info.size // _BLOCK) * _BLOCK
    return members


def _unpack(file: Path, members: dict[str, _Member], to: Path, advance: Callable[[int], None]) -> None:
    """Write an archive's files to a folder and check them."""
    members.pop(MANIFEST).copy(text := io.BytesIO())
    try:
        manifest = json.loads(text.getvalue())
        files = {name: (stated["bytes"], stated["sha256"]) for name, stated in manifest["files"].items()}
        known = manifest["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: its manifest is damaged ({one_line(str(error))}); nothing was added") from None
    if not known:
        raise UserError(f"{file}: its schema is {one_line(str(manifest['schema']))[:60]!r}; known: {SCHEMA!r}")
    if files.keys() != members.keys():
        name = min(files.keys() ^ members.keys())
        raise UserError(f"{file}: {one_line(name)[:120]} is not both in it and in its manifest; nothing was added")
    for name, member in members.items():
        path = to / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                found = (member.size, member.copy(out))
        if found != files[name]:
            raise UserError(f"{file}: damaged ({name} does not fit the manifest); nothing was added")
        advance(1)
    _check_unpacked(file, to)


def _check_unpacked(file: Path, folder: Path) -> None:
    """Check that entries are whole, with digests that fit, and that checkpoints can be read."""
    try:
        unpacked = Store(folder)
        for building in {path.parent for path in folder.glob("*/*/*") if path.parent.parent.name != SCRATCH}:
            kind, key = building.parent.name, building.name
            if unpacked.digests(kind, key) is None:
                raise Damaged(f"{kind}/{key} has no digests")
            unpacked.read(kind, key)
        for path in folder.glob(f"{SCRATCH}/*/{CHECKPOINT}"):
            check_checkpoint(path)
    except UserError as error:
        message = str(error).replace(f"{folder}/", "")
        raise UserError(f"{file}: {message}; nothing was added") from None


def _place_entry(store: Store, building: Path, done: Added, replace: bool) -> None:
    """Move an unpacked entry into the store, unless another of its key is there."""
    kind, key = building.parent.name, building.name
    name = f"{kind}/{key}"
    with store.held(kind, key) as ours:
        if not ours:
            done.busy.append(name)
            return
        there: Digests | None = {}  # what is damaged
        with suppress(Damaged):
            if store.has(kind, key):
                store.check(kind, key)
            there = store.compute_digests(kind, key) if store.has(kind, key) else None
        if there == Store(building.parent.parent).digests(kind, key):
            done.equal.append(name)
        elif there and not replace:
            done.differing.append(name)
        else:
            for file in (TENSORS, META, DONE):
                sync(building / file)
            store.put_in_place(kind, key, building)
            (done.added if there is None else done.replaced).append(name)


def _place_checkpoint(store: Store, unpacked: Path, done: Added) -> None:
    """Move an unpacked checkpoint into the store, unless it has the entry or a checkpoint that is as far."""
    folder = unpacked.parent.name
    kind, _, key = folder.partition("-")
    name = f"{kind}/{key} (checkpoint)"
    with store.held(kind, key) as ours:
        if not ours:
            done.busy.append(name)
            return
        there = whole_checkpoint(store.scratch(kind, key))
        if store.has(kind, key) or (there is not None and there[1].meta["epochs"] >= load_header(unpacked)["epochs"]):
            done.unneeded.append(name)
            return
        path = store.scratch(kind, key) / CHECKPOINT
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if there is not None:
                there[0].replace(previous_of(path))
            sync(unpacked)
            unpacked.replace(path)
        done.added.append(name)
