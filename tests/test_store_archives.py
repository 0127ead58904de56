"""Archives of a store: what one machine trained another recalls, and nothing hostile or damaged gets in."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from experiment_setups import EXPERIMENTS, entries, lab, settings, timeless
from tailscope.errors import UserError
from tailscope.store import Damaged, Store, add, pack, packed_bytes
from tailscope.store.files import CHECKPOINT, previous_of, save_tensors
from tailscope.training import loop
from test_store import META, TENSORS, assert_complete, files, made


def filled(root: Path) -> Store:
    """Return a store with three entries, one of before there were digests, and a checkpoint after epoch 2."""
    store = Store(root)
    for kind, key in (("stage1", "a"), ("stage1", "old"), ("stage2", "b")):
        store.get_or_make(kind, key, made)
    (root / "stage1" / "old" / "DONE").write_bytes(b"")
    save_checkpoint(store, "c", 2)
    return store


def save_checkpoint(store: Store, key: str, epochs: int) -> Path:
    scratch = store.scratch("stage1", key)
    scratch.mkdir(parents=True, exist_ok=True)
    save_tensors(scratch / CHECKPOINT, TENSORS, {"epochs": epochs})
    return scratch / CHECKPOINT


ENTRIES = [("stage2", "b"), ("stage1", "a"), ("stage1", "old")]
CHECKPOINTS = [("stage1", "c")]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    pack(filled(folder / "store"), folder / "stages.tar", ENTRIES, CHECKPOINTS)
    return folder / "stages.tar"


def contents(root: Path) -> dict[str, bytes]:
    """Return the files of a store without its locks."""
    return {name: (root / name).read_bytes() for name in files(root) if not name.startswith("locks/")}


# -- there and back -------------------------------------------------------------------------------------------------


def test_what_is_packed_is_added_elsewhere_as_it_was(tmp_path):
    store = filled(tmp_path / "from")
    expected = contents(store.root)
    assert pack(store, tmp_path / "a.tar", ENTRIES, CHECKPOINTS) == [tmp_path / "a.tar"]
    assert contents(store.root) == expected  # packing changes nothing
    other = Store(tmp_path / "to")
    done = add(other, tmp_path / "a.tar")
    assert done.added == ["stage1/a", "stage1/old", "stage2/b", "stage1/c (checkpoint)"]
    assert (done.equal, done.differing, done.replaced, done.busy, done.unneeded) == ([], [], [], [], [])
    for kind, key in ENTRIES:
        assert_complete(other, kind, key)
        assert other.digests(kind, key) == other.compute_digests(kind, key)
    expected["stage1/old/DONE"] = expected["stage1/a/DONE"]  # it has digests now
    assert contents(other.root) == expected
    again = add(other, tmp_path / "a.tar")
    assert again.equal == done.added[:3]
    assert again.unneeded == done.added[3:]
    assert contents(other.root) == expected


def test_an_archive_is_a_plain_tar_that_is_a_store_and_the_same_for_everybody(tmp_path, archive):
    store = filled(tmp_path / "store")
    for path in store.root.rglob("*"):
        os.utime(path, (1, 1))
    pack(store, tmp_path / "b.tar", ENTRIES, CHECKPOINTS)
    names = [f"{k}/{key}/{file}" for k, key in ENTRIES for file in ("tensors.safetensors", "meta.json", "DONE")]
    with tarfile.open(tmp_path / "b.tar", "r:") as tar:
        assert tar.getnames() == [*names, f"scratch/stage1-c/{CHECKPOINT}", "MANIFEST.json"]
        tar.extractall(tmp_path / "plain", filter="data")
    for kind, key in ENTRIES:
        assert_complete(Store(tmp_path / "plain"), kind, key)
    manifest = json.loads((tmp_path / "plain" / "MANIFEST.json").read_text())
    for name, stated in manifest["files"].items():
        content = (tmp_path / "plain" / name).read_bytes()
        assert stated == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with (
        tarfile.open(archive) as one,
        tarfile.open(tmp_path / "b.tar") as two,
    ):  # safetensors orders its header as it likes
        assert [(m.name, m.size, m.mtime, m.uid, m.mode) for m in one] == [
            (m.name, m.size, m.mtime, m.uid, m.mode) for m in two
        ]
    first = (tmp_path / "b.tar").read_bytes()
    pack(store, tmp_path / "b.tar", ENTRIES, CHECKPOINTS, overwrite=True)
    assert (tmp_path / "b.tar").read_bytes() == first


@hypothesis.settings(max_examples=20)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.integers(30_000, 60_000))
def test_parts_keep_to_the_limit_and_to_the_order(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("parts")
    store = Store(folder / "store")
    for number, size in enumerate(sizes):
        store.get_or_make("views", str(number), lambda _, n=size: ({"x": torch.zeros(n)}, {}))
    names = [("views", str(number)) for number in reversed(range(len(sizes)))]
    parts = pack(store, folder / "x.tar", names, limit=limit)
    assert max(part.stat().st_size for part in parts) <= limit
    assert [p.name for p in parts] == (["x.tar"] if len(parts) == 1 else [f"x-{n + 1}.tar" for n in range(len(parts))])
    packed = []
    for part in parts:
        with tarfile.open(part) as tar:
            packed += [tuple(m.name.split("/")[:2]) for m in tar if m.name.endswith("DONE")]
    assert packed == names
    assert len(add(Store(folder / "to"), *parts).added) == len(sizes)
    assert sum(packed_bytes(store, *name) for name in names) < sum(p.stat().st_size for p in parts) + 3 * 1024 * len(
        names
    )


@pytest.mark.parametrize(
    ("names", "checkpoints", "limit", "message"),
    [
        ([("stage1", "none")], [], None, "stage1/none.*damaged"),
        ([], [("stage1", "a")], None, "no checkpoint there"),
        ([("stage1", "a")], [], 12_500, r"stage1 a: takes [\d,]+ bytes, more than the limit of 12,500"),
    ],
)
def test_what_cannot_be_packed_is_said_and_leaves_no_file(tmp_path, names, checkpoints, limit, message):
    store = filled(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        pack(store, tmp_path / "a.tar", names, checkpoints, limit)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json", "DONE"])
def test_a_damaged_entry_is_not_packed(tmp_path, name):
    store = filled(tmp_path / "store")
    path = store.root / "stage1" / "a" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    with pytest.raises(Damaged, match=f"stage1/a/{name}"):
        pack(store, tmp_path / "a.tar", ENTRIES)
    assert not (tmp_path / "a.tar").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


# -- what is there already ------------------------------------------------------------------------------------------


def other_seconds(_: Path):
    return TENSORS, {**META, "seconds": 3.0}


def test_another_content_is_left_unless_replacing_is_asked_for(tmp_path, archive):
    store = Store(tmp_path)
    store.get_or_make("stage1", "a", other_seconds)
    done = add(store, archive)
    assert done.differing == ["stage1/a"]
    assert done.added == ["stage1/old", "stage2/b", "stage1/c (checkpoint)"]
    assert store.meta("stage1", "a")["seconds"] == 3.0
    assert add(store, archive, replace=True).replaced == ["stage1/a"]
    assert_complete(store, key="a")


def test_a_damaged_entry_is_mended_by_an_archive(tmp_path, archive):
    store = Store(tmp_path)
    add(store, archive)
    path = store.tensors_file("stage1", "a")
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    done = add(store, archive)
    assert (done.replaced, done.equal) == (["stage1/a"], ["stage1/old", "stage2/b"])
    assert_complete(store, key="a")


@pytest.mark.parametrize(
    ("there", "kept"), [(None, 2), (1, 2), (2, 2), (3, 3), ("damaged", 2), ("entry", None), ("running", None)]
)
def test_a_checkpoint_is_added_where_it_is_the_furthest(tmp_path, archive, there, kept):
    store = Store(tmp_path)
    if isinstance(there, int):
        save_checkpoint(store, "c", there)
    if there == "damaged":
        path = save_checkpoint(store, "c", 3)
        path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    if there == "entry":
        store.get_or_make("stage1", "c", made)
    (tmp_path / "locks").mkdir(exist_ok=True)
    with FileLock(tmp_path / "locks" / f"stage1-{'c' if there == 'running' else 'x'}.lock"):
        done = add(store, archive)
    found = store.checkpoint("stage1", "c")
    assert (found and found["epochs"]) == kept
    name = "stage1/c (checkpoint)"
    assert (name in done.added) == (there in (None, 1, "damaged"))
    assert (name in done.unneeded) == (there in (2, 3, "entry"))
    assert (name in done.busy) == (there == "running")


# -- nothing else gets in -------------------------------------------------------------------------------------------


def refused(store_root: Path, path: Path) -> str:
    """Return the one line with which an archive is refused, after which the store holds nothing."""
    with pytest.raises(UserError) as raised:
        add(Store(store_root), path)
    assert contents(store_root) == {}
    assert not list(store_root.glob("scratch/*"))
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.isprintable()
    return message


def test_no_flipped_bit_of_an_archive_is_silent(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    whole, stream = archive.read_bytes(), random.Random(0)
    expected = Store(tmp_path / "expected")
    add(expected, archive)
    path, store, noticed = tmp_path / "flipped.tar", tmp_path / "store", 0
    for number in range(150):
        data = bytearray(whole)
        bit = stream.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            add(Store(store), path)
        except UserError:
            noticed += 1
            assert contents(store) == {}, number
        else:  # in the zeros between files
            assert contents(store) == contents(expected.root), number
            shutil.rmtree(store)
    assert noticed > 30


def test_a_checkpoint_of_before_digests_is_checked_by_the_manifest(tmp_path):
    store = Store(tmp_path / "from")
    path = save_checkpoint(store, "c", 2)
    save_file({"x": torch.zeros(3000)}, path, metadata={"meta": '{"epochs": 2}'})
    pack(store, tmp_path / "a.tar", [], CHECKPOINTS)
    assert add(Store(tmp_path / "to"), tmp_path / "a.tar").added == ["stage1/c (checkpoint)"]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[5000] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    assert "does not fit the manifest" in refused(tmp_path / "other", tmp_path / "a.tar")


@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.6, 0.9, 1])
def test_a_truncated_archive_is_refused(tmp_path, archive, part):
    path, whole = tmp_path / "cut.tar", archive.read_bytes()
    path.write_bytes(whole[: int(part * whole.rindex(b"}"))])  # of the manifest; zeros follow
    message = refused(tmp_path / "s", path)
    assert "cut off" in message or "no whole archive" in message


def test_of_several_archives_all_are_checked_before_anything_appears(tmp_path, archive):
    path = tmp_path / "cut.tar"
    path.write_bytes(archive.read_bytes()[:4000])
    with pytest.raises(UserError):
        add(Store(tmp_path / "s"), archive, path)
    assert contents(tmp_path / "s") == {}


def tar_of(
    path: Path, members: dict[str, bytes], manifest: object = None, change=None, kind=tarfile.GNU_FORMAT
) -> Path:
    """Write an archive by hand, with a manifest that fits unless another is given."""
    digests = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in members.items()}
    text = {"schema": "tailscope.store/1", "files": digests} if manifest is None else manifest
    last = text if isinstance(text, bytes) else json.dumps(text).encode()
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in {**members, "MANIFEST.json": last}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if change is not None:
                change(info)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def members(archive) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.name.startswith("stage1/a/")}


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "/etc/passwd",
        "stage1/../../../a",
        "stage1/a/../../b/DONE",
        "stage1/a/other",
        "stage1/a b/DONE",
        "stage1/\x1b[31m/DONE",
        "stage9/a/DONE",
        "locks/a/DONE",
        "scratch/stage1-a/entry",
        "scratch/stage9-a/checkpoint.safetensors",
        "stage1/a",
        "stage1/" + "a" * 90 + "/DONE",
        "stage1/a\n/DONE",
        "a" * 300,
    ],
)
def test_names_that_no_store_has_are_refused(tmp_path, members, name):
    refused(tmp_path / "s", tar_of(tmp_path / "a.tar", {**members, name: b"x"}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "s"]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"x", b"L", b"7"],
)
def test_links_devices_and_extensions_are_refused(tmp_path, members, kind):
    def change(info):
        if info.name.endswith("DONE"):
            info.type, info.linkname, info.size = kind, "../../out", 0

    assert "does not write" in refused(tmp_path / "s", tar_of(tmp_path / "a.tar", members, change=change))


@pytest.mark.parametrize("size", [-1, 1 << 20, 1 << 60])
def test_sizes_that_the_file_has_not_are_refused_from_the_header(tmp_path, members, size):
    name, content = "stage1/a/tensors.safetensors", members["stage1/a/tensors.safetensors"]
    info = tarfile.TarInfo(name)
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT) if size > 0 else negative_size(info)
    (tmp_path / "a.tar").write_bytes(header + content)
    assert "cut off at stage1/a/tensors" in refused(tmp_path / "s", tmp_path / "a.tar")


def negative_size(info: tarfile.TarInfo) -> bytes:
    """Return a header whose size is -1, in the binary notation, with a checksum that fits."""
    info.size = 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


DEEP = b'{"schema":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HOSTILE = {
    "no text": (b"\xff\xfe", {}),
    "nested": (DEEP, {}),
    "a list": (b"[]", {}),
    "no files": (b'{"schema": "tailscope.store/1"}', {}),
    "files are a list": (b'{"schema": "tailscope.store/1", "files": []}', {}),
    "another schema": (b'{"schema": "x\\u001b/2", "files": {}}', {}),
    "one more": (b'{"schema": "tailscope.store/1", "files": {"/etc/x": {"bytes": 1, "sha256": ""}}}', {}),
    "no digests": (None, {"stage1/a/DONE": b""}),
    "other digests": (None, {"stage1/a/DONE": b"0" * 64 + b"  tensors.safetensors\n" + b"0" * 64 + b"  meta.json\n"}),
    "meta no object": (None, {"stage1/a/meta.json": b"[1]"}),
    "meta nested": (None, {"stage1/a/meta.json": DEEP}),
    "tensors a pickle": (None, {"stage1/a/tensors.safetensors": b"\x80\x04N."}),
    "no tensors": (None, {"stage1/a/tensors.safetensors": None}),
    "a checkpoint that is none": (None, {f"scratch/stage1-c/{CHECKPOINT}": b"\x80\x04N."}),
}


@pytest.mark.parametrize(("manifest", "change"), HOSTILE.values(), ids=HOSTILE)
def test_archives_of_another_making_are_refused(tmp_path, members, manifest, change):
    changed = {name: content for name, content in {**members, **change}.items() if content is not None}
    if change and "stage1/a/DONE" not in change and "stage1/a/DONE" in changed:  # with digests that fit
        names = [n for n in ("tensors.safetensors", "meta.json") if f"stage1/a/{n}" in changed]
        changed["stage1/a/DONE"] = b"".join(
            hashlib.sha256(changed[f"stage1/a/{n}"]).hexdigest().encode() + b"  " + n.encode() + b"\n" for n in names
        )
    refused(tmp_path / "s", tar_of(tmp_path / "a.tar", changed, manifest))


@pytest.mark.parametrize(
    "header",
    [
        '{"epochs": Infinity}',
        '{"epochs": NaN}',
        '{"epochs": -1}',
        '{"epochs": 1.5}',
        '{"epochs": true}',
        '{"epochs": "2"}',
        '{"epochs": null}',
        "{}",
        "[]",
        '{"epochs": 2, "more": 1}',
        '{"epochs": 2, "losses": 1.0}',
        '{"epochs": 2, "losses": [null]}',
        '{"epochs": 2, "losses": [NaN]}',
        '{"epochs": 2, "losses": [1' + "0" * 400 + "]}",
        '{"epochs": 2, "seconds": "1"}',
        '{"epochs": 2, "seconds": -Infinity}',
        '{"epochs": ' + "9" * 5000 + "}",
    ],
    ids=lambda header: header[:30],
)
def test_a_checkpoint_that_is_no_training_s_is_refused_and_never_taken(tmp_path, members, header):
    path = tmp_path / "c"
    save_file({"x": torch.zeros(3)}, path, metadata={"meta": header})
    name = f"scratch/stage1-c/{CHECKPOINT}"
    assert "damaged (" in refused(tmp_path / "s", tar_of(tmp_path / "a.tar", {**members, name: path.read_bytes()}))
    store = Store(tmp_path / "own")
    newest = save_checkpoint(store, "c", 1)
    save_checkpoint(store, "c", 2)
    newest.write_bytes(path.read_bytes())
    assert store.checkpoint("stage1", "c") == {"epochs": 1}
    previous_of(newest).unlink()
    assert store.checkpoint("stage1", "c") is None


def test_a_name_twice_is_refused(tmp_path, members):
    path = tar_of(tmp_path / "a.tar", members)
    data = path.read_bytes()
    path.write_bytes(data[: 512 + len(members["stage1/a/tensors.safetensors"]) // 512 * 512 + 512] + data)
    refused(tmp_path / "s", path)


@given(st.binary(max_size=2000))
def test_anything_else_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.tar").write_bytes(content)
    refused(folder / "s", folder / "a.tar")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "none", tmp_path / "fifo", Path("/dev/zero")):
        refused(tmp_path / "s", path)


def test_a_disk_without_room_is_told_before(tmp_path, archive, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match=r"hold [\d,]+ bytes, and 100 are free"):
        add(Store(tmp_path / "s"), archive)


# -- a run that is killed and moved ---------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from experiment_setups import EXPERIMENTS, lab, settings
from tailscope.training import loop

loop.SPACING = 0  # a checkpoint after every epoch, however short
save, saved = loop.save_tensors, []

def save_and_die(path, tensors, meta):
    save(path, tensors, meta)
    saved.append(path)
    if len(set(saved)) == 2 and meta["epochs"] == 1:  # the second backbone
        os.kill(os.getpid(), signal.SIGKILL)

loop.save_tensors = save_and_die
EXPERIMENTS["swap"](lab(Path(sys.argv[1])), settings(seeds=(0,)))
"""


def test_a_run_that_is_killed_and_moved_ends_with_the_same_numbers(tmp_path, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "here")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    here = Store(tmp_path / "here")
    unfinished = [path.name.split("-")[1] for path in (here.root / "scratch").iterdir()]
    whole = [("stage1", key) for key in here.keys("stage1")]
    assert (len(unfinished), len(whole)) == (1, 1)
    pack(here, tmp_path / "moved.tar", whole, [("stage1", key) for key in unfinished])
    shutil.rmtree(here.root)
    there = lab(tmp_path / "there")
    add(there.store, tmp_path / "moved.tar")
    epochs, save = [], loop.save_tensors
    monkeypatch.setattr(loop, "SPACING", 0)
    monkeypatch.setattr(loop, "save_tensors", lambda *a: (epochs.append(a[2]["epochs"]), save(*a)))
    moved = EXPERIMENTS["swap"](there, settings(seeds=(0,)))
    assert epochs == list(range(2, 2 + len(epochs)))  # the rest of one backbone, after its first epoch
    assert epochs
    uninterrupted = lab(tmp_path / "whole")
    assert timeless(moved) == timeless(EXPERIMENTS["swap"](uninterrupted, settings(seeds=(0,))))
    assert entries(there.store, "stage1") == 2
    for key in there.store.keys("stage1"):
        one, other = (store.read("stage1", key) for store in (there.store, uninterrupted.store))
        assert one.meta["losses"] == other.meta["losses"]
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
        assert not there.store.checkpoint("stage1", key)
