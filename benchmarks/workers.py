"""Arms of a comparison, in long-lived processes that work one slice at a time.

An arm is a function `arm(pace, **settings)`, named "module:function", written as an ordinary loop that calls
`pace.step()` after each step. Inside a slice that call returns at once; at a slice's end it reports to the parent and
blocks until the next slice. So a library's own training loop can be measured in slices without changing it.
"""

import contextlib
import importlib
import multiprocessing
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

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
