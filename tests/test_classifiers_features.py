"""Stage-2 systems on frozen features beyond softmax regression: formulas in loops, known limits, invariants."""

import warnings

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.frozen import FrozenEstimator

from tailscope.classifiers import (
    CLASSIFIERS,
    CRT,
    OLTR,
    CosineClassifier,
    FeatureClouds,
    LabelAwareSmoothing,
    LinearClassifier,
    MiSLAS,
    SoftmaxRegression,
    TauNorm,
)
from tailscope.classifiers.features import angular_variances, feature_clouds
from test_classifiers import EXACT, assert_local_minimum, long_tailed, objective, wide

LINEAR = {"mislas": True, "feature_clouds": True, "cosine": False, "oltr": False}


def balanced(y):
    counts = np.bincount(y)
    return len(y) / (len(counts) * counts)


def smoothed(y, head=0.3):
    """Targets of the concave form for counts from 60 down to 5, written out."""
    counts = np.bincount(y)
    classes, s = len(counts), head * np.sin(np.pi * (counts - counts.min()) / (2 * (counts.max() - counts.min())))
    return np.array([np.where(np.arange(classes) == k, 1 - s[k], s[k] / (classes - 1)) for k in y])


@pytest.mark.parametrize(("name", "linear"), LINEAR.items())
def test_which_end_in_a_linear_layer(name, linear):
    X, y = long_tailed()
    model = CLASSIFIERS.make(name).fit(X, y)
    assert isinstance(model, LinearClassifier) == linear == hasattr(model, "coef_")
    if linear:
        assert model.logits(X) == pytest.approx(X @ model.coef_.T + model.intercept_)
        assert TauNorm(base=FrozenEstimator(model)).fit(X, y).coef_.shape == (4, 6)
    else:
        differences = model.logits(np.stack([X[0], X[-1], (X[0] + X[-1]) / 2]))
        assert np.abs(differences[0] + differences[1] - 2 * differences[2]).max() > 0.1  # no layer adds up like that
        with pytest.raises(ValueError, match="linear"):
            TauNorm(base=model).fit(X, y)


def test_mislas_is_its_formula_at_a_minimum_and_better_than_its_start():
    X, y = long_tailed(2)
    base = SoftmaxRegression().fit(X, y)
    got = MiSLAS(base=FrozenEstimator(base), l2=0.02, scale_l2=0.05, **EXACT).fit(X, y)
    weight = balanced(y)
    mean = np.average(X, axis=0, weights=weight[y])
    variance = np.average((X - mean) ** 2, axis=0, weights=weight[y]).mean()

    def value(p):
        change, shift, scale = p[:24].reshape(4, 6), p[24:28], p[28:]
        logits = scale * (X @ (base.coef_ + change).T + base.intercept_ + shift)
        penalty = 0.02 / 2 * variance * (change**2).sum() + 0.05 / 2 * np.mean((scale - 1) ** 2)
        return objective(X, y, logits, weight, smoothed(y)) + penalty

    change, shift = got.coef_ / got.scale_[:, None] - base.coef_, got.intercept_ / got.scale_ - base.intercept_
    assert_local_minimum(value, np.concatenate([change.ravel(), shift, got.scale_]), np.random.default_rng(0))
    assert value(np.concatenate([change.ravel(), shift, got.scale_])) < value(np.repeat([0.0, 1.0], [28, 4]))


def test_mislas_with_nothing_to_start_from_and_no_scale_is_label_aware_smoothing():
    X, y = long_tailed()
    nothing = SoftmaxRegression().fit(X, y)
    nothing.coef_, nothing.intercept_ = np.zeros((4, 6)), np.zeros(4)
    got = MiSLAS(base=FrozenEstimator(nothing), l2=0.01, scale_l2=1e5, **EXACT).fit(X, y)
    assert got.coef_ == pytest.approx(LabelAwareSmoothing(l2=0.01, **EXACT).fit(X, y).coef_, abs=1e-4)


def test_mislas_in_the_span_of_the_rows_is_that_in_all_features():
    (X, y), rng = wide(dims=50), np.random.default_rng(3)
    base = SoftmaxRegression().fit(X, y)
    more = np.concatenate([X, X + 1e-7 * rng.normal(size=X.shape)]), np.concatenate([y, y])  # 80 rows, of as much
    narrow, direct = (MiSLAS(base=FrozenEstimator(base), **EXACT).fit(*given) for given in ((X, y), more))
    assert narrow.logits(X) == pytest.approx(direct.logits(X), abs=1e-3)


def test_angular_variances_against_loops():
    X, y = long_tailed()
    for k, found in enumerate(angular_variances(X, y)):
        rows = X[y == k]
        mean = rows.mean(axis=0)
        angles = [np.arccos(r @ mean / np.linalg.norm(r) / np.linalg.norm(mean)) for r in rows]
        assert found == pytest.approx(sum(a * a for a in angles) / (len(rows) - 1))
    assert angular_variances(np.array([[1.0, 0], [0, 1], [0, 0], [2, 2]]), np.array([0, 0, 1, 1]))[0] == pytest.approx(
        2 * (np.pi / 4) ** 2
    )


def cones(counts, spreads, dims=400, seed=0):
    """Classes whose samples have given root mean squared angles to their centre, in many dimensions."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = np.eye(len(counts), dims)[labels]
    lengths = rng.uniform(1, 3, size=(len(labels), 1))
    noise = rng.normal(size=(len(labels), dims)) / np.sqrt(dims) * np.array(spreads)[labels][:, None]
    return lengths * (centres + noise), labels


def test_clouds_make_body_and_tail_as_wide_as_the_head():
    X, y = cones([300, 60, 12], [0.3, 0.15, 0.1])
    rows, labels = feature_clouds(X, y, 20, seed=0)
    assert (rows[: len(X)] == X).all()
    assert np.bincount(labels).tolist() == [300, 60 * 21, 12 * 21]
    virtual, owner = rows[len(X) :], np.repeat(np.arange(300, 372), 20)
    assert np.linalg.norm(virtual, axis=1) == pytest.approx(np.linalg.norm(X[owner], axis=1))
    spread = angular_variances(X, y)
    turned = np.arccos((virtual * X[owner]).sum(axis=1) / np.linalg.norm(X[owner], axis=1) ** 2)
    for k, tolerance in ((1, 0.1), (2, 0.25)):
        assert (turned[y[owner] == k] ** 2).mean() == pytest.approx(spread[0] - spread[k], rel=0.15)
        assert angular_variances(virtual[y[owner] == k], np.zeros(len(owner[y[owner] == k]), int))[0] == pytest.approx(
            spread[0], rel=tolerance
        )


def test_a_class_wider_than_the_head_keeps_its_samples_and_one_sample_gets_the_whole_width():
    X, y = cones([300, 60, 1], [0.1, 0.3, 0.1])
    rows, labels = feature_clouds(X, y, 5, seed=0)
    assert np.bincount(labels).tolist() == [300, 60, 6]
    assert np.isfinite(rows).all()
    two, codes = cones([50, 10], [0.3, 0.1])
    assert np.bincount(feature_clouds(two, codes, 3, seed=0)[1]).tolist() == [50, 40]  # no groups: the larger is head
    assert feature_clouds(np.array([[1.0], [2.0], [3.0]]), np.array([0, 0, 1]), 4, seed=0)[0].shape == (3, 1)


def test_feature_clouds_are_cross_validated_by_crt_and_depend_on_the_seed_alone():
    X, y = long_tailed()
    rows, labels = feature_clouds(X, y, 7, seed=4)
    got = FeatureClouds(cloud=7, random_state=4, **EXACT).fit(X, y)
    assert got.coef_ == pytest.approx(CRT(**EXACT).fit(rows, labels).coef_, abs=1e-6)
    assert (FeatureClouds(cloud=7, random_state=5).fit(X, y).coef_ != FeatureClouds(cloud=7).fit(X, y).coef_).all()
    none = FeatureClouds(cloud=0, **EXACT).fit(X, y)
    assert none.coef_ == pytest.approx(CRT(**EXACT).fit(X, y).coef_, abs=1e-6)


@pytest.mark.parametrize("equal", [True, False])
def test_cosine_is_its_formula_at_a_minimum(equal):
    X, y = long_tailed(2)
    got = CosineClassifier(scale=9.0, balanced=equal, **EXACT).fit(X, y)
    unit = np.array([row / np.linalg.norm(row) for row in X - X.mean(axis=0)])
    weight = balanced(y) if equal else np.ones(4)

    def value(W):
        return objective(X, y, 9 * unit @ (W / np.linalg.norm(W, axis=1, keepdims=True)).T, weight, np.eye(4)[y])

    assert got.logits(X) == pytest.approx(9 * unit @ got.directions_.T)
    assert np.linalg.norm(got.directions_, axis=1) == pytest.approx(1)
    assert_local_minimum(value, got.directions_, np.random.default_rng(0))


def test_lengths_of_samples_say_nothing_to_a_cosine_classifier():
    X, y = long_tailed()
    lengths = np.random.default_rng(0).uniform(0.1, 10, size=(len(X), 1))
    plain, other = (CosineClassifier(centre=False, **EXACT).fit(rows, y) for rows in (X, lengths * X))
    assert plain.predict_proba(X) == pytest.approx(other.predict_proba(X), abs=1e-6)
    assert plain.logits(np.zeros((1, 6))).tolist() == [[0.0] * 4]


def test_oltr_against_loops_and_no_worse_than_its_start():
    X, y = long_tailed(2)
    base = SoftmaxRegression().fit(X, y)
    got = OLTR(base=FrozenEstimator(base), scale=12.0, reach=3.0, **EXACT | {"max_iter": 300})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit of iterations
        got.fit(X, y)
    H, h, S, t, w = (tensor.numpy() for tensor in got.found_)
    z = X - X.mean(axis=0)
    z /= np.sqrt((z**2).sum(axis=1).mean())
    memory = np.array([z[y == k].mean(axis=0) for k in range(4)])

    def logits(H, h, S, t, w):
        found = []
        for x in z:
            reach = 3 / max(0.01, min(np.linalg.norm(x - c) for c in memory))
            attention, selector = softmax(H @ x + h), np.tanh(S @ x + t)
            v = reach * (x + selector * sum(a * c for a, c in zip(attention, memory, strict=True)))
            length = np.linalg.norm(v)
            found.append([12 * length / (1 + length) * (v @ c) / length / np.linalg.norm(c) for c in w])
        return np.array(found)

    def value(H, h, S, t, w):
        penalty = 1e-3 / 2 / 6 * (((H - start[0]) ** 2).sum() + (S**2).sum())
        return objective(X, y, logits(H, h, S, t, w), balanced(y), np.eye(4)[y]) + penalty

    unit = np.sqrt(((X - X.mean(axis=0)) ** 2).sum(axis=1).mean())
    start = base.coef_ * unit, base.logits(X.mean(axis=0)[None])[0], np.zeros((6, 6)), np.zeros(6), memory
    assert softmax(z @ start[0].T + start[1], axis=1) == pytest.approx(base.predict_proba(X))
    assert got.logits(X) == pytest.approx(logits(H, h, S, t, w), abs=1e-6)
    assert value(H, h, S, t, w) < value(*start)
    rng = np.random.default_rng(0)
    for _ in range(5):
        step = [1e-2 * rng.normal(size=p.shape) for p in (H, h, S, t, w)]
        assert value(*(p + s for p, s in zip((H, h, S, t, w), step, strict=True))) > value(H, h, S, t, w)


@pytest.mark.parametrize("name", LINEAR)
def test_they_raise_the_recall_of_rare_classes(name):
    X, y = long_tailed(seed=5, counts=(2000, 400, 80, 16), spread=0.9, dtype=np.float32)
    centres = 0.9 * np.random.default_rng(5).normal(size=(4, 6))
    labels = np.repeat(np.arange(4), 500)
    unseen = 3 + centres[labels] + np.random.default_rng(6).normal(size=(2000, 6))
    assert CLASSIFIERS.make(name).fit(X, y).score(unseen, labels) > SoftmaxRegression().fit(X, y).score(unseen, labels)


@pytest.mark.parametrize("name", ["cosine", "oltr"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_unit_of_features_does_not_matter(name, factor):
    X, y = long_tailed(spread=2.0, dtype=np.float32)
    scaled = np.float32(factor) * X
    one, other = (CLASSIFIERS.make(name).fit(rows, y).predict(rows) for rows in (X, scaled))
    assert (one == other).mean() > 0.97
