"""Runs of the command line in forked processes, which start in no time: this one has imported everything.

The parent itself never computes anything, for PyTorch's threads do not survive a fork.
"""

import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailscope import cli, progress, report, verbs
from tailscope.diagnosis import outcomes, verdict
from tailscope.encoders import extract
from tailscope.experiments import plans
from tailscope.progress import Quiet
from tailscope.reproduce import queue

IMPORTED = (outcomes, queue, extract, verdict, plans)
"""What the verbs import when they are called."""

PATIENCE = 300.0
"""Seconds after which a process hangs."""
UNCAUGHT = 70
Prepare = Callable[[], object]


@dataclass
class Task:
    """A piece of work that a run told about: of `total` images `before` were there, and `done` more were done.

    `starts` says how many were done when each epoch began.
    """

    description: str
    total: int
    before: int
    done: int = 0
    starts: list[int] = field(default_factory=list)


@dataclass
class Ended:
    """How a run ended: exit code (minus the signal that killed it), what it printed and what it told."""

    code: int
    out: str
    err: str
    seconds: float
    tasks: list[Task] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """How many stages were trained and stored."""
        return sum(note.startswith("done: ") for note in self.notes)


class Recorder(Quiet):
    """Progress that is on disk when the process is killed."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _tell(self, kind: str, **values: object) -> None:
        os.write(self._descriptor, (json.dumps([kind, values]) + "\n").encode())

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        self._tell("task", description=description, total=total, before=done)
        yield lambda items: self._tell("advance", items=items)

    def note(self, text: str) -> None:
        self._tell("note", text=text)

    def safe_point(self) -> None:
        self._tell("safe point")


class Running:
    """A forked process."""

    def __init__(self, folder: Path, work: Callable[[], int], prepare: Prepare = lambda: None) -> None:
        folder.mkdir(parents=True)
        self._folder, self._started = folder, time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            _child(folder, work, prepare)

    def end(self, kill_after: float | None = None, number: int = signal.SIGKILL) -> Ended:
        """Wait for the process, with a signal after some seconds if it runs that long."""
        status = self._wait(PATIENCE if kill_after is None else kill_after)
        if status is None:
            os.kill(self._pid, signal.SIGKILL if kill_after is None else number)
            status = self._wait(PATIENCE)
        assert status is not None, "the process hangs"
        out, err = (self._read(name) for name in ("out", "err"))
        ended = Ended(os.waitstatus_to_exitcode(status), out, err, time.monotonic() - self._started)
        for line in self._read("log").splitlines():
            _take_in(ended, line)
        return ended

    def _wait(self, seconds: float) -> int | None:
        """Return the status; None where the process runs on. A look every few milliseconds."""
        end = self._started + seconds if seconds < PATIENCE else time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return status
            if time.monotonic() >= end:
                return None
            time.sleep(0.002)

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(errors="replace") if path.exists() else ""


def _take_in(ended: Ended, line: str) -> None:
    kind, values = json.loads(line)
    if kind == "task":
        ended.tasks.append(Task(**values))
    elif kind == "advance":
        ended.tasks[-1].done += values["items"]
    elif kind == "safe point":
        if ended.tasks:
            ended.tasks[-1].starts.append(ended.tasks[-1].done)
    else:
        ended.notes.append(values["text"])


def _child(folder: Path, work: Callable[[], int], prepare: Prepare) -> None:
    """Do the work with streams and progress of its own, and end without what the parent would do at its end."""
    code = UNCAUGHT
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        recorder = Recorder(folder / "log")

        @contextmanager
        def shown_on(_: object) -> Iterator[Recorder]:
            yield recorder

        progress.shown_on = verbs.shown_on = plans.shown_on = shown_on
        report.build = lambda out, **_: Path(out)  # which takes ten times as long as all the rest
        prepare()
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


class Forks:
    """Starts runs, each with a folder of its own for what it prints."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0

    def start(self, *arguments: object, prepare: Prepare = lambda: None) -> Running:
        """Start the command line."""

        def work() -> int:
            sys.argv = ["tailscope", *map(str, arguments)]
            try:
                cli.main()
            except SystemExit as end:
                return int(end.code or 0)
            return 0

        return self._running(work, prepare)

    def run(self, *arguments: object, prepare: Prepare = lambda: None) -> Ended:
        """Run the command line to its end."""
        return self.start(*arguments, prepare=prepare).end()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function returns in a process of its own, as JSON keeps it."""
        result = self._folder / f"result-{self._number}.json"

        def work() -> int:
            result.write_text(json.dumps(function(*arguments)))
            return 0

        ended = self._running(work, lambda: None).end()
        assert ended.code == 0, ended.err
        return json.loads(result.read_text())

    def _running(self, work: Callable[[], int], prepare: Prepare) -> Running:
        self._number += 1
        return Running(self._folder / f"run-{self._number}", work, prepare)
