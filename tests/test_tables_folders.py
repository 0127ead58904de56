"""Folders of Parquet files: one table, sorted by class, whose features are mapped and never held whole."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diagnosis_cases import separable
from tailscope import diagnose
from tailscope.errors import UserError
from tailscope.tables import mapped
from tailscope.tables.table import FeatureTable


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TAILSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables"


def samples(rows=500, width=6, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((rows, width)).astype(np.float32)
    return features, rng.integers(0, classes, rows), np.array([f"img/{i}.png" for i in range(rows)])


def write(folder, features, labels, ids, *, parts=(0, 130, 131, 400)):
    """Write rows as several tables of `FeatureTable.save`, some in folders further down."""
    for number, start in enumerate(parts):
        rows = slice(start, ([*parts, len(labels)])[number + 1])
        target = folder / (f"part={number % 2}" if number else ".") / f"{number}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        table = FeatureTable.from_arrays(
            features[rows], labels[rows], ids=ids[rows], class_names=list("abcdefg"), provenance={"model": "m"}
        )
        table.save(target)
    return sorted(folder.rglob("*.parquet"))


def test_a_folder_is_its_files_rows_sorted_by_class(tmp_path):
    features, labels, ids = samples()
    files = write(tmp_path / "set", features, labels, ids)
    table = FeatureTable.load(tmp_path / "set")
    whole = [FeatureTable.load(file) for file in files]
    labels = np.concatenate([one.labels for one in whole])
    order = np.argsort(labels, kind="stable")
    assert np.array_equal(table.features, np.concatenate([one.features for one in whole])[order])
    assert np.array_equal(table.labels, labels[order])
    assert np.array_equal(table.ids, np.concatenate([one.ids for one in whole])[order])
    assert table.class_names == tuple("abcdefg")
    assert table.provenance == {"model": "m"}


def test_the_sorted_copy_is_made_once_and_again_where_a_file_changes(tmp_path, cache):
    features, labels, ids = samples()
    files = write(tmp_path / "set", features, labels, ids)
    first = FeatureTable.load(tmp_path / "set")
    (copy,) = cache.iterdir()
    written = (copy / "features.npy").stat().st_mtime_ns
    FeatureTable.load(tmp_path / "set")
    assert (copy / "features.npy").stat().st_mtime_ns == written
    os.utime(files[0], ns=(1, 1))
    again = FeatureTable.load(tmp_path / "set")
    assert len(list(cache.iterdir())) == 2
    assert np.array_equal(first.features, again.features)


def test_a_copy_that_was_broken_off_is_made_again(tmp_path, cache):
    features, labels, ids = samples()
    write(tmp_path / "set", features, labels, ids)
    FeatureTable.load(tmp_path / "set")
    (copy,) = cache.iterdir()
    (copy / "fields.json").unlink()
    (copy / "features.npy").write_bytes(b"half")
    assert len(FeatureTable.load(tmp_path / "set")) == len(labels)


def test_columns_of_numbers_and_names_of_rows(tmp_path):
    for number in range(2):
        columns = {f"f{i}": np.arange(3.0) + i + 10 * number for i in range(3)} | {"label": ["b", "a", "b"]}
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    table = FeatureTable.load(tmp_path)
    assert table.class_names == ("a", "b")
    assert table.features[:, 0].tolist() == [1, 11, 0, 2, 10, 12]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"features": [[1.0, 2.0]], "label": ["x"]}, "its columns, their types"),
        ({"features": [[1.0, 2.0, 3.0]], "label": [0]}, "has rows of 3 features in float64, other files of 2"),
        ({"f0": [1.0], "f1": [2.0], "label": [0]}, "its columns, their types"),
        ({"features": [[1.0, None]], "label": [0]}, "have gaps or differ in length"),
    ],
)
def test_files_that_are_not_parts_of_one_table(tmp_path, second, says):
    pq.write_table(pa.table({"features": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]}), tmp_path / "0.parquet")
    pq.write_table(pa.table(second), tmp_path / "1.parquet")
    with pytest.raises(UserError, match=says) as refused:
        FeatureTable.load(tmp_path)
    assert str(tmp_path / "1.parquet") in str(refused.value)


def test_a_damaged_file_is_named_and_leaves_no_copy(tmp_path, cache):
    features, labels, ids = samples()
    files = write(tmp_path / "set", features, labels, ids)
    content = bytearray(files[1].read_bytes())
    files[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated or damaged"):
        FeatureTable.load(tmp_path / "set")
    assert not list(cache.rglob("fields.json"))


def test_files_without_any_row(tmp_path):
    for name in ("0", "1"):
        rows = pa.table({"features": pa.array([], pa.list_(pa.float32())), "label": pa.array([], pa.int64())})
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"none of its 2 \.parquet files has a row"):
        FeatureTable.load(tmp_path)


@pytest.mark.parametrize("where", [".", "part=1"])
@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ('{"schema": "tailscope.features/1", "images": 1500}', "500 of 1,500"),
        ('{"schema": "tailscope.features/1", "images": 500}', None),
        ('{"schema": "of somebody else/1", "images": 1500}', None),
        ('{"schema": "tailscope.features/1", "images": "many"}', None),
        ("[" * 100_000, None),
    ],
)
def test_an_extraction_that_was_not_done_is_refused_wherever_in_the_folder_it_is(tmp_path, where, said, refused):
    write(tmp_path / "set" / where, *samples(), parts=(0,))
    (tmp_path / "set" / where / "extraction.json").write_text(said)
    if refused is None:
        assert len(FeatureTable.load(tmp_path / "set")) == 500
    else:
        with pytest.raises(UserError, match=f"{refused} images are extracted; run the same `features` command again"):
            FeatureTable.load(tmp_path / "set")


def test_a_full_disk_is_told_before_it_is_written(tmp_path, monkeypatch):
    features, labels, ids = samples()
    write(tmp_path / "set", features, labels, ids)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="set TAILSCOPE_CACHE to a folder with more"):
        FeatureTable.load(tmp_path / "set")


MEASURE = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
from tailscope.tables.table import FeatureTable
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
import pyarrow.parquet
before = anonymous()
table = FeatureTable.load(Path(sys.argv[1]))
print(anonymous() - before, table.features.numel() * 4 / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to tell memory")
def test_features_are_not_held_in_memory(tmp_path):
    grown, sizes = [], []
    for rows in (20_000, 120_000):
        folder = tmp_path / str(rows)
        write(folder, *samples(rows=rows, width=256), parts=tuple(range(0, rows, 20_000)))
        done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
        mib, size = map(float, done.stdout.split())
        grown.append(mib)
        sizes.append(size)
    # The libraries' own buffers, which differ from machine to machine, and 100,000 rows' labels and ids: no features,
    # which are 98 MiB more.
    assert sizes[1] - sizes[0] > 97
    assert grown[1] - grown[0] < 0.8 * (sizes[1] - sizes[0])


# -- a diagnosis of what is mapped ------------------------------------------------------------------------------------


def planted(tmp_path, kind=np.float32, scale=1.0):
    """Write a long-tailed table as a folder; return it, its rows in memory, and unseen samples."""
    (train, labels), (unseen, theirs) = separable()
    train, unseen = train * scale, unseen * scale
    train[5] *= 1000  # a row that is left out
    train[-1] = 0
    order = np.random.default_rng(1).permutation(len(labels))
    features, labels = train[order].astype(kind), labels[order]
    for number, rows in enumerate(np.array_split(np.arange(len(labels)), 3)):
        FeatureTable.from_arrays(features[rows], labels[rows]).save(tmp_path / f"{number}.parquet")
    by_class = np.argsort(labels, kind="stable")
    whole = FeatureTable.from_arrays(features[by_class], labels[by_class])
    return tmp_path, whole, (unseen.astype(kind), theirs)


def numbers(value, path=""):
    if isinstance(value, dict):
        return {key: found for name, one in value.items() for key, found in numbers(one, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {key: found for i, one in enumerate(value) for key, found in numbers(one, f"{path}.{i}").items()}
    return {path: value}


def comparable(result):
    """Return every number and text of a result but when, by what and from where it was made."""
    left_out = ("created", "command", "environment", "spec", "provenance")
    found = numbers({key: value for key, value in result.items() if key not in left_out})
    return {key: value for key, value in found.items() if key not in (".dataset.name",) and "warnings" not in key}


def saved(folder, whole, form):
    """Write the table's rows to a file that is mapped; its features, if they are in a file by themselves."""
    features, labels = whole.features.numpy(), whole.labels.numpy()
    if form == ".npy":
        np.save(folder / "features.npy", features)
        np.save(folder / "labels.npy", labels)
        return folder / "features.npy"
    whole.save(folder / "table.safetensors")
    return folder / "table.safetensors"


@pytest.mark.parametrize(
    ("form", "kind", "scale"),
    [
        ("folder", np.float32, 1),
        ("folder", np.float16, 1),
        ("folder", np.float32, 2.0**40),
        (".npy", np.float32, 1),
        (".safetensors", np.float64, 2.0**-40),
    ],
)
def test_what_is_mapped_is_diagnosed_as_the_same_rows_in_memory(tmp_path, monkeypatch, form, kind, scale):
    folder, whole, unseen = planted(tmp_path, kind, scale)
    expected = diagnose(whole, unseen, permutations=19)
    given = folder if form == "folder" else saved(tmp_path, whole, form)
    monkeypatch.setattr(mapped, "HELD", 0)
    monkeypatch.setattr(mapped, "_BLOCK_VALUES", 7 * whole.width)
    found = diagnose(given, unseen, permutations=19, memory="8GiB")
    one, other = comparable(found), comparable(expected)
    assert one.keys() == other.keys()
    assert len(one) > 500
    for name, value in one.items():
        assert value == (pytest.approx(other[name], rel=1e-6, abs=1e-6) if isinstance(value, float) else other[name]), (
            name
        )
    assert len(found["warnings"]) == len(expected["warnings"])
    digests = [next(iter(one["spec"]["encoders"].values()))["train"]["sha256"] for one in (found, expected)]
    assert digests[0] == digests[1]


def test_rows_that_are_made_of_mapped_ones_are_mapped_and_leave_nothing(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(mapped, "HELD", 100)
    monkeypatch.setattr(mapped, "_BLOCK_VALUES", 10)
    rows = torch.randn(50, 4, generator=torch.manual_seed(0)).half()
    chosen = torch.randperm(50, generator=torch.manual_seed(1))[:33]
    found = mapped.map_rows(rows, lambda block: 3 * block.float(), chosen)
    assert torch.equal(found, 3 * rows.float()[chosen])
    assert list(cache.parent.iterdir()) == []  # the file has no name
    found += 1  # it may be written to
    assert torch.equal(found, 3 * rows.float()[chosen] + 1)


def test_rows_are_held_where_the_disk_has_no_room(monkeypatch, caplog):
    monkeypatch.setattr(mapped, "HELD", 100)
    monkeypatch.setattr(mapped, "_allocate", raising(OSError(errno.ENOSPC, "No space left on device")))
    rows = torch.arange(200.0).view(50, 4)
    assert torch.equal(mapped.map_rows(rows, torch.neg), -rows)
    assert "are held in memory: no file for them in the cache" in caplog.text


def raising(error):
    def function(*_):
        raise error

    return function
