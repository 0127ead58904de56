"""The files and arrays that people bring: labels of every kind and every format give what plain labels give."""

import csv
import json
from collections import OrderedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression

import tailscope
from tailscope.diagnosis.inputs import read
from tailscope.errors import UserError
from tailscope.tables.table import FeatureTable, LinearLayer, align

COUNTS, UNSEEN = (60, 40, 20, 12, 8, 6), (30,) * 6
NAMES = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])


def draw(counts, seed):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    return (np.random.default_rng(99).normal(size=(6, 8))[y] + rng.normal(size=(len(y), 8))).astype(np.float32), y


X, Y = draw(COUNTS, 0)
U, V = draw(UNSEEN, 1)


def numbers(result):
    """Return accuracies and angles of a diagnosis; permutations depend on the names of classes, so nothing of these."""
    gap, bottleneck = (result["verdict"][key] for key in ("classifier_gap", "bottleneck"))
    fields = ("train_count", "unseen_count", "spread_train_deg", "center_shift_deg", "escape_rate")
    classes = [[round(entry[field], 9) for field in fields] for entry in result["classes"]]
    return json.loads(json.dumps([result["accuracy"], bottleneck, gap, classes]))


@pytest.fixture(scope="module")
def plain():
    return numbers(tailscope.diagnose((X, Y), (U, V), permutations=19))


LABELS = {
    "from one": (lambda y: y + 1, "123456"),
    "gaps": (lambda y: y * 10, ("0", "10", "20", "30", "40", "50")),
    "far": (lambda y: y * 10**17, tuple(str(k * 10**17) for k in range(6))),
    "column": (lambda y: y[:, None].astype("u1"), "012345"),
    "row": (lambda y: y[None], "012345"),
    "big-endian": (lambda y: y.astype(">i2") + 1, "123456"),
    "uint64": (lambda y: y.astype("u8"), "012345"),
    "whole floats": (lambda y: y + 1.0, "123456"),
    "float16": (lambda y: y.astype("f2"), "012345"),
    "names": (lambda y: NAMES[y], tuple(NAMES)),
    "bytes": (lambda y: NAMES.astype("S")[y], tuple(NAMES)),
    "names in a column": (lambda y: NAMES[y][:, None], tuple(NAMES)),
}


@pytest.mark.parametrize(("change", "names"), LABELS.values(), ids=LABELS)
def test_labels_of_every_kind_give_the_plain_numbers(tailscope_, tmp_path, plain, change, names):
    np.savez(tmp_path / "train.npz", features=X, labels=change(Y))
    np.savez(tmp_path / "unseen.npz", features=U, labels=change(V))
    given = ("--train", tmp_path / "train.npz", "--unseen", tmp_path / "unseen.npz", "--out", tmp_path / "out")
    ended = tailscope_("diagnose", *given, "--permutations", 19, "--no-report")
    assert (ended.code, ended.err) == (0, "")
    result = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert result["dataset"]["class_names"] == list(names)
    assert numbers(result) == plain


def as_csv(path, delimiter=",", encoding="utf-8", newline="\n"):
    with path.open("w", encoding=encoding, newline=newline) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow([*(f"f{i}" for i in range(8)), "label"])
        writer.writerows([*map(repr, map(float, x)), y] for x, y in zip(X, Y, strict=True))


def embedded_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "embedding", "target"])
        for k, (x, y) in enumerate(zip(X.astype(float), Y, strict=True)):
            writer.writerow([f"row {k}\nof it, all", str(x.tolist()) if k % 2 else str(x.tolist()).replace(",", ""), y])


def single(path):
    np.save(path, X)
    np.save(path.with_name(path.name.replace("features", "labels").replace("X", "y")), Y)


def tensors(path):
    torch.save({"features": torch.tensor(X), "labels": torch.tensor(Y)}, path)


FORMATS = {
    "labels.parquet": lambda p: pq.write_table(pa.table({"features": pa.array(list(X)), "labels": Y}), p),
    "fixed.parquet": lambda p: pq.write_table(
        pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 8), "target": Y}), p
    ),
    "columns.parquet": lambda p: pq.write_table(pa.table({"label": Y, **{f"x{i + 1}": X[:, i] for i in range(8)}}), p),
    "category.parquet": lambda p: pq.write_table(
        pa.table({"label": pa.array([str(y) for y in Y]).dictionary_encode(), "features": pa.array(list(X))}), p
    ),
    "dict.pt": tensors,
    "upper.PTH": tensors,
    "arrays.pt": lambda p: torch.save(OrderedDict(X=X, y=Y.astype(">i4")), p),
    "fortran.pt": lambda p: torch.save({"embeddings": np.asfortranarray(X), "targets": Y.tolist()}, p),
    "pair.pt": lambda p: torch.save((torch.tensor(X, requires_grad=True), torch.tensor(Y)), p),
    "named.pt": lambda p: torch.save({"features": X, "labels": np.array([str(y) for y in Y])}, p),
    "features.npy": single,
    "train_features.npy": single,
    "X_train.npy": single,
    "alias.npz": lambda p: np.savez_compressed(p, X=X, y=Y),
    "column.safetensors": lambda p: save_file({"features": X, "labels": Y[:, None].astype("u1")}, p),
    "table.csv": as_csv,
    "table.tsv": lambda p: as_csv(p, "\t"),
    "semicolons.csv": lambda p: as_csv(p, ";", newline="\r\n"),
    "excel.csv": lambda p: as_csv(p, encoding="utf-8-sig", newline="\r\n"),
    "unicode.csv": lambda p: as_csv(p, "\t", encoding="utf-16"),
    "embedded.csv": embedded_csv,
}  # fmt: skip


@pytest.mark.parametrize(("name", "write"), FORMATS.items(), ids=FORMATS)
def test_the_same_table_in_every_format(tmp_path, name, write):
    write(tmp_path / name)
    loaded, _ = align(FeatureTable.load(tmp_path / name), FeatureTable.of((U, V)))
    np.testing.assert_array_equal(loaded.features.numpy(), X)
    np.testing.assert_array_equal(loaded.labels.numpy(), Y)
    assert loaded.class_names == tuple("012345")
    assert (loaded.notes != ()) == (name == "embedded.csv")  # its column of texts is not read


class Frame:
    """What is used of a DataFrame of pandas or polars."""

    def __init__(self, content):
        self.content, self.columns = content, list(content)

    def __getitem__(self, name):
        return self.content[name]

    def to_numpy(self):
        return np.column_stack(list(self.content.values()))


def test_what_python_holds(plain):
    frame = Frame({"f0": X[:, 0], **{f"f{i}": X[:, i] for i in range(7, 0, -1)}, "label": Y.astype(object)})
    listed = Frame({"embedding": np.array([*map(list, X), None], dtype=object)[:-1], "y": np.array(list("abcdef"))[Y]})
    bare = Frame(dict(enumerate(X.T)))
    for given in [
        (X, Y),
        (torch.tensor(X), torch.tensor(Y)),
        (X, Y.tolist()),
        (bare, Y),
        {"embeddings": X, "targets": Y},
        frame,
    ]:
        assert numbers(tailscope.diagnose(given, (U, V), permutations=19)) == plain
    assert align(FeatureTable.of(listed))[0].class_names == tuple("abcdef")
    two = tailscope.diagnose([(X, Y), (X, Y)], [(U, V), (U, V)], permutations=0, verdict=False)
    assert list(two["encoders"]) == ["train", "train 2"]


def test_a_real_dataframe():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=[f"f{i}" for i in range(8)]).assign(label=pandas.Categorical(NAMES[Y]), note=1)
    table = FeatureTable.of(frame)
    np.testing.assert_array_equal(table.features.numpy(), X)
    assert table.class_names == tuple(NAMES)
    assert "not read: 'note'" in table.notes[0]
    pair = FeatureTable.of((frame[[f"f{i}" for i in range(8)]], frame["label"]))
    assert torch.equal(pair.labels, table.labels)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "train: a int; expected a file, a pair"),
        ((X, Y, Y), "train: a tuple; expected"),
        ((X, [*Y[:-1].tolist(), None]), "labels: 1 of 146 rows hold no number or text, the first is row 145"),
        ((X, np.array([*NAMES[Y][:-1], np.nan], dtype=object)), "1 of 146 rows hold no number or text"),
        ((X, np.array([*Y[:-1], "ant"], dtype=object)), "1 rows hold a name, the others a number"),
        ((X, np.array([10**30] * len(X))), "a number is too large; labels are below 2**63"),
        (([[0.0], [1.0, 2.0]], [0, 1]), "features is no array"),
        ({"features": X, "label": Y, "target": Y}, "holds both 'label' and 'target'"),
        ({"X": X, "embeddings": X, "labels": Y}, "holds both 'embeddings' and 'X'"),
        ((X, np.ma.masked_equal(Y, 5)), "labels: 6 values are masked; leave these rows out"),
        ((np.ma.masked_array(X, X[0, 0] == X), Y), "features: 1 values are masked"),
        ((torch.tensor(X).to_sparse(), Y), "features is no plain dense tensor ("),
        ((X, torch.tensor(Y).to_sparse()), "labels is no plain dense tensor ("),
        ((torch.empty(146, 8, device="meta"), Y), "features is no plain dense tensor ("),
        ({"features": X, "labels": Y, "provenance": "hello"}, "provenance is not a JSON object"),
        ({"feats": X, "labels": Y}, "no field 'features'; needs features, labels, and holds 'feats' ndarray [146, 8]"),
        (Frame({"a": NAMES[Y], "label": Y}), "no field 'features'"),
        (Frame({"f0": X[:, 0], "f2": X[:, 0], "label": Y}), "no column 'f1'"),
        (Frame({"f0": X[:, 0], "label": Y, "y": Y}), "holds both 'label' and 'y'"),
    ],
)
def test_python_objects_that_are_no_table(given, says):
    with pytest.raises(UserError) as caught:
        FeatureTable.of(given, "train")
    assert str(caught.value).startswith("train")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_held_out_set_that_lacks_a_class(tailscope_, tmp_path):
    kept = V != 2
    np.savez(tmp_path / "train.npz", features=X, labels=NAMES[Y])
    np.savez(tmp_path / "unseen.npz", features=U[kept], labels=NAMES[V[kept]])
    names = NAMES[[5, 0, 1, 3, 4]]
    codes = np.array([1, 2, -1, 3, 4, 0])[V[kept]]
    np.savez(tmp_path / "listed.npz", features=U[kept], labels=codes, class_names=names)
    for unseen in ("unseen", "listed"):
        inputs = read(tmp_path / "train.npz", tmp_path / f"{unseen}.npz")
        np.testing.assert_array_equal(inputs.unseen.labels.numpy(), V[kept])
        assert f"{unseen}.npz: no samples of 'cat', so nothing is said about them there" in inputs.warnings[-1]
    given = ("--train", tmp_path / "train.npz", "--unseen", tmp_path / "listed.npz", "--out", tmp_path / "out")
    assert tailscope_("diagnose", *given, "--permutations", 19, "--no-report").code == 0
    given = ("--train", tmp_path / "listed.npz", "--unseen", tmp_path / "train.npz", "--out", tmp_path / "out")
    ended = tailscope_("diagnose", *given)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "has samples of 'cat', which" in ended.err


def test_labels_of_ten_and_two_are_ordered_as_numbers():
    table = FeatureTable.from_arrays(np.zeros((3, 1)), [10, 2, 1])
    assert align(table)[0].class_names == ("1", "2", "10")


def test_text_in_a_csv_that_looks_like_numbers_stays_text(tmp_path):
    (tmp_path / "t.csv").write_text("f0,label\n1,007\n2,7\n3,\u00e9\n")
    assert FeatureTable.load(tmp_path / "t.csv").class_names == ("007", "7", "\u00e9")
    (tmp_path / "t.csv").write_text("f0,label\n1,3.0\n2,7\n")
    assert FeatureTable.load(tmp_path / "t.csv").labels.tolist() == [3, 7]


@pytest.mark.parametrize("missing", ["", " ", "NA", "n/a", "nan", "NaN", "None", "null", "<NA>"])
def test_missing_labels_beside_numbers_are_no_class(missing):
    with pytest.raises(UserError, match=r"in row 2 \(and 1 more\) is empty"):
        FeatureTable.from_arrays(np.zeros((5, 1)), ["0", "1", missing, "2.0", missing])


def test_words_for_nothing_are_names_among_names():
    table = FeatureTable.from_arrays(np.zeros((4, 1)), ["None", "ant", "NA", "null"])
    assert table.class_names == ("NA", "None", "ant", "null")


def test_the_fields_own_name_wins_and_the_other_is_named(tmp_path):
    np.savez(tmp_path / "t.npz", features=X, labels=Y, y=Y[::-1], X=X + 1)
    (tmp_path / "t.csv").write_text("a,b,labels,y\n1,2,0,1\n3,4,1,0\n")
    table = FeatureTable.load(tmp_path / "t.npz")
    assert torch.equal(table.labels, torch.tensor(Y))
    np.testing.assert_array_equal(table.features.numpy(), X)
    assert table.notes == (f"{tmp_path / 't.npz'}: not read: 'y', 'X'",)
    table = FeatureTable.load(tmp_path / "t.csv")
    assert table.features.tolist() == [[1, 2], [3, 4]]  # what else may be the labels is no feature
    assert table.notes[-1] == f"{tmp_path / 't.csv'}: not read: 'y'"
    lists = Frame({"features": np.array([*map(list, X), None], dtype=object)[:-1], "X": X[:, 0], "label": Y})
    assert "not read: 'X'" in FeatureTable.of(lists).notes[0]


def test_an_opened_file_of_ours_is_what_the_file_is(tmp_path, monkeypatch):
    ids = [f"i{k}" for k in range(len(X))]
    FeatureTable.from_arrays(X, Y, ids=ids, provenance={"data": "d"}).save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as opened:
        table = FeatureTable.of(opened)
        fields = dict(opened)
    assert table.provenance == {"data": "d"} == FeatureTable.load(tmp_path / "t.npz").provenance
    with pytest.raises(UserError, match="does not hold what was written"):
        FeatureTable.of({**fields, "features": X + 1})
    del fields["provenance"]
    monkeypatch.setattr(FeatureTable, "digest", lambda _: pytest.fail("hashed, though no digest was written"))
    FeatureTable.of(fields)
    np.savez(tmp_path / "foreign.npz", **fields)
    FeatureTable.load(tmp_path / "foreign.npz")


def test_columns_without_numbers_and_what_is_left_out_are_said(tmp_path):
    path = tmp_path / "iris.csv"
    path.write_text(",length,width,species_id,label\n0,1.5,2,x,a\n1,2.5,3,x,b\n")
    table = FeatureTable.load(path)
    assert table.features.tolist() == [[1.5, 2.0], [2.5, 3.0]]
    assert table.notes == (
        f"{path}: taken as the features: 2 columns, 'length', 'width'",
        f"{path}: not read: '', 'species_id'",
    )
    np.savez(tmp_path / "more.npz", features=X, labels=Y, logits=X, paths=np.array([{}], dtype=object))
    assert FeatureTable.load(tmp_path / "more.npz").notes == (f"{tmp_path / 'more.npz'}: not read: 'logits', 'paths'",)
    assert read(tmp_path / "more.npz", (U, V)).warnings[-1].endswith("not read: 'logits', 'paths'")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("f0,f1,label\n1,2,0\n1,2\n", "line 3 has 2 cells, but the first line names 3"),
        ("f0,label\n1,0\nabc,1\n", "line 3, column 'f0': 'abc' is no number"),
        ("1,2,0\n3,4,1\n", "no names; the first line names the columns"),
        ("f0,label\n", "no samples"),
        ("f0,label\n1,a\n2,\n", "label '' in row 1 is empty"),
        ("f0,label\n1,0\n2,NA\n3,NA\n", "label 'NA' in row 1 (and 1 more) is empty; leave unlabelled rows out"),
        ("f0,label\n1,None\n2,7\n", "label 'None' in row 0 is empty"),
        ("f0,label\n1,a\n2,nan\n3,<NA>\n", "label 'nan' in row 1 (and 1 more) is empty"),
        ("f0,f1,f2,label\n1,1,,0\n1,1,1,1\n", "line 2, column 'f2': '' is no number"),
        ("f0,f1,f2,label\n1,,1,0\n1,1,1,1\n", "line 2, column 'f1': '' is no number"),
        ("e_0,e_1,label\n,,0\n1,1,1\n", "line 2, column 'e_0': '' is no number"),
        ("f0,label\n1,0\nnan,1\n", "1 of 2 rows hold NaN or infinity"),
        ("f0,label,label\n1,0,0\n", "2 columns are called 'label'"),
        ("f0,label,target\n1,0,0\n", "holds both 'label' and 'target'"),
        ("f0,f1,g0,g1,label\n1,1,1,1,0\n", "from 'f0' and from 'g0' may both be"),
        ("f0,f1\n1,2\n", "no field 'labels'; needs features, labels, and holds 'f0' number, 'f1' number"),
        ('embedding,label\n"[1, 2]",0\n"[1]",1\n', "differ in length"),
        ('embedding,label\n"[1 ... 2]",0\n', "'[1 ... 2]' is no list of numbers"),
        ("embedding,label\n1,0\n", "column 'embedding' is number; expected lists"),
        ('f0,label\n"1,0\n', "not a readable .csv"),
    ],
)  # fmt: skip
def test_tables_that_are_refused(tmp_path, text, says):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        FeatureTable.load(tmp_path / "t.csv")
    assert says in str(caught.value)
    (tmp_path / "t.csv").write_bytes(text.replace("label", "l\xe4bel").encode("latin-1"))
    with pytest.raises(UserError, match=r"t.csv: "):
        FeatureTable.load(tmp_path / "t.csv")


def test_labels_beside_an_npy(tmp_path):
    np.save(tmp_path / "features.npy", X)
    with pytest.raises(UserError, match=r"a single array, float32 \[146, 8\]; its labels are .* in labels.npy or"):
        FeatureTable.load(tmp_path / "features.npy")
    for name in ("labels", "targets"):
        np.save(tmp_path / f"{name}.npy", Y)
    with pytest.raises(UserError, match=r"may be labels.npy or targets.npy"):
        FeatureTable.load(tmp_path / "features.npy")
    (tmp_path / "targets.npy").unlink()
    (tmp_path / "labels.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"labels.npy: the file is empty"):
        FeatureTable.load(tmp_path / "features.npy")
    torch.save(torch.tensor(X), tmp_path / "X.pt")
    torch.save(Y.tolist(), tmp_path / "y.pt")
    assert FeatureTable.load(tmp_path / "X.pt").labels.tolist() == Y.tolist()
    with pytest.raises(UserError, match=r"single array.*expected the fields weight"):
        LinearLayer.load(tmp_path / "X.pt")


def test_a_file_of_another_kind_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "f.npz", feats=X, y=Y)
    torch.save({"train": {"features": X}, "epoch": 3}, tmp_path / "f.pt")
    save_file({"feats": X}, tmp_path / "f.safetensors")
    holds = {
        "npz": "holds 'feats' float32 [146, 8], 'y' int64 [146]",
        "pt": "holds 'train' a dict, 'epoch' a int",
        "safetensors": "holds 'feats' F32 [146, 8]",
    }
    for suffix, words in holds.items():
        with pytest.raises(UserError) as caught:
            FeatureTable.load(tmp_path / f"f.{suffix}")
        assert "no field 'features'" in str(caught.value)
        assert words in str(caught.value)


def binary():
    both = np.isin(Y, (0, 1))
    return X[both], Y[both]


@pytest.mark.parametrize("names", [(0, 1), (3, 7), ("ant", "bee"), (3.0, 7.0), (False, True)])
def test_scikit_learns_classifier_of_two_classes(tmp_path, names):
    x, y = binary()
    y = np.array(names)[y]
    fitted = LogisticRegression(C=0.1).fit(x, y)
    np.savez(tmp_path / "a.npz", coef_=fitted.coef_, intercept_=fitted.intercept_, classes_=fitted.classes_)
    np.savez(tmp_path / "b.npz", weight=fitted.coef_, bias=fitted.intercept_)
    torch.save({"weight": fitted.coef_, "bias": fitted.intercept_}, tmp_path / "c.pt")
    for name in ("a.npz", "b.npz", "c.pt"):
        inputs = read((x, y), (x, y), classifier=tmp_path / name)
        logits = inputs.classifier.logits(inputs.train.features)
        assert logits.shape == (len(x), 2)
        np.testing.assert_allclose(logits.softmax(dim=1).numpy(), fitted.predict_proba(x), rtol=1e-5)
        result = tailscope.diagnose((x, y), (x, y), classifier=tmp_path / name, permutations=0)
        assert result["accuracy"]["current"]["mean"] == pytest.approx(fitted.score(x, y))
    with pytest.raises(UserError, match="a classifier of 2 classes, but train has 6"):
        read((X, Y), (U, V), classifier=tmp_path / "b.npz")


def test_classes_that_are_no_whole_numbers(tmp_path):
    np.savez(tmp_path / "a.npz", coef_=np.zeros((2, 8)), intercept_=np.zeros(2), classes_=[0.5, 1])
    with pytest.raises(UserError, match=r"class_names: label 0.5 in row 0 is no whole number"):
        LinearLayer.load(tmp_path / "a.npz")


def test_a_tables_own_file_keeps_the_names_that_its_labels_were(tmp_path):
    for labels in (Y * 10, NAMES[Y]):
        table = align(FeatureTable.of((X, labels)))[0]
        table.save(tmp_path / "t.npz")
        again = FeatureTable.load(tmp_path / "t.npz")
        assert again.class_names == table.class_names
        assert torch.equal(again.labels, table.labels)


def test_the_namespace_of_aliases_has_no_name_twice() -> None:
    from tailscope.tables.arrays import ALIASES

    every = [name for names in ALIASES.values() for name in names]
    assert len(every) == len(set(every))
    assert all(names[0] == field for field, names in ALIASES.items())
