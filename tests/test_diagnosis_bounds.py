"""Folds, and paired differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailscope.diagnosis.curve_fits import assign_folds
from tailscope.diagnosis.outcomes import difference


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


def test_difference_is_paired():
    rng = np.random.default_rng(7)
    a = rng.random(400) < 0.7
    b = a ^ (rng.random(400) < 0.05)
    got = difference(a, b, 1.3)
    deviations = a.astype(float) - b
    half = 1.3 * 1.959963984540054 * deviations.std(ddof=1) / 20
    assert got.ci95 == pytest.approx((deviations.mean() - half, deviations.mean() + half))
