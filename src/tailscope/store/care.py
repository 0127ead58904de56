"""Looking after a store: what is in it, whether it is whole, and what of it can go."""

import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tailscope.errors import UserError, one_line, unknown
from tailscope.progress import Progress, Quiet
from tailscope.store.entries import KINDS, SCRATCH, Store
from tailscope.store.files import CHECKPOINT, Damaged, Meta, check_checkpoint, opened, reading, writing

State = Literal["verified", "digests", "unverified", "damaged", "unreadable"]
_STALE = 24 * 3600.0
"""Seconds after which an interrupted `add` has left its folder for good."""
_REMOVING = "removing-"


@dataclass(frozen=True)
class Row:
    """An entry, or the checkpoint of an unfinished one.

    Attributes:
        kind: the entry's.
        key: the entry's; empty where the folder of the whole kind may not be read.
        checkpoint: whether it is unfinished.
        what: what it is, in words.
        bytes: of its files.
        written: seconds since 1970.
        arithmetic: what computed it, as far as it says.
        state: `verified` (every byte was checked just now), `digests` (has them, and reading checks), `unverified` (was
            written before there were digests), `damaged` or `unreadable` (for the caller).
        problem: what is damaged or unreadable.
    """

    kind: str
    key: str
    checkpoint: bool
    what: str
    bytes: int
    written: float
    arithmetic: str
    state: State
    problem: str | None = None

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"{self.kind}/{self.key}" + (" (checkpoint)" if self.checkpoint else "")


def inventory(store: Store) -> list[Row]:
    """Return what a store holds, from descriptions and headers alone: tensors are not read."""
    return [_row(store, *place, check=False) for place in _places(store)]


def verify(store: Store, progress: Progress | None = None) -> list[Row]:
    """Return what a store holds after checking every byte of it. Entries without digests get them, and say so."""
    places = list(_places(store))
    rows = []
    with (progress or Quiet()).task("checking", len(places)) as advance:
        for place in places:
            rows.append(_row(store, *place, check=True))
            advance(1)
    return rows


@dataclass(frozen=True)
class Pruned:
    """What went, and the names of what a running process is working on, which stayed."""

    removed: list[Row] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)


def prune(
    store: Store,
    *,
    kinds: Collection[str] = (),
    scratch: bool = False,
    damaged: bool = False,
    keep: Collection[str] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Remove entries, those first that are made again most easily.

    Args:
        store: loses them.
        kinds: of which everything goes.
        scratch: unfinished work goes: checkpoints, and what killed processes left.
        damaged: every byte is checked, and damaged entries go; of damaged checkpoints the one before is taken.
        keep: beginnings of keys that stay, whatever else is said; each must be one of a key that is there.
        dry_run: only return what would go.
        progress: receives the number of entries checked.

    Raises:
        UserError: a kind is unknown or may not be read, nothing begins with one of `keep`, or the disk refuses.
    """
    if others := sorted(set(kinds) - {*KINDS, *store.kinds()}):
        raise unknown("--kind", others[0], KINDS)
    rows = verify(store, progress) if damaged else inventory(store)
    if unread := next((row for row in rows if row.kind in kinds and not row.key), None):
        raise UserError(f"{unread.problem}")
    if lost := next((key for key in keep if not any(row.key.startswith(key) for row in rows)), None):
        raise UserError(f"--keep {lost}: no such key in {store.root}; nothing was removed")
    done = Pruned()
    for row in rows:
        by_name = scratch if row.checkpoint else row.kind in kinds
        if (by_name or (damaged and row.state == "damaged")) and not row.key.startswith(tuple(keep)):
            _remove(store, row, done, dry_run=dry_run, by_name=by_name)
    if not dry_run:
        _clean(store.root / SCRATCH, scratch=scratch)
    return done


# -- rows -----------------------------------------------------------------------------------------------------------


def _places(store: Store) -> Iterator[tuple[str, str, bool]]:
    """Yield kind and key of everything, and whether it is unfinished; the easiest to make again first."""
    for kind in store.kinds():
        try:
            keys = store.keys(kind)
        except UserError:
            keys = [""]  # the whole kind may not be read
        yield from ((kind, key, False) for key in keys)
    for folder in sorted((store.root / SCRATCH).glob("*-*")):
        kind, _, key = folder.name.partition("-")
        if kind in KINDS:
            yield kind, key, True


def _row(store: Store, kind: str, key: str, unfinished: bool, *, check: bool) -> Row:
    folder = store.scratch(kind, key) if unfinished else store.entry(kind, key)
    what, arithmetic, problem = "", "", None
    try:
        look = _look_at_checkpoint if unfinished else _look_at_entry
        what, arithmetic, digested = look(store, kind, key, check)
        state: State = ("verified" if check else "digests") if digested else "unverified"
    except UserError as error:
        state, problem = "damaged" if isinstance(error, Damaged) else "unreadable", str(error)
    size, written = _size_and_time(folder)
    return Row(kind, key, unfinished, what, size, written, arithmetic, state, problem)


def _look_at_entry(store: Store, kind: str, key: str, check: bool) -> tuple[str, str, bool]:
    """Return what an entry is, its arithmetic and whether it has digests."""
    if not key:
        raise UserError(f"{store.root / kind}: may not be read; ask its owner for the right to read it")
    digested = store.check(kind, key) if check else store.digests(kind, key) is not None
    meta, path = store.meta(kind, key), store.tensors_file(kind, key)
    with opened(path) as file:  # is it cut off?
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    what = describe(meta) or "; ".join(f"{one_line(name)} {shape}" for name, shape in list(shapes.items())[:2])
    return what, _arithmetic(meta), digested


def _look_at_checkpoint(store: Store, kind: str, key: str, _: bool) -> tuple[str, str, bool]:
    path = store.scratch(kind, key) / CHECKPOINT
    with reading(path):
        if not path.exists():
            return "leftovers of a killed run", "", True
    artifact, digested = check_checkpoint(path)  # a checkpoint is small
    return f"after epoch {artifact.meta['epochs']}", "", digested


def _size_and_time(folder: Path) -> tuple[int, float]:
    """Return the bytes below a folder and when its newest file was written; files may vanish meanwhile."""
    size, written = 0, 0.0
    for path in folder.rglob("*"):
        with suppress(OSError):
            stat = path.lstat()
            if path.is_file():
                size, written = size + stat.st_size, max(written, stat.st_mtime)
    return size, written


def describe(meta: Meta) -> str:
    """Return what a trained stage is, in words, as far as its description says; empty where it is none.

    >>> describe({"spec": {"data": {"name": "digits", "profile": "exp:9"}, "augment": ["flip"]}, "seed": 0})
    'digits exp:9, flip, seed 0'
    """
    spec = _fields(meta.get("spec"))
    if not spec:
        return f"{meta['images']:,} images" if isinstance(meta.get("images"), int) else ""
    data = _fields(spec.get("data"))
    augment, loss = spec.get("augment"), spec.get("loss")
    parts = [
        f"{data.get('name', '?')} {data.get('profile', '?')}",
        spec.get("model"),
        "+".join(str(part) for part in (*(augment if isinstance(augment, list) else ()), spec.get("mix")) if part),
        None if loss == "cross_entropy" else loss,
        f"{meta['epochs']} epochs" if "epochs" in meta else None,
        f"seed {meta['seed']}" if "seed" in meta else None,
    ]
    return one_line(", ".join(str(part) for part in parts if part))


def _arithmetic(meta: Meta) -> str:
    """Return processor, precision and engine, and whatever else a description says of how it was computed."""
    told = _fields(meta.get("arithmetic"))
    device = _fields(meta.get("device"))
    threads = device.get("threads")
    parts = [
        device.get("gpu") or device.get("cpu"),
        f"{threads} threads" if threads and not device.get("gpu") else None,
        meta.get("precision"),
        "compiled" if meta.get("compiled") else None,
        "fused" if meta.get("fused") else None,
        *(f"{name} {value}" for name, value in told.items() if isinstance(value, str | int | bool)),
    ]
    return one_line(", ".join(str(part) for part in parts if part))


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# -- removing -------------------------------------------------------------------------------------------------------


def _remove(store: Store, row: Row, done: Pruned, *, dry_run: bool, by_name: bool) -> None:
    """Remove what was asked for by name, or what is still damaged: another process may have mended it meanwhile."""
    with store.held(row.kind, row.key) as ours:
        if not ours:
            done.busy.append(row.name)
            return
        if not by_name and _row(store, row.kind, row.key, row.checkpoint, check=True).state != "damaged":
            return
        if not dry_run:
            folder = store.scratch(row.kind, row.key) if row.checkpoint else store.entry(row.kind, row.key)
            with writing(folder):
                if row.checkpoint and not by_name:
                    store.mend_checkpoint(row.kind, row.key)
                else:
                    _take_away(store, folder)
        done.removed.append(row)


def _take_away(store: Store, folder: Path) -> None:
    """Remove a folder, which is gone to readers at once; what a kill leaves of it, the next `prune` removes."""
    scratch = store.root / SCRATCH
    scratch.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=_REMOVING, dir=scratch))
    folder.rename(aside / folder.name)
    shutil.rmtree(aside)


def _clean(folder: Path, *, scratch: bool) -> None:
    """Remove what an interrupted `prune` left among unfinished work, and with `scratch` an interrupted `add`."""
    left = list(folder.glob(f"{_REMOVING}*"))
    if scratch:
        left += [one for one in folder.glob("adding-*") if time.time() - one.stat().st_mtime > _STALE]
    for one in left:
        shutil.rmtree(one, ignore_errors=True)
