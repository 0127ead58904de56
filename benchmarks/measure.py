"""Arms of a comparison, measured in turn in processes of their own, and the statistics of paired rounds.

An arm is a function `arm(pace, **settings)`, named "module:function", written as an ordinary loop that calls
`pace.step()` after each step. Inside a slice that call returns at once; at a slice's end it reports to the parent and
blocks until the next slice. So a library's own training loop can be measured in slices without changing it.
"""

import contextlib
import importlib
import multiprocessing
import resource
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

# -- arms -------------------------------------------------------------------------------------------------------------


PAUSE = 0.3  # seconds


class Stop(Exception):
    """The parent has measured enough; raised inside an arm by `Pace`."""


@dataclass(frozen=True)
class Arm:
    """What a worker runs.

    Attributes:
        target: "module:function".
        settings: its keyword arguments.
        settle: untimed steps at the beginning of each slice, so that data loaded ahead between slices do not count.
        multiple: a slice has a multiple of so many steps: the period of work that is not done in every step.
        warm_up: untimed steps before the first slice; compiling happens there.
    """

    target: str
    settings: dict[str, Any] = field(default_factory=dict)
    settle: int = 0
    multiple: int = 1
    warm_up: int = 3


@dataclass(frozen=True)
class Slice:
    """A measured stretch of an arm's work.

    Attributes:
        steps: calls of `Pace.step`.
        items: what they worked on, such as images.
        seconds: wall clock.
        peak_bytes: the process's largest resident memory so far.
        result: what the arm returned, None while it has not ended.
        told: what the arm has told of itself since it was ready.
    """

    steps: int
    items: int
    seconds: float
    peak_bytes: int
    result: dict[str, Any] | None = None
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def per_item(self) -> float:
        """Seconds per item."""
        return self.seconds / self.items


class Pace:
    """An arm's view of its worker: tells the parent of finished slices and waits for new ones."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.synchronize: Callable[[], None] = lambda: None
        """Set by arms on a GPU: waits until the work handed to it is done."""
        self.told: dict[str, Any] = {}
        """What the parent should know and is known only while the arm works."""

    def ready(self, **info: Any) -> None:
        """Report that the set-up is done, with anything the parent should know, and wait for the first slice."""
        self._connection.send(("ready", info))
        self._wait()

    def step(self, items: int = 1) -> None:
        """Count a step; at the end of a slice report and wait.

        Raises:
            Stop: the parent wants no more.
        """
        self._steps += 1
        if self._steps == 0:  # the untimed steps are over
            self._start()
        elif self._steps > 0:
            self._items += items
            if self._steps % self._multiple == 0 and time.perf_counter() - self._started >= self._seconds:
                self._connection.send(("slice", self.slice()))
                self._wait()

    def slice(self, result: dict[str, Any] | None = None) -> Slice:
        """Return the slice so far."""
        self.synchronize()
        seconds = time.perf_counter() - self._started
        return Slice(max(0, self._steps), self._items, seconds, peak_bytes(), result, self.told)

    def _wait(self) -> None:
        command = self._connection.recv()
        if command is None:
            raise Stop
        settle, self._seconds, self._multiple = command
        self._steps = -settle
        self._start()

    def _start(self) -> None:
        self.synchronize()
        self._items = 0
        self._started = time.perf_counter()


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def find(target: str) -> Callable[..., Any]:
    """Import "module:function"."""
    module, name = target.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def serve(connection: Connection, target: str, settings: Mapping[str, Any]) -> None:
    """Run an arm until it ends or is stopped; the worker's main function."""
    pace = Pace(connection)
    try:
        result = find(target)(pace, **settings)
        connection.send(("slice", pace.slice(result or {})))
    except Stop:
        pass
    except Exception:
        connection.send(("error", traceback.format_exc()))


class Worker:
    """The parent's handle of an arm; a context manager that ends the process."""

    def __init__(self, arm: Arm, *, inline: bool = False) -> None:
        """Start the arm; with `inline` in a thread of this process, which suits tests and nothing else."""
        self.arm = arm
        self._pause = 0.0 if inline else PAUSE
        self._connection, child = multiprocessing.Pipe()
        self._runner: Any
        if inline:
            self._runner = threading.Thread(target=serve, args=(child, arm.target, arm.settings), daemon=True)
        else:
            context = multiprocessing.get_context("spawn")
            self._runner = context.Process(target=serve, args=(child, arm.target, arm.settings))
        self._runner.start()
        if not inline:
            child.close()  # so that a worker that dies is noticed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it may have ended already
            self._connection.send(None)
        self._runner.join(timeout=30)
        if isinstance(self._runner, multiprocessing.process.BaseProcess) and self._runner.is_alive():
            self._runner.terminate()
        self._connection.close()

    def wait_until_ready(self) -> dict[str, Any]:
        """Return what the arm reported when its set-up was done."""
        info: dict[str, Any] = self._receive()
        return info

    def warm_up(self) -> Slice:
        """Run the first few steps, if any."""
        return self._run(0, 0.0, self.arm.warm_up) if self.arm.warm_up else Slice(0, 0, 0.0, 0)

    def run(self, seconds: float) -> Slice:
        """Run a slice of at least `seconds`, once what the last arm's data workers still had to load is loaded."""
        time.sleep(self._pause)
        return self._run(self.arm.settle, seconds, self.arm.multiple)

    def _run(self, settle: int, seconds: float, multiple: int) -> Slice:
        self._connection.send((settle, seconds, multiple))
        done: Slice = self._receive()
        return done

    def _receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.arm.target} died (out of memory?)") from None
        if kind == "error":
            raise RuntimeError(f"{self.arm.target} failed:\n{value}")
        return value


# -- rounds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median of several rounds with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """What an arm's slices gave, one a round."""

    slices: list[Slice]
    warm_up: Slice
    info: dict[str, Any]

    @property
    def per_item(self) -> list[float]:
        """Seconds per item of each round."""
        return [s.per_item for s in self.slices]

    @property
    def rate(self) -> Spread:
        """Items per second."""
        return Spread.of([1 / seconds for seconds in self.per_item])

    @property
    def seconds_per_item(self) -> Spread:
        """Seconds per item."""
        return Spread.of(self.per_item)

    @property
    def items(self) -> int:
        """How many items were measured in all rounds."""
        return sum(s.items for s in self.slices)

    @property
    def peak_bytes(self) -> int:
        """The process's largest resident memory."""
        return max(s.peak_bytes for s in self.slices)

    def raw(self) -> dict[str, Any]:
        """Return what a record keeps of it."""
        return {
            "seconds_per_item": self.per_item,
            "items": self.items,
            "warm_up_seconds": self.warm_up.seconds,
            "peak_bytes": self.peak_bytes,
        }


def paired(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Return the ratios slow / fast round by round.

    >>> paired([2.0, 6.0, 6.0], [1.0, 2.0, 4.0])
    Spread(median=2.0, low=1.5, high=3.0)
    """
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])


def start(arms: Mapping[str, Arm], stack: ExitStack, *, inline: bool) -> dict[str, Worker]:
    """Start all arms at once; the stack ends them."""
    return {name: stack.enter_context(Worker(arm, inline=inline)) for name, arm in arms.items()}


def interleave(arms: Mapping[str, Arm], *, rounds: int, seconds: float, inline: bool = False) -> dict[str, Measured]:
    """Measure every arm once a round, in turn.

    Args:
        arms: by name.
        rounds: how often each is measured.
        seconds: at least so long a slice.
        inline: for tests, see `Worker`.
    """
    with ExitStack() as stack:
        workers = start(arms, stack, inline=inline)
        infos = {name: worker.wait_until_ready() for name, worker in workers.items()}
        warm_ups = {name: worker.warm_up() for name, worker in workers.items()}
        slices: dict[str, list[Slice]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, worker in workers.items():
                slices[name].append(worker.run(seconds))
    return {name: Measured(slices[name], warm_ups[name], infos[name] | warm_ups[name].told) for name in arms}


def fastest(arms: Mapping[str, Arm], *, seconds: float, inline: bool = False) -> str:
    """Return the name of the arm with the least time per item in a short interleaved trial."""
    if len(arms) == 1:
        return next(iter(arms))
    trial = interleave(arms, rounds=2, seconds=seconds, inline=inline)
    return min(trial, key=lambda name: trial[name].seconds_per_item.median)
