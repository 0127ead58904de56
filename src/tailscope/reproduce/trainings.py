"""The backbones of a reproduction: several trained at a time, each in a thread of its own, or one when its turn comes.

Small networks do not fill a GPU: the captured steps of several trainings run side by side on it, each on a stream of
its own, where processes would only take turns. On a CPU every training gets its share of the cores. What was trained,
the experiments recall from the store, while other trainings go on.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments.runs import Run, evaluate
from tailscope.experiments.stages import Stages
from tailscope.progress import Advance, Deadline, Progress, Quiet, TimeIsUp
from tailscope.reproduce.reproduce import Tell, with_progress

_log = logging.getLogger(__name__)

STATUS = 60.0
"""Seconds between two lines on how far the threads are."""


def failure(what: object, work: Callable[[], object], tell: Tell) -> Exception | None:
    """Return what went wrong, once it is told; only that the time is up is raised."""
    try:
        work()
    except TimeIsUp:
        raise
    except UserError as error:
        tell(f"{what} failed: {error}")
        return error
    except Exception as error:  # a net: what ends one piece of work must not end the others, nor lose their results
        _log.exception("%s failed", what)
        return error
    return None


@dataclass(eq=False)
class _Training(Quiet):
    """A backbone to train, and the runs whose classifiers are fitted on it; the progress of both, which may be stopped.

    Its state is `waiting`, `training`, `fitting`, `done`, `unfinished` (the time was too short) or `failed`.
    """

    lab: Stages
    run: Run
    number: int
    stop: threading.Event
    runs: list[Run] = field(default_factory=list)
    state: str = "waiting"
    images: int = 0
    before: int = 0
    total: int = 1

    def __str__(self) -> str:
        return f"{self.lab.data.name} seed {self.run.seed} {self.run.encoder}"

    @property
    def rank(self) -> tuple[int, int, int]:
        """What comes first: seed by seed the long trainings, so that short ones fill the end; then as added."""
        return self.run.seed, -len(self.run.trained_on.rows), self.number

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Count the images that the backbone is trained on; `before` of them before its checkpoint."""
        counts = self.state == "training"
        if counts:
            self.images, self.before, self.total = done, done, max(1, total)

        def advance(items: int, /) -> None:
            self.images += items * counts
            self.safe_point()

        yield advance

    def log(self, run: str, step: int, numbers: Mapping[str, float], *, last: bool = False) -> None:
        """Pass the numbers on to what the lab reports to."""
        self.lab.runtime.progress.log(run, step, numbers, last=last)

    def safe_point(self) -> None:
        """End at the next step where that is asked for."""
        if self.stop.is_set():
            raise TimeIsUp


@dataclass(eq=False)
class Trainings:
    """The backbones that are to be trained, and the threads that do it while this context lasts.

    Leaving it waits for what is being trained, which ends in time by itself; leaving it by an exception ends the
    trainings at their next step, and checkpoints keep their finished epochs. With one job there are no threads, and
    `train` trains. After the deadline no epoch is begun, and in the `closing` seconds before it no training.
    """

    jobs: int
    runtime: Runtime
    deadline: Deadline
    closing: float
    tell: Tell
    _all: dict[str, _Training] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)

    def __enter__(self) -> Self:
        if self.jobs > 1:
            initial = (self.runtime.device, max(1, torch.get_num_threads() // self.jobs))
            self._pool = ThreadPoolExecutor(self.jobs, "training", prepare_thread, initial)
            threading.Thread(target=self._tell_status, name="status", daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.jobs == 1:
            return
        if kind is not None:
            self._stop.set()
        try:
            self._pool.shutdown(cancel_futures=True)
        finally:  # after an interrupt the last ones have not ended by themselves
            self._stop.set()
            self._pool.shutdown()
        self.tell(f"{self._count('fitting', 'done')} of {self.total} backbones trained")

    def add(self, lab: Stages, runs: Iterable[Run]) -> None:
        """Take in the backbones of these runs that are not stored."""
        new: dict[str, _Training] = {}
        for run in runs:
            key = run.backbone_key
            if key not in self._all and (key in new or not lab.store.has("stage1", key)):
                new.setdefault(key, _Training(lab, run, self.total + len(new), self._stop)).runs.append(run)
        with self._lock:
            self._all |= new
        for _ in new if self.jobs > 1 else ():
            self._pool.submit(self._train_next)

    def train(self, keys: Iterable[str]) -> bool:
        """Without threads, train the first of these backbones that waits; return whether there was one, and time."""
        waiting = [self._all[key] for key in keys if self._all[key].state == "waiting"]
        if self.jobs > 1 or self.too_late or not waiting:
            return False
        self._train(waiting[0], self.runtime.progress)
        if waiting[0].state == "unfinished":
            raise TimeIsUp
        return True

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of these backbones that are not whole: still to come, unfinished or failed."""
        return [key for key in keys if key in self._all and self._all[key].state != "done"]

    @property
    def too_late(self) -> bool:
        """Whether so little time is left that nothing long should begin."""
        return self.deadline.left < self.closing or self.deadline.passed

    @property
    def busy(self) -> bool:
        """Whether threads train, or will."""
        return self.jobs > 1 and self._count("training", "fitting", *([] if self.too_late else ["waiting"])) > 0

    @property
    def total(self) -> int:
        """How many backbones there are."""
        return len(self._all)

    @property
    def failed(self) -> list[str]:
        """The trainings that failed."""
        return [str(training) for training in self._all.values() if training.state == "failed"]

    def images(self) -> list[int]:
        """Return on how many images threads have trained each backbone so far, without those of before a checkpoint."""
        with self._lock:
            return [training.images - training.before for training in self._all.values()]

    def _count(self, *states: str) -> int:
        with self._lock:
            return sum(training.state in states for training in self._all.values())

    def _train_next(self) -> None:
        """Train the most valuable backbone that waits by now: some may have come later than others."""
        with self._lock:
            waiting = [training for training in self._all.values() if training.state == "waiting"]
            if not waiting or self.too_late or self._stop.is_set():
                return
            training = min(waiting, key=lambda t: t.rank)
            training.state = "training"
        self._train(training, Deadline(training, self.deadline.left))  # it remembers the last epoch's time

    def _train(self, training: _Training, progress: Progress) -> None:
        """Train a backbone and, in a thread, fit the classifiers on it; what fails is tried once more, eagerly."""
        run, lab = training.run, with_progress(training.lab, progress)

        def work() -> None:
            training.state = "training"
            backbone = lab.backbone(run.stage1, run.trained_on.rows, run.seed, str(training))
            training.state = "fitting"
            for row in training.runs if self.jobs > 1 else ():
                evaluate(lab, row, backbone, f"{lab.data.name} seed {row.seed} {row.row}")
            training.state = "done"

        try:
            failed = failure(training, work, self.tell)
            if failed and not isinstance(failed, UserError) and lab.runtime.engine != "eager":
                lab.runtime = replace(lab.runtime, engine="eager")
                failed = failure(f"{training}, once more with the engine eager,", work, self.tell)
            if failed:
                training.state = "failed"
        except TimeIsUp:
            training.state = "unfinished"

    def _tell_status(self) -> None:
        began = last = time.monotonic()
        before = 0
        while not self._stop.wait(STATUS):
            now, images = time.monotonic(), sum(self.images())
            with self._lock:
                active = [t for t in self._all.values() if t.state == "training"]
            shares = ", ".join(f"{t} {t.images / t.total:.0%}" for t in active)
            self.tell(
                f"{(now - began) / 60:.0f} min: {self._count('fitting', 'done')} of {self.total} backbones trained,"
                f" {(images - before) / (now - last):,.0f} images/s; {shares or 'none in training'}"
            )
            last, before = now, images


def prepare_thread(device: torch.device, threads: int) -> None:
    """Give the thread its share of the cores, and a stream on a GPU."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
