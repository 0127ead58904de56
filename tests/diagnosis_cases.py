"""Planted features whose bottleneck is known, for the tests of `diagnose`."""

import numpy as np
from sklearn.datasets import load_digits

from tailscope.tables.table import FeatureTable, LinearLayer

COUNTS = (200, 150, 120, 60, 40, 30, 15, 10, 8)
CLASSES, DIMS, UNSEEN = len(COUNTS), 12, 50
CENTRES = 4 * np.eye(CLASSES, DIMS) + 2
FEW = {"permutations": 99}


def table(features, labels, **fields):
    return FeatureTable.from_arrays(np.asarray(features, dtype=np.float32), np.asarray(labels), **fields)


def around(centres, counts, scale, rng):
    labels = np.repeat(np.arange(len(counts)), counts)
    return centres[labels] + scale * rng.normal(size=(len(labels), centres.shape[1])), labels


def separable(seed=0):
    """Compact classes, the same in train and unseen."""
    rng = np.random.default_rng(seed)
    return around(CENTRES, COUNTS, 0.5, rng), around(CENTRES, [UNSEEN] * CLASSES, 0.5, rng)


def head_biased():
    """The best linear classifier for `CENTRES`, pushed towards the three head classes."""
    bias = -0.5 * (CENTRES**2).sum(axis=1)
    bias[:3] += 14
    return LinearLayer.from_arrays(CENTRES, bias)


def scattered(seed=0):
    """Compact training classes, and unseen samples of the tail spread over all classes."""
    rng = np.random.default_rng(seed)
    train = around(CENTRES, COUNTS, 0.3, rng)
    features, labels = around(CENTRES, [UNSEEN] * CLASSES, 0.3, rng)
    lost = labels >= 3
    features[lost] = CENTRES[rng.integers(CLASSES, size=lost.sum())] + 0.3 * rng.normal(size=(lost.sum(), DIMS))
    return train, (features, labels)


def noise(seed=0):
    """Features that have nothing to do with the labels."""
    rng = np.random.default_rng(seed)
    return tuple(
        (rng.normal(size=(sum(counts), DIMS)), np.repeat(np.arange(CLASSES), counts))
        for counts in (COUNTS, [UNSEEN] * CLASSES)
    )


def weak():
    """An encoder that never saw the training set and says little: digits through a random map to three numbers."""
    digits, rng = load_digits(), np.random.default_rng(3)
    features = np.tanh(digits.data / 16 @ rng.normal(size=(64, 3)) * 0.3)
    labels, order = digits.target, rng.permutation(len(digits.target))
    rank = np.empty(len(labels), int)
    for k in range(10):
        members = order[labels[order] == k]
        rank[members] = np.arange(len(members))
    counts = (100 * 0.05 ** (np.arange(10) / 9)).astype(int)
    return tuple((features[rows], labels[rows]) for rows in (rank < counts[labels], rank >= 120))
