"""A Ray cluster as the place where stages are made: one task a stage, with the cores and GPUs that it asks for.

Ray decides on which machine a task runs. What becomes of a task that is lost is decided by `places.Apart`, not by Ray,
for a stage goes on from its checkpoint, and people are told. A small actor on the cluster is the board on which workers
write where they are and how far. Data sets, and stages where no file system is shared, travel through Ray's object
store. Ray's own transport pickles, and executes what it is sent: whoever reaches a cluster can run code on it.
"""

import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tailscope.errors import UserError, one_line
from tailscope.experiments.options import Placing
from tailscope.experiments.places import GRACE, Apart, Following, Lost, Tell
from tailscope.experiments.stages import Stages
from tailscope.experiments.workers import Job, Outcome, here, work

MOST = 512
"""How many stages are asked for at a time at most: each has a thread here that waits."""
LOOK = 0.5
"""Seconds between two looks at a task and at the board."""


class OnRay(Apart):
    """A Ray cluster."""

    def __init__(self, placing: Placing, device: str, tell: Tell) -> None:
        """Connect to the cluster, or start one on this machine.

        Raises:
            UserError: Ray is not installed, the cluster cannot be reached, or it lacks what a stage needs.
        """
        self._ray = ray = imported()
        connect(ray, str(placing.on))
        have = ray.cluster_resources()
        gpus = placing.gpus
        if gpus is None:
            gpus = 1.0 if have.get("GPU") and device != "cpu" else 0.0
        needs = {"CPU": 1.0 if placing.cpus is None else placing.cpus, "GPU": gpus}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = sum(_fitting(machine, needs) for machine in machines)  # a stage does not spread over machines
        if not fit:
            self.close()
            most = " and ".join(f"{max(one.get(name, 0) for one in machines):g}" for name in needs)
            raise UserError(
                f"--on {placing.on}: no machine of the cluster has more cores and GPUs than {most}, a stage asks for"
                f" {needs['CPU']:g} and {gpus:g}; change --cpus or --gpus"
            )
        slots = placing.jobs or min(MOST, fit)
        seen = "cpu" if device == "auto" and not gpus else device  # a task without a GPU must not take one
        super().__init__(slots, max(1, int(needs["CPU"])), seen, tell)
        self._task = ray.remote(num_cpus=needs["CPU"], num_gpus=gpus, max_retries=0)(_work)
        self._board = ray.remote(_board()).options(num_cpus=0, max_restarts=-1).remote()
        self._sent: dict[str, Any] = {}
        tell(f"Ray: {len(machines)} machines, {slots} stages at a time, each {needs['CPU']:g} cores, {gpus:g} GPUs")

    def _ask(self, lab: Stages, job: Job, given: bytes | None) -> Outcome:
        ray, progress = self._ray, lab.runtime.progress
        name = uuid.uuid4().hex  # of this try: the board keeps what others said
        with self._lock:
            if job.fingerprint not in self._sent:
                self._sent[job.fingerprint] = ray.put(lab.data)
        data = [self._sent[job.fingerprint]]  # in a list Ray hands it over as it is, to be fetched if it is needed
        task = self._task.options(name=job.order.label).remote(
            job, data, None if given is None else [ray.put(given)], self._board, name
        )
        try:
            return self._answer_of(task, name, progress, job.order.label)
        except BaseException:
            self._stop(task)
            raise

    def _answer_of(self, task: Any, name: str, progress: Any, label: str) -> Outcome:
        ray, where = self._ray, ""
        with Following(progress, label) as follow:
            while not ray.wait([task], timeout=LOOK)[0]:
                with suppress(ray.exceptions.RayError):  # the board may be moving to another machine
                    if (said := ray.get(self._board.read.remote(name), timeout=GRACE)) is not None:
                        if said[0] != where:
                            where = said[0]
                            self._tell(f"{label}: begun on {where}")
                        follow(*said[1:])
                progress.safe_point()
        try:
            outcome = ray.get(task)
        except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
            raise UserError(f"{label}: {_cause(error)}; do all machines of the cluster have this tailscope?") from None
        except ray.exceptions.RayError as error:
            raise Lost(where or type(error).__name__) from None
        return Outcome(*outcome)

    def _stop(self, task: Any) -> None:
        """Have a task save its last epoch and end; kill its worker where that takes too long."""
        ray = self._ray
        with suppress(Exception):  # whatever Ray says of a task that has ended
            ray.cancel(task)
            if not ray.wait([task], timeout=GRACE)[0]:
                ray.cancel(task, force=True)

    def close(self) -> None:
        """Leave the cluster, and end it if it was started for this."""
        with suppress(AttributeError):  # it was never whole
            super().close()
        self._ray.shutdown()


def _fitting(machine: dict[str, float], needs: dict[str, float]) -> int:
    """Return how many stages a machine has room for at a time."""
    rooms = [int(machine.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items() if amount]
    return min(rooms, default=MOST)


def _board() -> type:
    """Return a class for what workers say, by the name of their task.

    It is made here so that Ray sends it whole: its process then need not import this module, and PyTorch with it.
    """

    class Board:
        """What workers said last."""

        def __init__(self) -> None:
            self._said: dict[str, tuple[str, int, int]] = {}

        def write(self, name: str, where: str, done: int, total: int) -> None:
            """Take in where a task runs, and how far it is."""
            self._said[name] = where, done, total

        def read(self, name: str) -> tuple[str, int, int] | None:
            """Return the last that was said of a task."""
            return self._said.get(name)

    return Board


def _work(job: Job, data: list[Any], given: list[Any] | None, board: Any, name: str) -> tuple[Any, ...]:
    """Carry out a job in a worker of the cluster."""
    import ray

    def report(done: int, total: int) -> None:
        board.write.remote(name, here(), done, total)

    report(0, 1)
    fetched = None if given is None else lambda: ray.get(given[0])
    return tuple(work(job, lambda: ray.get(data[0]), fetched, report))


def imported() -> Any:
    """Return the module `ray`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--on ray: Ray is not installed; pip install 'tailscope[ray]'") from None
    return ray


def connect(ray: Any, on: str) -> None:
    """Connect to the cluster that `--on` names, or start one here.

    Raises:
        UserError: it cannot be reached, or started.
    """
    address = on if on.startswith("ray://") else None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    with _own_signals():
        try:
            ray.init(address=address, **quiet, **({} if address else {"include_dashboard": False}))
        except Exception as error:  # Ray raises many kinds for a cluster that is not there
            if not (named := address or os.environ.get("RAY_ADDRESS")):
                raise UserError(f"--on {on}: Ray could not be started on this machine ({_cause(error)})") from None
            said = f"the cluster at {named} cannot be reached ({_cause(error)}); is its address right?"
            raise UserError(f"--on {on}: {said}") from None


def _cause(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return one_line(lines[-1])[:200]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers: Ray sets one of its own, which would end it without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
