"""Intervals against written-out formulas, simulated coverage and independent oracles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tailscope.intervals import p_of_zero, paired, proportion, ratio, variance_components

T2 = 0.95 * (2 / (4 * 0.975 * 0.025)) ** 0.5  # Student's t, 2 degrees of freedom, 97.5 %, in closed form


def naive_components(values):
    """The variances of one mean by seeds and by items, and the residual's part of it, one sum at a time."""
    seeds, items = values.shape
    grand = values.mean()
    rows = [sum(values[s]) / items for s in range(seeds)]
    columns = [sum(values[:, i]) / seeds for i in range(items)]
    v1 = sum((r - grand) ** 2 for r in rows) / (seeds - 1) / seeds
    residual = 0.0
    for s in range(seeds):
        for i in range(items):
            residual += (values[s, i] - rows[s] - columns[i] + grand) ** 2
    residual /= (seeds - 1) * (items - 1)
    v2 = sum((c - grand) ** 2 for c in columns) / (items - 1) / items - residual / (seeds * items)
    return v1, max(0.0, v2), residual / (seeds * items)


def test_mover_and_t_are_the_written_out_formulas():
    values = np.random.default_rng(0).normal(size=(3, 7)) + np.arange(7)
    values += np.array([[-1.0], [0.0], [2.0]])  # trainings that differ
    v1, v2, _ = naive_components(values)
    got = paired(values)
    half = np.sqrt(T2**2 * v1 + 1.959963984540054**2 * v2)
    assert got.kind == "mover"
    assert got.ci95 == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-12)
    oracle = stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval(0.95)
    assert got.ci95_seeds == pytest.approx((oracle.low, oracle.high), rel=1e-12)


@given(st.integers(2, 5), st.integers(2, 12), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_components_match_naive_loops(seeds, items, seed):
    values = np.random.default_rng(seed).integers(-1, 2, size=(seeds, items)).astype(float)
    found = variance_components(values[None])
    parts = found.seed.item(), found.item.item(), found.residual.item()
    assert parts == pytest.approx(naive_components(values), abs=1e-14)


def test_covariances_agree_with_the_variance_of_a_sum():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 40)) + 3 * rng.normal(size=(2, 1, 40))
    pair = variance_components(np.stack([x, y]))
    total = variance_components((x + y)[None])
    for part in ("seed", "item", "residual"):
        assert getattr(pair, part).sum() == pytest.approx(getattr(total, part).item(), rel=1e-12)


def test_residual_alone_leaves_no_item_variance():
    noise = np.array([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert variance_components(noise[None]).item.item() == 0.0


def flips(rng, seeds, items, changed):
    """Differences of two equal methods: as many items get better as get worse, in expectation; others do not change."""
    values = np.zeros((seeds, items))
    for row in values:
        row[rng.choice(items, changed, replace=False)] = rng.choice([-1.0, 1.0], changed)
    return values


def test_seeds_that_happen_to_agree_are_not_taken_for_certain():
    tied = np.zeros((3, 500))
    tied[[0, 1, 2], [10, 20, 30]] = 1  # one image more, of 500, by each of three seeds
    got, (v1, v2, residual) = paired(tied), naive_components(tied)
    assert (v1, v2) == pytest.approx((0, 0), abs=1e-18)
    half = 1.959963984540054 * np.sqrt(residual)
    assert got.ci95 == pytest.approx((0.002 - half, 0.002 + half), rel=1e-9)
    assert got.ci95_seeds == pytest.approx(got.ci95, rel=1e-9)
    assert p_of_zero(tied) == pytest.approx(2 * stats.norm.sf(0.002 / np.sqrt(residual)), rel=1e-6)


@pytest.mark.parametrize("changed", [4, 10, 40])
def test_false_alarms_keep_to_their_level_where_few_images_change(changed):
    rng, repeats = np.random.default_rng(changed), 2000
    found = np.array([p_of_zero(flips(rng, 3, 500, changed)) for _ in range(repeats)])
    for level in (0.05, 0.05 / 30):  # alone, and as the smallest of thirty by Holm
        alarms = int((found <= level).sum())
        assert stats.binomtest(alarms, repeats, level, alternative="greater").pvalue > 0.001, (level, alarms)


def test_trainings_that_differ_are_judged_by_students_t_alone():
    values = np.random.default_rng(6).normal(size=(3, 200)) + np.array([[-1.0], [0.3], [1.0]])
    v1, v2, _ = naive_components(values)
    assert paired(values).ci95_seeds[1] - values.mean() == pytest.approx(T2 * np.sqrt(v1), rel=1e-12)
    p = p_of_zero(values)
    t, z = stats.t.isf(p / 2, 2), stats.norm.isf(p / 2)
    assert t**2 * v1 + z**2 * v2 == pytest.approx(values.mean() ** 2, rel=1e-6)


def test_few_seeds():
    values = [[1.0, 0.0, 1.0, 1.0, 0.0]]
    one = paired(values)
    half = 1.959963984540054 * np.std(values, ddof=1) / 5**0.5
    assert one.kind == "item"
    assert one.ci95 == pytest.approx((0.6 - half, 0.6 + half))
    assert one.ci95_seeds is None
    two = paired(values * 2)
    assert (two.estimate, two.ci95, two.ci95_seeds, two.kind) == (0.6, None, None, None)
    single_item = paired([[0.0], [1.0], [0.5]])
    assert single_item.ci95 is None
    assert single_item.ci95_seeds is not None


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[]], [[np.nan, 1.0]]])
def test_values_must_be_a_finite_matrix(bad):
    with pytest.raises(ValueError, match="seeds, items"):
        paired(bad)


def test_proportion_is_wilson_for_one_seed_and_stays_within_bounds():
    p, n, z = 0.9, 50, 1.959963984540054
    got = proportion([[1] * 45 + [0] * 5])
    centre, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert got.ci95 == pytest.approx(((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)))
    three = proportion([[1] * 10, [1] * 10, [0] + [1] * 9])
    assert three.ci95[1] == 1.0
    assert 0 <= three.ci95[0] < three.estimate
    with pytest.raises(ValueError, match="0 or 1"):
        proportion([[0.5, 1.0]])


def test_fieller_bounds_are_where_the_t_statistic_is_critical():
    rng = np.random.default_rng(2)
    item, other = rng.normal(size=(2, 60))
    shift, other_shift = rng.normal(size=(2, 4, 1))
    denominator = 4 + item + 0.3 * shift + 0.1 * rng.normal(size=(4, 60))
    numerator = 0.6 * denominator + other + 0.3 * other_shift + 0.2 * rng.normal(size=(4, 60))
    low, high = ratio(numerator, denominator)
    assert low < numerator.mean() / denominator.mean() < high
    for bound in (low, high):
        combined = numerator - bound * denominator
        v1, v2, _ = naive_components(combined)
        assert abs(combined.mean()) / np.sqrt(v1 + v2) == pytest.approx(stats.t.ppf(0.975, 3), rel=1e-6)


def test_a_share_of_seeds_that_agree_has_a_width():
    rng = np.random.default_rng(7)
    gap, part = np.zeros((2, 3, 400))
    for k in range(3):  # of each seed 100 items, of which 60 by one part: the same means, other items
        chosen = rng.permutation(400)[:100]
        gap[k, chosen], part[k, chosen[:60]] = 1, 1
    low, high = ratio(part, gap)
    assert low < 0.6 - 0.02 < 0.6 + 0.02 < high


def test_fieller_is_none_where_unbounded_and_for_two_seeds():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(3, 50))
    assert ratio(noise + 1, noise) is None
    assert ratio(np.ones((2, 5)), np.ones((2, 5)) + rng.normal(size=(2, 5))) is None


def simulate(rng, seeds, items, item_sd, seed_sd):
    """One experiment of 0/1 outcomes in a probit model; returns it with its mean on these items."""
    item = 0.7 + item_sd * rng.normal(size=items)
    seed = seed_sd * rng.normal(size=(seeds, 1))
    correct = rng.normal(size=(seeds, items)) < item + seed
    return correct.astype(float), stats.norm.cdf(item / np.sqrt(1 + seed_sd**2)).mean()


def test_coverage_at_three_seeds():
    rng, repeats, item_sd, seed_sd = np.random.default_rng(4), 1000, 1.5, 0.06
    population = stats.norm.cdf(0.7 / np.sqrt(1 + item_sd**2 + seed_sd**2))
    hits = np.zeros(3)
    for _ in range(repeats):
        values, this_test_set = simulate(rng, 3, 600, item_sd, seed_sd)
        got = paired(values)
        hits[0] += got.ci95[0] <= population <= got.ci95[1]
        hits[1] += got.ci95_seeds[0] <= this_test_set <= got.ci95_seeds[1]
        hits[2] += got.ci95_seeds[0] <= population <= got.ci95_seeds[1]
    new_items, these_items, seeds_only_on_new_items = hits.astype(int)
    assert stats.binomtest(new_items, repeats, 0.95, alternative="less").pvalue > 0.001
    assert stats.binomtest(these_items, repeats, 0.95).pvalue > 0.001
    # The test has teeth: the interval over seeds alone does not cover new test items.
    assert stats.binomtest(seeds_only_on_new_items, repeats, 0.95, alternative="less").pvalue < 0.001


def test_a_share_is_covered_when_it_is_bounded():
    rng, repeats, covered, bounded = np.random.default_rng(5), 400, 0, 0
    for _ in range(repeats):
        item = rng.normal(size=(1, 300))
        denominator = 0.3 + 0.5 * item + 0.02 * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 300))
        numerator = 0.7 * denominator + 0.02 * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 300))
        bounds = ratio(numerator, denominator)
        if bounds is not None:
            bounded += 1
            covered += bounds[0] <= 0.7 <= bounds[1]
    assert bounded > repeats / 2
    assert stats.binomtest(covered, bounded, 0.95, alternative="less").pvalue > 0.001
