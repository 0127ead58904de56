"""The store: an entry is all there or absent, computed once, never pickled, and damage is one line."""

import _thread
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from tailscope.errors import UserError
from tailscope.progress import Deadline, Quiet, TimeIsUp
from tailscope.store import Damaged, Store, make_folder
from tailscope.store import entries as store_entries
from tailscope.store import files as store_files
from tailscope.store.files import load_checkpoint, load_tensors, save_tensors, write_json

TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "rows": torch.arange(5),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "channels last": torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
    "view": torch.arange(10)[::2],
}
META = {"losses": [1.0, 0.5], "name": "caf\u00e9 \U0001f600 <script>", "none": None}


def made(_: Path):
    return TENSORS, META


def never(_: Path):
    raise AssertionError("computed again")


def assert_complete(store: Store, kind: str = "stage1", key: str = "k") -> None:
    artifact = store.read(kind, key)
    assert artifact.meta == META
    assert artifact.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert artifact.tensors[name].dtype == tensor.dtype
        assert torch.equal(artifact.tensors[name], tensor)


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_an_entry_is_computed_once_and_read_back_as_it_was(tmp_path):
    store = Store(tmp_path / "a" / "b \u00fc \U0001f600")
    assert not store.has("stage1", "k")
    fresh, found = store.get_or_make("stage1", "k", made)
    assert not found
    assert torch.equal(fresh.tensors["weights"], TENSORS["weights"])
    recalled, found = store.get_or_make("stage1", "k", never)
    assert found
    assert recalled.meta == META
    assert_complete(Store(store.root))
    assert not store.has("stage2", "k")
    entry = {f"stage1/k/{name}" for name in ("tensors.safetensors", "meta.json", "DONE")}
    assert files(store.root) == entry | {"locks/stage1-k.lock"}


def test_nothing_is_pickled(tmp_path):
    store = Store(tmp_path)
    store.get_or_make("stage1", "k", made)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
                pickle.loads(path.read_bytes())
    json.loads((tmp_path / "stage1/k/meta.json").read_text())


def test_a_pickle_in_the_place_of_tensors_is_not_executed(tmp_path):
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (ran,))

    store = Store(tmp_path / "store")
    store.get_or_make("stage1", "k", made)
    torch.save(Hostile(), store.root / "stage1/k/tensors.safetensors")
    with pytest.raises(UserError):
        store.read("stage1", "k")
    assert not ran.exists()


def test_without_done_an_entry_is_absent_and_made_anew(tmp_path):
    store = Store(tmp_path)
    store.get_or_make("stage1", "k", made)
    (tmp_path / "stage1/k/DONE").unlink()
    (tmp_path / "stage1/k/tensors.safetensors").write_bytes(b"half")
    assert not store.has("stage1", "k")
    _, found = store.get_or_make("stage1", "k", made)
    assert not found
    assert_complete(store)


def test_scratch_outlives_a_failure_and_not_a_success(tmp_path):
    store = Store(tmp_path)

    def fails(scratch: Path):
        (scratch / "checkpoint").write_text("epoch 3")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("stage1", "k", fails)
    assert not store.has("stage1", "k")

    def resumes(scratch: Path):
        assert (scratch / "checkpoint").read_text() == "epoch 3"
        return TENSORS, META

    store.get_or_make("stage1", "k", resumes)
    assert_complete(store)
    assert not any((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    "broken", [{"meta": {1, 2}}, {"meta": {"x": object()}}, {"tensors": {"a": 3}}], ids=["set", "object", "number"]
)
def test_what_cannot_be_written_leaves_no_entry(tmp_path, broken):
    store = Store(tmp_path)
    tensors, meta = broken.get("tensors", TENSORS), broken.get("meta", META)
    with pytest.raises((TypeError, AttributeError)):
        store.get_or_make("stage1", "k", lambda _: (tensors, meta))
    assert not store.has("stage1", "k")
    store.get_or_make("stage1", "k", made)
    assert_complete(store)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error:\n full")], ids=repr
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, error):
    store = Store(tmp_path)

    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise error

    def full_text(path, text):
        with path.open("w") as file:
            file.write(text[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_files, "save_file", full)
        patch.setattr(Path, "write_text", full_text)
        for attempt in (
            lambda: store.get_or_make("stage1", "k", made),
            lambda: save_tensors(tmp_path / "checkpoint", TENSORS, META),
            lambda: write_json(tmp_path / "swap.json", META),
        ):
            with pytest.raises(UserError, match=r"cannot be written.*free space") as raised:
                attempt()
            assert "\n" not in str(raised.value)
    assert not store.has("stage1", "k")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
    store.get_or_make("stage1", "k", made)
    assert_complete(store)


DAMAGE = {
    "tensors truncated": ("tensors.safetensors", lambda old: old[: len(old) // 2]),
    "tensors empty": ("tensors.safetensors", lambda old: b""),
    "tensors overwritten": ("tensors.safetensors", lambda old: b"\xff" * len(old)),
    "tensors missing": ("tensors.safetensors", None),
    "meta truncated": ("meta.json", lambda old: old[: len(old) // 2]),
    "meta empty": ("meta.json", lambda old: b""),
    "meta no utf-8": ("meta.json", lambda old: b"\xff\xfe\xfa"),
    "meta no object": ("meta.json", lambda old: b"[1, 2]"),
    "meta missing": ("meta.json", None),
    "digests truncated": ("DONE", lambda old: old[: len(old) // 2]),
    "digests swapped": ("DONE", lambda old: b"\n".join(old.splitlines()[::-1]) + b"\n\n"),
    "digests no text": ("DONE", lambda old: b"\xff\n"),
    "digests of more": ("DONE", lambda old: old + old.splitlines()[0][:64] + b"  more\n"),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_named_and_made_again(tmp_path, caplog, name, damage):
    store = Store(tmp_path)
    store.get_or_make("stage1", "k", made)
    path = tmp_path / "stage1" / "k" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Damaged) as raised:
        store.read("stage1", "k")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)

    def fails(_: Path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("stage1", "k", fails)
    assert store.has("stage1", "k")  # it stays until the new one is whole
    caplog.clear()
    assert store.get_or_make("stage1", "k", made)[1] is False
    assert [record.getMessage() for record in caplog.records] == [f"{raised.value}; it is made again"]
    assert_complete(store)
    assert store.get_or_make("stage1", "k", never)[1] is True
    assert not any((tmp_path / "scratch").iterdir())


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from test_store import META, TENSORS
from tailscope.store import Store, files

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def killed_at(moment, store):
    if moment == "tensors":
        real = files.save_file
        def half(tensors, path, **options):
            real(tensors, path, **options)
            os.truncate(path, path.stat().st_size // 2)
            die()
        files.save_file = half
    elif moment == "meta":
        Path.write_text = die
    elif moment == "done":
        real_write = Path.write_text
        Path.write_text = lambda path, *a, **k: die() if path.name == "DONE" else real_write(path, *a, **k)
    elif moment == "rename":
        Path.rename = die
    store.get_or_make("stage1", "k", lambda scratch: (scratch.joinpath("checkpoint").touch(), (TENSORS, META))[1])

root = Path(sys.argv[1])
for moment in ("tensors", "meta", "done", "rename"):
    child = os.fork()  # one import of PyTorch for all of them
    if child == 0:
        killed_at(moment, Store(root / moment))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
"""


def test_a_kill_at_any_moment_of_the_writing_leaves_no_entry(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], env=environment, check=True)
    for moment in ("tensors", "meta", "done", "rename"):
        store = Store(tmp_path / moment)
        assert not store.has("stage1", "k"), moment
        assert not (store.root / "stage1" / "k").exists(), moment

        def make(scratch: Path):
            assert (scratch / "checkpoint").is_file()  # what training would resume from
            return TENSORS, META

        store.get_or_make("stage1", "k", make)
        assert_complete(store)
        assert not any((store.root / "scratch").iterdir()), moment


def test_two_that_ask_at_once_compute_once(tmp_path):
    """Threads with a store of their own contend for the lock just as processes do: each opens the lock's file."""
    computed, results = [], []
    barrier = threading.Barrier(4)

    def slow(_: Path):
        computed.append(1)
        time.sleep(0.2)
        return TENSORS, META

    def ask():
        store = Store(tmp_path)
        barrier.wait()
        results.append(store.get_or_make("stage1", "k", slow)[1])

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(computed) == 1
    assert sorted(results) == [False, True, True, True]
    assert_complete(Store(tmp_path))


@pytest.fixture
def held(tmp_path, monkeypatch):
    """The lock of an entry, held as by another run."""
    monkeypatch.setattr(store_entries, "STEP", 0.01)
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "stage1-k.lock") as lock:
        yield lock


class Listening(Quiet):
    """Does something at every safe point, told how many there were before; lists the tasks."""

    def __init__(self, act):
        self.act, self.calls, self.tasks = act, 0, []

    @contextmanager
    def task(self, description, total, done=0):
        self.tasks.append(description)
        yield lambda items: None

    def safe_point(self):
        self.act(self.calls)
        self.calls += 1


def test_waiting_for_another_run_is_told_once_and_ends_when_that_run_does(tmp_path, held, caplog):
    waiting = Listening(lambda calls: held.release() if calls == 5 else None)
    assert Store(tmp_path).get_or_make("stage1", "k", made, waiting)[1] is False
    assert waiting.calls > 5
    assert waiting.tasks == ["waiting for another run"]
    assert [record.getMessage() for record in caplog.records] == [
        f"another run is working on {tmp_path / 'stage1' / 'k'}; waiting for it"
    ]
    again = Listening(never)
    assert Store(tmp_path).get_or_make("stage1", "k", never, again)[1] is True
    assert len(caplog.records) == 1
    assert_complete(Store(tmp_path))


def test_waiting_ends_when_the_time_is_up(tmp_path, held):
    clock = iter(range(100, 1000))  # a second passes between any two looks at it
    with pytest.raises(TimeIsUp):
        Store(tmp_path).get_or_make("stage1", "k", never, Deadline(Quiet(), 20, lambda: next(clock)))
    assert 110 < next(clock) < 125
    held.release()
    assert Store(tmp_path).get_or_make("stage1", "k", made)[1] is False  # whoever gave up holds nothing


def test_waiting_is_interrupted_by_ctrl_c(tmp_path, held):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    threading.Timer(0.1, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get_or_make("stage1", "k", never)
    signal.signal(signal.SIGINT, before)


def test_different_keys_do_not_wait_for_each_other(tmp_path):
    store = Store(tmp_path)
    done = []

    def outer(_: Path):
        helper = threading.Thread(target=lambda: done.append(Store(tmp_path).get_or_make("stage1", "other", made)))
        helper.start()
        helper.join(timeout=20)
        assert done
        return TENSORS, META

    store.get_or_make("stage1", "k", outer)


def test_the_second_computes_when_the_first_fails(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        store.get_or_make("stage1", "k", lambda _: 1 / 0)
    assert store.get_or_make("stage1", "k", made)[1] is False


@given(st.dictionaries(st.text(max_size=10), st.text(max_size=10) | st.floats(-1e9, 1e9) | st.none()))
def test_checkpoints_keep_tensors_and_meta(tmp_path_factory, meta):
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    save_tensors(path, TENSORS, {"older": 1})
    save_tensors(path, {"a": TENSORS["channels last"]}, meta)
    read = load_checkpoint(path)
    assert read.meta == meta
    assert torch.equal(read.tensors["a"], TENSORS["channels last"])
    assert {p.name for p in path.parent.iterdir()} == {"checkpoint.safetensors", "checkpoint.safetensors.previous"}
    assert load_checkpoint(store_files.previous_of(path)).meta == {"older": 1}


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_tensors(path, TENSORS, META)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors.*delete"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="none"):
        load_tensors(tmp_path / "none.safetensors")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "swap.json"
    write_json(path, {"a": "é\u2028<"})
    for undefined in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": undefined})
    assert json.loads(path.read_text()) == {"a": "é\u2028<"}
    assert path.read_bytes().isascii()
    assert [p.name for p in tmp_path.iterdir()] == ["swap.json"]


def test_a_folder_that_cannot_be_written_is_named_with_its_option(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/nothing/here")):
        with pytest.raises(UserError) as raised:
            make_folder(path, "--out")
        assert str(raised.value).startswith(f"--out {path}: cannot be written (")
        assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(UserError, match="--store"):
            Store(path)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")  # noqa: PTH102
    for path in (tmp_path / "\udcff", tmp_path / "\udcff" / "new"):
        with pytest.raises(UserError, match="its name is no UTF-8"):
            Store(path)
