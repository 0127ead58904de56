"""Every stored byte is checked: flipped bits, torn files, disks that refuse, and stores of somebody else."""

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import SoftFileLock
from safetensors.torch import save_file

from tailscope.encoders.extract import Shards
from tailscope.errors import UserError
from tailscope.networks import norm_act
from tailscope.store import Damaged, Store
from tailscope.store import entries as store_entries
from tailscope.store import files as store_files
from tailscope.store.files import CHECKPOINT, check_tensors, load_checkpoint, load_header, save_tensors
from test_store import META, TENSORS, assert_complete, files, made, never

FLIPS = 120
"""Flipped bits of each file; there are five kinds of files."""


def flipped(path: Path, seed: int):
    """Yield once for each of some random bits of a file, while that bit is flipped."""
    whole, stream = path.read_bytes(), random.Random(seed)
    for _ in range(FLIPS):
        bit = stream.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield bit
    path.write_bytes(whole)


def same(tensors, meta) -> bool:
    return (
        meta == META
        and tensors.keys() == TENSORS.keys()
        and all(tensors[name].dtype == t.dtype and torch.equal(tensors[name], t) for name, t in TENSORS.items())
    )


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json", "DONE"])
def test_no_flipped_bit_of_an_entry_is_silent(tmp_path, name):
    store = Store(tmp_path)
    store.get_or_make("stage1", "k", made)
    noticed = 0
    for bit in flipped(tmp_path / "stage1" / "k" / name, seed=1):
        try:
            artifact = store.read("stage1", "k")
        except Damaged:
            noticed += 1
        else:
            assert same(artifact.tensors, artifact.meta), bit
    assert noticed == FLIPS
    assert_complete(store)


def test_no_flipped_bit_of_a_checkpoint_is_silent(tmp_path):
    path = tmp_path / CHECKPOINT
    save_tensors(path, TENSORS, META)
    noticed = 0
    for bit in flipped(path, seed=2):
        try:
            artifact = load_checkpoint(path)
        except Damaged:
            noticed += 1
        else:  # in the name of the digest's own field: nothing that counts is another
            assert same(artifact.tensors, artifact.meta), bit
    assert noticed > 0.95 * FLIPS
    assert check_tensors(path)


def test_no_flipped_bit_of_a_shard_is_silent(tmp_path, caplog):
    features, rows = torch.randn(8, 5), torch.arange(8)
    shards = Shards(tmp_path / "f.npz", 8)
    path = shards.folder / "000000000.safetensors"
    with shards.opened({"images": "a"}):
        shards.write(0, features, rows, [])
        for bit in flipped(path, seed=3):
            caplog.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
                shards_again = Shards(tmp_path / "f.npz", 8)
                shards_again._remove_damaged()
            if 0 in shards_again.starts:
                read = shards_again.read(0)
                assert torch.equal(read[0], features), bit
                assert torch.equal(read[1], rows), bit
            else:
                assert "its images are extracted again" in caplog.text
        with path.open("r+b") as file:  # damaged after the check
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        with pytest.raises(UserError, match="run the same command again"):
            shards.read(0)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096])
def test_what_a_power_cut_leaves_is_noticed(tmp_path, content):
    store = Store(tmp_path)
    for name in ("tensors.safetensors", "meta.json"):
        store.get_or_make("stage1", "k", made)
        (tmp_path / "stage1" / "k" / name).write_bytes(content)
        assert store.get_or_make("stage1", "k", made)[1] is False
    for size in (0, 4096):
        with (tmp_path / "c.safetensors").open("wb") as file:
            file.truncate(size)
        with pytest.raises(Damaged):
            load_checkpoint(tmp_path / "c.safetensors")


def without_digests(path: Path) -> None:
    """Turn a checkpoint into one of before."""
    saved = load_checkpoint(path)
    save_file(saved.tensors, path, metadata={"meta": json.dumps(saved.meta)})


def test_what_was_written_before_digests_is_read_and_gets_them(tmp_path):
    store = Store(tmp_path)
    store.get_or_make("stage1", "k", made)
    done = tmp_path / "stage1" / "k" / "DONE"
    digests = done.read_text()
    done.write_bytes(b"")
    assert store.digests("stage1", "k") is None
    assert store.get_or_make("stage1", "k", never)[1] is True
    assert done.read_text() == digests
    assert files(tmp_path / "stage1") == {f"k/{name}" for name in ("tensors.safetensors", "meta.json", "DONE")}
    save_tensors(tmp_path / "c", TENSORS, META)
    without_digests(tmp_path / "c")
    assert check_tensors(tmp_path / "c") is False
    assert same(load_checkpoint(tmp_path / "c").tensors, load_header(tmp_path / "c"))
    done.write_bytes(b"")
    path = tmp_path / "stage1" / "k" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])  # even these are known to be cut off
    with pytest.raises(Damaged):
        store.read("stage1", "k")
    assert done.read_bytes() == b""


@pytest.mark.parametrize("meanwhile", ["nothing", "locked", "no locks"])
def test_digests_are_added_where_nobody_holds_the_entry(tmp_path, monkeypatch, meanwhile):
    store = Store(tmp_path)
    store.get_or_make("stage1", "k", made)
    done = tmp_path / "stage1" / "k" / "DONE"
    done.write_bytes(b"")
    if meanwhile == "no locks":
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    if meanwhile == "locked":  # by the reader itself, which must not wait for itself
        with store.held("stage1", "k") as ours:
            assert ours
            store.read("stage1", "k")
    else:
        store.read("stage1", "k")
    assert (done.read_bytes() != b"") == (meanwhile == "nothing")
    monkeypatch.undo()
    assert store.check("stage1", "k") == (meanwhile == "nothing")  # whole, whatever happened


def test_digests_are_those_of_sha256sum(tmp_path):
    store = Store(tmp_path)
    store.get_or_make("stage1", "k", made)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "-c", "DONE"], cwd=tmp_path / "stage1" / "k", check=True)


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", ["newest", "both", "newest missing", "only one"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, caplog, damaged):
    store = Store(tmp_path)
    scratch = tmp_path / "scratch" / "stage1-k"
    scratch.mkdir(parents=True)
    newest = scratch / CHECKPOINT
    for epoch in (1, 2):
        save_tensors(newest, TENSORS, {"epochs": epoch})
    before = store_files.previous_of(newest)
    if damaged == "only one":
        before.unlink()
    for path in (newest, before):
        if path.exists() and (path == newest or damaged == "both"):
            path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    if damaged == "newest missing":
        newest.unlink()
    expected = 1 if damaged.startswith("newest") else None
    planned = store.checkpoint("stage1", "k")
    assert planned == (expected and {"epochs": expected})
    seen = []

    def resumes(folder: Path):
        seen.append(load_checkpoint(folder / CHECKPOINT).meta["epochs"] if (folder / CHECKPOINT).is_file() else None)
        return TENSORS, META

    caplog.clear()
    store.get_or_make("stage1", "k", resumes)
    assert seen == [expected]
    if damaged == "newest missing":
        assert not caplog.records
    else:
        word = "the one before it is taken" if expected else "training starts again"
        assert f"{newest}: damaged (its bytes do not fit its digest); {word}" in caplog.text


def test_at_any_moment_one_of_two_checkpoints_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    """Whatever call comes last, what a power cut leaves (files that were synced) holds a whole checkpoint."""
    path, clock, synced = tmp_path / CHECKPOINT, [1e9], set()
    monkeypatch.setattr(store_files, "sync", lambda p: synced.add(p.stat().st_ino))
    monkeypatch.setattr(store_files.time, "time", lambda: clock[0])
    stat = Path.stat

    def with_fake_ctime(p, **options):  # of hard links: the time of the last `os.link`
        found = stat(p, **options)
        return os.stat_result((*found[:9], linked[0])) if p.name.endswith(".previous") else found

    link, linked = os.link, [0.0]
    monkeypatch.setattr(os, "link", lambda a, b: (link(a, b), linked.__setitem__(0, int(clock[0]))))
    monkeypatch.setattr(Path, "stat", with_fake_ctime)
    kept = []
    for epoch in range(1, 40):
        clock[0] += 1
        save_tensors(path, TENSORS, {"epochs": epoch})
        both = [p for p in (path, store_files.previous_of(path)) if p.exists()]
        durable = [load_checkpoint(p).meta["epochs"] for p in both if stat(p).st_ino in synced]
        assert durable
        assert max(durable) >= epoch - 6
        assert load_checkpoint(path).meta["epochs"] == epoch
        kept.append(len(both))
    assert kept == [1] + [2] * 38
    assert len(synced) < 39  # not every epoch waits for the disk


def test_a_file_system_without_hard_links_keeps_two_checkpoints_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in (1, 2):
        save_tensors(tmp_path / CHECKPOINT, TENSORS, {"epochs": epoch})
    assert load_checkpoint(store_files.previous_of(tmp_path / CHECKPOINT)).meta == {"epochs": 1}


# -- disks that refuse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "call", "code"),
    [
        (Path, "mkdir", errno.EIO),
        (Path, "mkdir", errno.ENOSPC),
        (Path, "rename", errno.EXDEV),
        (Path, "rename", errno.EACCES),
        (Path, "write_text", errno.EDQUOT),
        (os, "fsync", errno.EIO),
        (fcntl, "flock", errno.EIO),
    ],
    ids=str,
)
def test_a_call_that_fails_is_one_line_and_loses_no_checkpoint(tmp_path, monkeypatch, owner, call, code):
    store = Store(tmp_path)

    def made_with_checkpoint(scratch: Path):
        (scratch / "kept").touch()
        return TENSORS, META

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, refuse)
        with pytest.raises(UserError, match="cannot be written") as raised:
            store.get_or_make("stage1", "k", made_with_checkpoint)
    message = str(raised.value)
    assert os.strerror(code) in message
    assert "\n" not in message
    assert ("one disk" in message) == (code == errno.EXDEV)
    assert not store.has("stage1", "k")
    if call in ("rename", "fsync", "write_text"):
        assert (tmp_path / "scratch" / "stage1-k" / "kept").is_file()
    store.get_or_make("stage1", "k", made)
    assert_complete(store)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_a_file_has_to_do(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(store_entries, "STEP", 0.05)
    computed = []
    barrier = threading.Barrier(3)

    def ask():
        barrier.wait()
        Store(tmp_path).get_or_make("stage1", "k", slow)

    def slow(_: Path):
        computed.append(1)
        time.sleep(0.3)  # six looks of those that wait
        return TENSORS, META

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(timeout=60)
    assert computed == [1]
    assert_complete(Store(tmp_path))
    lock = tmp_path / "locks" / "stage1-k.softlock"
    assert caplog.text.count(f"{lock}: this disk has no locks") <= 2  # once for each that waits, not every STEP
    lock = lock.with_name("stage1-other.softlock")
    with SoftFileLock(lock), Store(tmp_path).held("stage1", "other") as ours:
        assert not ours
    assert f"{lock}: this disk has no locks but such files; delete it if no run is at work" in caplog.text


@pytest.mark.parametrize("meta", [{"losses": [1.0, float("nan")]}, {"a": {"b": [float("inf")]}}])
def test_no_description_holds_nan(tmp_path, meta):
    field = next(iter(meta))
    with pytest.raises(UserError, match=f"not stored, for its {field} holds NaN or infinity"):
        Store(tmp_path).get_or_make("stage1", "k", lambda _: (TENSORS, meta))
    with pytest.raises(UserError, match=field):
        save_tensors(tmp_path / "c", TENSORS, meta)
    assert not Store(tmp_path).has("stage1", "k")
    assert not (tmp_path / "c").exists()


# -- stores of somebody else ----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_files_get_the_mode_that_umask_gives(tmp_path):
    before = os.umask(0o002)
    try:
        store = Store(tmp_path / "store")
        store.get_or_make("stage1", "k", made)
        save_tensors(tmp_path / "store" / CHECKPOINT, TENSORS, META)
        for path in (tmp_path / "store").rglob("*"):
            assert oct(path.stat().st_mode & 0o777) == ("0o775" if path.is_dir() else "0o664"), path
    finally:
        os.umask(before)


STRANGER = """
import json, os, sys, tempfile
from pathlib import Path
from test_store import TENSORS, META, made, never
from tailscope.errors import UserError
from tailscope.store import Store, inventory, pack, prune, verify

warm = Path(tempfile.mkdtemp())  # nothing is imported after the rights are gone
Store(warm).get_or_make("stage1", "k", made)
pack(Store(warm), warm / "a.tar", [("stage1", "k")])
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
store, said = Store(Path(sys.argv[1])), {}
said["recalled"] = store.get_or_make("stage1", "k", never)[1]
said["listed"] = [(row.name, row.state) for row in inventory(store)]
said["verified"] = [(row.name, row.state) for row in verify(store)]
for name, work in {
    "pruned": lambda: prune(store, kinds=["stage2"]),
    "new": lambda: store.get_or_make("stage1", "new", made),
    "secret": lambda: store.get_or_make("stage1", "secret", made),
    "hidden": lambda: store.get_or_make("stage2", "hidden", made),
}.items():
    try:
        said[name] = work() and None
    except UserError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_store_that_may_be_read_and_not_written_serves_recalls():
    root = Path(tempfile.mkdtemp())
    try:
        store = Store(root)
        for kind, key in (("stage1", "k"), ("stage1", "old"), ("stage1", "secret"), ("stage2", "hidden")):
            store.get_or_make(kind, key, made)
        (root / "stage1/old/DONE").write_bytes(b"")
        (root / "scratch/stage1-c").mkdir()
        save_tensors(root / "scratch/stage1-c" / CHECKPOINT, TENSORS, {"epochs": 1})
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (root / "stage1/secret/tensors.safetensors").chmod(0)
        (root / "scratch/stage1-c" / CHECKPOINT).chmod(0)
        (root / "stage2").chmod(0)
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", STRANGER, str(root)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        said = json.loads(ran.stdout)
        assert said["recalled"] is True
        states = ["unreadable", "digests", "unverified", "unreadable"]
        names = ["stage2/", "stage1/k", "stage1/old", "stage1/secret", "stage1/c (checkpoint)"]
        assert said["listed"] == list(map(list, zip(names, [*states, "unreadable"], strict=True)))
        states[1] = "verified"
        assert said["verified"] == list(map(list, zip(names, [*states, "unreadable"], strict=True)))
        assert said["pruned"].startswith(f"{root}/stage2: may not be read")
        assert said["new"].startswith(f"{root}/stage1/new: cannot be written (Permission denied); ask for the right")
        assert said["secret"].startswith(
            f"{root}/stage1/secret/tensors.safetensors: may not be read (Permission denied)"
        )
        assert said["hidden"].startswith(f"{root}/stage2/hidden/DONE: may not be read (Permission denied)")
        (root / "stage2").chmod(0o755)
        (root / "stage1/secret/tensors.safetensors").chmod(0o644)
        assert_complete(store, key="secret")  # what may not be read is not thrown away
        assert_complete(store, "stage2", "hidden")
    finally:
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(root)


# -- compiled kernels -----------------------------------------------------------------------------------------------


def test_a_damaged_kernel_is_compiled_again(tmp_path, monkeypatch):
    compiled = []

    def compile_it(compiler, source, to):
        compiled.append(to)
        content = b"\x7fELF" + bytes(range(200))
        to.write_bytes(content + norm_act._digest(content))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(norm_act, "_compile", compile_it)
    monkeypatch.setattr(norm_act, "_share_openmp", lambda: None)
    monkeypatch.setattr(norm_act, "_fingerprint", lambda source, compiler: "f")
    monkeypatch.setattr(norm_act.ctypes, "CDLL", lambda path: Path(path).read_bytes())
    monkeypatch.setenv("CXX", sys.executable)
    whole = norm_act.library.__wrapped__()
    assert norm_act.library.__wrapped__() == whole
    assert len(compiled) == 1
    for count, bit in enumerate(flipped(compiled[0], seed=4), 2):
        assert norm_act.library.__wrapped__() == whole, bit
        assert len(compiled) == count
    for content in (b"", b"\x7fELF", whole[:-64], whole[:-1]):  # as before there were digests, or cut off
        compiled[0].write_bytes(content)
        assert norm_act.library.__wrapped__() == whole
