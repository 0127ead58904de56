"""Where the stages of an experiment are made: in this process, in others of this machine, or on a Ray cluster.

A `Place` makes one stage at a time for each thread that asks, and the thread waits: which stage comes when is decided
in `tailscope.experiments.trainings`, the same for all places. Elsewhere than in this process a worker makes the stage
(`tailscope.experiments.workers`): in the store, so that one that is killed leaves its checkpoint to the next, or where
it does not see that, in a folder of its own, and it sends an archive home. Whichever way, the store then has the stage,
and the experiment recalls it.
"""

import multiprocessing
import pickle
import signal
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any

import torch

from tailscope import plugins
from tailscope.data.sources import ImageData
from tailscope.errors import UserError
from tailscope.experiments.stages import Stages, beneath
from tailscope.experiments.workers import Job, Order, Outcome, carry_out, packed, work
from tailscope.progress import Deadline, Progress, TimeIsUp
from tailscope.store import Store, add

ATTEMPTS = 4
"""How often a stage is begun at most, where its workers are lost."""
LOOK = 0.2
"""Seconds between two looks whether a worker has answered, or is to be stopped."""
NEVER_BEGAN = (
    "a process for it ended as it began; a script that asks for several (--jobs) starts its work under"
    " `if __name__ == '__main__':`, for each process imports the script anew"
)
GRACE = 10.0
"""Seconds that a worker has to save its last epoch when it is stopped."""

Tell = Callable[[str], object]


class Lost(Exception):
    """A worker has ended without an answer; the message says which."""


class Failed(Exception):
    """What a worker did not foresee: the message is its traceback."""


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
        run, needs = order.run, list[tuple[str, str]]()
        if order.kind == "stage1":
            needs = [one[:2] for one in beneath(run.stage1, run.seed) if lab.store.has(*one[:2])]
        elif order.kind == "stage2":
            spec, trained_on = run.spec(), run.retrained_on
            assert spec is not None
            assert trained_on is not None
            needs = [("stage1", run.backbone_key), *lab.extracted(spec, trained_on.rows)]
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
    has_spoken: bool = False

    @property
    def never_began(self) -> bool:
        """Whether the process ended by a mistake of the program that it starts as, before it could work."""
        self.process.join(GRACE)
        return not self.has_spoken and self.process.exitcode == 1

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
            never_began = worker.never_began
            worker.end()
            if never_began:
                raise UserError(f"{job.order.label}: {NEVER_BEGAN}") from None
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
                worker.has_spoken = True
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
