"""Tables and classifiers that have to fit together: rows, classes by name, widths; and classifier files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tailscope.errors import UserError
from tailscope.tables.table import FeatureTable, LinearLayer, align


def test_take_keeps_rows_together() -> None:
    rows = FeatureTable.from_arrays(
        np.arange(12.0).reshape(4, 3), [0, 1, 1, 0], ids=["a/1", "b/22", "b/é", "a/4"], groups=[7, 7, 8, 9]
    )
    picked = rows.take([2, 0])
    assert picked.features.tolist() == [[6.0, 7.0, 8.0], [0.0, 1.0, 2.0]]
    assert picked.labels.tolist() == [1, 0]
    assert picked.ids.tolist() == ["b/é", "a/1"]
    assert picked.bursts.tolist() == [8, 7]


def test_align_matches_classes_by_name() -> None:
    rng = np.random.default_rng(0)
    names = [f"class {k}" for k in range(50)]
    order = rng.permutation(50)
    labels = rng.integers(0, 50, 200)
    train = FeatureTable.from_arrays(rng.normal(size=(200, 3)), labels, class_names=names)
    unseen = FeatureTable.from_arrays(
        rng.normal(size=(200, 3)), np.argsort(order)[labels], class_names=[names[k] for k in order]
    )
    a, b = align(train, unseen)
    assert torch.equal(a.labels, b.labels)
    assert a.class_names == b.class_names == tuple(names)


def test_align_without_names_takes_labels_for_names() -> None:
    a = FeatureTable.from_arrays(np.zeros((3, 3)), [9_999, 2, 10])
    b = FeatureTable.from_arrays(np.zeros((2, 3)), [10, 9_999])
    first, second = align(a, b)
    assert first.class_names == second.class_names == ("2", "10", "9999")
    assert (first.labels.tolist(), second.labels.tolist()) == ([2, 0, 1], [1, 2])
    assert second.counts() == [0, 1, 1]


def test_numbers_and_the_same_numbers_as_text_match_but_not_beside_a_list_of_names() -> None:
    numbers = FeatureTable.from_arrays(np.zeros((3, 1)), [3, 1, 2])
    texts = FeatureTable.from_arrays(np.zeros((3, 1)), ["3", "1", "2"])
    indexed = FeatureTable.from_arrays(np.zeros((3, 1)), [2, 0, 1], class_names=["1", "2", "3"])
    plain = FeatureTable.from_arrays(np.zeros((3, 1)), [2, 0, 1], class_names=["0", "1", "2"])
    for first, second in [(numbers, texts), (texts, numbers), (texts, indexed), (indexed, texts)]:
        assert align(first, second)[1].labels.tolist() == align(first)[0].labels.tolist()
    with pytest.raises(UserError, match="no class_names, but"):  # 1 may be the first name, or the second
        align(indexed, numbers)
    assert align(plain, FeatureTable.from_arrays(np.zeros((1, 1)), [1]))[1].labels.tolist() == [1]


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"class_names": list("ab")}, {"class_names": list("bc")}, r"two: has samples of 'c', which one has not among"),
        ({}, {"labels": [0, 2]}, r"two: has samples of '2', which one has not among its classes \('0', '1'\)"),
        ({"class_names": list("ab")}, {}, r"two: no class_names, but one has them"),
        ({}, {"class_names": list("ab")}, r"one: no class_names, but two has them"),
        ({}, {"features": np.zeros((2, 4))}, r"two: d = 4 features, but one has d = 3"),
        ({"labels": [0, 0]}, {"labels": [0, 0]}, r"one: a single class"),
    ],
)
def test_tables_that_do_not_fit(first: dict, second: dict, says: str) -> None:
    plain = {"features": np.zeros((2, 3)), "labels": [0, 1]}
    with pytest.raises(UserError, match=says):
        align(
            FeatureTable.from_arrays(**{**plain, **first}, source="one"),
            FeatureTable.from_arrays(**{**plain, **second}, source="two"),
        )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_classifier_files(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    path = tmp_path / f"c{suffix}"
    LinearLayer.from_arrays(weight, bias, class_names=list("wxyz")).save(path)
    loaded = LinearLayer.load(path)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded.logits(torch.from_numpy(x)), x @ weight.T + bias, rtol=1e-5)
    reordered = loaded.aligned(list("zywx"), 3, "features.npz")
    np.testing.assert_allclose(
        reordered.logits(torch.from_numpy(x)), (x @ weight.T + bias)[:, [3, 2, 0, 1]], rtol=1e-5, atol=1e-6
    )
    unnamed = LinearLayer.from_arrays(weight)
    assert unnamed.bias.tolist() == [0.0] * 4
    assert unnamed.aligned(list("abcd"), 3, "features.npz").class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight": np.zeros(3)}, "weight has shape (3,); expected [C, d]"),
        ({"bias": np.zeros(3)}, "bias has length 3, but weight has 2 rows"),
        ({"bias": np.zeros((2, 1))}, "bias has shape (2, 1); expected [C]"),
        ({"bias": np.array([0.0, np.nan])}, "bias: 1 of 2 rows hold NaN"),
        ({"weight": np.full((2, 3), np.inf)}, "weight: 2 of 2 rows hold NaN or infinity, the first is row 0"),
        ({"class_names": np.array(["a"])}, "class_names has length 1"),
        ({"weight": None}, "no field 'weight'"),
    ],
)
def test_bad_classifier_files(tmp_path: Path, fields: dict, says: str) -> None:
    path = tmp_path / "c.npz"
    good = {"weight": np.zeros((2, 3)), "bias": np.zeros(2)}
    np.savez(path, **{k: v for k, v in {**good, **fields}.items() if v is not None})
    with pytest.raises(UserError) as caught:
        LinearLayer.load(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("names", "width", "says"),
    [
        (["a", "b"], 4, "weight takes d = 3, but t.npz has d = 4"),
        (["a", "b", "c"], 3, "a classifier of 2 classes, but t.npz has 3"),
        (["a", "c"], 3, "t.npz: its class_names are not those of the classifier: it lacks 'b' and has 'c'"),
    ],
)
def test_a_classifier_that_does_not_fit(names: list[str], width: int, says: str) -> None:
    classifier = LinearLayer.from_arrays(np.zeros((2, 3)), class_names=["a", "b"])
    with pytest.raises(UserError) as caught:
        classifier.aligned(names, width, "t.npz")
    assert says in str(caught.value)
