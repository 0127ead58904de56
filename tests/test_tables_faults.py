"""Damaged, hostile and odd files: one line that names the file, nothing run, nothing huge allocated.

The number of fuzzed cases a reader is `TAILSCOPE_FUZZ`, 60 without it.
"""

import gc
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tailscope.encoders import checkpoints
from tailscope.errors import UserError
from tailscope.tables import arrays
from tailscope.tables import arrays as npz_files
from tailscope.tables.table import FeatureTable, LinearLayer

CASES = int(os.environ.get("TAILSCOPE_FUZZ", "60"))
X, Y = np.arange(24, dtype=np.float32).reshape(12, 2), np.arange(12) % 3
CSV = "f0,f1,label\n" + "".join(f"{a},{b},{y}\n" for (a, b), y in zip(X, Y, strict=True))


def refusal(path, load=FeatureTable.load):
    with pytest.raises(UserError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def saved(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def safetensors(folder):
    FeatureTable.from_arrays(X, Y, class_names=list("abc"), ids=list("abcdefghijkl")).save(folder / "t.safetensors")
    return (folder / "t.safetensors").read_bytes()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a good file of each kind, by suffix."""
    nested = {"features": X, "labels": torch.tensor(Y), "class_names": list("abc"), "provenance": "{}"}
    table = pa.table({"features": pa.array(list(X)), "label": Y, "class_name": np.array(list("abc"))[Y]})
    return {
        "npz": saved(lambda file: np.savez(file, features=X, labels=Y, class_names=list("abc"))),
        "deflated.npz": saved(lambda file: np.savez_compressed(file, features=X, labels=Y)),
        "npy": saved(lambda file: np.save(file, X)),
        "pt": saved(lambda file: torch.save(nested, file)),
        "safetensors": safetensors(tmp_path_factory.mktemp("valid")),
        "parquet": saved(lambda file: pq.write_table(table, file)),
        "csv": CSV.encode(),
    }


SUFFIXES = ("npz", "deflated.npz", "npy", "pt", "safetensors", "parquet", "csv")
EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut", "copy"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def edited(content, edits):
    data = bytearray(content)
    for what, where, value in edits:
        at = int(where * max(len(data) - 1, 0))
        if what == "set" and data:
            data[at] = value
        elif what == "insert":
            data[at:at] = bytes([value]) * (1 + value % 9)
        elif what == "delete":
            del data[at : at + 1 + value % 5]
        elif what == "cut":
            del data[at:]
        else:
            data[at:at] = data[at : at + value]
    return bytes(data)


def refitted(content, edits):
    """Edit the first member of a zip archive, with sizes and checksums that are right: damage that only readers see."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next((name for name in members if name.endswith(".pkl")), next(iter(members)))
    members[name] = edited(members[name], edits)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fuzzed_files_are_read_or_refused_in_one_line(tmp_path_factory, valid, suffix):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / f"features.{suffix}"
    np.save(folder / "labels.npy", Y)
    path.write_bytes(valid[suffix])
    assert len(FeatureTable.load(path)) == 12
    is_archive = zipfile.is_zipfile(path)

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(edits=EDITS, inside=st.booleans())
    def run(edits, inside):
        path.write_bytes((refitted if inside and is_archive else edited)(valid[suffix], edits))
        for load in (FeatureTable.load, LinearLayer.load):
            try:
                load(path)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017 - other exceptions are failures
                assert str(path) in str(error)  # noqa: PT017

    run()


def npy(shape, descr="<f4", data=b"\0" * 64):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def tensors(shape, dtype="F32", end=8):
    header = json.dumps({"features": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


def pickled(change):
    """A .pt whose pickle is changed and whose checksums are right."""
    good = saved(lambda file: torch.save({"features": torch.tensor(X), "labels": torch.tensor(Y)}, file))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info.filename, change(content) if info.filename.endswith(".pkl") else content)
    return buffer.getvalue()


HUGE = {
    "npy": npy((10**15, 8)),
    "negative.npy": npy((-1, 8)),
    "claims.npy": npy((10**6,)),
    "npz": npz(features=npy((10**15, 8)), labels=npy((12,), "<i8", bytes(96))),
    "negative.npz": npz(features=npy((-4, -4)), labels=npy((12,), "<i8", bytes(96))),
    "claims.npz": npz(features=npy((10**8,)), labels=npy((12,), "<i8", bytes(96))),
    "empty-text.npz": npz(features=npy((12, 2), data=bytes(96)), labels=npy((10**15,), "<U0", b"")),
    "records.npz": npz(features=npy((12,), "<f4,<f4", bytes(96)), labels=npy((12,), "<i8", bytes(96))),
    "safetensors": tensors([10**15]),
    "negative.safetensors": tensors([-1]),
    "header.safetensors": struct.pack("<Q", 2**62) + b"{}",
    "stride.pt": saved(lambda file: torch.save({"features": torch.zeros(1).expand(10**9, 9), "labels": [0]}, file)),
    "storage.pt": pickled(lambda p: p.replace(b"K\x18t", b"J\xff\xff\xff\x7ft", 1)),
    "shape.pt": pickled(lambda p: p.replace(b"K\x0cK\x02\x86", b"J\xff\xff\xff\x7fK\x02\x86", 1)),
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_are_checked_before_anything_is_allocated(tmp_path, name):
    path = tmp_path / (f"features.{name}" if "." in name else f"t.{name}")
    path.write_bytes(HUGE[name])
    gc.collect()
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24, message


def test_bombs(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    monkeypatch.setattr(npz_files, "_BOMB_BYTES", 2**20)
    np.savez_compressed(path, features=np.zeros((2**18, 4), dtype=np.float32), labels=Y)  # 4 MiB in 4 KiB
    assert "features would unpack to" in refusal(path)
    pq.write_table(pa.table({"f0": np.zeros(10**6), "label": np.zeros(10**6, int)}), tmp_path / "bomb.parquet")
    monkeypatch.setattr(arrays, "usable_memory", lambda: 10**6)
    assert "the table declares 0 GiB, more than the memory here" in refusal(tmp_path / "bomb.parquet")
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t/data.pkl", b"\x80\x02" + b"0" * 10**7)
    (tmp_path / "bomb.pt").write_bytes(compressed.getvalue())
    assert "compressed; torch.save does not compress" in refusal(tmp_path / "bomb.pt")


@pytest.mark.parametrize("form", ["pair", "dict", "checkpoint"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_tensor_has_the_size_of_its_own_record(tmp_path, form, swapped):
    """PyTorch reads beyond a record whose tensor declares more, though another record may have that size."""
    pair = torch.from_numpy(X), torch.from_numpy(Y.astype("i2"))  # 96 bytes and 24
    content = pair if form == "pair" else dict(zip(("features", "labels"), pair, strict=True))
    torch.save(content, tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_STORED) as bad,
    ):
        names = {"/data/0": "/data/1", "/data/1": "/data/0"}
        held = {name: good.read(name) for name in good.namelist()}
        held |= {name: raw[:-2] for name, raw in held.items() if name.endswith("/data/1") and not swapped}
        for name, raw in held.items():
            end = name[name.index("/") :]
            bad.writestr(name[: name.index("/")] + (names.get(end, end) if swapped else end), raw)

    load = checkpoints.read if form == "checkpoint" else FeatureTable.load
    assert load(tmp_path / "good.pth")
    assert "a tensor declares another size than its bytes have" in refusal(tmp_path / "c.pth", load)


def test_damaged_statistics_of_a_parquet_do_not_end_the_process(tmp_path, valid):
    """pyarrow aborts when the metadata of a damaged column are asked for; reading the column raises."""
    path = tmp_path / "t.parquet"
    good = valid["parquet"]
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for at in range(footer, len(good) - 8, 3):
        path.write_bytes(good[:at] + bytes([(good[at] + 1) % 256]) + good[at + 1 :])
        try:
            FeatureTable.load(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"features": torch.tensor(X), "labels": Touch(mark)}, tmp_path / "t.pt")
    assert "holds '__builtin__.getattr', which is no tensor and is never unpickled" in refusal(tmp_path / "t.pt")
    (tmp_path / "u.pt").write_bytes(pickle.dumps(Touch(mark)))
    assert "no archive as torch.save writes them" in refusal(tmp_path / "u.pt")
    objects = np.array([Touch(mark)] * 12, dtype=object)
    torch.save({"features": X, "labels": np.array(["a", None] * 6, dtype=object)}, tmp_path / "v.pt")
    assert "Python objects" in refusal(tmp_path / "v.pt")
    np.save(tmp_path / "features.npy", objects)
    assert "never unpickled" in refusal(tmp_path / "features.npy")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "w.pt")
    assert "holds 'torch.nn.modules.linear.Linear'" in refusal(tmp_path / "w.pt", LinearLayer.load)
    assert not mark.exists()


def test_flipped_bits_of_a_pt_are_noticed(tmp_path, valid):
    path = tmp_path / "t.pt"
    good = valid["pt"]
    start = good.index(Y.tobytes())
    for at in range(start, start + Y.nbytes, 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert "differs from its checksum" in refusal(path)


def deep(path):
    save_file({"features": X, "labels": Y}, path, metadata={"class_names": "[" * 100_000})


def test_json_that_nests_deep(tmp_path):
    deep(tmp_path / "t.safetensors")
    assert "class_names in the header is not a JSON list" in refusal(tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npz", features=X, labels=Y, provenance=np.array('{"a":' * 100_000))
    assert "provenance is not a JSON object" in refusal(tmp_path / "t.npz")


def folder(path):
    path.mkdir()


def device(path):
    path.symlink_to("/dev/zero")


def circle(path):
    path.symlink_to(path.name)


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


ODD = {
    "a folder": (folder, "a folder, not a file"),
    "a pipe": (os.mkfifo, "a pipe, not a file"),
    "a device": (device, "a device, not a file"),
    "a circle": (circle, "links that lead in a circle"),
    "a pointer": (pointer, "a pointer of Git LFS"),
    "empty": (Path.touch, "the file is empty"),
    "absent": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("suffix", ["npz", "npy", "pt", "safetensors", "parquet", "csv"])
@pytest.mark.parametrize(("make", "says"), ODD.values(), ids=ODD)
def test_what_is_no_file(tmp_path, suffix, make, says):
    make(tmp_path / f"t.{suffix}")
    assert says in refusal(tmp_path / f"t.{suffix}")


def test_odd_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~nosuchuser/t.npz", "a\0b.npz", "x" * 300 + ".npz", "t.npz/u.npz"):
        assert refusal(Path(name))
    assert "'.pkl'; known: .npz" in refusal(Path("t.pkl"))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "t.npz"
    np.savez(path, features=X, labels=Y)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "may not be read (permission denied)" in refusal(path)


@pytest.mark.parametrize("suffix", ["npz", "npy", "pt", "safetensors", "parquet", "csv"])
def test_a_name_that_is_no_utf8(tmp_path, valid, suffix):
    assert "no such file" in refusal(tmp_path / os.fsdecode(b"caf\xe9.npz"))
    path = tmp_path / os.fsdecode(b"caf\xe9_features." + suffix.encode())
    np.save(path.with_name(path.name.replace("features", "labels")), Y)
    path.write_bytes(valid[suffix])
    if suffix == "safetensors":  # the library's own limit
        assert "safetensors opens only files whose names are UTF-8; rename it" in refusal(path)
        return
    assert FeatureTable.load(path).source == str(tmp_path / f"caf\\xe9_features.{suffix}")


def test_a_name_that_is_no_utf8_from_end_to_end(tailscope_, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    names = [os.fsdecode(name) for name in (b"caf\xe9.npz", b"new\xe9.npz")]  # as the command line has them
    y = np.repeat([0, 1], 40)
    for name in names:
        np.savez(name, features=(rng.normal(size=(80, 3)) + 4 * y[:, None]).astype("f4"), labels=y)
    options = ("--out", "out", "--permutations", 0, "--no-verdict", "--no-report")
    ended = tailscope_("diagnose", "--train", names[0], "--unseen", names[1], *options)
    assert (ended.code, ended.err) == (0, "")
    encoders = json.loads((tmp_path / "out" / "diagnosis.json").read_text(encoding="utf-8"))["spec"]["encoders"]
    assert [one["train"]["source"] for one in encoders.values()] == ["caf\\xe9.npz"]
    ended = tailscope_("diagnose", "--train", names[0] + ".npz", "--unseen", names[1], *options)
    assert (ended.code, ended.err.encode().count(b"\n")) == (2, 1)


def test_text_in_a_parquet_file_that_is_no_utf8_is_refused(tmp_path):
    table = {"features": pa.array(list(X)), "label": Y, "id": [f"test:{k}" for k in range(12)]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "t.parquet").read_bytes()
    assert data.count(b"test:7") == 1
    (tmp_path / "t.parquet").write_bytes(data.replace(b"test:7", b"test:\xb7"))
    assert "damaged" in refusal(tmp_path / "t.parquet")
