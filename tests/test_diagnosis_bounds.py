"""Folds, nested selection of a classifier, and paired differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tailscope.diagnosis.curve_fits import assign_folds
from tailscope.diagnosis.outcomes import difference, select_nested


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
    got = difference(a, b, 1.3)
    deviations = a.astype(float) - b
    half = 1.3 * 1.959963984540054 * deviations.std(ddof=1) / 20
    assert got.ci95 == pytest.approx((deviations.mean() - half, deviations.mean() + half))
