"""The samples to look at, against scikit-learn, written-out loops and planted mistakes."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import tailscope
from diagnosis_cases import CENTRES, CLASSES, FEW, UNSEEN, around, head_biased, separable, table
from tailscope.diagnosis import samples

NAMES = [f"class {k}" for k in range(CLASSES)]
PLANTED = {7: 4, 120: 8, 333: 0}  # unseen rows and the labels that they get instead of 0, 2 and 6


@pytest.fixture(scope="module")
def given():
    """Training and unseen samples and a classifier that favours head classes; three unseen labels are wrong."""
    train, (features, labels) = separable()
    labels = labels.copy()
    for row, label in PLANTED.items():
        labels[row] = label
    ids = np.array([f"img/{k}.jpg" for k in range(len(labels))])
    return table(*train, class_names=NAMES), table(features, labels, class_names=NAMES, ids=ids), head_biased()


@pytest.fixture(scope="module")
def found(given):
    train, unseen, classifier = given
    return tailscope.diagnose(train, unseen, classifier=classifier, **FEW)["drilldown"]


@pytest.fixture(scope="module")
def scores(given):
    _, unseen, classifier = given
    return unseen.features.numpy() @ classifier.weight.numpy().T + classifier.bias.numpy()


def test_confusions_are_those_of_scikit_learn(given, found, scores):
    labels, predicted = given[1].labels.numpy(), scores.argmax(axis=1)
    expected = confusion_matrix(labels, predicted, labels=range(CLASSES))
    assert found["confusions"]["matrix"] == expected.tolist()
    np.fill_diagonal(expected, 0)
    assert found["confusions"]["pairs"] == (expected > 0).sum()
    top = found["confusions"]["top"]
    assert [entry["count"] for entry in top] == sorted(expected[expected > 0].tolist(), reverse=True)[: samples.TOP]
    first = top[0]
    cell = expected[NAMES.index(first["true"]), NAMES.index(first["predicted"])]
    assert (first["count"], first["share"]) == (cell, cell / (labels == NAMES.index(first["true"])).sum())


def test_precision_recall_and_f1_are_those_of_scikit_learn(given, found, scores):
    expected = precision_recall_fscore_support(given[1].labels.numpy(), scores.argmax(axis=1))
    for name, values in zip(("precision", "recall", "f1", "scored"), expected, strict=True):
        assert [entry[name] for entry in found["classes"]] == pytest.approx(values.tolist())


def test_nearest_misses_are_wrong_by_the_smallest_margin(given, found, scores):
    labels = given[1].labels.numpy()
    for k, entry in enumerate(found["classes"]):
        wrong = [i for i in np.flatnonzero(labels == k) if scores[i].argmax() != k]
        wrong.sort(key=lambda i: scores[i].max() - scores[i, labels[i]])
        kind = entry["samples"]["nearest_misses"]
        assert kind["count"] == len(wrong)
        assert [one["row"] for one in kind["first"]] == wrong[: samples.LISTED]
        for one in kind["first"]:
            shares = np.exp(scores[one["row"]] - scores[one["row"]].max())
            shares /= shares.sum()
            assert one["id"] == f"img/{one['row']}.jpg"
            assert one["predicted"] == NAMES[shares.argmax()]
            assert one["confidence"] == pytest.approx(shares.max(), rel=1e-4)
            assert one["true_probability"] == pytest.approx(shares[k], rel=1e-3)


def test_the_farthest_samples_have_the_largest_angles_to_the_mean_of_all_samples(given, found):
    train, unseen, _ = given
    for k, entry in enumerate(found["classes"]):
        own = unseen.labels.numpy() == k
        rows = unseen.features.numpy()[own].astype(float)
        centre = np.concatenate([train.features.numpy()[train.labels.numpy() == k].astype(float), rows]).mean(axis=0)
        cosines = rows @ centre / np.linalg.norm(rows, axis=1) / np.linalg.norm(centre)
        expected = np.sort(np.degrees(np.arccos(cosines)))[::-1][: samples.LISTED]
        listed = [one["angle_deg"] for one in entry["samples"]["farthest_out"]["first"]]
        assert listed == pytest.approx(expected.tolist(), abs=1e-3)


def test_planted_wrong_labels_are_found_with_their_true_classes(found):
    doubted = {
        one["row"]: one["suspected"]
        for entry in found["classes"]
        for one in entry["samples"]["likely_mislabelled"]["first"]
    }
    assert doubted == {7: "class 0", 120: "class 2", 333: "class 6"}


def test_confident_learning_is_as_its_equations_say():
    rng, classes = np.random.default_rng(1), 4
    logits, labels = rng.normal(size=(300, classes)), rng.integers(0, classes, 300)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    thresholds = [shares[labels == j, j].mean() for j in range(classes)]
    expected = []
    for p, label in zip(shares, labels, strict=True):
        over = [j for j in range(classes) if p[j] >= thresholds[j]]
        best = max(over, key=lambda j: p[j]) if over else label
        expected.append(-1 if best == label else best)
    suspected, probability, own = samples.doubt_labels(lambda block: logits[block], labels, classes)
    assert suspected.tolist() == expected
    assert np.allclose(own, shares[np.arange(300), labels])
    doubted = suspected >= 0
    assert np.allclose(probability[doubted], shares[doubted, suspected[doubted]])


def test_a_test_set_is_what_is_listed_and_rows_are_those_of_its_file():
    rng = np.random.default_rng(5)
    train, unseen = separable()
    features, labels = around(CENTRES, [UNSEEN] * CLASSES, 0.9, rng)
    features[:3] = unseen[0][:3]  # copies, which are left out: rows stay those of the file
    tables = [table(*part, class_names=NAMES) for part in (train, unseen, (features, labels))]
    found = tailscope.diagnose(*tables[:2], test=tables[2], drop_duplicates=True, permutations=0)["drilldown"]
    assert (found["file"], found["scored"]) == ("test", len(labels) - 3)
    for k, entry in enumerate(found["classes"]):
        for kind in entry["samples"].values():
            for one in kind["first"]:
                assert one["id"] is None
                assert labels[one["row"]] == k
                assert one["row"] >= 3


def test_the_map_is_what_principal_components_of_the_samples_are(given, found):
    drawn, features = found["map"], given[1].features.numpy().astype(float)
    assert (drawn["method"], len(drawn["x"])) == ("PCA", len(features))
    centred = features - features.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    for name, column in zip("xy", expected.T, strict=True):
        assert abs(np.corrcoef(drawn[name], column)[0, 1]) > 0.9999
    assert drawn["explained"] == pytest.approx((sizes[:2] ** 2 / (sizes**2).sum()).tolist())
    assert drawn["label"] == given[1].labels.tolist()
    assert drawn["sample"][5] == "img/5.jpg"


def test_umap_is_taken_where_it_is_installed(given, monkeypatch):
    asked = {}

    class UMAP:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, features):
            return features[:, 2:4]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP, __spec__=SimpleNamespace()))
    drawn = tailscope.diagnose(*given[:2], permutations=0)["drilldown"]["map"]
    assert (drawn["method"], drawn["explained"]) == ("UMAP", None)
    assert (asked["n_components"], asked["n_jobs"]) == (2, 1)
    assert asked["random_state"] in range(2**32)


def test_without_a_verdict_there_is_no_classifier_to_ask(given):
    assert tailscope.diagnose(*given[:2], verdict=False, permutations=0)["drilldown"] is None


def test_of_very_many_classes_few_samples_are_listed(monkeypatch):
    monkeypatch.setattr(samples, "MOST_LISTED", 200)
    monkeypatch.setattr(samples, "DRAWN", 100)
    rng, classes = np.random.default_rng(0), 90
    centres = rng.normal(size=(classes, 16))
    labels = np.repeat(np.arange(classes), 3)
    train, unseen = (table(centres[labels] + 0.1 * rng.normal(size=(len(labels), 16)), labels) for _ in range(2))
    found = tailscope.diagnose(train, unseen, permutations=0)["drilldown"]
    assert found["listed"] == 2
    assert found["confusions"]["matrix"] is None
    assert len(found["map"]["x"]) == samples.DRAWN
    assert all(len(kind["first"]) <= 2 for entry in found["classes"] for kind in entry["samples"].values())
