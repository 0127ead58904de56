"""What is made elsewhere than in the process that asks: an order, the job that it comes in, and the worker's answer.

A worker is a process of this machine or a task on a Ray cluster (`tailscope.experiments.places`). It opens the store,
if it sees it, and makes the stage there; otherwise in a folder of its own, and the stage goes home as an archive.
"""

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tailscope import plugins
from tailscope.data.sources import ImageData
from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments.runs import Run, fitted
from tailscope.experiments.stages import Stages, pretraining
from tailscope.progress import Advance, Deadline, Progress, TimeIsUp
from tailscope.spec import backbone_key
from tailscope.store import Store, add, pack
from tailscope.training.recipes import with_plugins

Kind = Literal["pretrained", "stage1", "stage2"]


@dataclass(frozen=True, eq=False)
class Order:
    """A stage to make: the pre-training or the backbone of a run, or the classifier on it."""

    kind: Kind
    run: Run
    label: str

    @property
    def key(self) -> str:
        """The store's key of the stage."""
        if self.kind == "pretrained":
            return backbone_key(pretraining(self.run.stage1), self.run.seed)
        spec = self.run.spec() if self.kind == "stage2" else None
        return self.run.backbone_key if spec is None else spec.key()

    def plain(self) -> "Order":
        """Return the order as it is sent: with what every run has, whatever experiment it belongs to."""
        run = Run(**{one.name: getattr(self.run, one.name) for one in fields(Run)})
        return Order(self.kind, run, self.label)


def carry_out(lab: Stages, order: Order) -> None:
    """Make a stage, unless the store has it, and the features of the test images that its evaluation needs."""
    run = order.run
    for stage in filter(None, (run.stage1, run.stage2)):
        if with_plugins(stage) != stage:
            raise UserError(
                "a worker has other plug-ins than this process; give all of them the same files, and put methods of a"
                " notebook into a file that --import names"
            )
    if order.kind == "pretrained":
        lab.pretrained(run.stage1, run.trained_on.rows, run.seed, order.label)
        return
    backbone = lab.backbone(run.stage1, run.trained_on.rows, run.seed, order.label)
    encoder = fitted(lab, run, backbone, order.label)[0] if order.kind == "stage2" else backbone
    if run.trained_on.name not in ("cut", "part"):  # they judge on training images, and test images stay unread
        lab.clean_features(encoder, "test")


@dataclass(frozen=True)
class Job:
    """An order with all that a worker needs to know; data come apart, since it may have them.

    Attributes:
        fingerprint: of the data set.
        store: the store's folder, as the process that asks sees it.
        marker: name of a file in it: a worker that finds it sees the same store.
        device: as `--device` takes it, and `engine` as `--engine`.
        threads: cores that the worker uses.
        workers: processes that decode files; None decides.
        seconds: until no further epoch may begin; None: no limit.
        imports: the plug-ins that `--import` named.
    """

    order: Order
    fingerprint: str
    store: Path
    marker: str
    device: str
    engine: str
    threads: int
    workers: int | None
    seconds: float | None
    imports: tuple[plugins.Named, ...]


class Outcome(NamedTuple):
    """A worker's answer."""

    state: Literal["done", "mistake", "failed", "unfinished", "unshared"]
    where: str
    text: str = ""
    archive: bytes = b""
    """What was made, from a worker that does not see the store."""
    logged: Sequence[tuple[str, int, Mapping[str, float], bool]] = ()
    """What is for loggers."""


class Reporting(Progress):
    """A worker's progress: `report` gets images done and their number, some times a second at most."""

    EVERY = 0.5

    def __init__(self, report: Callable[[int, int], object]) -> None:
        self._report, self._told = report, 0.0
        self.logged: list[tuple[str, int, Mapping[str, float], bool]] = []

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Report how far the task is."""
        count = done

        def advance(items: int, /) -> None:
            nonlocal count
            count += items
            if time.monotonic() - self._told >= self.EVERY:
                self._told = time.monotonic()
                self._report(count, total)

        self._report(done, total)
        yield advance

    def log(self, run: str, step: int, numbers: Mapping[str, float], *, last: bool = False) -> None:
        """Keep the numbers for the process that asked."""
        self.logged.append((run, step, dict(numbers), last))


def here() -> str:
    """Return this process's name for people: machine and number."""
    return f"{socket.gethostname()}, process {os.getpid()}"


def work(
    job: Job,
    data: ImageData | Callable[[], ImageData],
    given: bytes | Callable[[], bytes] | None,
    report: Callable[[int, int], object],
) -> Outcome:
    """Carry out a job in this process, and say what came of it.

    Args:
        job: what is to be done.
        data: the data set, or what fetches it where this process has not had it just now.
        given: the archive of the stages that this one stands on, or what fetches it; None where it was not sent.
        report: is told how far the work is.
    """
    progress = Reporting(report)
    try:
        for plugin in job.imports:
            plugin.load()
        torch.set_num_threads(job.threads)
        limited = progress if job.seconds is None else Deadline(progress, job.seconds)
        runtime = Runtime.choose(job.device, engine=job.engine, progress=limited)
        if _sees_the_store(job):
            carry_out(_lab(job, data, Store(job.store), runtime), job.order)
            return Outcome("done", here(), logged=progress.logged)
        if given is None:
            return Outcome("unshared", here())
        archive = given() if callable(given) else given
        with tempfile.TemporaryDirectory(prefix="tailscope-") as folder:
            made = _apart(_lab(job, data, Store(Path(folder) / "store"), runtime), job.order, archive, Path(folder))
        return Outcome("done", here(), archive=made, logged=progress.logged)
    except TimeIsUp:
        return Outcome("unfinished", here(), logged=progress.logged)
    except UserError as error:
        return Outcome("mistake", here(), str(error))
    except (Exception, SystemExit):  # the net under a worker: whoever asked tells it
        return Outcome("failed", here(), traceback.format_exc())


def _sees_the_store(job: Job) -> bool:
    with suppress(OSError):  # it may be in a folder where this process may not look
        return (job.store / job.marker).is_file()
    return False


_opened: dict[str, Stages] = {}
"""The data set that this worker had last, with its statistics."""


def _lab(job: Job, data: ImageData | Callable[[], ImageData], store: Store, runtime: Runtime) -> Stages:
    if job.fingerprint not in _opened:
        _opened.clear()
        opened = data() if callable(data) else data
        _opened[job.fingerprint] = Stages(opened, store, runtime, workers=job.workers)
    return _opened[job.fingerprint].working(runtime, store)


def _apart(lab: Stages, order: Order, archive: bytes, folder: Path) -> bytes:
    """Make a stage in a store of its own, from the archive of what it stands on; return what was made, packed."""
    if archive:
        (folder / "given.tar").write_bytes(archive)
        add(lab.store, folder / "given.tar")
    before = _entries(lab.store)
    carry_out(lab, order)
    return packed(lab.store, [entry for entry in _entries(lab.store) if entry not in before], folder)


def _entries(store: Store) -> list[tuple[str, str]]:
    return [(kind, key) for kind in store.kinds() for key in store.keys(kind)]


def packed(store: Store, entries: Sequence[tuple[str, str]], folder: Path) -> bytes:
    """Return an archive of entries, written to a folder on the way; nothing for none."""
    return pack(store, folder / "packed.tar", entries)[0].read_bytes() if entries else b""
