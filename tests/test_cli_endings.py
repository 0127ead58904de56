"""How the command line ends: signals, streams that fail, memory and disks that are full, bugs of our own."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tailscope import cli
from tailscope.cli import Output
from tailscope.errors import UserError, expanded
from tailscope.progress import Bars, Lines, shown_on

SUBSET = ("subset", "--data", "digits", "--profile", "exp:5")
PRINTED = "import sys; from tailscope.cli import main; sys.argv = ['tailscope', 'methods', '--json']; main()"


@pytest.fixture
def ended_by(tailscope_, monkeypatch):
    """Run `methods` with something in place of what it does; return code, out and err."""

    def run(action):
        monkeypatch.setattr(
            "tailscope.verbs.training.REGISTRIES", SimpleNamespace(items=lambda: (action() and []) or [])
        )
        return tailscope_("methods", "--json")

    return run


def raising(error):
    def action():
        raise error

    return action


class OutOfMemoryError(RuntimeError):
    """Has the name of PyTorch's own."""


MACHINE = {
    "numpy": (MemoryError("Unable to allocate 7.28 TiB"), "out of memory (Unable to allocate 7.28 TiB)"),
    "no message": (MemoryError(), "out of memory (no details)"),
    "a GPU": (OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "out of memory (CUDA out of memory."),
    "PyTorch on a CPU": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    "a file": (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
    "a name in bytes": (OSError(errno.EIO, "Input/output error", b"/x/\xff\x1b"), "Input/output error"),
    "an error without words": (OSError(), "OSError"),
}


@pytest.mark.parametrize(("error", "says"), MACHINE.values(), ids=MACHINE)
def test_faults_of_the_machine_are_one_line(ended_by, error, says):
    ended = ended_by(raising(error))
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"error: [^\n\x1b]+\n", ended.err)
    assert says in ended.err


def test_memory_that_is_really_short_is_told_as_such(ended_by):
    import torch

    ended = ended_by(lambda: torch.empty(1 << 50, dtype=torch.uint8))
    assert (ended.code, ended.err.startswith("error: out of memory (")) == (2, True)


@pytest.mark.parametrize("error", [TypeError("no\nway"), KeyError("x"), RecursionError(), AssertionError()])
def test_a_bug_is_one_line_that_says_so_and_a_variable_shows_its_traceback(ended_by, monkeypatch, error):
    ended = ended_by(raising(error))
    assert (ended.code, ended.out) == (1, "")
    assert re.fullmatch(r"error: this is a bug in tailscope: [^\n]+\n", ended.err)
    assert type(error).__name__ in ended.err
    assert "test_cli_endings.py line" in ended.err
    monkeypatch.setenv(cli.DEBUG, "1")
    shown = ended_by(raising(error)).err
    assert shown.startswith("Traceback")
    assert shown.endswith(ended.err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_verb_as_ctrl_c_does(ended_by, number):
    before = [signal.getsignal(n) for n in cli.SIGNALS]
    cleaned, after = [], []

    def action():
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)
            after.extend(signal.getsignal(n) for n in cli.SIGNALS)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this one under nohup
    ended = ended_by(action)
    assert (ended.code, ended.out) == (128 + number, "")
    assert ended.err.strip() == "interrupted; the same command keeps what is finished and does the rest"
    assert cleaned == [True]
    assert after == [signal.SIG_DFL] * len(cli.SIGNALS)  # a second one ends at once
    for number, handler in ((signal.SIGINT, before[0]), (signal.SIGHUP, before[2])):
        signal.signal(number, handler)
    assert [signal.getsignal(n) for n in cli.SIGNALS] == before


def test_workers_that_the_signal_ended_too_are_no_bug(ended_by):
    def action():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.") from None

    ended = ended_by(action)
    assert (ended.code, ended.err.strip().startswith("interrupted")) == (143, True)


def test_a_signal_that_is_ignored_stays_so(ended_by):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended_by(lambda: signal.raise_signal(signal.SIGHUP)).code == 0  # as under nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_leaves_the_signals_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tailscope", "--version"])
    ended = []

    def run():
        try:
            cli.main()
        except SystemExit as end:
            ended.append(end.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [0]


class Failing(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EPIPE, 141), (errno.EBADF, 1), (errno.EIO, 1)])
def test_results_are_written_where_nobody_reads_standard_output(tailscope_, monkeypatch, tmp_path, number, code):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Failing(number))
        ended = tailscope_(*SUBSET, "--out", tmp_path, "--json")
    assert ended.code == code
    said = f"error: standard output cannot be written ({os.strerror(number)}); files are complete\n"
    assert ended.err == ("" if number == errno.EPIPE else said)
    assert json.loads((tmp_path / "subset.json").read_text())["schema"] == "tailscope.subset/1"


def test_standard_error_that_cannot_be_written_changes_nothing(tailscope_, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Failing(errno.EIO))
        assert tailscope_("swap").code == 2
        assert tailscope_(*SUBSET).code == 0
        patched.setattr(sys, "stderr", None)  # as `2>&-` leaves it
        assert tailscope_("swap").code == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_the_interpreter_has_nothing_to_add_when_a_stream_fails():
    with Path("/dev/full").open("w") as nowhere:
        full = subprocess.run([sys.executable, "-c", PRINTED], stdout=nowhere, stderr=subprocess.PIPE, text=True)
    assert full.returncode == 1
    assert full.stderr == "error: standard output cannot be written (No space left on device); files are complete\n"
    reading, writing = os.pipe()
    os.close(reading)
    broken = subprocess.run([sys.executable, "-c", PRINTED], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (broken.returncode, broken.stderr) == (141, "")
    command = f'"{sys.executable}" -c "{PRINTED}" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command]).returncode == 0


def test_an_output_passes_on_what_works():
    stream = io.StringIO()
    output = Output(stream)
    print("text", file=output)
    assert (stream.getvalue(), output.isatty(), output.exit_code(output)) == ("text\n", False, 0)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_line_a_minute_says_what_how_much_how_fast_and_how_long():
    told, clock = [], Clock()
    lines = Lines(told.append, clock)
    with lines.task("features of \x1b[2J\u202ecaf\u00e9", 4000, done=1000) as advance:
        for _ in range(30):
            clock.now += 10
            advance(50)
    assert told == [
        f"[{n} min] features of \ufffd[2J\ufffdcaf\u00e9: {1000 + 300 * n:,} of 4,000, 5/s, about {10 - n} min left"
        for n in range(1, 6)
    ]
    lines.note("not in a log")
    clock.now += 1000
    lines.safe_point()  # nothing is going on
    assert len(told) == 5


def test_lines_of_slow_and_nested_work():
    told, clock = [], Clock()
    lines = Lines(told.append, clock)
    with lines.task("epochs", 10) as outer, lines.task("waiting for another run", 1):
        clock.now += 61
        lines.safe_point()
        outer(1)
        clock.now += 3600
        outer(1)
    with lines.task("slow", 100) as advance:
        clock.now += 600
        advance(1)
    assert told == [
        "[1 min] waiting for another run: 0 of 1",
        "[1 h 1 min] waiting for another run: 0 of 1",
        "[1 h 11 min] slow: 1 of 100, 10 min each, about 16 h 30 min left",
    ]


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("out", "err"), [(Screen, Screen), (Screen, io.StringIO), (io.StringIO, Screen)])
def test_bars_go_to_the_terminal_there_is(monkeypatch, out, err):
    out, err = out(), err()
    monkeypatch.setattr(sys, "stderr", err)
    chosen = shown_on(Console(file=out))
    assert isinstance(chosen, Bars)
    assert chosen.console.file is (out if isinstance(out, Screen) else err)


def test_lines_go_to_standard_error_where_there_is_no_terminal(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(Lines, "EVERY", 0)
    with shown_on(Console(file=out)) as progress, progress.task("work", 3) as advance:
        assert isinstance(progress, Lines)
        advance(1)
    assert (out.getvalue(), err.getvalue().startswith("[1 min] work: 1 of 3")) == ("", True)


@pytest.mark.parametrize("path", ["~no-such-user", "~no-such-user/x.npz"])
def test_a_home_that_nobody_has_is_one_line(path, tailscope_, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no home folder is known for ~no-such-user"):
        expanded(path)
    sources = [f"folder:{path}", f"list:{path}", "x", path if path.endswith("npz") else "x"]
    for source in sources:
        assert tailscope_("subset", "--data", source).code == 2
    assert tailscope_(*SUBSET, "--profile", f"{path}.json").code == 2
    assert tailscope_("subset", "--data", "cifar10", "--data-root", path).code == 2
    assert expanded("~") == Path.home()
    (tmp_path / "~x").mkdir()
    assert expanded("~x/a.npz") == Path("~x/a.npz")  # a name like any other


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "deep", "infinite", "many digits", "nan", "utf-16"])
def test_json_files_that_are_none_are_one_line(tailscope_, tmp_path, kind):
    path = tmp_path / "counts.json"
    written = {
        "deep": "[" * 100_000,
        "infinite": "[1e999]",
        "many digits": f"[{'9' * 400}]",
        "nan": "[NaN]",
    }
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "utf-16":
        path.write_text("[1]", encoding="utf-16")
    else:
        path.write_text(written[kind])
    ended = tailscope_("subset", "--data", "digits", "--profile", path)
    assert ended.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", ended.err)
    assert str(path) in ended.err


HOSTILE = "a\x1b[2J\u202e\udce9b"


def test_a_strangers_store_cannot_steer_the_terminal(tailscope_, tmp_path):
    for kind, key in ((HOSTILE, "0" * 32), ("stage1", HOSTILE)):
        entry = tmp_path / kind / key
        entry.mkdir(parents=True)
        (entry / "meta.json").write_text(json.dumps({HOSTILE: HOSTILE, "spec": {"model": HOSTILE}}))
        (entry / "tensors.safetensors").write_text("none")
        (entry / "DONE").touch()
    for verb in (("list",), ("verify",), ("prune", "--damaged", "--dry-run"), ("list", "--json"), ("verify", "--json")):
        ended = tailscope_("store", *verb, "--store", tmp_path)
        assert ended.code in (0, 1), ended.err
        assert "a" in ended.out
        for sign in "\x1b\u202e":
            assert sign not in ended.out + ended.err


def test_what_a_verb_tells_cannot_steer_the_terminal(tailscope_, monkeypatch, tmp_path):
    from tailscope.reproduce import reproduce

    monkeypatch.setattr(
        reproduce, "run_reproduce", lambda *_, tell, **__: tell(f"  {HOSTILE} [bold]") or {"label": "", "plan": {}}
    )
    ended = tailscope_("reproduce", "table1", "--plan", "--out", tmp_path)
    assert (ended.code, ended.out) == (0, "  a\ufffd[2J\ufffd\ufffdb [bold]\n")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"indices": [[1' + "0" * 40 + "]]}", '{"indices": [[NaN]]}', "[]"])
def test_a_subset_file_that_is_none_is_one_line(tailscope_, tmp_path, text):
    (tmp_path / "subset.json").write_text(text)
    data = ("--model", "resnet32", "--data", "digits", "--split", "train", "--out", tmp_path / "f.npz")
    ended = tailscope_("features", *data, "--subset", tmp_path / "subset.json")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"--subset {tmp_path / 'subset.json'}: " in ended.err
