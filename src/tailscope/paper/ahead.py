"""Train backbones ahead of the experiments that need them, several at a time.

Small networks do not fill a GPU. There each training has a thread of this process with a CUDA stream of its own, and
the GPU works on the captured steps of all streams side by side; processes would only take turns. On a CPU each has a
process and its share of the threads. The store is what they have in common: what they trained, the experiments recall.
"""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from tailscope.data.sources import ImageData, load
from tailscope.errors import UserError
from tailscope.experiments.lab import Lab
from tailscope.experiments.settings import Settings
from tailscope.paper.runs import runs
from tailscope.progress import Deadline, Quiet, TimeIsUp
from tailscope.store import Store
from tailscope.training.runtime import Runtime


@dataclass(frozen=True)
class Place:
    """Where a process finds the images and leaves what it trained."""

    data: str
    data_root: Path | None
    store: Path
    device: str


@dataclass(frozen=True)
class MissingBackbone:
    """One backbone to train: the first run of an experiment that has its key."""

    place: Place
    settings: Settings
    experiment: str
    key: str


def missing(lab: Lab, place: Place, settings: Settings, experiment: str) -> dict[str, MissingBackbone]:
    """Return by key the backbones of an experiment that are not stored, in the order of need."""
    keys = [run.backbone_key for run in runs(lab, settings, experiment)]
    return {key: MissingBackbone(place, settings, experiment, key) for key in keys if not lab.store.has("stage1", key)}


@contextmanager
def training(backbones: Sequence[MissingBackbone], jobs: int, seconds: float) -> Iterator[Callable[[str], bool]]:
    """Train `jobs` backbones at a time, in their order, while the caller works with those that are finished.

    Leaving the context waits for the rest, which ends in time by itself; leaving it by an exception ends processes at
    once, threads after their epoch.

    Args:
        backbones: what `missing` returned.
        jobs: trainings at a time, at least 1.
        seconds: from now, after which no epoch is begun; infinity for no limit.

    Yields:
        What waits for the backbone of a key and returns whether it was trained to its end. One that the time was too
        short for has a checkpoint and goes on from there another time.

    Raises:
        UserError: a process was killed; the others end with it.
    """
    if not backbones or seconds <= 0:
        yield lambda key: False
        return
    end = time.time() + seconds  # on the clock that all processes have
    device = Runtime.choose(backbones[0].place.device).device
    workers = min(jobs, len(backbones))
    with _streams(workers, device) if device.type == "cuda" else _processes(workers, jobs) as pool:
        tasks = {backbone.key: pool.submit(_train, backbone, end) for backbone in backbones}
        yield lambda key: tasks[key].result()
        wait(tasks.values())


@contextmanager
def _processes(workers: int, jobs: int) -> Iterator[Executor]:
    """Yield processes that share the threads among `jobs`; an exception ends them all, and so does the death of one."""
    before = multiprocessing.active_children()
    # Spawned, not forked: neither CUDA nor OpenMP survives a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _share_threads, (jobs,))
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in before:
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                f"--jobs {jobs}: a process that trained a backbone was killed, perhaps for want of memory; the same "
                "command goes on from its last epoch, with fewer jobs in less memory"
            ) from None
        raise
    pool.shutdown()


@contextmanager
def _streams(workers: int, device: torch.device) -> Iterator[Executor]:
    """Yield threads that compute on a CUDA stream each; an exception stops them after their epoch."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, "training", _open_stream, (device, stop))
    try:
        yield pool
    except BaseException:
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _share_threads(jobs: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _open_stream(device: torch.device, stop: threading.Event) -> None:
    _thread.stop = stop
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


class _Thread(threading.local):
    """What a thread that trains has for itself; in a process that trains there is only one."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.labs: dict[Place, Lab] = {}

    def lab(self, place: Place) -> Lab:
        """Return the thread's lab; a lab keeps a model, and tells one progress."""
        if place not in self.labs:
            self.labs[place] = Lab(_data(place), Store(place.store), Runtime.choose(place.device))
        return self.labs[place]


_thread = _Thread()


class _Stoppable(Quiet):
    """Ends the work at a safe point once the training's thread is told to."""

    def safe_point(self) -> None:
        """Stop where the thread is to stop.

        Raises:
            TimeIsUp: it is.
        """
        if _thread.stop.is_set():
            raise TimeIsUp


def _train(backbone: MissingBackbone, end: float) -> bool:
    deadline = Deadline(_Stoppable(), end - time.time())
    if deadline.passed:
        return False
    lab = _thread.lab(backbone.place)
    lab.runtime = replace(lab.runtime, progress=deadline)
    run = next(r for r in runs(lab, backbone.settings, backbone.experiment) if r.backbone_key == backbone.key)
    try:
        lab.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder)
    except TimeIsUp:
        return False
    return True


@cache
def _data(place: Place) -> ImageData:
    return load(place.data, data_root=place.data_root)
