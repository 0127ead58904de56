"""What Python's functions take: a path as `Path` or text, and a classifier in whatever holds its weight and bias."""

import inspect
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn

import tailscope
from experiment_setups import TINY
from tailscope import verbs
from tailscope.errors import UserError
from tailscope.tables.table import LinearLayer
from tailscope.training.recipes import RECIPES

FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1))
"""
PATHS = {
    "Monitor": ["out"],
    "compare": ["data", "data_root", "out", "store"],
    "diagnose": ["ceiling_from", "checkpoint", "data", "data_root", "out", "store", "subset"],
    "features": ["checkpoint", "data", "data_root", "out", "store", "subset"],
    "geometry": ["data", "data_root", "out", "store"],
    "ladder": ["data", "data_root", "out", "store"],
    "load": ["data_root", "source"],
    "rebalance": ["checkpoint", "out", "to"],
    "report": ["out"],
    "subset": ["data", "data_root", "out"],
    "swap": ["data", "data_root", "out", "store"],
}


def stream():
    return np.random.default_rng(0)


def blobs(counts, seed=0, width=6):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    return (3 * np.eye(len(counts), width)[labels] + rng.normal(size=(len(labels), width))).astype("f4"), labels


@pytest.mark.parametrize("name", sorted({*tailscope.__all__} - {"FeatureTable", "UserError", "classifiers"}))
def test_every_parameter_that_takes_a_path_takes_text(name):
    parameters = inspect.signature(getattr(tailscope, name)).parameters
    found = [key for key, one in parameters.items() if re.search(r"\bPath\b", str(one.annotation))]
    assert sorted(found) == PATHS[name]
    assert [key for key in found if "str" not in str(parameters[key].annotation)] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, a subset of them, a checkpoint and its factory."""
    folder = tmp_path_factory.mktemp("paths")
    labels = np.repeat(np.arange(10), 40)
    images = stream().integers(0, 60, (400, 8, 8, 1)).astype("u1") + (labels * 15).astype("u1")[:, None, None, None]
    held = np.arange(400) % 4 == 0
    arrays = {"train": ~held, "test": held}
    np.savez(
        folder / "images.npz",
        **{f"{split}_images": images[rows] for split, rows in arrays.items()},
        **{f"{split}_labels": labels[rows] for split, rows in arrays.items()},
    )
    (folder / "net_of_paths.py").write_text(FACTORY)
    torch.manual_seed(0)
    layer = nn.Linear(64, 10)
    torch.save({"fc.weight": layer.weight.detach(), "fc.bias": layer.bias.detach()}, folder / "w.pth")
    verbs.subset(folder / "images.npz", profile="exp:5", out=folder / "drawn")
    return folder


@pytest.mark.parametrize("kind", [str, Path])
def test_text_and_paths_do_the_same(made, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    monkeypatch.setitem(RECIPES, "demo", TINY)
    data, out = kind(made / "images.npz"), kind(tmp_path / "out")
    assert tailscope.load(data, data_root=kind(made)).name == "images"
    network = {"checkpoint": kind(made / "w.pth"), "subset": kind(made / "drawn" / "subset.json")}
    options = {"data_root": kind(made), "store": kind(tmp_path), "device": "cpu"}
    written = tailscope.features(
        "net_of_paths:Net", data, kind(tmp_path / "f.npz"), split="train", part="train", **network, **options
    )
    table = tailscope.FeatureTable.load(kind(written.features))
    table.save(kind(tmp_path / "again.npz"))
    assert len(tailscope.FeatureTable.load(kind(tmp_path / "again.npz"))) == len(table) == written.rows
    first = tailscope.diagnose(
        model="net_of_paths:Net", data=data, out=out, report=False, permutations=0, **network, **options
    )
    patched = tailscope.rebalance(out, "net_of_paths:Net", kind(made / "w.pth"), to=kind(tmp_path / "new.pth"))
    assert patched == tmp_path / "new.pth"
    assert patched.is_file()
    files = [kind(tmp_path / "out" / "features" / f"{part}.npz") for part in ("train", "unseen")]
    given = {"classifier": kind(tmp_path / "out" / "rebalanced.npz"), "permutations": 0}
    beside = tailscope.diagnose(*files, test=kind(tmp_path / "out" / "features" / "test.npz"), **given)
    assert beside["counts"] == first["counts"]
    with pytest.raises(UserError, match="no such file"):
        tailscope.diagnose(*files, ceiling_from=kind(tmp_path / "no.json"), **given)
    assert first.report(kind(tmp_path / "page.html")).is_file()


@pytest.mark.parametrize("kind", [str, Path])
def test_experiments_take_text_and_paths(made, kind, monkeypatch, tmp_path):
    monkeypatch.setitem(RECIPES, "demo", TINY)
    given = {"profile": "exp:5", "recipe": "demo", "seeds": 1, "device": "cpu"}
    places = {"out": kind(tmp_path / "out"), "store": kind(tmp_path / "store"), "data_root": kind(made)}
    result = tailscope.swap(kind(made / "images.npz"), backbones="lt", **given, **places)
    assert result["dataset"]["name"] == "images"
    assert (tmp_path / "out" / "swap.json").is_file()
    assert verbs.report(kind(tmp_path / "out"), figures=False).is_file()
    shutil.rmtree(tmp_path / "store")


# -- a classifier ---------------------------------------------------------------------------------------------------


def linear_of(weight, bias):
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(bias))
    return layer


def test_a_classifier_comes_in_many_forms_that_are_the_same():
    (x, y), unseen = blobs([60, 30, 8, 6]), blobs([30] * 4, seed=1)
    fitted = LogisticRegression().fit(x, y)
    weight, bias = fitted.coef_.astype("f4"), fitted.intercept_.astype("f4")
    forms = {
        "layer": LinearLayer.from_arrays(weight, bias),
        "pair": (weight, bias),
        "pair of tensors": (torch.from_numpy(weight), torch.from_numpy(bias)),
        "pair of lists": (weight.tolist(), bias.tolist()),
        "mapping": {"weight": weight, "bias": bias},
        "scikit-learn's names": {"coef_": weight, "intercept_": bias},
        "torch": linear_of(weight, bias),
        "estimator": fitted,
    }
    right = [float((fitted.predict(unseen[0]) == unseen[1]).mean())] * len(forms)
    found = {
        name: tailscope.diagnose((x, y), unseen, classifier=form, permutations=0)["accuracy"]["current"]["mean"]
        for name, form in forms.items()
    }
    assert list(found.values()) == pytest.approx(right), found


def test_a_classifier_without_a_bias_has_none():
    weight = np.eye(4, 6, dtype="f4")
    for form in ((weight, None), {"weight": weight}, linear_of(weight, None)):
        made = LinearLayer.of(form)
        assert made.weight.tolist() == weight.tolist()
        assert made.bias.tolist() == [0.0] * 4


def test_one_classifier_for_each_encoder():
    (x, y), (u, v) = blobs([60, 30, 8, 6]), blobs([30] * 4, seed=1)
    pair, layer = (np.eye(4, 6), np.zeros(4)), linear_of(np.eye(4, 6), np.zeros(4))
    for given in ([pair, layer], (layer, layer), [pair, pair]):
        both = tailscope.diagnose([(x, y), (x[:, ::-1].copy(), y)], [(u, v), (u[:, ::-1].copy(), v)],
                                  classifier=given, permutations=0)  # fmt: skip
        assert len(both["encoders"]) == 2


def test_an_estimators_classes_are_matched_by_name():
    (x, y), (u, v) = blobs([60, 30, 8, 6]), blobs([30] * 4, seed=1)
    names = np.array(["dog", "ant", "cat", "bee"])
    fitted = LogisticRegression().fit(x, names[y])
    found = tailscope.diagnose((x, names[y]), (u, names[v]), classifier=fitted, permutations=0)
    assert found["accuracy"]["current"]["mean"] == pytest.approx((fitted.predict(u) == names[v]).mean())
    positions = LogisticRegression().fit(x, y)
    tables = [tailscope.FeatureTable.from_arrays(*two, class_names=names) for two in ((x, y), (u, v))]
    found = tailscope.diagnose(*tables, classifier=positions, permutations=0)
    assert found["accuracy"]["current"]["mean"] == pytest.approx((positions.predict(u) == v).mean())


def test_two_classes_have_one_row_in_scikit_learn():
    x, y = blobs([40, 20])
    for fitted in (LogisticRegression().fit(x, y), RidgeClassifier().fit(x, y)):
        layer = LinearLayer.of(fitted)
        assert (layer.logits(torch.from_numpy(x)).argmax(1).numpy() == fitted.predict(x)).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (SVC(kernel="linear"), "SVC does not choose the class with the largest"),
        (LinearRegression(), "a LinearRegression; expected a file, a pair"),
        (make_pipeline(StandardScaler(), LogisticRegression()), "a Pipeline; expected a file"),
        (nn.ReLU(), "a ReLU; expected a file"),
        (3, "a int; expected a file"),
        ({"bias": [0.0]}, "no field 'weight'"),
        ((np.eye(3), np.zeros(4)), "bias has length 4"),
    ],
)
def test_what_is_no_classifier_is_one_line(given, said):
    x, y = blobs([30, 30, 30])
    given = given.fit(x, y) if hasattr(given, "fit") else given
    with pytest.raises(UserError, match=f"the classifier: {said}"):
        tailscope.diagnose((x, y), (x, y), classifier=given)


def test_a_diagnosis_says_which_classes_its_gains_leave_out():
    train, unseen, test = blobs([60, 30, 8, 6]), blobs([0, 30, 30, 30], seed=1), blobs([30] * 4, seed=2)
    found = tailscope.diagnose(train, unseen, test=test, permutations=0)
    first = found["verdict"]["caveats"][0]
    assert first.startswith("“0” has too few unseen samples: accuracies and gains leave it out")
    assert first in found.summary().splitlines()[1]
    assert "unseen" not in found["accuracy"]["rebalanced"]["classifier"]  # such a one would not know the class
    whole = tailscope.diagnose(train, blobs([30] * 4, seed=1), test=test, permutations=0)
    assert not any("too few unseen" in text for text in whole["verdict"]["caveats"])
