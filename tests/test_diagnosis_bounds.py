"""Bounds from unseen samples: no peeking, agreement with scikit-learn, extrapolation, nested selection."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tailscope.classifiers import SoftmaxRegression
from tailscope.diagnosis.outcomes import (
    INFLATION,
    Bound,
    Selection,
    assign_folds,
    at_least,
    cross_fitted,
    difference,
    extrapolation_weights,
    held_out,
    select_nested,
)
from tailscope.intervals import paired, proportion

FIXED = "softmax(l2=0.1, tol=1e-4)"


def gaussian(rng, per_class, dims=6, classes=3, spread=0.8):
    """Spherical Gaussian classes about fixed centres: the best classifier is the nearest centre."""
    centres = spread * np.random.default_rng(99).normal(size=(classes, dims))
    labels = np.repeat(np.arange(classes), per_class)
    features = centres[labels] + rng.normal(size=(len(labels), dims))
    return features, labels, centres


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_folds_are_stratified_and_of_equal_size(counts, folds, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    fold_of = assign_folds(labels, folds, None, seed)
    for members in [fold_of, *(fold_of[labels == k] for k in range(len(counts)))]:
        sizes = np.bincount(members, minlength=folds)
        assert sizes.max() - sizes.min() <= 1
    assert (assign_folds(labels, folds, None, seed) == fold_of).all()


def test_bursts_share_a_fold():
    labels = np.repeat([0, 1, 2], 20)
    bursts = np.array([f"burst {i // 4}" for i in range(60)])
    fold_of = assign_folds(labels, 5, bursts, seed=0)
    assert all(len(set(fold_of[bursts == b])) == 1 for b in bursts)
    assert np.bincount(fold_of).tolist() == [12] * 5


def test_each_fold_is_scored_by_a_fit_to_the_others():
    X, y, _ = gaussian(np.random.default_rng(0), 15)
    got = cross_fitted(X, y + 7, classifier=FIXED, folds=3)
    fold_of = assign_folds(y + 7, 3, None, seed=0)
    for k in range(3):
        rest, test = fold_of != k, fold_of == k
        model = SoftmaxRegression(l2=0.1, tol=1e-4).fit(X[rest], y[rest])
        assert np.mean(got.correct[test] == (model.predict(X[test]) == y[test])) > 0.95  # the order of rows differs
    plain = paired(got.correct[None])
    assert got.accuracy.estimate == got.correct.mean()
    width = got.accuracy.ci95[1] - got.accuracy.ci95[0]
    assert width == pytest.approx(INFLATION * (plain.ci95[1] - plain.ci95[0]))
    assert got.extrapolated is None
    assert "not an upper bound" in got.notes


def test_features_without_information_give_chance():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(200, 120)), rng.integers(0, 2, 200)
    assert SoftmaxRegression(l2=1e-3).fit(X, y).score(X, y) > 0.85  # on its own training samples
    got = cross_fitted(X, y)
    assert stats.binomtest(int(got.correct.sum()), 200, 0.5).pvalue > 0.001
    assert got.extrapolated is None
    assert any("too few to extrapolate from in 120 dimensions" in note for note in got.notes)


def test_cross_fitting_stays_below_the_best_and_extrapolation_comes_closer():
    below, error, raw_error = [], [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        X, y, centres = gaussian(rng, 24, dims=8)
        fresh, fresh_y, _ = gaussian(rng, 4000, dims=8)
        best = (((fresh[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1) == fresh_y).mean()
        got = cross_fitted(X, y, classifier=FIXED)
        below.append(got.accuracy.estimate - best)
        error.append(got.extrapolated.estimate - best)
        raw_error.append(got.accuracy.estimate - best)
    assert np.mean(below) < 0
    assert abs(np.mean(error)) < abs(np.mean(raw_error))


def test_extrapolation_is_the_intercept_of_a_line_in_one_over_m():
    sizes, accuracy = np.array([0.25, 0.5, 0.8]), np.array([0.61, 0.7, 0.72])
    assert extrapolation_weights(sizes) @ accuracy == pytest.approx(np.polyfit(1 / sizes, accuracy, 1)[1])
    X, y, _ = gaussian(np.random.default_rng(2), 40, dims=4)
    got = cross_fitted(X, y, classifier=FIXED)
    assert got.extrapolated.estimate == pytest.approx(got.extrapolated_items.mean())
    assert got.extrapolated.ci95[0] < got.accuracy.ci95[0] or got.extrapolated.ci95[1] > got.accuracy.ci95[1]


def test_held_out_fits_all_unseen_samples():
    rng = np.random.default_rng(3)
    X, y, _ = gaussian(rng, 30)
    test, test_y, _ = gaussian(rng, 50)
    got = held_out((X, y), (test, test_y), classifier=FIXED)
    expected = SoftmaxRegression(l2=0.1).fit(X, y).score(test, test_y)
    assert got.accuracy.estimate == pytest.approx(expected, abs=0.01)
    assert got.correct.shape == (150,)
    assert got.extrapolated is not None


def test_default_classifier_chooses_its_penalty_by_itself():
    X, y, _ = gaussian(np.random.default_rng(4), 20, dims=12, spread=0.5)
    chosen, too_weak = cross_fitted(X, y), cross_fitted(X, y, classifier="softmax(l2=0.0001)")
    assert chosen.accuracy.estimate > too_weak.accuracy.estimate
    again = cross_fitted(X, y)
    assert (again.correct == chosen.correct).all()


def test_a_class_with_one_sample_counts_as_wrong_and_is_said():
    X, y, _ = gaussian(np.random.default_rng(5), 10)
    X, y = np.vstack([X, X[:1] + 50]), np.append(y, 3)
    got = cross_fitted(X, y, classifier=FIXED)
    assert not got.correct[-1]
    assert "1 classes have a single unseen sample" in got.notes


def test_selection_is_scored_on_items_that_did_not_choose():
    """Fifty classifiers that guess: the best on all items looks better than it is, the nested score does not."""
    flattered, honest, items, repeats = [], [], 60, 60
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        correct = {f"guess {k}": rng.random(items) < 0.5 for k in range(50)}
        got = select_nested(correct, np.arange(items) % 3, seed=seed)
        flattered.append(correct[got.best].sum())
        honest.append(got.correct.sum())
    assert stats.binomtest(int(sum(flattered)), items * repeats, 0.5).pvalue < 1e-6
    assert stats.binomtest(int(sum(honest)), items * repeats, 0.5).pvalue > 0.001


def test_selection_against_loops():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, 40)
    correct = {name: rng.random(40) < 0.5 for name in "abc"}
    got = select_nested(correct, labels, folds=4, seed=1)
    fold_of = assign_folds(labels, 4, None, 1)
    for k in range(4):
        others = {name: c[fold_of != k].mean() for name, c in correct.items()}
        assert others[got.chosen[k]] == max(others.values())
        assert (got.correct[fold_of == k] == correct[got.chosen[k]][fold_of == k]).all()
    tie = select_nested({"simple": correct["a"], "complex": correct["a"].copy()}, labels)
    assert set(tie.chosen) == {"simple"}
    assert tie.best == "simple"


def test_difference_is_paired():
    rng = np.random.default_rng(7)
    a = rng.random(400) < 0.7
    b = a ^ (rng.random(400) < 0.05)
    got = difference(a, b)
    deviations = a.astype(float) - b
    half = INFLATION * 1.959963984540054 * deviations.std(ddof=1) / 20
    assert got.ci95 == pytest.approx((deviations.mean() - half, deviations.mean() + half))


def test_wrong_input_is_refused():
    X, y, _ = gaussian(np.random.default_rng(8), 3)
    for folds in (1, 10):
        with pytest.raises(ValueError, match="folds"):
            cross_fitted(X, y, folds=folds)


def test_a_remedy_that_reaches_more_is_the_bound():
    rng = np.random.default_rng(0)
    fitted = Bound(rng.random(400) < 0.4, proportion(np.ones((1, 2))), None, None, ("not an upper bound",))
    better = fitted.correct | (rng.random(400) < 0.3)
    remedy = Selection(better, proportion(better[None]), ("ncm",) * 5, "ncm")
    found = at_least(fitted, remedy)
    assert found.remedy == "ncm"
    assert found.accuracy.estimate == better.mean()
    assert "ncm reaches" in found.notes[-1]
    assert "few" in found.notes[-1]  # the verdict warns by this word
    same = Selection(fitted.correct, fitted.accuracy, ("ncm",) * 5, "ncm")
    assert at_least(fitted, same) is fitted
