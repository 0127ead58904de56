"""Train backbones ahead of the experiments that need them, several at a time, each in a thread of its own.

Small networks do not fill a GPU: the captured steps of several trainings run side by side on it, each on a stream of
its own, where processes would only take turns. On a CPU every training gets its share of the cores, which then do not
wait for one another at every layer. The store is what the threads and the caller have in common: what was trained
ahead, the experiments recall.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tailscope.experiments.lab import Lab
from tailscope.experiments.runs import Run
from tailscope.experiments.settings import Settings
from tailscope.paper.runs import runs
from tailscope.progress import Advance, Deadline, Quiet, TimeIsUp


@dataclass(frozen=True, eq=False)
class MissingBackbone:
    """One backbone to train: the first run of an experiment that has its key, and where its data and its store are."""

    lab: Lab
    run: Run


def missing(lab: Lab, settings: Settings, experiment: str) -> dict[str, MissingBackbone]:
    """Return by key the backbones of an experiment that are not stored, in the order of need."""
    found: dict[str, MissingBackbone] = {}
    for run in runs(lab, settings, experiment):
        if not lab.store.has("stage1", run.backbone_key):
            found.setdefault(run.backbone_key, MissingBackbone(lab, run))
    return found


@contextmanager
def training(backbones: Sequence[MissingBackbone], jobs: int, deadline: Deadline) -> Iterator[Callable[[str], bool]]:
    """Train `jobs` backbones at a time, in their order, while the caller works with those that are finished.

    Leaving the context waits for the rest, which ends in time by itself; leaving it by an exception ends the trainings
    at their next step, and checkpoints keep their finished epochs.

    Args:
        backbones: what `missing` returned, of one device.
        jobs: trainings at a time, at least 1.
        deadline: after it no epoch is begun.

    Yields:
        What waits for the backbone of a key and returns whether it was trained to its end. One that the time was too
        short for has a checkpoint and goes on from there another time.
    """
    if not backbones:
        yield lambda key: False
        return
    stop = threading.Event()
    initial = (backbones[0].lab.runtime.device, max(1, torch.get_num_threads() // jobs))
    pool = ThreadPoolExecutor(jobs, "training", prepare_thread, initial)
    try:
        tasks = {b.run.backbone_key: pool.submit(_train, b, deadline, stop) for b in backbones}
        yield lambda key: tasks[key].result()
        wait(tasks.values())
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_thread(device: torch.device, threads: int) -> None:
    """Give the thread its share of the cores, and a stream on a GPU."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


class _Stoppable(Quiet):
    """Ends a training at its next step once an event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Look at the event after every step."""
        yield lambda items: self.safe_point()

    def safe_point(self) -> None:
        """Look at the event.

        Raises:
            TimeIsUp: it is set.
        """
        if self._stop.is_set():
            raise TimeIsUp


def _train(backbone: MissingBackbone, deadline: Deadline, stop: threading.Event) -> bool:
    own = Deadline(_Stoppable(stop), deadline.left)  # a deadline remembers how long the last epoch took
    if own.passed:
        return False
    lab, run = copy.copy(backbone.lab), backbone.run  # a lab keeps a model, and tells one progress
    lab.runtime = replace(lab.runtime, progress=own)
    try:
        lab.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder)
    except TimeIsUp:
        return False
    return True
