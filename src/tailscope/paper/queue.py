"""As much of the paper as fits into a time limit, most valuable first, and the rest another time.

A *piece* is one experiment on one data set with the seeds so far. Pieces are worked off in order; each is written, with
claims and tables, when it is finished. With one job a piece's backbones are trained when its turn comes. With several,
threads train them (`tailscope.paper.ahead`) while this one fits the classifiers of those that are there: both spend
their time outside of Python's lock, so a process of its own would bring nothing. When the time is up the work stops at
the end of an epoch or of an extraction, which the store keeps, and the same command goes on from there.
"""

import logging
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tailscope.data.sources import load
from tailscope.errors import UserError, expanded
from tailscope.experiments.lab import Lab
from tailscope.experiments.runs import Run, evaluate
from tailscope.experiments.settings import Settings, store_root
from tailscope.origin import command
from tailscope.paper import ahead, side_by_side, targets
from tailscope.paper.reproduce import EXPERIMENTS, Reproduction, Tell, conclude, draw, fixed_part
from tailscope.paper.runs import runs
from tailscope.paper.timing import duration, parse_duration
from tailscope.progress import Deadline, Progress, Quiet, TimeIsUp
from tailscope.result_files import check_free, stored_spec, write
from tailscope.store import Store, make_folder, pack, packed_bytes
from tailscope.training.runtime import Runtime

_log = logging.getLogger(__name__)

EVERYTHING = "everything"
DATASETS = ("cifar10-lt", "cifar100-lt")
"""What `everything` is: the CIFAR half of the paper."""
SCHEMA = "tailscope.reproduce/1"
GEOMETRY = "geometry"
ARCHIVE, ROOM, FILES = 15 << 20, 62 << 20, 7
"""Of a bundle: the bytes of an archive and of all together, and how many files it has at most; logs make one more."""
TAR_END = 16 << 10
"""More bytes than what an archive has beside its entries."""
WAIT = 0.2
"""Seconds between two looks at what threads have trained and whether data have come."""


@dataclass(frozen=True)
class Piece:
    """One experiment on one data set, with the seeds that its result file then holds."""

    dataset: str
    experiment: str
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        """Return the piece as people read it."""
        seeds = f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"seeds {' '.join(map(str, self.seeds))}"
        return f"{self.experiment} of {self.dataset}, {seeds}"


def order(wanted: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[Piece]:
    """Return the pieces, most valuable first: everything with one seed before anything with two.

    Args:
        wanted: the experiments of each data set, both in the order of their value.
        seeds: in the order in which they are added.

    >>> [str(piece) for piece in order({"cifar10-lt": ["swap", "ladder"], "cifar100-lt": ["swap"]}, [0, 1])]
    ... # doctest: +NORMALIZE_WHITESPACE
    ['swap of cifar10-lt, seed 0', 'ladder of cifar10-lt, seed 0', 'swap of cifar100-lt, seed 0',
     'swap of cifar10-lt, seeds 0 1', 'ladder of cifar10-lt, seeds 0 1', 'swap of cifar100-lt, seeds 0 1']
    """
    return [
        Piece(dataset, experiment, tuple(seeds[:n]))
        for n in range(1, len(seeds) + 1)
        for dataset, experiments in wanted.items()
        for experiment in experiments
    ]


def run_queue(reproduction: Reproduction, *, tell: Tell = print, progress: Progress | None = None) -> dict[str, Any]:
    """Work off the pieces of a reproduction until they are done or the time is up; write OUT/reproduce.json.

    `everything` takes both CIFAR data sets, each in a folder of its own such as OUT/cifar10-paper, and keeps trained
    stages beside OUT (in OUT-store, unless told otherwise), so that OUT holds no weights. Other reproductions use OUT
    itself. The reports are built once, at the end; an interrupt leaves everything but them.

    Args:
        reproduction: what to do; its `time_limit` counts from now.
        tell: receives lines for people.
        progress: receives the work done.

    Returns:
        What reproduce.json holds.

    Raises:
        UserError: something about the reproduction, the data or OUT is not usable; before any training, unless the
            data came later.
    """
    limit = None if reproduction.time_limit is None else parse_duration(reproduction.time_limit)
    deadline = Deadline(progress or Quiet(), float("inf") if limit is None else limit)
    runtime = replace(Runtime.choose(reproduction.device, engine=reproduction.engine), progress=deadline)
    closing = 0.0 if limit is None else min(ahead.LAST, limit / 10)
    make_folder(reproduction.out, "--out")
    trainings = ahead.Trainings(reproduction.jobs, runtime, deadline, closing, tell)
    queue = _Queue(reproduction, trainings, tell, limit)
    try:
        with trainings:
            queue.work()
    except BaseException as error:
        if (
            isinstance(error, KeyboardInterrupt) or reproduction.bundle is not None
        ):  # who wants a bundle cannot come back
            queue.conclude()
        raise
    document = queue.conclude()
    for out in queue.reports():
        draw(out, tell)
    return document


@dataclass(frozen=True, eq=False)
class _Row:
    """A run with what it is known by: its backbone's key, and its own."""

    run: Run
    backbone: str
    key: str


class _Queue:
    """The pieces of a reproduction, the labs that they are worked off in, and which of them are done."""

    def __init__(self, reproduction: Reproduction, trainings: ahead.Trainings, tell: Tell, limit: float | None) -> None:
        self._parts = _by_dataset(reproduction)
        self._changed: set[str] = set()  # data sets with new results
        self._reproduction, self._trainings, self._tell, self._limit = reproduction, trainings, tell, limit
        self._started = time.monotonic()
        self._settings = {dataset: part.settings() for dataset, part in self._parts.items()}
        self._first = next(iter(self._settings.values()))
        wanted = {dataset: part.wanted() for dataset, part in self._parts.items()}
        self._pieces = order(wanted, self._first.seeds)
        self._labs: dict[str, Lab] = {}
        self._rows: dict[Piece, list[_Row]] = {}
        self._done: set[Piece] = set()
        self._stored: set[str] = set()
        self._evaluated: set[str] = set()
        self._broken: set[Piece] = set()

    def work(self) -> None:
        """Do what can be done, one thing after the other, until nothing is left or the time is up."""
        coming = self._take_in()
        label = side_by_side.label_of(self._first.recipe.model_dump())
        self._tell(f"{len(self._pieces)} pieces, {len(self._done)} done before; {label}")
        if self._reproduction.jobs > 1:
            self._tell(f"{self._trainings.total} backbones to train, {self._reproduction.jobs} at a time")
        for dataset in coming:
            self._tell(f"waiting for the data of {dataset}")
        deadline = self._trainings.deadline
        while len(self._done) < len(self._pieces) and not deadline.passed:
            busy = self._trainings.busy  # before the look: what ends after it is not missed
            try:
                acted = self._step()
            except TimeIsUp:
                break
            if not acted:
                if not busy and not coming:
                    break
                time.sleep(WAIT)
            waited, coming = coming, self._take_in()
            for dataset in set(waited) - set(coming):
                self._tell(f"the data of {dataset} have come; {self._trainings.total} backbones to train in all")

    def conclude(self) -> dict[str, Any]:
        """Write what is done and what is left, and the bundle if one is wanted; return reproduce.json."""
        document = self._document()
        write(self._reproduction.out, "reproduce", document)
        self._tell(_summary(document))
        if self._reproduction.bundle is not None:
            self._bundle(make_folder(self._reproduction.bundle, "--bundle"))
        return document

    def _bundle(self, to: Path) -> None:
        """Write results first, then classifiers and backbones, then checkpoints, as far as there is room."""
        out = self._reproduction.out
        results = _pack_results(to, out, [out, *(part.out for part in self._parts.values())])
        room, files, told = ROOM - results.stat().st_size, FILES - 1, []
        for name, store, found in self._stages():
            checkpoint = name == "checkpoints"
            chosen = _fitting(store, found, room, files, checkpoint=checkpoint)
            if chosen:
                entries, checkpoints = ([], chosen) if checkpoint else (chosen, [])
                written = pack(store, to / f"{name}.tar", entries, checkpoints, ARCHIVE)
                room, files = room - sum(file.stat().st_size for file in written), files - len(written)
            told.append(f"{len(chosen)} {name}" + (f" ({len(found)} are there)" if len(found) > len(chosen) else ""))
        self._tell(f"bundle: results, {', '.join(told)}; {(ROOM - room) / 1e6:.1f} MB in {FILES - files} files")

    def _stages(self) -> Iterator[tuple[str, Store, list[tuple[str, str]]]]:
        """Yield what can be bundled, the most valuable first: trained stages, then checkpoints of unfinished ones."""
        needed: dict[str, Run] = {}
        classifiers: dict[str, None] = {}
        for dataset, lab in self._labs.items():
            for experiment in self._parts[dataset].wanted():
                for run in runs(lab, self._settings[dataset], experiment):
                    needed.setdefault(run.backbone_key, run)
                    if spec := run.spec():
                        classifiers[spec.key()] = None
        if not needed:
            return
        store = next(iter(self._labs.values())).store  # all data sets have one
        keys = sorted(needed, key=lambda key: (needed[key].seed, -len(needed[key].trained_on.rows)))
        stages = [("stage2", key) for key in classifiers] + [("stage1", key) for key in keys]
        yield "stages", store, [stage for stage in stages if store.has(*stage)]
        unfinished = [("stage1", key) for key in keys if not store.has("stage1", key)]
        yield "checkpoints", store, [stage for stage in unfinished if store.checkpoint(*stage) is not None]

    def reports(self) -> list[Path]:
        """Return the folders whose report is to be built: those with new results, or with results and no report."""
        written = {piece.dataset for piece in self._done}
        return [
            part.out
            for dataset, part in self._parts.items()
            if dataset in self._changed or (dataset in written and not (part.out / "report.html").is_file())
        ]

    def _take_in(self) -> list[str]:
        """Open the data sets that have come, and have their backbones trained; return those that are to come."""
        for dataset, part in self._parts.items():
            if dataset not in self._labs and _has_come(part):
                self._open(dataset, part)
        return [dataset for dataset in self._parts if dataset not in self._labs]

    def _open(self, dataset: str, part: Reproduction) -> None:
        lab = _lab(part, self._trainings.runtime)
        self._labs[dataset] = lab
        for piece in self._pieces:
            if piece.dataset == dataset:
                settings = self._settings_of(piece)
                if _is_done(piece, part.out, settings.spec(lab.data), overwrite=part.overwrite):
                    self._done.add(piece)
                else:
                    self._rows[piece] = [
                        _Row(run, run.backbone_key, spec.key() if (spec := run.spec()) else run.backbone_key)
                        for run in runs(lab, settings, piece.experiment)
                    ]
        self._trainings.add(lab, [row.run for piece in self._left(dataset) for row in self._rows[piece]])

    def _step(self) -> bool:
        """Evaluate one run, write one piece, or train one backbone; return whether there was anything to do."""
        for piece in self._left():
            if piece.dataset not in self._labs or piece in self._broken:
                continue
            lab, rows = self._labs[piece.dataset], self._rows[piece]
            missing = [row.backbone for row in rows if not self._is_stored(lab, row.backbone)]
            if piece.experiment == GEOMETRY:
                # It takes minutes and no GPU; what threads have trained meanwhile would wait for it.
                if self._trainings.busy or (self._reproduction.jobs > 1 and self._trainings.too_late):
                    continue
            elif row := next((r for r in rows if r.key not in self._evaluated and r.backbone not in missing), None):
                self._try(piece, self._evaluate, lab, row)
                return True
            if not missing:
                self._try(piece, self._finish, piece, lab)
                return True
            if self._trainings.train(missing):
                return True
        return False

    def _try(self, piece: Piece, work: Callable[..., None], *given: Any) -> None:
        """Do a part of a piece. Where threads train beside it, what goes wrong costs the piece alone, not them."""
        try:
            work(*given)
        except TimeIsUp:
            raise
        except Exception as error:
            if self._reproduction.jobs == 1:
                raise
            self._broken.add(piece)
            if isinstance(error, UserError):
                self._tell(f"{piece} failed: {error}")
            else:
                _log.exception("%s failed", piece)

    def _is_stored(self, lab: Lab, key: str) -> bool:
        if key not in self._stored and lab.store.has("stage1", key):
            self._stored.add(key)
        return key in self._stored

    def _evaluate(self, lab: Lab, row: _Row) -> None:
        """Fit a run's classifier, which its piece then recalls."""
        run = row.run
        evaluate(lab, run, lab.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder), run.row)
        self._evaluated.add(row.key)

    def _finish(self, piece: Piece, lab: Lab) -> None:
        """Write a piece's result, with claims and tables."""
        settings, out = self._settings_of(piece), self._parts[piece.dataset].out
        write(out, piece.experiment, EXPERIMENTS[piece.experiment](lab, settings))
        conclude(lab, settings, out)
        self._done.add(piece)
        self._changed.add(piece.dataset)
        self._tell(f"written: piece {self._pieces.index(piece) + 1} of {len(self._pieces)}, {piece}")

    def _settings_of(self, piece: Piece) -> Settings:
        return self._settings[piece.dataset].model_copy(update={"seeds": piece.seeds})

    def _left(self, dataset: str | None = None) -> list[Piece]:
        return [p for p in self._pieces if p not in self._done and dataset in (None, p.dataset)]

    def _document(self) -> dict[str, Any]:
        listed = [
            {
                **asdict(piece),
                "seeds": list(piece.seeds),
                "folder": _below(self._parts[piece.dataset].out, self._reproduction.out),
                "done": piece in self._done,
            }
            for piece in self._pieces
        ]
        return {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "finished": len(self._done) == len(self._pieces),
            "seconds": time.monotonic() - self._started,
            "time_limit_seconds": self._limit,
            "pieces": listed,
            "left": [str(piece) for piece in self._left()],
            "failed": self._trainings.failed + [str(piece) for piece in self._pieces if piece in self._broken],
        }


def _by_dataset(reproduction: Reproduction) -> dict[str, Reproduction]:
    """Return a reproduction for each data set, each with the folder of its results."""
    if reproduction.what != EVERYTHING:
        return {reproduction.dataset: reproduction}
    recipe = replace(reproduction, what="all", dataset=DATASETS[0]).settings().recipe.name
    store = reproduction.store or reproduction.out.with_name(f"{reproduction.out.name}-store")
    return {
        dataset: replace(
            reproduction,
            what="all",
            dataset=dataset,
            out=reproduction.out / f"{dataset.removesuffix('-lt')}-{recipe}",
            store=store,
        )
        for dataset in DATASETS
    }


def _lab(reproduction: Reproduction, runtime: Runtime) -> Lab:
    data = load(targets.benchmark(reproduction.dataset).data, data_root=reproduction.data_root)
    make_folder(reproduction.out, "--out")
    return Lab(data, Store(store_root(reproduction.out, reproduction.store)), runtime)


def _pack_results(to: Path, out: Path, folders: Sequence[Path]) -> Path:
    """Write JSON, claims and tables of the folders into TO/results.tar.gz, by their names in OUT; old archives go."""
    for pattern in ("results.tar.gz", "stages*.tar", "checkpoints*.tar"):
        for old in to.glob(pattern):
            old.unlink()
    path = to / "results.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for folder in dict.fromkeys(folders):
            for file in (*sorted(folder.glob("*.json")), *sorted(folder.glob("tables/*"))):
                tar.add(file, file.relative_to(out).as_posix())
    return path


def _fitting(
    store: Store, stages: Sequence[tuple[str, str]], room: int, archives: int, *, checkpoint: bool
) -> list[tuple[str, str]]:
    """Return those stages, in their order, for which there is room in so many archives."""
    chosen, filled, used = [], ARCHIVE, 0
    for stage in stages:
        size = packed_bytes(store, *stage, checkpoint=checkpoint)
        new = filled + size > ARCHIVE - TAR_END
        if size > min(room, ARCHIVE - TAR_END) or (new and used == archives):
            continue
        filled, used, room = (size, used + 1, room - size - TAR_END) if new else (filled + size, used, room - size)
        chosen.append(stage)
    return chosen


def _has_come(reproduction: Reproduction) -> bool:
    """Return whether the data are there to be opened: who waits for them waits for NAME.npz."""
    if not reproduction.wait_for_data or reproduction.data_root is None:
        return True
    return (expanded(reproduction.data_root) / f"{targets.benchmark(reproduction.dataset).data}.npz").is_file()


def _is_done(piece: Piece, out: Path, own: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Return whether the piece's file holds its seeds, and perhaps more.

    Raises:
        UserError: it holds a result that this piece may not replace.
    """
    stored = stored_spec(out / f"{piece.experiment}.json")
    if stored is not None and fixed_part(stored) == fixed_part(own):
        known, seeds = tuple(stored["seeds"]), piece.seeds
        both = min(len(known), len(seeds))
        whole = stored.get("backbones") == own.get("backbones")
        if known[:both] == seeds[:both] and (whole or "backbones" not in own):  # half a swap may become a whole one
            return whole and len(known) >= len(seeds)
    check_free(out, piece.experiment, dict(own), overwrite=overwrite)
    return False


def _below(folder: Path, out: Path) -> str:
    return "." if folder == out else folder.name


def _summary(document: Mapping[str, Any]) -> str:
    """Return one line on what is done and what is left."""
    done, total = sum(piece["done"] for piece in document["pieces"]), len(document["pieces"])
    spent = f"{done} of {total} pieces done, {duration(document['seconds'])} this time"
    if document["failed"]:
        spent += f"; FAILED: {', '.join(document['failed'])}"
    if document["finished"]:
        return f"{spent}; nothing is left"
    return f"{spent}; UNFINISHED, left: {'; '.join(document['left'])}; the same command goes on"
