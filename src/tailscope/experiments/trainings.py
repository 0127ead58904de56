"""Which stage is made when: those that experiments need, several at a time, each after those that it stands on.

A *piece* is one stage that the store lacks: a pre-training, a backbone, or the classifier of a run. A thread for each
that is made at a time takes the most valuable piece that can begin, has it made in a place (`experiments.places`: this
process, others of this machine, or a Ray cluster) and waits for it. What was made, the experiments recall from the
store, while other pieces are made. With one job there are no threads, and a backbone is trained when its turn comes.

In this process, small networks do not fill a GPU: the captured steps of several trainings run side by side on it, each
on a stream of its own, where processes would only take turns. On a CPU every thread gets its share of the cores.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments.options import Placing
from tailscope.experiments.places import Failed, Here, Place, Processes, Tell
from tailscope.experiments.runs import Run
from tailscope.experiments.stages import Stages, labeller
from tailscope.experiments.workers import Order
from tailscope.progress import Advance, Deadline, Progress, Quiet, TimeIsUp

_log = logging.getLogger(__name__)

STATUS = 60.0
"""Seconds between two lines on how far the threads are."""
WAIT = 0.05
"""Seconds between two looks whether all is made."""


def failure(what: object, work: Callable[[], object], tell: Tell) -> Exception | None:
    """Return what went wrong, once it is told; only that the time is up is raised."""
    try:
        work()
    except TimeIsUp:
        raise
    except UserError as error:
        tell(f"{what} failed: {error}")
        return error
    except (Exception, SystemExit) as error:  # a net: what ends one piece of work must not end the others, nor lose
        _log.exception("%s failed", what)  # their results; a method's code may end the program
        return error if isinstance(error, Exception) else Failed(f"its code ends the program (exit {error})")
    return None


@dataclass(eq=False)
class _Piece(Quiet):
    """A stage to make, and the progress of that, which may be stopped.

    Its state is `waiting`, `queued` (it can begin), `working`, `done`, `unfinished` (the time was too short) or
    `failed`; what stands on a piece that is not done ends as that did. Where another piece makes the same features,
    this one comes `after` it, whatever becomes of that.
    """

    lab: Stages
    order: Order
    number: int
    stop: threading.Event
    needs: "_Piece | None" = None
    after: "_Piece | None" = None
    state: str = "waiting"
    error: Exception | None = None
    images: int = 0
    before: int = 0
    total: int = 1

    def __str__(self) -> str:
        of = {"pretrained": f"{self.run.encoder}, pre-training", "stage2": self.run.row}
        return f"{self.lab.data.name} seed {self.run.seed} {of.get(self.order.kind, self.run.encoder)}"

    @property
    def run(self) -> Run:
        """The run that the stage is for, or one of them."""
        return self.order.run

    @property
    def rank(self) -> tuple[bool, int, int, int]:
        """What comes first: classifiers, then seed by seed the long trainings, so that short ones fill the end.

        Of the same value, what was added first.
        """
        return self.order.kind != "stage2", self.run.seed, -len(self.run.trained_on.rows), self.number

    @property
    def trains(self) -> bool:
        """Whether it is a backbone that is trained just now."""
        return self.order.kind == "stage1" and self.state == "working"

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Count the images that a backbone is trained on; `before` of them before its checkpoint."""
        counts = self.trains and not self.images
        if counts:
            self.images, self.before, self.total = done, self.before + done, max(1, total)

        def advance(items: int, /) -> None:
            self.images += items * counts
            self.safe_point()

        yield advance

    def begin_again(self) -> None:
        """Count anew from the next task on; what was trained in vain stays work that was done."""
        self.images, self.before = 0, self.before - self.images

    def log(self, run: str, step: int, numbers: Mapping[str, float], *, last: bool = False) -> None:
        """Pass the numbers on to what the lab reports to."""
        self.lab.runtime.progress.log(run, step, numbers, last=last)

    def safe_point(self) -> None:
        """End at the next step where that is asked for."""
        if self.stop.is_set():
            raise TimeIsUp


@dataclass(eq=False)
class Trainings:
    """The stages that are to be made, and the threads that have it done while this context lasts.

    Leaving it waits for what is being made, which ends in time by itself; leaving it by an exception ends trainings at
    their next step, and checkpoints keep their finished epochs. With one job here there are no threads, and `train`
    trains backbones. After the deadline no epoch is begun, and in the `closing` seconds before it no training.
    """

    place: Place
    runtime: Runtime
    deadline: Deadline
    closing: float
    tell: Tell
    _all: dict[str, _Piece] = field(default_factory=dict, init=False)
    _features: dict[tuple[object, ...], _Piece] = field(default_factory=dict, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)

    def __enter__(self) -> Self:
        if self.ahead:
            threads = torch.get_num_threads() if self.place.apart else torch.get_num_threads() // self.place.slots
            initial = (self.runtime.device, max(1, threads))
            self._pool = ThreadPoolExecutor(self.place.slots, "training", prepare_thread, initial)
            threading.Thread(target=self._tell_status, name="status", daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not self.ahead:
            return
        if kind is not None:
            self._stop.set()
        try:
            self._pool.shutdown(cancel_futures=True)
        finally:  # after an interrupt the last ones have not ended by themselves
            self._stop.set()
            self._pool.shutdown()
            self.place.close()
        if self.total:
            self.tell(f"{self._backbones('done')} of {self.total} backbones trained")

    @property
    def ahead(self) -> bool:
        """Whether stages are made before they are asked for, by threads."""
        return self.place.apart or self.place.slots > 1

    def add(self, lab: Stages, runs: Iterable[Run]) -> None:
        """Take in what these runs need and the store lacks: backbones, and where threads work all stages."""
        with self._lock:
            for run in runs:
                backbone = self._add_backbone(lab, run)
                spec = run.spec()
                if self.ahead and spec is not None and not lab.store.has("stage2", spec.key()):
                    stage = spec.stage2
                    drawn = None if stage.sampler == "instance" else spec.stage2.data.indices_sha256
                    seen = (run.backbone_key, stage.augment, stage.sampler, stage.bn_mode, drawn)
                    piece = self._add(lab, Order("stage2", run, run.row), backbone, self._features.get(seen))
                    self._features.setdefault(seen, piece)
        self._begin()

    def _add_backbone(self, lab: Stages, run: Run) -> _Piece | None:
        if run.backbone_key in self._all:
            return self._all[run.backbone_key]
        if lab.store.has("stage1", run.backbone_key):
            return None
        return self._add(lab, Order("stage1", run, run.encoder), self._add_beneath(lab, run) if self.ahead else None)

    def _add_beneath(self, lab: Stages, run: Run) -> _Piece | None:
        """Take in what a backbone is trained from, unless the store has it, and return the piece to wait for."""
        if run.stage1.unlabelled:  # both networks are trained from the same pre-training, if there is one
            first = replace(run, stage1=labeller(run.stage1), encoder=f"{run.encoder}, to label the others")
            return self._add_backbone(lab, first)
        order = Order("pretrained", run, run.encoder)
        return self._add(lab, order) if run.stage1.pretrain and not lab.store.has("pretrained", order.key) else None

    def _add(self, lab: Stages, order: Order, needs: _Piece | None = None, after: _Piece | None = None) -> _Piece:
        if order.key not in self._all:
            piece = _Piece(lab, order, len(self._all), self._stop, needs, after)
            piece.order = replace(order, label=str(piece))
            self._all[order.key] = piece
        return self._all[order.key]

    def train(self, keys: Iterable[str]) -> bool:
        """Without threads, train the first of these backbones that waits; return whether there was one, and time."""
        waiting = [self._all[key] for key in keys if self._all[key].state == "waiting"]
        if self.ahead or self.too_late or not waiting:
            return False
        self._train(waiting[0], self.runtime.progress)
        if waiting[0].state == "unfinished":
            raise TimeIsUp
        return True

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of these backbones on which something is still to come, unfinished or failed."""
        open_ = {piece.run.backbone_key for piece in self._all.values() if piece.state != "done"}
        return [key for key in keys if key in open_]

    @property
    def too_late(self) -> bool:
        """Whether so little time is left that nothing long should begin."""
        return self.deadline.left < self.closing or self.deadline.passed

    @property
    def busy(self) -> bool:
        """Whether threads work, or will."""
        return self.ahead and self._count("working", *([] if self.too_late else ["waiting", "queued"])) > 0

    @property
    def total(self) -> int:
        """How many backbones there are."""
        return self._backbones()

    @property
    def made(self) -> int:
        """How many stages were made."""
        return self._count("done")

    @property
    def failed(self) -> list[str]:
        """What failed, and not only because it stands on what did."""
        failed = [piece for piece in self._all.values() if piece.state == "failed"]
        return [str(piece) for piece in failed if piece.needs not in failed]

    @property
    def errors(self) -> list[Exception]:
        """Why."""
        return [piece.error for piece in self._all.values() if piece.error]

    @property
    def in_vain(self) -> bool:
        """Whether what is still to come would fail as well: all has failed so far, or the device answers no more.

        One alone may have failed for a reason of its own.
        """
        failed = len(self.failed)
        return failed > 0 and ((failed > 1 and not self.made) or not (self.place.apart or answers(self.runtime.device)))

    def images(self) -> list[int]:
        """Return on how many images threads have trained each backbone so far, without those of before a checkpoint."""
        with self._lock:
            return [piece.images - piece.before for piece in self._all.values()]

    def _count(self, *states: str) -> int:
        with self._lock:
            return sum(piece.state in states for piece in self._all.values())

    def _backbones(self, *states: str) -> int:
        with self._lock:
            found = [piece for piece in self._all.values() if piece.order.kind == "stage1"]
        return sum(piece.state in states for piece in found) if states else len(found)

    def _begin(self) -> None:
        """Queue the pieces that can begin by now, and end those that never will."""
        with self._lock:
            for piece in self._all.values() if self.ahead else ():
                if piece.state != "waiting":
                    continue
                if piece.needs is not None and piece.needs.state in ("failed", "unfinished"):
                    piece.state = piece.needs.state
                elif (piece.needs is None or piece.needs.state == "done") and (
                    piece.after is None or piece.after.state in ("done", "failed", "unfinished")
                ):
                    piece.state = "queued"
                    self._pool.submit(self._train_next)

    def _train_next(self) -> None:
        """Have the most valuable piece made that is queued by now: some may have come later than others."""
        with self._lock:
            queued = [piece for piece in self._all.values() if piece.state == "queued"]
            if not queued or self.too_late or self._stop.is_set():
                return
            piece = min(queued, key=lambda one: one.rank)
            piece.state = "working"
        self._train(piece, Deadline(piece, self.deadline.left))  # it remembers the last epoch's time
        if not self._stop.is_set():
            self._begin()

    def _train(self, piece: _Piece, progress: Progress) -> None:
        """Have a piece made; what fails is tried once more, eagerly, unless by a mistake of the user."""
        piece.state = "working"
        lab = piece.lab.working(replace(piece.lab.runtime, progress=progress))
        try:
            error = failure(piece, lambda: self.place.make(lab, piece.order), self.tell)
            if error and not isinstance(error, UserError) and lab.runtime.engine != "eager":
                lab.runtime = replace(lab.runtime, engine="eager")
                with self._lock:
                    piece.begin_again()
                again = f"{piece}, once more with the engine eager,"
                error = failure(again, lambda: self.place.make(lab, piece.order), self.tell)
            piece.error, piece.state = error, "failed" if error else "done"
        except TimeIsUp:
            piece.state = "unfinished"

    def _tell_status(self) -> None:
        began = last = time.monotonic()
        before = 0
        while not self._stop.wait(STATUS):
            now, images = time.monotonic(), sum(self.images())
            with self._lock:
                active = [piece for piece in self._all.values() if piece.trains]
            shares = ", ".join(f"{t} {t.images / t.total:.0%}" for t in active)
            self.tell(
                f"{(now - began) / 60:.0f} min: {self._backbones('done')} of {self.total} backbones trained,"
                f" {(images - before) / (now - last):,.0f} images/s; {shares or 'none in training'}"
            )
            last, before = now, images


def answers(device: torch.device) -> bool:
    """Whether a device computes: after some errors CUDA refuses everything until the process ends."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def prepare_thread(device: torch.device, threads: int) -> None:
    """Give the thread its share of the cores, and a stream on a GPU."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def place_of(placing: Placing, device: str, runtime: Runtime, tell: Tell) -> Place:
    """Return the place that options ask for; without Ray processes of this machine, or on a GPU threads of this one.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached or lacks what a piece needs.
    """
    if placing.on is not None:
        from tailscope.experiments.on_ray import OnRay

        return OnRay(placing, device, tell)
    jobs = placing.jobs or 1
    return Here(jobs) if jobs == 1 or runtime.device.type == "cuda" else Processes(jobs, device, tell)


def make_ahead(lab: Stages, waves: Iterable[Sequence[Run]], placing: Placing, device: str, tell: Tell) -> None:
    """Have what runs need made in the place that options ask for, several at a time; a wave may look at those before.

    Nothing is done where they ask for none. What fails ends the others no sooner than they are done.

    Raises:
        UserError: a piece failed by a mistake, the first that did; or as `place_of`.
    """
    if not placing.elsewhere:
        return
    place, endless = place_of(placing, device, lab.runtime, tell), Deadline(Quiet(), float("inf"))
    with Trainings(place, lab.runtime, endless, 0.0, tell) as trainings:
        for runs in waves:
            trainings.add(lab, runs)
            while trainings.busy:
                time.sleep(WAIT)
            if trainings.errors:
                break
    lab.trained += trainings.made
    for error in trainings.errors:
        raise error if isinstance(error, UserError) else Failed(str(error))
