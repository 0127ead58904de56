"""Classifiers on features: scikit-learn's contract, written-out formulas, scikit-learn's own as oracle, invariants."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize
from sklearn.utils.estimator_checks import parametrize_with_checks

from tailscope.classifiers import (
    CLASSIFIERS,
    CRT,
    LWS,
    OLTR,
    DisAlign,
    LabelAwareSmoothing,
    LogitAdjustedSoftmax,
    LogitAdjustment,
    MiSLAS,
    NearestClassMean,
    SoftmaxRegression,
    TauNorm,
    base,
)
from tailscope.classifiers.base import Diverged, Stopping, fit_softmax, stratified_holdout
from tailscope.classifiers.estimators import TAUS, balanced_weights, label_aware_smoothing
from tailscope.errors import UserError

EXACT = {"tol": 1e-14, "max_iter": 2000}


def long_tailed(seed=0, counts=(60, 25, 12, 5), dims=6, spread=1.0, dtype=np.float64):
    """Overlapping Gaussian classes with a common offset, as features have one."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = spread * rng.normal(size=(len(counts), dims))
    return (3 + centres[labels] + rng.normal(size=(len(labels), dims))).astype(dtype), labels


@parametrize_with_checks([entry.factory() for entry in CLASSIFIERS])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("entry", list(CLASSIFIERS), ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_default_learns_in_the_features_precision(entry, dtype):
    X, y = long_tailed(spread=3.0, dtype=dtype)
    model = CLASSIFIERS.make(CLASSIFIERS.canonical(entry.name)).fit(X, y)
    assert model.score(X, y) > 0.8
    assert model.predict_proba(X).dtype == np.float32
    assert model.predict_proba(X).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert entry.summary.endswith(".")


def sklearn_C(X, l2, weight):
    """scikit-learn's C for our penalty: both minimise the same sum, ours in units of the weighted feature variance."""
    mean = np.average(X, axis=0, weights=weight)
    variance = np.average((X - mean) ** 2, axis=0, weights=weight).mean()
    return 1 / (len(X) * l2 * variance)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_softmax_and_crt_agree_with_logistic_regression(balanced, l2):
    X, y = long_tailed()
    weight = balanced_weights(np.bincount(y))[y] if balanced else np.ones(len(y))
    ours = (CRT if balanced else SoftmaxRegression)(l2=l2, **EXACT).fit(X, y)
    oracle = LogisticRegression(C=sklearn_C(X, l2, weight), class_weight="balanced" if balanced else None)
    oracle.set_params(tol=1e-9, max_iter=10_000).fit(X, y)
    assert ours.predict_proba(X) == pytest.approx(oracle.predict_proba(X), abs=1e-5)
    assert ours.coef_ == pytest.approx(oracle.coef_, abs=1e-4)


def test_default_tolerance_is_close_to_the_optimum():
    X, y = long_tailed(counts=(500, 200, 60, 20, 8), dims=20, dtype=np.float32)
    fine = SoftmaxRegression(**EXACT).fit(X.astype(np.float64), y)
    assert np.abs(SoftmaxRegression().fit(X, y).predict_proba(X) - fine.predict_proba(X)).mean() < 0.003


@given(st.floats(1e-3, 1e3), st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_scale_and_origin_of_features_do_not_matter(scale, seed):
    X, y = long_tailed(seed)
    before = SoftmaxRegression(**EXACT).fit(X, y).predict_proba(X)
    moved = scale * (X - 5)
    assert SoftmaxRegression(**EXACT).fit(moved, y).predict_proba(moved) == pytest.approx(before, abs=1e-5)


def test_constant_features_leave_the_class_frequencies():
    y = np.repeat([0, 1], [6, 2])
    assert SoftmaxRegression(**EXACT).fit(np.ones((8, 3)), y).predict_proba(np.ones((1, 3)))[0] == pytest.approx(
        [0.75, 0.25], abs=1e-6
    )


def test_row_blocks_do_not_matter(monkeypatch):
    X, y = long_tailed()
    whole = [model.fit(X, y).predict_proba(X) for model in (CRT(**EXACT), LWS(base="softmax(tol=1e-14)", **EXACT))]
    monkeypatch.setattr("tailscope.classifiers.base.LOGITS_AT_ONCE", 4 * 7)  # 7 rows at a time
    parts = [model.fit(X, y).predict_proba(X) for model in (CRT(**EXACT), LWS(base="softmax(tol=1e-14)", **EXACT))]
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("name", ["softmax", "crt", "logit_adjusted_loss"])
def test_penalty_is_chosen_by_held_out_loss(name):
    X, y = long_tailed(counts=(200, 60, 20, 6, 1), spread=0.7)
    got = CLASSIFIERS.make(f"{name}(choose_l2=True, tol=1e-12, random_state=3)").fit(X, y)
    held_out = stratified_holdout(y, seed=3)
    counts = np.bincount(y)
    weight = balanced_weights(counts)[y] if name == "crt" else np.ones(len(y))
    losses = {}
    for l2 in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):
        # The offset of the adjusted loss only shifts the bias, so that plain regression has the same held-out loss.
        model = LogisticRegression(C=sklearn_C(X[~held_out], l2, weight[~held_out]), tol=1e-9, max_iter=10_000)
        model.fit(X[~held_out], y[~held_out], weight[~held_out])
        losses[l2] = -(weight * log_softmax(model.decision_function(X), axis=1)[np.arange(len(y)), y])[held_out].sum()
    assert got.l2_ == min(losses, key=losses.get)
    assert got.coef_ == pytest.approx(CLASSIFIERS.make(f"{name}(l2={got.l2_}, tol=1e-12)").fit(X, y).coef_, abs=1e-4)
    assert SoftmaxRegression(choose_l2=True).fit([[0.0], [1.0]], [0, 1]).l2_ == 1e-3


def test_hitting_the_limit_warns():
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        SoftmaxRegression(max_iter=2).fit(*long_tailed())


def objective(X, y, logits, weight, target):
    """Weighted mean cross-entropy against soft targets, row by row."""
    log_p = log_softmax(logits, axis=1)
    return sum(-weight[y[i]] * (target[i] @ log_p[i]) for i in range(len(y))) / len(y)


def assert_local_minimum(value, parameters, rng):
    """No small step in a random direction lowers `value`."""
    here = value(parameters)
    for _ in range(20):
        direction = rng.normal(size=parameters.shape)
        for step in (1e-3, -1e-3):
            assert value(parameters + step * direction / np.linalg.norm(direction)) > here - 1e-9


@pytest.mark.parametrize("name", ["crt", "logit_adjusted_loss", "label_aware_smoothing"])
def test_losses_are_the_written_out_formulas(name):
    X, y = long_tailed(2)
    rng, counts, l2 = np.random.default_rng(0), np.bincount(y), 0.01
    classes = len(counts)
    model = CLASSIFIERS.make(f"{name}(l2={l2}, tol=1e-14, max_iter=2000)").fit(X, y)
    weight = np.ones(classes) if name == "logit_adjusted_loss" else len(y) / (classes * counts)
    offset = np.log(counts / len(y)) if name == "logit_adjusted_loss" else 0
    target = np.eye(classes)[y]
    if name == "label_aware_smoothing":
        smoothing = 0.3 * np.sin(np.pi * (counts - 5) / (2 * (60 - 5)))
        target = np.array([(s := smoothing[k]) / (classes - 1) + (1 - s - s / (classes - 1)) * np.eye(classes)[k]
                           for k in y])  # fmt: skip
    mean = np.average(X, axis=0, weights=weight[y])
    variance = np.average((X - mean) ** 2, axis=0, weights=weight[y]).mean()

    def value(parameters):
        W, b = parameters[:, :-1], parameters[:, -1]
        return objective(X, y, X @ W.T + b + offset, weight, target) + l2 / 2 * variance * (W**2).sum()

    assert_local_minimum(value, np.hstack([model.coef_, model.intercept_[:, None]]), rng)


def test_smoothing_shapes():
    counts = np.array([100, 40, 10])
    f = 30 / 90
    assert label_aware_smoothing(counts, 0.4, 0.1, "concave") == pytest.approx(
        [0.4, 0.1 + 0.3 * np.sin(np.pi / 2 * f), 0.1]
    )
    assert label_aware_smoothing(counts, 0.4, 0.1, "convex") == pytest.approx(
        [0.4, 0.4 + 0.3 * np.sin(1.5 * np.pi + np.pi / 2 * f), 0.1]
    )
    assert label_aware_smoothing(np.array([7, 7]), 0.4, 0.1, "linear") == pytest.approx([0.1, 0.1])
    for wrong in ({"head": 1.0}, {"tail": -0.1}, {"shape": "flat"}):
        with pytest.raises(ValueError, match="must"):
            LabelAwareSmoothing(**wrong).fit(*long_tailed())


def test_logit_adjustment_subtracts_the_prior_and_equals_the_adjusted_loss():
    X, y = long_tailed()
    prior = np.bincount(y) / len(y)
    base = SoftmaxRegression(**EXACT).fit(X, y)
    after = LogitAdjustment(base=FrozenEstimator(base), tau=0.7).fit(X, y)
    assert after.logits(X) == pytest.approx(base.logits(X) - 0.7 * np.log(prior))
    trained = LogitAdjustedSoftmax(tau=0.7, **EXACT).fit(X, y)
    assert trained.predict_proba(X) == pytest.approx(after.predict_proba(X), abs=1e-5)


@pytest.mark.parametrize("bias", ["centre", "drop", "scale", "keep"])
def test_tau_norm_against_loops(bias):
    X, y = long_tailed()
    base = SoftmaxRegression().fit(X, y)
    got = TauNorm(base=FrozenEstimator(base), tau=0.6, bias=bias).fit(X, y)
    for k in range(4):
        w, b, norm = base.coef_[k], base.intercept_[k], np.linalg.norm(base.coef_[k]) ** 0.6
        logit = {
            "centre": (X - X.mean(axis=0)) @ (w / norm),
            "drop": X @ (w / norm),
            "scale": (X @ w + b) / norm,
            "keep": X @ (w / norm) + b,
        }[bias]
        assert got.logits(X)[:, k] == pytest.approx(logit)
    same = TauNorm(base=FrozenEstimator(base), tau=0, bias="keep").fit(X, y)
    assert same.logits(X) == pytest.approx(base.logits(X))
    unit = TauNorm(base=FrozenEstimator(base), tau=1).fit(X, y)
    assert np.linalg.norm(unit.coef_, axis=1) == pytest.approx(1)


def test_tau_is_chosen_on_held_out_samples_by_mean_recall():
    X, y = long_tailed(counts=(200, 60, 20, 6, 1), spread=1.2)
    got = TauNorm(random_state=3).fit(X, y)
    held_out = stratified_holdout(y, seed=3)
    assert np.bincount(y[held_out], minlength=5).tolist() == [40, 12, 4, 1, 0]
    recalls = []
    for tau in TAUS:
        model = TauNorm(tau=tau).fit(X[~held_out], y[~held_out])
        right = model.predict(X[held_out]) == y[held_out]
        recalls.append(np.mean([right[y[held_out] == k].mean() for k in range(4)]))
    assert got.tau_ == TAUS[int(np.argmax(recalls))]
    assert TauNorm().fit([[0.0], [1.0]], [0, 1]).tau_ == 0.0
    with pytest.raises(ValueError, match="must be"):
        TauNorm(bias="none").fit(X, y)


def test_lws_scales_a_fixed_classifier_by_its_formula():
    X, y = long_tailed(2)
    counts = np.bincount(y)
    base = SoftmaxRegression().fit(X, y)
    got = LWS(base=FrozenEstimator(base), **EXACT).fit(X, y)
    assert got.logits(X) == pytest.approx(got.scale_ * base.logits(X))

    def value(scale):
        fit = objective(X, y, scale * base.logits(X), len(y) / (4 * counts), np.eye(4)[y])
        return fit + 0.01 / 2 * np.mean((scale - 1) ** 2)

    assert_local_minimum(value, got.scale_, np.random.default_rng(0))
    assert value(got.scale_) < value(np.ones(4))


def test_disalign_is_its_formula_at_a_minimum():
    X, y = long_tailed(2)
    counts = np.bincount(y)
    base = SoftmaxRegression().fit(X, y)
    got = DisAlign(base=FrozenEstimator(base), rho=1.5, **EXACT).fit(X, y)
    z = base.logits(X)
    weight = (1 / counts) ** 1.5 / ((1 / counts) ** 1.5).sum()
    weight *= len(y) / weight[y].sum()
    mean, variance = X.mean(axis=0), X.var(axis=0, ddof=1).mean()

    def logits(p):
        a, b, v, u = p[:4], p[4:8], p[8:14], p[14]
        confidence = 1 / (1 + np.exp(-(X @ v + u)))
        return np.array([c * (a * row + b) + (1 - c) * row for c, row in zip(confidence, z, strict=True)])

    def value(p):
        a, b, v = p[:4], p[4:8], p[8:14]
        penalty = np.mean((a - 1) ** 2) + np.mean(b**2) + variance * (v**2).sum()
        return objective(X, y, logits(p), weight, np.eye(4)[y]) + 0.01 / 2 * penalty

    found = np.concatenate([got.scale_, got.bias_, got.gate_, got.threshold_])
    assert got.logits(X) == pytest.approx(logits(found))
    assert_local_minimum(value, found, np.random.default_rng(0))
    assert value(found) < value(np.concatenate([np.ones(4), np.zeros(11)]))
    assert mean.shape == (6,)


def test_nearest_class_mean_against_nearest_centroid():
    X, y = long_tailed(spread=0.7)
    plain = NearestClassMean(centre=False, normalise=False).fit(X, y)
    assert (plain.predict(X) == NearestCentroid().fit(X, y).predict(X)).all()
    unit = normalize(X - X.mean(axis=0))
    kang = NearestClassMean().fit(X, y)
    assert (kang.predict(X) == NearestCentroid().fit(unit, y).predict(unit)).all()
    means = np.array([unit[y == k].mean(axis=0) for k in range(4)])
    variance = ((unit - means[y]) ** 2).sum() / ((len(y) - 4) * 6)
    density = np.exp([[-((x - m) ** 2).sum() / (2 * variance) for m in means] for x in unit])
    assert kang.predict_proba(X) == pytest.approx(density / density.sum(axis=1, keepdims=True))


def test_balancing_raises_the_recall_of_rare_classes():
    X, y = long_tailed(seed=5, counts=(2000, 400, 80, 16), spread=0.9, dtype=np.float32)
    rng = np.random.default_rng(5)
    centres = 0.9 * rng.normal(size=(4, 6))  # the first draw of that seed: the same classes, balanced
    labels = np.repeat(np.arange(4), 500)
    unseen = 3 + centres[labels] + np.random.default_rng(6).normal(size=(2000, 6))
    plain = SoftmaxRegression().fit(X, y).score(unseen, labels)
    for name in ("crt", "logit_adjustment", "label_aware_smoothing", "ncm", "disalign", "tau_norm", "lws"):
        assert CLASSIFIERS.make(name).fit(X, y).score(unseen, labels) > plain + 0.03, name


def test_base_may_be_a_call_string_an_estimator_or_frozen():
    X, y = long_tailed()
    by_name = TauNorm(base="crt(l2=0.01)", tau=1.0).fit(X, y)
    by_object = TauNorm(base=CRT(l2=0.01), tau=1.0).fit(X, y)
    assert (by_name.coef_ == by_object.coef_).all()
    with pytest.raises(UserError, match="unknown classifier"):
        LWS(base="sotfmax").fit(X, y)
    with pytest.raises(ValueError, match="linear"):
        LWS(base="ncm").fit(X, y)
    with pytest.raises(ValueError, match="other classes"):
        LWS(base=FrozenEstimator(SoftmaxRegression().fit(X[y < 3], y[y < 3]))).fit(X, y)


def test_refits_are_bit_identical():
    X, y = long_tailed(dtype=np.float32)
    for entry in CLASSIFIERS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = (entry.factory().fit(X, y).predict_proba(X) for _ in range(2))
        assert (first == second).all(), entry.name


def test_features_and_weights_whose_squares_leave_the_range_of_float32():
    corners, labels = np.eye(4, 6, dtype=np.float32), np.arange(4)
    NearestClassMean().fit(np.float32(1e-30) * corners, labels).predict(corners)  # warnings are errors here
    base = SoftmaxRegression().fit(corners, labels)
    base.coef_, base.intercept_ = np.float32(1e30) * corners, np.zeros(4, dtype=np.float32)
    adjusted = TauNorm(base=FrozenEstimator(base), tau=1.0, bias="drop").fit(corners, labels)
    assert np.allclose(adjusted.coef_, corners)


def wide(rows=40, dims=200, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    return 3 + rng.normal(size=(classes, dims))[y] * 0.3 + rng.normal(size=(rows, dims)), y


@pytest.mark.parametrize("more", [{}, {"start": True}, {"offset": [0.5, 0, -1, 2]}, {"smoothing": [0.1, 0, 0.2, 0]}])
def test_a_fit_in_the_span_of_the_rows_is_the_fit_in_all_features(monkeypatch, more):
    (X, y), rng = wide(), np.random.default_rng(1)
    if "start" in more:
        more = {"start": (0.1 * rng.normal(size=(4, 200)), rng.normal(size=4))}
    arguments = {"class_weight": np.array([0.4, 0.8, 1.2, 1.6]), "l2": 1e-2, "stopping": Stopping(1e-15, 5000), **more}
    weight, bias, _ = fit_softmax(X, y, **arguments)
    monkeypatch.setattr(base, "_row_space", lambda features: (features, None, torch.zeros(200, dtype=torch.float64)))
    direct_weight, direct_bias, _ = fit_softmax(X, y, **arguments)
    logits, direct = X @ weight.T + bias, X @ direct_weight.T + direct_bias
    assert np.abs(logits - direct).max() < 1e-6 * np.abs(direct).max()
    assert np.abs(weight - direct_weight).max() < 1e-6 * np.abs(direct_weight).max()


def test_wide_features_cost_by_their_rows(monkeypatch):
    orders = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (orders.append(len(matrix)), eigh(matrix))[1])
    X, y = wide(dims=3000)
    SoftmaxRegression(choose_l2=True).fit(X.astype(np.float32), y)
    assert max(orders) == 40


def test_what_is_not_finite_ends_the_fit():
    X, y = wide(dims=3)
    huge = (np.full((4, 3), 3e38), np.zeros(4))
    with pytest.raises(Diverged, match="loss or its gradient"):
        fit_softmax(X.astype(np.float32), y, np.ones(4), 1e-3, Stopping(1e-4, 10), start=huge)
    model = SoftmaxRegression().fit(X, y)
    model.coef_ = np.full_like(model.coef_, np.inf)
    with pytest.raises(Diverged, match="logits"):
        model.predict(X)


def test_an_exponent_may_be_a_whole_number():
    X, y = long_tailed()
    whole, decimal = (DisAlign(rho=rho).fit(X, y) for rho in (1, 1.0))
    np.testing.assert_array_equal(whole.logits(X), decimal.logits(X))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", [LogitAdjustment, TauNorm, LWS, DisAlign, MiSLAS, OLTR])
def test_a_linear_classifier_of_scikit_learn_may_be_the_base(kind, classes):
    rng = np.random.default_rng(0)
    y = np.repeat(np.array(["a", "b", "c"])[:classes], [90, 60, 30][:classes])
    X = rng.normal(size=(len(y), 5)) + 3 * (y[:, None] == np.array(["a", "b", "c", "d", "e"]))
    found = kind(base=LogisticRegression()).fit(X, y)
    assert found.logits(X).shape == (len(y), classes)
    assert found.score(X, y) > 0.85


def test_a_base_of_two_classes_with_one_logit_decides_as_before():
    X, y = np.random.default_rng(0).normal(size=(80, 4)), np.arange(80) % 2
    base = LogisticRegression().fit(X, y)
    same = LogitAdjustment(base=FrozenEstimator(base), tau=0).fit(X, y)
    assert np.array_equal(same.predict(X), base.predict(X))
    np.testing.assert_allclose(same.predict_proba(X), base.predict_proba(X), atol=1e-6)


def test_a_base_that_is_no_classifier_is_refused():
    with pytest.raises(ValueError, match="base must be a linear classifier"):
        LogitAdjustment(base=LinearRegression()).fit(np.eye(4), np.arange(4) % 2)
