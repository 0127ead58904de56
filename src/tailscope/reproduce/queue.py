"""As much of the paper as fits into a time limit, most valuable first, and the rest another time.

A *piece* is one experiment on one data set with the seeds so far. Pieces are worked off in order; each is written, with
claims and tables, when it is finished. With one job a piece's backbones are trained when its turn comes. With several,
threads train all of them and fit the classifiers on each (`experiments.trainings`), and a piece is written as soon as
its own are there. When the time is up the work stops at the end of an epoch or of an extraction, which the store
keeps, and the same command goes on from there.
"""

import re
import tarfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tailscope import paper
from tailscope.data.sources import load
from tailscope.device import Runtime
from tailscope.errors import UserError, expanded
from tailscope.experiments.options import Reproduction
from tailscope.experiments.places import Here
from tailscope.experiments.plans import EXPERIMENTS
from tailscope.experiments.runs import Run, Settings, store_root
from tailscope.experiments.stages import Stages
from tailscope.experiments.trainings import Trainings, failure, place_of
from tailscope.progress import Deadline, Progress, Quiet, TimeIsUp, duration
from tailscope.reproduce import claims
from tailscope.reproduce.reproduce import Tell, conclude, draw, fixed_part, runs
from tailscope.results import check_free, command, stored_spec, write
from tailscope.store import Store, make_folder, pack, packed_bytes
from tailscope.store.files import replacing

DATASETS = ("cifar10-lt", "cifar100-lt")
"""What `everything` is: the CIFAR half of the paper."""
LAST = 60.0
"""So many seconds before a time limit no training begins: compiling and the first epochs would be in vain."""
WAIT = 0.2
"""Seconds between two looks at what threads have trained and whether data have come."""
COPIED = 60.0
"""Seconds without a change after which a file of data is taken for whole, whatever it is."""
ARCHIVE, ROOM, FILES = 15 << 20, 62 << 20, 7
"""Of a bundle: the bytes of an archive and of all together. Entries of up to 4 MiB fill no more files."""
TAR_END = 16 << 10
"""More bytes than what an archive has beside its entries."""

Stage = tuple[str, str]


@dataclass(frozen=True)
class Piece:
    """One experiment on one data set, with the seeds that its result file then holds."""

    dataset: str
    experiment: str
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        seeds = "seeds" if len(self.seeds) > 1 else "seed"
        return f"{self.experiment} of {self.dataset}, {seeds} {' '.join(map(str, self.seeds))}"


def order(wanted: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> list[Piece]:
    """Return the pieces, most valuable first: everything with one seed before anything with two."""
    return [
        Piece(dataset, experiment, tuple(seeds[:n]))
        for n in range(1, len(seeds) + 1)
        for dataset, experiments in wanted.items()
        for experiment in experiments
    ]


def parse_duration(text: str) -> float:
    """Return the seconds that a time such as `9m`, `90s` or `1h30m` means; a bare number is minutes.

    >>> parse_duration("9m"), parse_duration("1h30m"), parse_duration("90s"), parse_duration("2.5")
    (540.0, 5400.0, 90.0, 150.0)
    """
    number = r"(\d+(?:\.\d+)?)"
    parts = re.fullmatch(rf"(?:{number}h)?(?:{number}(?:m|$))?(?:{number}s)?", text.strip().lower())
    seconds = sum(float(n or 0) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True)) if parts else 0.0
    if seconds <= 0:
        raise UserError(f"--time-limit {text}: expected a time like 9m, 90s or 1h30m")
    return seconds


def run_queue(reproduction: Reproduction, *, tell: Tell = print, progress: Progress | None = None) -> dict[str, Any]:
    """Work off the pieces of a reproduction until they are done or the time is up; write OUT/reproduce.json.

    `everything` takes both CIFAR data sets, each in a folder of its own such as OUT/cifar10-paper, and keeps trained
    stages beside OUT (in OUT-store, unless told otherwise), so that OUT holds no weights. Other reproductions use OUT
    itself. The reports are built once, at the end; an interrupt leaves everything but them. Returns what reproduce.json
    holds; `UserError` for what is not usable comes before any training, unless the data came later.
    """
    limit = None if reproduction.time_limit is None else parse_duration(reproduction.time_limit)
    deadline = Deadline(progress or Quiet(), float("inf") if limit is None else limit)
    runtime = replace(
        Runtime.choose(reproduction.own_device(reproduction.device), engine=reproduction.engine), progress=deadline
    )
    make_folder(reproduction.out, "--out")
    on_ray = reproduction.on is not None  # threads here take their turns with the pieces, on a GPU side by side
    place = place_of(reproduction, reproduction.device, runtime, tell) if on_ray else Here(reproduction.jobs or 1)
    trainings = Trainings(place, runtime, deadline, 0.0 if limit is None else min(LAST, limit / 10), tell)
    queue = _Queue(reproduction, trainings, tell, limit)
    try:
        with trainings:
            queue.work()
    except BaseException as error:
        # Whoever wants a bundle cannot come back for what is left.
        if isinstance(error, KeyboardInterrupt) or reproduction.bundle is not None:
            queue.conclude()
        raise
    document = queue.conclude()
    for out in queue.reports():
        draw(out, tell)
    return document


# -- the pieces -----------------------------------------------------------------------------------------------------


class _Part:
    """One data set of a reproduction: what is wanted of it, and once its images have come, its lab and its runs."""

    lab: Stages
    runs: Mapping[str, list[Run]]

    def __init__(self, reproduction: Reproduction) -> None:
        self.reproduction, self.out = reproduction, reproduction.out
        self.settings, self.wanted = reproduction.settings(), reproduction.wanted()
        self.data = paper.benchmark(reproduction.dataset).data
        self.open, self.changed = False, False

    def has_come(self) -> bool:
        """Whether the images are there: whoever waits for them waits for NAME.npz, which may be half copied.

        What makes it an archive is its end; a file without, to which nothing comes, is refused when it is opened.
        """
        root = self.reproduction.data_root
        if not self.reproduction.wait_for_data or root is None:
            return True
        path = expanded(root) / f"{self.data}.npz"
        return path.is_file() and (zipfile.is_zipfile(path) or time.time() - path.stat().st_mtime > COPIED)

    def take_in(self, runtime: Runtime) -> None:
        data = load(self.data, data_root=self.reproduction.data_root)
        make_folder(self.out, "--out")
        self.lab = Stages(data, Store(store_root(self.out, self.reproduction.store)), runtime)
        self.runs = {experiment: list(runs(self.lab, self.settings, experiment)) for experiment in self.wanted}
        self.open = True

    def settings_of(self, piece: Piece) -> Settings:
        return self.settings.model_copy(update={"seeds": piece.seeds})

    def is_done(self, piece: Piece) -> bool:
        """Return whether the piece's file holds its seeds, and perhaps more; refuse to replace another result."""
        own = self.settings_of(piece).spec(self.lab.data)
        stored = stored_spec(self.out / f"{piece.experiment}.json")
        if stored is not None and fixed_part(stored) == fixed_part(own):
            known, seeds = tuple(stored["seeds"]), piece.seeds
            whole = stored.get("backbones") == own.get("backbones")
            one_grows = known == seeds[: len(known)] or seeds == known[: len(seeds)]
            if one_grows and (whole or "backbones" not in own):  # half a swap may become a whole one
                return whole and len(known) >= len(seeds)
        check_free(self.out, piece.experiment, own, overwrite=self.reproduction.overwrite)
        return False

    def backbones(self, piece: Piece) -> list[str]:
        return list(dict.fromkeys(r.backbone_key for r in self.runs[piece.experiment] if r.seed in piece.seeds))

    def write(self, piece: Piece) -> None:
        """Write the piece's result, with claims and tables; classifiers that are missing are fitted."""
        settings = self.settings_of(piece)
        result = EXPERIMENTS[piece.experiment](self.lab, settings)
        if not self.is_done(piece):  # another process may have been faster
            write(self.out, piece.experiment, result)
        conclude(self.lab, settings, self.out)
        self.changed = True


class _Queue:
    """The pieces of a reproduction, and which of them are done or broken."""

    def __init__(self, reproduction: Reproduction, trainings: Trainings, tell: Tell, limit: float | None) -> None:
        self._reproduction, self._trainings, self._tell, self._limit = reproduction, trainings, tell, limit
        self._started = time.monotonic()
        self._parts = {dataset: _Part(part) for dataset, part in _by_dataset(reproduction).items()}
        self._settings = next(iter(self._parts.values())).settings
        self._pieces = order({dataset: part.wanted for dataset, part in self._parts.items()}, self._settings.seeds)
        self._done: set[Piece] = set()
        self._broken: set[Piece] = set()

    def work(self) -> None:
        """Do what can be done, one thing after the other, until nothing is left or the time is up."""
        coming = self._take_in()
        label = claims.label_of(self._settings.recipe.model_dump())
        self._tell(f"{len(self._pieces)} pieces, {len(self._done)} done before; {label}")
        if self._trainings.ahead:
            self._tell(f"{self._trainings.total} backbones to train, {self._trainings.place.slots} at a time")
        for dataset in coming:
            self._tell(f"waiting for the data of {dataset}")
        while self._left() and not self._trainings.deadline.passed:
            busy = self._trainings.busy  # before the look: what ends after it is not missed
            try:
                if not self._step():
                    if not busy and (not coming or self._trainings.in_vain):
                        break
                    time.sleep(WAIT)
            except TimeIsUp:
                break
            coming = self._take_in(coming)
        if coming and self._trainings.in_vain:
            self._tell(f"no longer waiting for the data of {', '.join(coming)}: what is to come would fail, too")

    def _take_in(self, waited: Sequence[str] = ()) -> list[str]:
        """Open the data sets that have come, and have their backbones trained; return those that are to come."""
        for dataset, part in self._parts.items():
            if part.open or not part.has_come():
                continue
            part.take_in(self._trainings.runtime)
            own = [piece for piece in self._pieces if piece.dataset == dataset]
            self._done |= {piece for piece in own if part.is_done(piece)}
            left = dict.fromkeys(piece.experiment for piece in own if piece not in self._done)
            self._trainings.add(part.lab, [run for experiment in left for run in part.runs[experiment]])
            if dataset in waited:
                self._tell(f"the data of {dataset} have come; {self._trainings.total} backbones to train in all")
        return [dataset for dataset, part in self._parts.items() if not part.open]

    def _step(self) -> bool:
        """Write one piece or, without threads, train one backbone; return whether there was anything to do."""
        trainings, threads = self._trainings, self._trainings.ahead
        for piece in self._left():
            part = self._parts[piece.dataset]
            if not part.open or piece in self._broken:
                continue
            # Geometry takes minutes and no GPU; what threads have trained meanwhile would wait for it.
            if piece.experiment == "geometry" and (trainings.busy or (threads and trainings.too_late)):
                continue
            missing = trainings.missing(part.backbones(piece))
            if not missing:
                self._write(piece, part)
                return True
            if trainings.train(missing):
                return True
        return False

    def _write(self, piece: Piece, part: _Part) -> None:
        """Write a piece. Where threads train beside it, what goes wrong costs the piece alone, not them."""
        if not self._trainings.ahead:
            part.write(piece)
        elif failure(piece, lambda: part.write(piece), self._tell):
            self._broken.add(piece)
            return
        self._done.add(piece)
        self._tell(f"written: piece {self._pieces.index(piece) + 1} of {len(self._pieces)}, {piece}")

    def _left(self) -> list[Piece]:
        return [piece for piece in self._pieces if piece not in self._done]

    def conclude(self) -> dict[str, Any]:
        """Write what is done and what is left, and the bundle if one is wanted; return reproduce.json."""
        document = self._document()
        write(self._reproduction.out, "reproduce", document)
        self._tell(_summary(document))
        if self._reproduction.bundle is not None:
            to = make_folder(self._reproduction.bundle, "--bundle")
            _bundle(to, self._reproduction.out, list(self._parts.values()), self._tell)
        return document

    def reports(self) -> list[Path]:
        """Return the folders whose report is to be built: those with new results, or with results and no report."""
        with_results = {piece.dataset for piece in self._done}
        return [
            part.out
            for dataset, part in self._parts.items()
            if part.changed or (dataset in with_results and not (part.out / "report.html").is_file())
        ]

    def _document(self) -> dict[str, Any]:
        folders = {name: part.out.relative_to(self._reproduction.out).as_posix() for name, part in self._parts.items()}
        return {
            "schema": "tailscope.reproduce/1",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "finished": not self._left(),
            "seconds": time.monotonic() - self._started,
            "time_limit_seconds": self._limit,
            "pieces": [
                {
                    **asdict(piece),
                    "seeds": list(piece.seeds),
                    "folder": folders[piece.dataset],
                    "done": piece in self._done,
                }
                for piece in self._pieces
            ],
            "left": [str(piece) for piece in self._left()],
            "failed": self._trainings.failed + [str(piece) for piece in self._pieces if piece in self._broken],
        }


def _by_dataset(reproduction: Reproduction) -> dict[str, Reproduction]:
    """Return a reproduction for each data set, each with the folder of its results."""
    if reproduction.what != "everything":
        return {reproduction.dataset: reproduction}
    store = reproduction.store or reproduction.out.with_name(f"{reproduction.out.name}-store")
    parts = {name: replace(reproduction, what="all", dataset=name, store=store) for name in DATASETS}
    recipe = parts[DATASETS[0]].settings().recipe.name
    return {
        name: replace(part, out=reproduction.out / f"{name.removesuffix('-lt')}-{recipe}")
        for name, part in parts.items()
    }


def _summary(document: Mapping[str, Any]) -> str:
    done, total = sum(piece["done"] for piece in document["pieces"]), len(document["pieces"])
    spent = f"{done} of {total} pieces done, {duration(document['seconds'])} this time"
    if document["failed"]:
        spent += f"; FAILED: {', '.join(document['failed'])}"
    if document["finished"]:
        return f"{spent}; nothing is left"
    return f"{spent}; UNFINISHED, left: {'; '.join(document['left'])}; the same command goes on"


# -- the bundle -----------------------------------------------------------------------------------------------------


def _bundle(to: Path, out: Path, parts: Sequence[_Part], tell: Tell) -> None:
    """Write results, then classifiers and backbones, then unfinished ones' checkpoints, as far as there is room.

    Archives of an earlier bundle go last: a run that ends meanwhile leaves them.
    """
    results = to / "results.tar.gz"
    with replacing(results) as partial, tarfile.open(partial, "w:gz") as tar:
        for folder in dict.fromkeys([out, *(part.out for part in parts)]):
            for file in (*sorted(folder.glob("*.json")), *sorted(folder.glob("tables/*"))):
                tar.add(file, file.relative_to(out).as_posix())
    room = ROOM - results.stat().st_size - TAR_END * (FILES - 1)
    files, told = [results], ["results"]
    if opened := [part for part in parts if part.open]:
        store = opened[0].lab.store  # all data sets have one
        stages, checkpoints = _stored(store, opened)
        stages = [stage for stage in stages if _sound(store, stage, tell)]
        whole, room = _fitting(stages, [packed_bytes(store, *stage) for stage in stages], room)
        sizes = [packed_bytes(store, *stage, checkpoint=True) for stage in checkpoints]
        unfinished, _ = _fitting(checkpoints, sizes, room)
        if whole or unfinished:
            files += pack(store, to / "stages.tar", whole, unfinished, ARCHIVE, overwrite=True)
        for name, some, every in (("stages", whole, stages), ("checkpoints", unfinished, checkpoints)):
            told.append(f"{len(some)} {name}" + (f" ({len(every)} are there)" if len(every) > len(some) else ""))
    for old in to.glob("stages*.tar"):
        if old not in files and re.fullmatch(r"stages(-\d+)?", old.stem):
            old.unlink()
    tell(f"bundle: {', '.join(told)}; {sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {len(files)} files")


def _sound(store: Store, stage: Stage, tell: Tell) -> bool:
    """Return whether every byte of a stage is what was written; say what is wrong with one that stays behind."""
    try:
        store.check(*stage)
    except UserError as error:
        tell(f"not in the bundle: {error}")
        return False
    return True


def _stored(store: Store, parts: Sequence[_Part]) -> tuple[list[Stage], list[Stage]]:
    """Return the trained stages and the checkpoints that are there, the most valuable first."""
    every = [run for part in parts for experiment in part.wanted for run in part.runs[experiment]]
    by_value = sorted(every, key=lambda run: (run.seed, -len(run.trained_on.rows)))
    backbones = [("stage1", key) for key in dict.fromkeys(run.backbone_key for run in by_value)]
    specs = filter(None, (run.spec() for run in every))
    classifiers = [("stage2", key) for key in dict.fromkeys(spec.key() for spec in specs)]
    unfinished = [stage for stage in backbones if not store.has(*stage) and store.checkpoint(*stage) is not None]
    return [stage for stage in classifiers + backbones if store.has(*stage)], unfinished


def _fitting(stages: Sequence[Stage], sizes: Sequence[int], room: int) -> tuple[list[Stage], int]:
    """Return those stages, in their order, for which there is room, and the room that is left."""
    chosen = []
    for stage, size in zip(stages, sizes, strict=True):
        if size <= min(room, ARCHIVE - TAR_END):
            chosen.append(stage)
            room -= size
    return chosen, room
