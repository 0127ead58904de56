"""Every field that needs no permutation, against plain NumPy loops in float64."""

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA

from tailscope.measures import FIELDS, describe
from tailscope.measures.fields import EXCESSES, MEASURES, NUMBERS, SHOWN
from tailscope.report.text import WRITERS
from tailscope.seeds import numpy_stream


def test_every_measure_has_a_unit_and_what_it_names():
    shown_as = {*WRITERS, *NUMBERS} - {"whole", "points"}
    for name, measure in MEASURES.items():
        assert measure.unit in {*shown_as, "quantiles", "permutations", "class", "flag"}, name
        assert measure.null is None or measure.null in MEASURES or measure.null in (0, 0.5, 1), name
        assert bool(measure.label) == bool(measure.meaning), name
        assert not measure.definition.endswith("."), name
    assert all(measure.unit in WRITERS for measure in SHOWN.values())
    assert len(EXCESSES) == 4


def degrees(u, v):
    cosine = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def trimmed(values):
    values = np.sort(values)
    drop = 0.1 * len(values)
    weight = np.ones(len(values))
    for i in range(len(values) - 1, -1, -1):
        weight[i] -= min(1.0, drop)
        drop -= 1 - weight[i]
    return (values * weight).sum() / weight.sum()


def naive_moments(rows, order):
    n = len(rows)
    if n < 2:
        return {}
    # The eigenvalues of the covariance are the squared singular values of the centred rows over n - 1.
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2 / (n - 1)
    trace, first, norm_squared = values.sum(), values[0], (values**2).sum()
    found = {
        "variance": trace,
        "covariance_norm": np.sqrt(norm_squared),
        "first_pc_share": first / trace,
        "first_pc_share_high": first / trace,
        "covariance_norm_unbiased": None,
        "effective_rank": None,
        "first_pc_share_low": None,
        "first_pc_share_noise_reduced": (first - (trace - first) / (n - 2)) / trace if n > 2 else None,
    }
    if n >= 4:
        q = (np.linalg.norm(rows - rows.mean(0), axis=1) ** 4).sum() / (n - 1)
        scale = (n - 1) / (n * (n - 2) * (n - 3))
        squared = scale * ((n - 1) * (n - 2) * norm_squared + trace**2 - n * q)
        trace_squared = scale * (2 * norm_squared + (n * n - 3 * n + 1) * trace**2 - n * q)
        found["covariance_norm_unbiased"] = np.sqrt(squared)
        found["effective_rank"] = trace_squared / squared
        a, b = rows[order[: (n + 1) // 2]], rows[order[(n + 1) // 2 :]]
        along = []
        for first_half, second_half in ((a, b), (b, a)):
            direction = np.linalg.svd(first_half - first_half.mean(0), full_matrices=False)[2][0]
            along.append(np.var(second_half @ direction, ddof=1))
        found["first_pc_share_low"] = np.mean(along) / trace
    return found


def naive_pairs(s, u):
    n = len(s)
    if n < 2 or not len(u):
        return {}
    others = [np.delete(s, j, axis=0).mean(0) for j in range(n)]
    out = np.array([np.mean([degrees(x, c) for c in others]) for x in u])
    own = np.array([degrees(s[j], others[j]) for j in range(n)])
    escapes, ranks = [], []
    for x in u:
        center = (s.sum(0) + x) / (n + 1)
        mine = degrees(x, center)
        theirs = np.array([degrees(y, center) for y in s])
        escapes.append((theirs < mine).all())
        ranks.append((theirs < mine).mean())
    return {
        "spread_gap_deg": out.mean() - own.mean(),
        "spread_gap_trimmed_deg": trimmed(out) - trimmed(own),
        "escape_conformal": np.mean(escapes),
        "escape_conformal_null": 1 / (n + 1),
        "escape_rank": np.mean(ranks),
    }


def naive_class(s, u, order):
    """Fields of one class that need no other class."""
    n, m = len(s), len(u)
    t = np.concatenate([s, u])
    mu_s, mu_t = s.mean(0), t.mean(0)
    inside, around = [degrees(x, mu_s) for x in s], [degrees(x, mu_t) for x in t]
    outside = [degrees(x, mu_s) for x in u]
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    found = naive_moments(t, order) | naive_pairs(s, u)
    if n > 1:
        found |= {"spread_train_deg": np.mean(inside), "angular_width_deg": np.max(inside)}
        found["angles_train_quantiles_deg"] = list(np.quantile(inside, levels))
        if m:
            found["escape_rate"] = np.mean(np.array(outside) > np.max(inside))
    if n + m > 1:
        found["spread_true_deg"] = np.mean(around)
        found["angles_true_quantiles_deg"] = list(np.quantile(inside + outside, levels))
    if m:
        mu_u = u.mean(0)
        found["center_shift_deg"], found["center_shift_unseen_deg"] = degrees(mu_s, mu_t), degrees(mu_s, mu_u)
        found["norm_ratio"] = np.linalg.norm(s, axis=1).mean() / np.linalg.norm(u, axis=1).mean()
        total = ((t - mu_t) ** 2).sum()
        found["between_share"] = n * m / (n + m) * ((mu_s - mu_u) ** 2).sum() / total
        found["between_share_null"] = 1 / (n + m - 1)
        along = np.var(t @ mu_t / np.linalg.norm(mu_t), ddof=1)
        rank = found["variance"] ** 2 / found["covariance_norm"] ** 2
        tangent = np.sqrt((1 - n / (n + m)) * (found["variance"] - along) / n) / np.linalg.norm(mu_t)
        found["center_shift_null_deg"] = np.degrees(np.arctan(tangent)) * (1 - 1 / (4 * rank))
        found["center_shift_excess_deg"] = found["center_shift_deg"] - found["center_shift_null_deg"]
        if m > 1:
            tau_u = u.var(0, ddof=1).sum()
            found["variance_unseen"] = tau_u
            if n > 1:
                tau_s = s.var(0, ddof=1).sum()
                delta = ((mu_s - mu_u) ** 2).sum() - tau_s / n - tau_u / m
                found["displacement"] = np.sign(delta) * np.sqrt(abs(delta)) / np.sqrt(tau_u)
                found["variance_ratio"] = tau_s / tau_u
    return found


def naive(train, train_labels, unseen, unseen_labels, names, seed=0):
    classes = len(names)
    own = [(train[train_labels == k], unseen[unseen_labels == k]) for k in range(classes)]
    mu = np.array([s.mean(0) for s, _ in own])
    mu_true = np.array([np.concatenate(pair).mean(0) for pair in own])
    entries = []
    for k, (s, u) in enumerate(own):
        t = np.concatenate([s, u])
        order = numpy_stream(seed, "geometry", "halves", f"{names[k]}#0").permutation(len(t))
        entry = dict.fromkeys(FIELDS) | naive_class(s, u, order)
        entry |= {"index": k, "name": names[k], "train_count": len(s), "unseen_count": len(u)}
        for which, centers, rows in (("train", mu, s), ("true", mu_true, t)):
            wrong = [j for j in range(classes) if j != k]
            lengths = np.linalg.norm(centers[wrong], axis=1) * np.linalg.norm(centers[k])
            distances = np.degrees(np.arccos(centers[wrong] @ centers[k] / lengths))
            entry[f"nearest_center_{which}_deg"] = np.min(distances)
            entry[f"nearest_center_{which}_class"] = wrong[int(np.argmin(distances))]
            unit = centers[wrong] / np.linalg.norm(centers[wrong], axis=1, keepdims=True)
            cosine = (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ unit.T
            entry[f"nearest_center_sample_{which}_deg"] = np.degrees(np.arccos(np.clip(cosine, -1, 1))).min(1).mean()
        entries.append(entry)
    return entries


def made_up(classes, d, most, unseen_most, seed, steep=1):
    """Long-tailed ReLU-like features of unequal lengths: n from `most` to 1, m from 0 to `unseen_most`."""
    rng = np.random.default_rng(seed)
    n = [max(1, int(most * (1 / most) ** (steep * k / (classes - 1)))) for k in range(classes)]
    m = [int(x) for x in rng.integers(0, unseen_most + 1, classes)]
    centers = np.maximum(rng.normal(size=(classes, d)), 0) + 0.1
    scale = 1 / np.sqrt(np.arange(1, d + 1))
    sets = []
    for counts in (n, m):
        labels = rng.permutation(np.repeat(np.arange(classes), counts))
        sets += [centers[labels] + 0.7 * rng.normal(size=(len(labels), d)) * scale, labels]
    return sets


def assert_same(ours, reference, relative, angle):
    for mine, theirs in zip(ours, reference, strict=True):
        for field, value in theirs.items():
            got = mine[field]
            if field in ("group", "spread_gap_material"):
                continue
            where = f"{field} of {mine['name']} (n={mine['train_count']}, m={mine['unseen_count']}): {got} != {value}"
            if value is None or isinstance(value, str):
                assert got == value, where
            elif "_deg" in field:
                assert got == pytest.approx(value, abs=angle), where
            else:
                assert got == pytest.approx(value, rel=relative, abs=relative), where


CASES = {
    "n > d": (5, 6, 60, 30),
    "n < d": (5, 40, 12, 9),
    "two classes, two dimensions": (2, 2, 9, 8),
    "d = 2048": (3, 2048, 7, 5),
    "Lanczos": (3, 150, 300, 20),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fields_equal_naive_loops(case, dtype):
    sets = made_up(*CASES[case], seed=3)
    names = [f"class {k}" for k in range(CASES[case][0])]
    sets = [torch.from_numpy(x).to(dtype) if x.dtype == np.float64 else torch.from_numpy(x) for x in sets]
    ours = describe(*sets, names, permutations=0).classes
    reference = naive(*(x.numpy().astype(np.float64) if x.is_floating_point() else x.numpy() for x in sets), names)
    if dtype == torch.float32:  # the direction that one half gives is only as exact as its eigenvalue is separate
        for mine, theirs in zip(ours, reference, strict=True):
            low = theirs.pop("first_pc_share_low")
            assert mine["first_pc_share_low"] == (None if low is None else pytest.approx(low, rel=1e-4))
    assert_same(ours, reference, relative=1e-6, angle=1e-4)


def test_thousand_classes_equal_naive_loops():
    sets = made_up(1000, 16, 500, 3, seed=1, steep=6)
    assert {1, 500} <= {*np.bincount(sets[1])}
    names = [str(k) for k in range(1000)]
    ours = describe(*map(torch.from_numpy, sets), names, permutations=0).classes
    assert_same(ours, naive(*sets, names), relative=1e-6, angle=1e-4)


def test_second_moments_equal_scikit_learn():
    train, labels, unseen, unseen_labels = made_up(3, 10, 50, 40, seed=5)
    ours = describe(*map(torch.from_numpy, (train, labels, unseen, unseen_labels)), list("abc"), permutations=0).classes
    for k in range(2):
        rows = np.concatenate([train[labels == k], unseen[unseen_labels == k]])
        sigma = EmpiricalCovariance().fit(rows).covariance_ * len(rows) / (len(rows) - 1)
        assert ours[k]["variance"] == pytest.approx(np.trace(sigma))
        assert ours[k]["covariance_norm"] == pytest.approx(np.linalg.norm(sigma))
        assert ours[k]["first_pc_share"] == pytest.approx(PCA(1).fit(rows).explained_variance_ratio_[0])
