"""Permutation statistics against plain loops, p-values against their definitions, and simulations of both errors."""

import itertools
from math import comb

import numpy as np
import pytest
import scipy.stats
import torch

from tailscope.measures import describe
from tailscope.measures.chance import (
    GAP,
    STATISTICS,
    Count,
    Draws,
    Units,
    continue_draws,
    draw,
    false_discovery,
    group_p,
    make_pool,
    standardize,
    statistics,
)
from tailscope.measures.measure import moments, top_eigenpair
from tailscope.measures.rows import all_subsets, subsets


def degrees(u, v):
    return np.degrees(np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1)))


def naive_statistics(rows, member):
    """One subset's statistics, straight from their definitions."""
    s, u = rows[member], rows[~member]
    center = s.mean(0)
    inside, outside = [degrees(x, center) for x in s], [degrees(x, center) for x in u]
    alone = [degrees(s[j], np.delete(s, j, axis=0).mean(0)) for j in range(len(s))]
    ratio = s.var(0, ddof=1).sum() / u.var(0, ddof=1).sum()
    return [
        degrees(center, rows.mean(0)),
        np.mean(outside) - np.mean(alone),
        np.mean(inside),
        np.mean(np.array(outside) > max(inside)),
        np.log(ratio),
    ]


@pytest.mark.parametrize(("n", "m", "d"), [(2, 20, 3), (7, 9, 40), (30, 4, 4)])
@pytest.mark.parametrize(("dtype", "angle"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_statistics_equal_loops(n, m, d, dtype, angle):
    rng = np.random.default_rng(n)
    rows = torch.from_numpy(rng.normal(size=(n + m, d)) + 1).to(dtype)
    taken = next(subsets(n, n + m, 8, rng))
    ours = statistics(make_pool(rows), torch.from_numpy(taken).to(dtype)).T.numpy()
    for got, member in zip(ours, taken, strict=True):
        assert got == pytest.approx(naive_statistics(rows.double().numpy(), member), abs=angle)


def test_subsets_are_uniform_and_of_the_right_size():
    rng = np.random.default_rng(0)
    drawn = np.concatenate(list(subsets(2, 5, 20_000, rng)))
    assert (drawn.sum(1) == 2).all()
    _, frequency = np.unique(drawn, axis=0, return_counts=True)
    assert len(frequency) == comb(5, 2)
    assert scipy.stats.chisquare(frequency).pvalue > 0.001
    assert {tuple(row) for row in all_subsets(2, 5)} == {tuple(row) for row in np.unique(drawn, axis=0)}
    assert all_subsets(2, 5)[0].tolist() == [True, True, False, False, False]


def test_few_splits_are_listed_and_chance_is_their_exact_mean():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 3)) + 2
    drawn = draw([make_pool(torch.from_numpy(rows))], Units(np.arange(12), 1, 12), 999, rng, 0.0)[0]
    assert drawn.complete
    assert drawn.values.shape == (len(STATISTICS), 12)
    assert drawn.null("shift") == pytest.approx(np.mean([degrees(x, rows.mean(0)) for x in rows]))


def test_bursts_change_sides_whole():
    rng = np.random.default_rng(0)
    units = Units(np.array([0, 0, 1, 2, 2, 3]), 2, 4)
    members = units.members(np.concatenate(list(subsets(2, 4, 50, rng))), torch.zeros(1)).numpy()
    assert (members[:, 0] == members[:, 1]).all()
    assert (members[:, 3] == members[:, 4]).all()
    assert set(members.sum(1)) == {2, 3, 4}


def test_related_rows_need_bursts():
    """Five copies of each vector: permuting rows flags a class that permuting bursts does not."""
    rng = np.random.default_rng(4)
    p = {"rows": [], "bursts": []}
    for _ in range(20):
        distinct = rng.normal(size=(18, 8)) + 1
        rows = torch.from_numpy(np.repeat(distinct, 5, axis=0) + 0.05 * rng.normal(size=(90, 8)))
        for kind, index in (("rows", np.arange(90)), ("bursts", np.repeat(np.arange(18), 5))):
            units = Units(index, (index[29] + 1), index[-1] + 1)
            count = draw([make_pool(rows)], units, 199, rng, 0.0)[0].count(GAP)
            p[kind].append(count.p(two_sided=False))
    assert np.mean(np.array(p["rows"]) < 0.05) > 0.3
    assert np.mean(np.array(p["bursts"]) < 0.05) < 0.3


def test_sequential_p_value_stops_at_twenty_exceedances():
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.normal(size=(40, 4)) + 1)
    units = Units(np.arange(40), 10, 40)
    pool = make_pool(rows)
    observed = statistics(pool, torch.arange(40)[None].lt(10).double())[GAP, 0].item()
    start = Count(observed, 0, 0, 0, complete=False, tolerance=0.0)
    p, draws = continue_draws(pool, units, start, GAP, 100_000, False, np.random.default_rng(2))
    values = np.concatenate(
        [statistics(pool, torch.from_numpy(t).double())[GAP] for t in subsets(10, 40, draws, np.random.default_rng(2))]
    )
    position = np.flatnonzero(np.cumsum(values >= observed) == 20)[0] + 1
    assert p == pytest.approx(20 / position)
    extreme = Count(1e9, 0, 0, 0, complete=False, tolerance=0.0)
    assert continue_draws(pool, units, extreme, GAP, 400, False, rng) == (1 / 401, 400)
    assert continue_draws(pool, units, extreme, GAP, 400, True, rng) == (2 / 401, 400)


def test_q_values_equal_the_definition():
    p = [0.01, None, 0.5, 0.03, 0.02, None, 0.9]
    known = sorted(value for value in p if value is not None)
    for value, q in zip(p, false_discovery(p), strict=True):
        if value is None:
            assert q is None
        else:
            rank = known.index(value)
            assert q == pytest.approx(min(min(1, known[i] * len(known) / (i + 1)) for i in range(rank, len(known))))


def test_unbiased_norms_are_means_over_quadruples():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3)))
    norm, trace = [], []
    for a, b, c, d in itertools.permutations(rows, 4):
        norm.append(((a - b) @ (c - d)).item() ** 2 / 4)
        trace.append(((a - b).square().sum() * (c - d).square().sum()).item() / 4)
    found = moments(rows - rows.mean(0), torch.arange(6))
    assert found["covariance_norm_unbiased"] == pytest.approx(np.sqrt(np.mean(norm)))
    assert found["effective_rank"] == pytest.approx(np.mean(trace) / np.mean(norm))


SPECTRA = {
    "separate": 1 / np.arange(1, 201),
    "even": np.linspace(1, 2, 200),
    "nearly equal": 1 + 1e-9 * np.arange(200),
    "rank 1": 1.0 * (np.arange(200) == 7),
    "equal": np.ones(200),
    "zero": np.zeros(200),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_top_eigenpair_of_large_matrices(kind):
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(200, 200)))[0]
    matrix = turn * SPECTRA[kind] @ turn.T
    matrix = (matrix + matrix.T) / 2
    value, vector = top_eigenpair(matrix)
    assert value == pytest.approx(max(SPECTRA[kind]), rel=1e-9, abs=1e-12)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert np.allclose(matrix @ vector, value * vector, rtol=0, atol=1e-6)


def exchangeable(rng, classes, n, m, d):
    """Train and unseen rows of every class from one heavy-tailed distribution."""
    centers = 2 * np.abs(rng.normal(size=(classes, d)))
    sets = []
    for count in (n, m):
        labels = np.repeat(np.arange(classes), count)
        noise = rng.standard_t(4, size=(len(labels), 1)) * rng.normal(size=(len(labels), d))
        sets += [torch.from_numpy(centers[labels] + noise), torch.from_numpy(labels)]
    return sets


def test_exchangeable_classes_are_flagged_no_more_often_than_promised():
    """Exact binomial test at 0.001 of both tests' error at the 5 % level, n from 5 to 40, 360 classes."""
    rng = np.random.default_rng(0)
    gap, shift = [], []
    for n in (5, 12, 40):
        sets = exchangeable(rng, 120, n, 30, 6)
        result = describe(*sets, [f"{n} {k}" for k in range(120)], permutations=99)
        gap += [e["spread_gap_p"] for e in result.classes]
        shift += [e["center_shift_p"] for e in result.classes]
        flagged = sum(e["spread_gap_flagged"] for e in result.classes)
        assert scipy.stats.binomtest(flagged, 120, 0.05, alternative="greater").pvalue > 0.001
    for p in (gap, shift):
        rejected = sum(value <= 0.05 for value in p)
        assert scipy.stats.binomtest(rejected, len(p), 0.05, alternative="greater").pvalue > 0.001
        assert scipy.stats.binomtest(rejected, len(p), 0.02, alternative="less").pvalue > 0.001  # nor is it useless


def test_known_null_values_hold():
    """Under exchangeability the gap is 0, the conformal escape 1 / (n + 1), its rank 1/2, displacement about 0."""
    sets = exchangeable(np.random.default_rng(1), 300, 5, 20, 6)
    classes = describe(*sets, [str(k) for k in range(300)], permutations=0).classes
    for field, null in (("spread_gap_deg", 0), ("escape_conformal", 1 / 6), ("escape_rank", 0.5)):
        values = np.array([e[field] for e in classes])
        assert abs(values.mean() - null) < 4 * values.std() / np.sqrt(len(values))


def test_displaced_classes_are_flagged():
    """Training samples of 5, 6, 10 and 30 turned away by their class's own spread: all flagged, few others."""
    rng = np.random.default_rng(2)
    d, classes, displaced = 64, 24, 8
    scale = 1 / np.sqrt(np.arange(1, d + 1))
    centers = rng.normal(size=(classes, d))
    centers *= np.linalg.norm(scale) / np.linalg.norm(centers, axis=1, keepdims=True)
    sets = []
    for counts in (np.resize([5, 6, 10, 30], classes), np.full(classes, 60)):
        labels = np.repeat(np.arange(classes), counts)
        rows = centers[labels] + scale * rng.normal(size=(len(labels), d))
        sets += [torch.from_numpy(rows), torch.from_numpy(labels)]
    names = [str(k) for k in range(classes)]
    before = describe(*sets, names, permutations=0).classes
    for k in range(displaced):
        own = sets[1] == k
        center = sets[0][own].mean(0)
        side = torch.from_numpy(rng.normal(size=d))
        side -= (side @ center) / center.square().sum() * center
        away = np.radians(before[k]["spread_train_deg"])
        sets[0][own] += np.tan(away) * center.norm() * side / side.norm()
    after = describe(*sets, names).classes
    assert all(e["spread_gap_flagged"] and e["center_shift_flagged"] for e in after[:displaced])
    assert sum(e["spread_gap_flagged"] for e in after[displaced:]) <= 2


def test_one_class_among_many_is_found_by_drawing_more():
    """199 permutations cannot flag one class of 60: its p-value has to come from 1,200."""
    rng = np.random.default_rng(3)
    sets = exchangeable(rng, 60, 8, 20, 8)
    sets[0][sets[1] == 7] = 5 * torch.eye(8, dtype=torch.float64)[:1] + 0.01 * torch.from_numpy(rng.normal(size=(8, 8)))
    result = describe(*sets, [str(k) for k in range(60)], permutations=199)
    entry = result.classes[7]
    assert entry["spread_gap_permutations"] == 1200
    assert entry["spread_gap_p"] == pytest.approx(1 / 1201)
    assert entry["spread_gap_flagged"]


def test_groups_see_what_single_classes_cannot():
    """Tail classes of three samples, each drawn in a little: no class has a verdict, the group has one."""
    rng = np.random.default_rng(5)
    counts = np.repeat([150, 30, 3], [3, 4, 25])
    centers = 2 * np.abs(rng.normal(size=(32, 12)))
    train_labels, unseen_labels = np.repeat(np.arange(32), counts), np.repeat(np.arange(32), 30)
    pull = np.where(counts < 20, 0.7, 1.0)[train_labels][:, None]
    train = centers[train_labels] + pull * rng.normal(size=(len(train_labels), 12))
    unseen = centers[unseen_labels] + rng.normal(size=(len(unseen_labels), 12))
    sets = [torch.from_numpy(x) for x in (train, train_labels, unseen, unseen_labels)]
    result = describe(*sets, [str(k) for k in range(32)], permutations=199)
    tail = [e for e in result.classes if e["group"] == "tail"]
    assert result.groups_rule == "counts"
    assert all(e["spread_gap_p"] is None and e["spread_gap_q"] is None for e in tail)
    assert result.groups["tail"]["spread_gap_p"] == pytest.approx(1 / 200)
    assert result.groups["tail"]["spread_gap_flagged"]
    assert not result.groups["head"]["spread_gap_flagged"]
    assert result.groups["tail"]["classes"] == 25
    assert result.groups["tail"]["train_count"] == 75
    assert result.groups["tail"]["variance"] == pytest.approx(np.mean([e["variance"] for e in tail]))


def test_group_test_is_the_sum_of_standardized_statistics():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, len(STATISTICS), 100))
    parts = [standardize(Draws(torch.from_numpy(part), False, 0.0), GAP, 99, rng) for part in values]
    total = np.sum([(part[GAP] - part[GAP].mean()) / part[GAP].std() for part in values], axis=0)
    assert group_p(np.array([*parts, np.full(100, np.nan)]), two_sided=False) == pytest.approx(
        (1 + (total[1:] >= total[0]).sum()) / 100
    )
    assert group_p(np.full((2, 100), np.nan), two_sided=False) is None
    few = standardize(Draws(torch.from_numpy(values[0][:, :5]), True, 0.0), GAP, 99, rng)
    assert few.shape == (100,)
    assert len(np.unique(few)) == 5
