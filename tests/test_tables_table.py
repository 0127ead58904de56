"""Feature and classifier files: what goes in comes out, in three formats, and everything wrong is said in one line."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from tailscope.errors import UserError
from tailscope.tables.table import FeatureTable

SUFFIXES = [".npz", ".safetensors", ".parquet"]


def table(**changes) -> FeatureTable:
    fields = {
        "features": np.arange(12, dtype=np.float32).reshape(4, 3),
        "labels": np.array([0, 1, 1, 0]),
        "class_names": ["köter", "cat"],
        "ids": ["a/1.png", "b/22.png", "b/é.png", "a/4.png"],
        "groups": [7, 7, 8, 9],
        "provenance": {"encoder": "resnet32"},
    }
    return FeatureTable.from_arrays(**{**fields, **changes})


def same(a: FeatureTable, b: FeatureTable) -> bool:
    def equal(x, y):
        return (x is None and y is None) or (x.dtype.kind == y.dtype.kind and (x == y).all())

    return (
        a.features.dtype == b.features.dtype
        and torch.equal(a.features, b.features)
        and torch.equal(a.labels, b.labels)
        and a.class_names == b.class_names
        and a.provenance == b.provenance
        and equal(a.ids, b.ids)
        and equal(a.bursts, b.bursts)
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_table_comes_back_as_it_was_saved(tmp_path: Path, suffix: str, dtype: type) -> None:
    full = table(features=np.arange(12, dtype=dtype).reshape(4, 3))
    bare = table(class_names=None, ids=None, groups=None, provenance=None)
    for name, saved in [("full", full), ("bare", bare)]:
        path = tmp_path / f"{name}{suffix}"
        saved.save(path)
        loaded = FeatureTable.load(path)
        assert same(loaded, saved)
        assert loaded.source == str(path)
        assert loaded.features.is_contiguous()
        loaded.features.add_(1)  # not a read-only view of the file
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"bare{suffix}", f"full{suffix}"]


@settings(max_examples=30)
@given(
    features=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.floats(-1e3, 1e3, width=32)
    ),
    suffix=st.sampled_from(SUFFIXES),
    data=st.data(),
)
def test_any_finite_table_survives_the_disk(tmp_path_factory, features: np.ndarray, suffix: str, data) -> None:
    text = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=5)
    rows = st.lists(text, min_size=len(features), max_size=len(features))
    labels = data.draw(hnp.arrays(np.int64, len(features), elements=st.integers(0, 2)))
    names = data.draw(st.lists(text, min_size=3, max_size=3, unique=True))
    saved = FeatureTable.from_arrays(features, labels, class_names=names, ids=data.draw(rows), groups=data.draw(rows))
    path = tmp_path_factory.mktemp("table") / f"t{suffix}"
    saved.save(path)
    assert same(FeatureTable.load(path), saved)


def test_plain_numpy_and_safetensors_files_of_other_programs(tmp_path: Path) -> None:
    features, labels = np.eye(3, dtype=">f8"), np.array([2, 0, 1], dtype=np.uint8)
    np.savez_compressed(
        tmp_path / "a.npz", features=np.asfortranarray(features), labels=labels, class_names=[b"x", b"y", b"z"]
    )
    save_file({"features": np.eye(3), "labels": labels.astype(np.int32)}, tmp_path / "b.safetensors")
    save_torch({"features": torch.eye(3).bfloat16(), "labels": torch.tensor([2, 0, 1])}, tmp_path / "c.safetensors")
    a, b, c = (FeatureTable.load(tmp_path / name) for name in ("a.npz", "b.safetensors", "c.safetensors"))
    assert a.features.dtype == b.features.dtype == torch.float64
    assert c.features.dtype == torch.float32
    assert a.class_names == ("x", "y", "z")
    for t in (a, b, c):
        assert t.features.tolist() == np.eye(3).tolist()
        assert t.labels.tolist() == [2, 0, 1]
        assert t.counts() == [1, 1, 1]


def test_parquet_with_a_column_a_feature_and_named_rows(tmp_path: Path) -> None:
    columns = {f"f{i}": np.arange(4.0) + i for i in range(12)}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"label": [1, 0, 1, 0], **columns, "class_name": ["b", "a", "b", "a"]}), path)
    loaded = FeatureTable.load(path)
    assert loaded.features[1].tolist() == [1.0 + i for i in range(12)]  # f10 comes after f9, not after f1
    assert loaded.class_names == ("a", "b")
    lists = pa.array([[1.0, 2.0], [3.0, 4.0]], type=pa.list_(pa.float32()))
    pq.write_table(pa.table({"label": [1, 0], "features": lists}), path)
    assert FeatureTable.load(path).features.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": [0, 1]}, "no field 'features'"),
        ({"f0": [0.0, 1.0]}, "no field 'labels'"),
        ({"label": [0, 1], "f0": [0.0, 1.0], "f2": [0.0, 1.0]}, "no column 'f1'"),
        ({"label": [0, None], "f0": [0.0, 1.0]}, "column 'label' has 1 empty"),
        ({"label": [0, 1], "features": [[1.0, 2.0], [3.0]]}, "differ in length"),
        ({"label": [0, 1], "features": [[1.0, 2.0], None]}, "gaps"),
        ({"label": [0, 1], "features": [1.0, 2.0]}, "expected lists"),
        ({"label": [0, 0], "f0": [0.0, 1.0], "class_name": ["a", "b"]}, "label 0 is called 'a' and 'b'"),
        ({"label": [0, 2], "f0": [0.0, 1.0], "class_name": ["a", "a"]}, "class_names has 'a' 2 times"),
        ({"label": [0.5, 2], "f0": [0.0, 1.0]}, "label 0.5 in row 0 is no whole number"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict, says: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert says in refusal(tmp_path / "t.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.delitem(__import__("sys").modules, "pyarrow.parquet")
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'tailscope\[parquet\]'"):
        table().save(tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def refusal(path: Path, load=FeatureTable.load) -> str:
    """Return the one line that refuses the file; it always names it."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def with_nan() -> np.ndarray:
    features = np.zeros((5, 2), dtype=np.float32)
    features[3, 1], features[4, 0] = np.nan, np.inf
    return features


GOOD = {"features": np.zeros((5, 2), dtype=np.float32), "labels": np.arange(5)}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"features": with_nan()}, "features: 2 of 5 rows hold NaN or infinity, the first is row 3"),
        ({"features": np.zeros((5, 2), dtype=int)}, "features is int64; expected float16"),
        ({"features": np.zeros((5, 2), dtype=complex)}, "features is complex128"),
        ({"features": np.zeros(5)}, "features has shape (5,); expected [N, d]"),
        ({"features": np.zeros((0, 2)), "labels": np.zeros(0, dtype=int)}, "features is empty"),
        ({"features": np.zeros((5, 0))}, "features is empty"),
        ({"labels": np.array([0, 1, 0.5, np.inf, np.nan])}, "label 0.5 in row 2 (and 2 more) is no whole number"),
        ({"labels": np.array(["a", "", "b", " ", "a"])}, "label '' in row 1 (and 1 more) is empty"),
        ({"labels": np.zeros(5, dtype=complex)}, "labels is complex128; expected whole numbers or names"),
        ({"labels": np.eye(5)}, "labels has shape (5, 5); expected one label a row"),
        ({"labels": np.arange(4)}, "4 labels for 5 rows"),
        ({"labels": np.array([0, 1, -2, 0, 0])}, "label -2 in row 2 is negative"),
        ({"labels": np.arange(10_001), "features": np.zeros((10_001, 1))}, "at most 10,000 classes"),
        ({"labels": np.array([0, 2**64 - 1, 0, 0, 0], dtype=np.uint64)}, "row 1 is too large; labels are below 2**63"),
        ({"labels": np.array([0, 1e19, 0, 0, 0])}, "row 1 is too large; labels are below 2**63"),
        ({"labels": np.arange(1, 6), "class_names": list("abcde")}, "row 4 has label 5; number them from 0"),
        ({"labels": list("abcda"), "class_names": list("abcef")}, "label 'd' in row 3 is not in class_names"),
        ({"class_names": np.array(["a", "b"])}, "class_names has 2 names, but row 4 has label 4"),
        ({"class_names": np.array(["a", "b", "c", "b", "e"])}, "class_names has 'b' 2 times"),
        ({"class_names": np.arange(5)}, "class_names is int64"),
        ({"ids": np.arange(4)}, "ids has shape (4,)"),
        ({"groups": np.zeros(5)}, "groups is float64"),
        ({"labels": None}, "no field 'labels'; needs features, labels"),
        ({"features": np.array([[{}]], dtype=object)}, "features holds Python objects, which are never unpickled"),
        ({"ids": np.array(["a", None, "b", "c", "d"], dtype=object)}, "ids holds Python objects"),
        ({"provenance": np.array("[1]")}, "provenance is not a JSON object"),
    ],
)
def test_bad_fields(tmp_path: Path, fields: dict, says: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in {**GOOD, **fields}.items() if v is not None})
    assert says in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    assert "no such file" in refusal(path)
    table(features=np.ones((4, 3000))).save(path)
    content = path.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        assert ("empty" if length == 0 else "truncated") in refusal(path)
    path.write_bytes(b"something else entirely, but long enough to look at" * 9)
    assert "not a readable" in refusal(path)


def test_a_damaged_field_inside_a_good_zip(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, **GOOD)
    with zipfile.ZipFile(path) as good:
        members = {name: good.read(name) for name in good.namelist()}
    members["labels.npy"] = members["labels.npy"][:-8]
    with zipfile.ZipFile(path, "w") as bad:
        for name, content in members.items():
            bad.writestr(name, content)
    assert "truncated or damaged (labels declares int64 [5], but 32 bytes follow)" in refusal(path)
    with zipfile.ZipFile(path, "w") as bad:
        bad.writestr("features", b"no array")
        bad.writestr("labels", b"no array")
    assert "features is not an array" in refusal(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert "single array" in refusal(path)


def test_bad_header_and_unknown_format(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(GOOD, path, metadata={"class_names": '{"a": 1}'})
    assert "class_names in the header is not a JSON list" in refusal(path)
    assert "unknown format '.pkl'; known: .npz, .safetensors, .parquet" in refusal(tmp_path / "t.pkl")
    with pytest.raises(UserError, match="unknown format"):
        table().save(tmp_path / "t.pt")
    with pytest.raises(UserError, match="existing folder"):
        table().save(tmp_path / "absent" / "t.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.npz"
    table().save(path)
    before = path.read_bytes()

    def full_disk(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(UserError, match="No space left"):
        table().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_flipped_bit_of_a_file_of_ours_is_silent(tmp_path: Path, suffix: str) -> None:
    path, saved, stream = tmp_path / f"f{suffix}", table(), np.random.default_rng(0)
    saved.save(path)
    whole = path.read_bytes()
    for bit in stream.integers(8 * len(whole), size=120):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded = FeatureTable.load(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            if suffix == ".parquet" and not loaded.provenance:  # both lie in the footer, and can be lost as one
                loaded = replace(loaded, class_names=saved.class_names)
            assert same(replace(loaded, provenance=saved.provenance), saved), bit
            assert loaded.provenance.get("encoder", "resnet32") == "resnet32"  # or its name, or the digest's, is hit


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_ours_that_was_changed_is_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"f{suffix}"
    loaded = FeatureTable.from_arrays([[0.0], [1.0]], [0, 1], provenance={"by": "hand"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureTable, "digest", lambda _: "0" * 64)
        loaded.save(path)
    with pytest.raises(UserError, match="does not hold what was written"):
        FeatureTable.load(path)
    loaded.save(path)
    assert FeatureTable.load(path).provenance == {"by": "hand"}


def test_provenance_is_json_in_every_format(tmp_path: Path) -> None:
    table().save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        assert json.loads(str(file["provenance"])) == {"encoder": "resnet32", "sha256": table().digest()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_others_may_read_what_was_saved(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "plain").touch()
    table().save(tmp_path / f"t{suffix}")
    assert (tmp_path / f"t{suffix}").stat().st_mode == (tmp_path / "plain").stat().st_mode
