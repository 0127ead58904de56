"""Subsets against the published algorithm written out with NumPy's global generator, and their properties."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailscope.data import sources
from tailscope.data.subsets import matched, resolve, subset
from tailscope.errors import UserError


@pytest.fixture
def legacy_generator() -> Iterator[None]:
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@st.composite
def labels_and_counts(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    have = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    labels = np.repeat(np.arange(len(have)), have)
    np.random.default_rng(draw(st.integers(0, 99))).shuffle(labels)
    return labels, [draw(st.integers(1, n)) for n in have]


def test_cifar10_lt_is_the_published_subset(cifar10_npz: Path) -> None:
    train = sources.load("cifar10", data_root=cifar10_npz.parent).train
    drawn = subset(train.labels, resolve("exp:100", train.counts()), protocol="ldam", seed=0)
    assert sum(drawn.counts) == 12_406
    assert drawn.sha256.startswith("4bf45bff")
    assert train.take(drawn.flat).counts() == drawn.counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.usefixtures("legacy_generator")
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_ldam_is_numpys_global_generator(seed: int) -> None:
    labels = np.random.default_rng(7).integers(0, 5, 400)
    counts = [60, 31, 14, 6, 1]
    np.random.seed(seed)
    expected = []
    for k in range(5):
        index = np.where(labels == k)[0]
        np.random.shuffle(index)
        expected.append(index[: counts[k]])
    drawn = subset(torch.from_numpy(labels), counts, protocol="ldam", seed=seed)
    for ours, theirs in zip(drawn.indices, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert drawn.sha256 == hashlib.sha256(np.concatenate(expected).astype("<i8").tobytes()).hexdigest()


@pytest.mark.usefixtures("legacy_generator")
def test_drawing_leaves_the_global_generator_alone() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    subset(np.arange(20) % 2, [3, 2], protocol="ldam", seed=1)
    subset(np.arange(20) % 2, [3, 2], seed=1)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


@given(labels_and_counts(), st.sampled_from(["nested", "ldam"]), st.integers(0, 3))
def test_a_subset_has_its_counts_labels_and_no_repeats(
    problem: tuple[np.ndarray, list[int]], protocol: str, seed: int
) -> None:
    labels, counts = problem
    drawn = subset(labels, counts, protocol=protocol, seed=seed)
    assert drawn.counts == counts
    assert drawn.flat.dtype == np.int64
    assert len(set(drawn.flat.tolist())) == sum(counts)
    np.testing.assert_array_equal(labels[drawn.flat], np.repeat(np.arange(len(counts)), counts))
    assert drawn.sha256 == subset(labels, counts, protocol=protocol, seed=seed).sha256


@given(labels_and_counts())
def test_nested_draws_are_beginnings_of_larger_ones(problem: tuple[np.ndarray, list[int]]) -> None:
    labels, counts = problem
    everything = subset(labels, np.bincount(labels).tolist(), seed=5)
    for few, more in zip(subset(labels, counts, seed=5).indices, everything.indices, strict=True):
        np.testing.assert_array_equal(few, more[: len(few)])


def test_seeds_and_order_matter() -> None:
    labels = np.arange(100) % 2
    hashes = {subset(labels, [20, 10], protocol=p, seed=s).sha256 for p in ("nested", "ldam") for s in range(3)}
    assert len(hashes) == 6


def test_nested_draws_are_uniform() -> None:
    """Each of 10 samples is kept in 3 of 10 draws: chi-squared over 2,000 seeds, 9 degrees of freedom."""
    kept = np.zeros(10)
    for seed in range(2000):
        kept[subset(np.zeros(10, dtype=np.int64), [3], seed=seed).flat] += 1
    # Kept counts of samples drawn without replacement have variance n p (1 - p) 10/9 around n p, summed over 10 cells.
    statistic = ((kept - 600) ** 2).sum() / (2000 * 0.3 * 0.7 * 10 / 9)
    assert statistic < 27.9  # the 0.999 quantile


@given(labels_and_counts())
def test_matched_is_as_large_and_as_equal_as_possible(problem: tuple[np.ndarray, list[int]]) -> None:
    labels, counts = problem
    have = np.bincount(labels)
    got = matched(labels, counts, seed=0).counts
    assert sum(got) == sum(counts)
    for k, n in enumerate(got):
        assert n <= have[k]
        # A class below the largest share by more than one has nothing left to give.
        assert n == have[k] or n >= max(got) - 1


def test_matched_extends_the_nested_subset_of_the_same_seed() -> None:
    labels = np.arange(60) % 3
    counts = [20, 8, 2]
    lt, balanced = subset(labels, counts, seed=4), matched(labels, counts, seed=4)
    assert balanced.counts == [10, 10, 10]
    for a, b in zip(lt.indices, balanced.indices, strict=True):
        shared = min(len(a), len(b))
        np.testing.assert_array_equal(a[:shared], b[:shared])


@pytest.mark.parametrize(
    ("counts", "options", "says"),
    [
        ([1, 1], {"protocol": "cui"}, "unknown protocol 'cui'; known: nested, ldam"),
        ([1, 1], {"seed": -1}, "seed -1"),
        ([1, 1], {"protocol": "ldam", "seed": 2**32}, "takes 0 to 4294967295"),
        ([6, 1], {}, "class 0: cannot keep 6 of 5"),
        ([1, 0], {}, "class 1: cannot keep 0 of 5"),
        ([1, 1, 1], {}, "class 2: cannot keep 1 of 0"),
        ([1], {}, "labels run 0 to 1, but counts are given for 1 classes"),
    ],
)
def test_impossible_subsets_are_one_line(counts: list[int], options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        subset(np.arange(10) % 2, counts, **options)
