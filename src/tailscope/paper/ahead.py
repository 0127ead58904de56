"""Train the backbones of a reproduction: several at a time, each in a thread of its own, or one when it is asked for.

Small networks do not fill a GPU: the captured steps of several trainings run side by side on it, each on a stream of
its own, where processes would only take turns. On a CPU every training gets its share of the cores, which then do not
wait for one another at every layer. The store is what the threads and the caller have in common: what was trained, the
experiments recall, in the same process and while other trainings go on.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from tailscope.errors import UserError
from tailscope.experiments.lab import Lab
from tailscope.experiments.runs import Run
from tailscope.progress import Advance, Deadline, Progress, Quiet, TimeIsUp
from tailscope.training.runtime import Runtime

LAST = 60.0
"""So many seconds before a time limit no training begins: compiling and the first epochs would be in vain."""

STATUS = 60.0
"""Seconds between two lines on how far the threads are."""

_log = logging.getLogger(__name__)


class _Watched(Quiet):
    """Counts a training's images, and ends it at its next step once an event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self.images, self.total, self.now = 0, 0, 0

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Count, and look at the event after every step."""
        self.images, self.total = done, total

        def advance(items: int, /) -> None:
            self.images += items
            self.now += items  # without those of before a checkpoint
            self.safe_point()

        yield advance

    def safe_point(self) -> None:
        """Look at the event.

        Raises:
            TimeIsUp: it is set.
        """
        if self._stop.is_set():
            raise TimeIsUp


@dataclass(eq=False)
class _Training:
    """One backbone to train: a run that has its key, and where its data and its store are.

    Its state is `waiting`, `training`, `stored`, `unfinished` (the time was too short) or `failed`.
    """

    lab: Lab
    run: Run
    number: int
    watched: _Watched
    state: str = "waiting"

    def __str__(self) -> str:
        """Return the training as people read it."""
        return f"{self.lab.data.name} seed {self.run.seed} {self.run.encoder}"

    @property
    def rank(self) -> tuple[int, int, int]:
        """What comes first: seed by seed the long trainings, so that short ones fill the end; then as added."""
        return self.run.seed, -len(self.run.trained_on.rows), self.number


@dataclass(eq=False)
class Trainings:
    """The backbones that are to be trained, and the threads that do it while this context lasts.

    Leaving it waits for what is being trained, which ends in time by itself; leaving it by an exception ends the
    trainings at their next step, and checkpoints keep their finished epochs.

    Attributes:
        jobs: trainings at a time; with one there are no threads, and `train` trains.
        runtime: the device, and the progress of what is trained without threads.
        deadline: after it no epoch is begun, and shortly before it no training.
        closing: how many seconds before the deadline that is.
        tell: receives lines for people.
    """

    jobs: int
    runtime: Runtime
    deadline: Deadline
    closing: float
    tell: Callable[[str], object]
    _all: dict[str, _Training] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False)

    def __enter__(self) -> Self:
        if self.jobs > 1:
            initial = (self.runtime.device, max(1, torch.get_num_threads() // self.jobs))
            self._pool = ThreadPoolExecutor(self.jobs, "training", prepare_thread, initial)
            threading.Thread(target=self._tell_status, name="status", daemon=True).start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.jobs == 1:
            return
        try:
            if kind is not None:
                self._stop.set()
            self._pool.shutdown(cancel_futures=True)
        except BaseException:  # an interrupt while the last ones end by themselves
            self._stop.set()
            self._pool.shutdown(cancel_futures=True)
            raise
        finally:
            self._over.set()
        self.tell(f"{self._count('stored')} of {self.total} backbones trained")

    def add(self, lab: Lab, runs: Iterable[Run]) -> int:
        """Take in the backbones of these runs that are not stored, and return how many they are."""
        new: dict[str, _Training] = {}
        for run in runs:
            key = run.backbone_key
            if key not in self._all and key not in new and not lab.store.has("stage1", key):
                new[key] = _Training(lab, run, len(self._all) + len(new), _Watched(self._stop))
        with self._lock:
            self._all |= new
        if self.jobs > 1:
            for _ in new:
                self._pool.submit(self._train_next)
        return len(new)

    def train(self, keys: Iterable[str]) -> bool:
        """Train the first of these backbones that waits, here and now; return whether there was one.

        With several jobs, or with too little time left, there is none.

        Raises:
            TimeIsUp: the time did not suffice.
        """
        if self.jobs > 1 or self.too_late:
            return False
        for key in keys:
            training = self._all[key]
            if training.state == "waiting":
                self._train(training, self.runtime.progress)
                if training.state == "unfinished":
                    raise TimeIsUp
                return True
        return False

    @property
    def too_late(self) -> bool:
        """Whether so little time is left that nothing long should begin."""
        return self.deadline.left < self.closing or self.deadline.passed

    @property
    def busy(self) -> bool:
        """Whether threads train, or will."""
        return self.jobs > 1 and bool(self._count("training") or (self._count("waiting") and not self.too_late))

    def images(self) -> list[int]:
        """Return on how many images threads have trained each backbone so far, without those of before a checkpoint."""
        with self._lock:
            return [training.watched.now for training in self._all.values()]

    @property
    def total(self) -> int:
        """How many were taken in."""
        return len(self._all)

    @property
    def failed(self) -> list[str]:
        """The trainings that failed."""
        return [str(training) for training in self._all.values() if training.state == "failed"]

    def _count(self, state: str) -> int:
        with self._lock:
            return sum(training.state == state for training in self._all.values())

    def _train_next(self) -> None:
        """Train the most valuable backbone that waits by now: some may have come later than others."""
        with self._lock:
            waiting = [training for training in self._all.values() if training.state == "waiting"]
            if not waiting or self.too_late or self._stop.is_set():
                return
            training = min(waiting, key=lambda t: t.rank)
            training.state = "training"
        self._train(training, Deadline(training.watched, self.deadline.left))  # it remembers the last epoch's time

    def _train(self, training: _Training, progress: Progress) -> None:
        """Train a backbone; where that fails, once more by PyTorch's own operations, and then leave it."""
        training.state, run = "training", training.run
        lab = copy.copy(training.lab)  # a lab keeps a model, and tells one progress
        lab.runtime = replace(lab.runtime, progress=progress)
        while True:
            again = lab.runtime.engine != "eager"
            try:
                lab.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder)
                training.state = "stored"
            except TimeIsUp:
                training.state = "unfinished"
            except UserError as error:
                self.tell(f"{training} failed: {error}")
                training.state = "failed"
            except Exception:  # a net: whatever ends one training must not end the others, nor lose their results
                _log.exception("%s failed%s", training, "; once more with the engine eager" if again else "")
                if again:
                    lab.runtime = replace(lab.runtime, engine="eager")
                    continue
                training.state = "failed"
            return

    def _tell_status(self) -> None:
        began = last = time.monotonic()
        before = 0
        while not self._over.wait(STATUS):
            now = time.monotonic()
            with self._lock:
                trainings = list(self._all.values())
            active = [t for t in trainings if t.state == "training"]
            images = sum(self.images())
            shares = [f"{t} {t.watched.images / max(1, t.watched.total):.0%}" for t in active]
            self.tell(
                f"{(now - began) / 60:.0f} min: {self._count('stored')} of {len(trainings)} backbones trained,"
                f" {(images - before) / (now - last):,.0f} images/s; {', '.join(shares) or 'none in training'}"
            )
            last, before = now, images


def prepare_thread(device: torch.device, threads: int) -> None:
    """Give the thread its share of the cores, and a stream on a GPU."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
