"""Collapse of features: double loops over samples, known truth (simplex, noise), invariances, nothing made up."""

import itertools

import numpy as np
import pytest
import torch

from tailscope.measures.collapse import class_means, collapse
from tailscope.measures.fields import COLLAPSE


def clusters(seed=0, counts=(9, 6, 4, 3), dims=5, spread=1.0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    features = 2 + 1.5 * rng.normal(size=(len(counts), dims))[labels] + spread * rng.normal(size=(len(labels), dims))
    order = rng.permutation(len(labels))
    return features[order], labels[order], rng.normal(size=(len(counts), dims)), rng.normal(size=len(counts))


def measured(features, labels, *linear, **more):
    return collapse(*(torch.tensor(x) for x in (features, labels, *linear)), **more)


def by_loops(X, y, W, b):
    """Every measure as its definition reads, sample by sample and pair by pair."""
    classes = sorted(set(y))
    rows = {k: [x for x, label in zip(X, y, strict=True) if label == k] for k in classes}
    number = len(classes)

    def distance(a, b):
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    within = {k: np.mean([distance(*pair) for pair in itertools.combinations(rows[k], 2)]) for k in classes}
    between = [
        np.mean([distance(a, b) for a in rows[j] for b in rows[k]]) for j, k in itertools.permutations(classes, 2)
    ]
    total = (sum(within.values()) + sum(between)) / number**2
    mean = {k: np.mean(rows[k], axis=0) for k in classes}
    middle = np.mean(list(mean.values()), axis=0)
    covariance = {k: sum(np.outer(x - mean[k], x - mean[k]) for x in rows[k]) / (len(rows[k]) - 1) for k in classes}
    S_W = sum(covariance.values()) / number
    S_B = sum(np.outer(mean[k] - middle, mean[k] - middle) for k in classes) / number
    away = np.array([mean[k] - middle for k in classes])
    lengths = [np.linalg.norm(row) for row in away]
    cosines = [away[j] @ away[k] / lengths[j] / lengths[k] for j, k in itertools.permutations(range(number), 2)]
    weights = W - W.mean(axis=0)
    return {
        "class_separation": 1 - np.mean(list(within.values())) / total,
        "nc1": np.trace(S_W @ np.linalg.pinv(S_B)) / number,
        "nc2_lengths": np.std(lengths) / np.mean(lengths),
        "nc2_angles": np.mean([abs(c + 1 / (number - 1)) for c in cosines]),
        "nc3": ((weights / np.sqrt((weights**2).sum()) - away / np.sqrt((away**2).sum())) ** 2).sum(),
        "nc4": np.mean([np.argmax(W @ x + b) != min(classes, key=lambda k: ((x - mean[k]) ** 2).sum()) for x in X]),
        "cdnv": np.mean(
            [
                (np.trace(covariance[j]) + np.trace(covariance[k])) / 2 / ((mean[j] - mean[k]) ** 2).sum()
                for j, k in itertools.combinations(classes, 2)
            ]
        ),
    }


@pytest.mark.parametrize("dims", [2, 5, 40])
def test_every_measure_against_loops(dims):
    X, y, W, b = clusters(dims=dims)
    got = measured(X, y, W, b)
    assert list(got) == list(COLLAPSE)
    assert got == pytest.approx(by_loops(X, y, W, b), rel=1e-9)
    assert measured(X.astype(np.float32), y, W, b) == pytest.approx(got, rel=1e-4)


def test_blocks_do_not_matter(monkeypatch):
    X, y, W, b = clusters()
    whole = measured(X, y, W, b)
    monkeypatch.setattr("tailscope.measures.rows.BLOCK_ELEMENTS", 4 * 5)
    assert measured(X, y, W, b) == pytest.approx(whole)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_a_simplex_has_collapsed(classes):
    corners = np.repeat(np.eye(classes, 9), 3, axis=0) * 4 + 7
    y = np.repeat(np.arange(classes), 3)
    W = 0.2 * np.eye(classes, 9) + 5  # the same for all classes says nothing
    got = measured(corners, y, W, np.zeros(classes))
    away = {name: value for name, value in got.items() if name != "class_separation"}
    assert away == pytest.approx(dict.fromkeys(away, 0.0), abs=1e-12)
    assert got["class_separation"] == pytest.approx(1)
    assert measured(corners, y, -W)["nc3"] == pytest.approx(4)


def test_features_that_know_nothing_of_the_classes_have_no_class_separation():
    rng, y = np.random.default_rng(0), np.repeat(np.arange(4), [40, 10, 4, 2])
    found = [measured(3 + rng.normal(size=(56, 6)), y)["class_separation"] for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20


def test_units_turns_and_the_order_of_classes_do_not_matter():
    X, y, W, b = clusters()
    before = measured(X, y, W, b)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    for factor in (1e-100, 1e100):
        after = measured(factor * X @ turn, y, W @ turn / factor, b)
        assert after == pytest.approx(before, rel=1e-6)
    order = np.array([2, 0, 3, 1])
    assert measured(X, np.argsort(order)[y], W[order], b[order]) == pytest.approx(before)
    moved = measured(X + 50, y, W, b - 50 * W.sum(axis=1))
    assert {**moved, "class_separation": 0} == pytest.approx({**before, "class_separation": 0})


def test_the_nearest_mean_is_that_of_other_samples_where_these_are_given():
    X, y, W, b = clusters()
    means = np.random.default_rng(2).normal(size=(4, 5))
    means[3] = np.nan
    expected = np.mean([np.argmax(W @ x + b) != np.argmin(((x - means[:3]) ** 2).sum(axis=1)) for x in X])
    assert measured(X, y, W, b, means=torch.tensor(means))["nc4"] == pytest.approx(expected)


def test_what_is_undefined_is_none():
    X, y, W, b = clusters()
    assert measured(X, y)["nc3"] is measured(X, y)["nc4"] is None
    assert measured(X, y, 0 * W, b)["nc3"] is None
    alone = measured(X[:2], np.array([0, 1]), W[:2], b[:2])
    assert {name for name, value in alone.items() if value is not None} == {"nc4"}
    assert set(measured(X[:0], y[:0], W, b).values()) == {None}
    same = measured(np.ones((6, 5)), np.repeat([0, 1], 3), W[:2], b[:2])
    assert {name for name, value in same.items() if value is not None} == {"nc4"}
    left_out = np.concatenate([X, 100 + X[:1]]), np.append(y, 4)
    one_more = np.concatenate([W, W[:1]]), np.append(b, b[0])
    assert {**measured(*left_out, *one_more), "nc4": 0} == pytest.approx({**measured(X, y, W, b), "nc4": 0})
    assert class_means(torch.tensor(X), torch.tensor(y), 5)[4].isnan().all()
