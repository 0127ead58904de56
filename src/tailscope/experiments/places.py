"""Where the stages of an experiment are made: in this process, in others of this machine, or on a Ray cluster.

A `Place` makes one stage at a time for each thread that asks, and the thread waits: which stage comes when is decided
in `tailscope.experiments.trainings`, the same for all places. Elsewhere than in this process a worker opens the store,
if it sees it, and makes the stage there, so that one that is killed leaves its checkpoint to the next. A worker that
does not see the store works in a folder of its own and sends the stage home as an archive of `tailscope store pack`.
Whichever way, the store then has the stage, and the experiment recalls it.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch

from tailscope import plugins
from tailscope.data.sources import ImageData
from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments.runs import Run, fitted
from tailscope.experiments.stages import Stages, beneath, pretraining
from tailscope.progress import Advance, Deadline, Progress, TimeIsUp
from tailscope.spec import backbone_key
from tailscope.store import Store, add, pack
from tailscope.training.recipes import with_plugins

ATTEMPTS = 4
"""How often a stage is begun at most, where its workers are lost."""
LOOK = 0.2
"""Seconds between two looks whether a worker has answered, or is to be stopped."""
GRACE = 10.0
"""Seconds that a worker has to save its last epoch when it is stopped."""

Kind = Literal["pretrained", "stage1", "stage2"]
Tell = Callable[[str], object]


class Lost(Exception):
    """A worker has ended without an answer; the message says which."""


class Failed(Exception):
    """What a worker did not foresee: the message is its traceback."""


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
            raise UserError("a worker has other plug-ins than this process; give all of them the same files")
    if order.kind == "pretrained":
        lab.pretrained(run.stage1, run.trained_on.rows, run.seed, order.label)
        return
    backbone = lab.backbone(run.stage1, run.trained_on.rows, run.seed, order.label)
    encoder = fitted(lab, run, backbone, order.label)[0] if order.kind == "stage2" else backbone
    if run.trained_on.name != "cut":  # while hyper-parameters are being chosen, test images stay unread
        lab.clean_features(encoder, "test")


class Place(ABC):
    """Makes stages; called from as many threads as it has `slots`."""

    slots: int
    apart: bool = True
    """Whether stages are made outside this process."""

    @abstractmethod
    def make(self, lab: Stages, order: Order) -> None:
        """Make a stage, so that the lab's store has it, and report to the lab's progress, which may end it.

        Raises:
            UserError: the order cannot be carried out, whoever tries.
            Failed: something unforeseen happened.
            TimeIsUp: the lab's progress ended it; finished epochs are kept.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what works in this place, at once."""


class Here(Place):
    """The process that asks. On a GPU small networks train side by side, each on a stream of its own."""

    apart = False

    def __init__(self, slots: int) -> None:
        """Take in how many stages are made at a time."""
        self.slots = slots

    def make(self, lab: Stages, order: Order) -> None:
        """Make the stage in the calling thread."""
        carry_out(lab, order)


# -- what a worker does -----------------------------------------------------------------------------------------------


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
        if (job.store / job.marker).is_file():
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
    except Exception:  # the net under a worker: whoever asked tells it
        return Outcome("failed", here(), traceback.format_exc())


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


# -- places apart -----------------------------------------------------------------------------------------------------


class Apart(Place):
    """A place whose workers may be lost: what one had begun another goes on with."""

    def __init__(self, slots: int, threads: int, device: str, tell: Tell) -> None:
        """Take in how many stages are made at a time, on how many cores each, where, and who is told about it."""
        self.slots, self._threads, self._device, self._tell = slots, threads, device, tell
        self._marker, self._marked = f".here-{uuid.uuid4().hex}", set[Path]()
        self._unshared = False
        self._lock = Lock()

    @abstractmethod
    def _ask(self, lab: Stages, job: Job, given: bytes | None) -> Outcome:
        """Have a job done; stop it where `lab.runtime.progress.safe_point` raises. `Lost`: its worker has ended."""

    def make(self, lab: Stages, order: Order) -> None:
        """Have the stage made, by one worker after the other where they are lost."""
        for attempt in range(ATTEMPTS):
            try:
                self._take(lab, order, self._answer(lab, order))
                return
            except Lost as lost:
                if attempt + 1 == ATTEMPTS:
                    raise UserError(
                        f"{order.label}: {ATTEMPTS} workers were lost, the last one {lost}; out of memory?"
                    ) from None
                saved = None if self._unshared else lab.store.checkpoint(order.kind, order.key)
                begins = f"goes on after epoch {saved['epochs']}" if saved else "begins anew"
                self._tell(f"{order.label}: its worker was lost ({lost}); another one {begins}")

    def _answer(self, lab: Stages, order: Order) -> Outcome:
        """Return a worker's answer; one that does not see the store gets what the stage stands on."""
        self._mark(lab.store)
        outcome = self._ask(lab, self._job(lab, order), self._given(lab, order) if self._unshared else None)
        if outcome.state != "unshared":
            return outcome
        with self._lock:
            if not self._unshared:
                self._tell(
                    f"{outcome.where} does not see {lab.store.root}: stages come home as archives, and what is lost"
                    " begins anew"
                )
            self._unshared = True
        return self._ask(lab, self._job(lab, order), self._given(lab, order))

    def _job(self, lab: Stages, order: Order) -> Job:
        progress = lab.runtime.progress
        left = progress.left if isinstance(progress, Deadline) else float("inf")
        return Job(
            order.plain(),
            lab.data.fingerprint,
            lab.store.root.absolute(),
            self._marker,
            self._device,
            lab.runtime.engine or "auto",
            self._threads,
            lab.workers,
            None if left == float("inf") else left,
            tuple(plugins.named),
        )

    def _given(self, lab: Stages, order: Order) -> bytes:
        """Return what a stage stands on as an archive."""
        needs = [("stage1", order.run.backbone_key)] if order.kind == "stage2" else []
        if order.kind == "stage1":  # of its labeller no order need have come before
            needs = [one[:2] for one in beneath(order.run.stage1, order.run.seed) if lab.store.has(*one[:2])]
        with tempfile.TemporaryDirectory() as folder:
            return packed(lab.store, needs, Path(folder))

    def _mark(self, store: Store) -> None:
        with self._lock:
            if store.root not in self._marked:
                (store.root / self._marker).touch()
                self._marked.add(store.root)

    def _take(self, lab: Stages, order: Order, outcome: Outcome) -> None:
        """Take in a worker's answer."""
        if outcome.archive:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "stages.tar"
                file.write_bytes(outcome.archive)
                add(lab.store, file)
        for run, step, numbers, last in outcome.logged:
            lab.runtime.progress.log(run, step, numbers, last=last)
        match outcome.state:
            case "mistake":
                raise UserError(outcome.text)
            case "failed":
                raise Failed(f"{order.label} ({outcome.where}):\n{outcome.text}")
            case "unfinished":
                raise TimeIsUp
        self._tell(f"done: {order.label} ({outcome.where})")

    def close(self) -> None:
        """Take away the marks."""
        for root in self._marked:
            with suppress(OSError):
                (root / self._marker).unlink(missing_ok=True)


class Following(ExitStack):
    """Passes on to a progress how far a worker is: images done, and their number, of one task after the other."""

    def __init__(self, progress: Progress, label: str) -> None:
        super().__init__()
        self._progress, self._label = progress, label
        self._done, self._total = 0, -1

    def __call__(self, done: int, total: int) -> None:
        """Take in how far the worker is."""
        if total != self._total or done < self._done:
            self.close()
            self._advance = self.enter_context(self._progress.task(self._label, total, done))
        else:
            self._advance(done - self._done)
        self._done, self._total = done, total


@dataclass(eq=False)
class _Worker:
    """A process of this machine, with the data sets that it has."""

    process: Any
    connection: Connection
    knows: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"process {self.process.pid}"

    def end(self) -> None:
        """Have the process save its last epoch and end; kill it where it takes too long."""
        with suppress(OSError, ValueError):
            self.process.terminate()
            self.process.join(GRACE)
            self.process.kill()
        self.connection.close()


class Processes(Apart):
    """Processes of this machine, each with its share of the cores; a script starts them under `if __name__ == ...`."""

    def __init__(self, slots: int, device: str, tell: Tell) -> None:
        """Take in how many stages are made at a time, on which device; processes start when they are needed."""
        super().__init__(slots, max(1, torch.get_num_threads() // slots), device, tell)
        self._idle: list[_Worker] = []

    def _ask(self, lab: Stages, job: Job, given: bytes | None) -> Outcome:
        worker = self._worker()
        try:
            if job.fingerprint not in worker.knows:
                worker.connection.send_bytes(pickle.dumps(lab.data))
                worker.knows = {job.fingerprint}
            else:
                worker.connection.send_bytes(b"")
            worker.connection.send((job, given))
            self._tell(f"{job.order.label}: begun by {worker}")
            outcome = _listen(worker, lab.runtime.progress, job.order.label)
        except (EOFError, OSError):
            worker.end()
            raise Lost(str(worker)) from None
        except BaseException:  # it is to be stopped
            worker.end()
            raise
        with self._lock:
            self._idle.append(worker)
        return outcome

    def _worker(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            context = multiprocessing.get_context("spawn")
            ours, its = context.Pipe()
            process = context.Process(target=_serve, args=(its,), daemon=False)
            process.start()
            its.close()
            return _Worker(process, ours)

    def close(self) -> None:
        """End the processes; those that were at work have been ended by who asked them."""
        super().close()
        while self._idle:
            self._idle.pop().end()


def _listen(worker: _Worker, progress: Progress, label: str) -> Outcome:
    """Wait for a worker's answer, pass on how far it is, and let the progress end it."""
    with Following(progress, label) as follow:
        while True:
            if worker.connection.poll(LOOK):
                said = worker.connection.recv()
                if isinstance(said, Outcome):
                    return said
                follow(*said)
            progress.safe_point()


def _serve(connection: Connection) -> None:
    """Be a worker: do one job after the other until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks hears it, and ends this one
    signal.signal(signal.SIGTERM, _interrupt)
    data: ImageData | None = None
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            if sent := connection.recv_bytes():
                data = pickle.loads(sent)
            job, given = connection.recv()
            assert data is not None
            outcome = work(job, data, given, lambda *far: connection.send(far))
            connection.send(outcome)


def _interrupt(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
