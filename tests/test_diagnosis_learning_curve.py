"""The classifier bound: known truths, refusals, invariances, and the fits it is made of against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from tailscope.diagnosis import curve_fits, curve_rows
from tailscope.diagnosis.curve_fits import Rows
from tailscope.diagnosis.learning_curve import DRAWS, ClassifierBound, Fits, follow


def learning_curve(train: Rows, unseen: Rows, test: Rows | None = None, *, bursts=None, seed=0, bound_at=None):
    """Return the bound, at the samples of the most frequent training class or as said."""
    return follow(Fits.of(train, unseen, test, bursts, seed), bound_at or int(np.bincount(train.labels).max(initial=1)))


def gaussian(classes: int, dims: int, counts: object, seed: int, distance: float = 1.0) -> Rows:
    """Classes about centres that depend on the number of classes and dimensions only."""
    centres = np.random.default_rng([classes, dims]).normal(size=(classes, dims)) * distance
    labels = np.repeat(np.arange(classes), counts)
    noise = np.random.default_rng(seed).normal(size=(len(labels), dims))
    return Rows((centres[labels] + noise).astype("f4"), labels)


def digits(m: int, head: int, factor: float, seed: int) -> tuple[Rows, Rows, Rows, Rows]:
    """Return long-tailed training samples, m unseen ones a class, a test set, and `head` of every class."""
    data = load_digits()
    X, y = data.data.astype("f4"), data.target
    order = np.random.default_rng(seed).permutation(len(y))
    rank = curve_rows.rank_in_class(y, order)
    counts = np.round(head * factor ** (-np.arange(10) / 9)).astype(int)
    pick = [rank < m, (rank >= m) & (rank < m + counts[y]), rank >= m + head, (rank >= m) & (rank < m + head)]
    unseen, train, test, true = (Rows(X[rows], y[rows]) for rows in pick)
    return train, unseen, test, true


def truth(true: Rows, test: Rows) -> float:
    """Return the best accuracy over penalties of scikit-learn's softmax regression on the true distribution."""
    scale = np.sqrt(true.features.var(axis=0).mean())
    found = []
    for strength in (1e-1, 1e-2, 1e-3):
        model = LogisticRegression(C=1 / (strength * len(true.labels)), max_iter=300)
        model.fit(true.features / scale, true.labels)
        found.append(model.score(test.features / scale, test.labels))
    return max(found)


def ends(bound: ClassifierBound) -> tuple[float, float]:
    """Return the interval of the bound: what is attained limits it where the curve does not."""
    assert bound.attained.accuracy.ci95 is not None
    return (bound.attained.accuracy.ci95[0], 1.0) if bound.extrapolated is None else bound.extrapolated.ci95


@pytest.mark.parametrize("tested", [True, False])
@pytest.mark.parametrize("m", [10, 25])
def test_covers_the_truth_on_digits_and_is_nearer_than_what_is_attained(m, tested):
    gaps, found, covered = [], [], 0
    for seed in range(3):
        train, unseen, test, true = digits(m, 80, 30.0, seed)
        bound = learning_curve(train, unseen, test if tested else None, seed=seed)
        target = truth(true, test)
        low, high = ends(bound)
        covered += low <= target <= high
        assert bound.bound_at == 80
        assert bound.attained.accuracy.ci95[0] <= target  # a lower limit
        assert bound.extrapolated is not None
        gaps.append(bound.attained.accuracy.estimate - target)
        found.append(bound.extrapolated.mean - target)
    assert covered == 3
    assert abs(np.mean(found)) < abs(np.mean(gaps))


@pytest.mark.parametrize(("m", "dims"), [(20, 20), (60, 60)])
def test_covers_the_truth_of_gaussian_classes(m, dims):
    distance = 1.6 / np.sqrt(dims)
    train = gaussian(10, dims, np.geomspace(400, 8, 10).round().astype(int), 1, distance)
    unseen, test = gaussian(10, dims, m, 2, distance), gaussian(10, dims, 300, 3, distance)
    target = truth(gaussian(10, dims, 400, 4, distance), test)
    for scored in (test, None):
        bound = learning_curve(train, unseen, scored)
        low, high = ends(bound)
        assert low <= target <= high
        assert bound.exchange.alike
        assert high - low < 0.35


def test_memorised_training_samples_take_no_part_in_the_curve():
    train = gaussian(6, 12, [200, 100, 50, 30, 20, 12], 1, 0.6)
    centres = np.stack([train.features[train.labels == k].mean(axis=0) for k in range(6)])
    memorised = Rows(train.features + 2 * centres[train.labels], train.labels)  # pushed out along their centres
    unseen, test = gaussian(6, 12, 40, 2, 0.6), gaussian(6, 12, 300, 3, 0.6)
    honest, misled = learning_curve(train, unseen, test), learning_curve(memorised, unseen, test)
    assert honest.exchange.alike
    assert [point.source for point in honest.points][-1] == "pooled"
    assert not misled.exchange.alike
    assert misled.exchange.difference > 0.1
    assert {point.source for point in misled.points} == {"unseen"}
    target = truth(gaussian(6, 12, 200, 4, 0.6), test)
    low, high = ends(misled)
    assert low <= target <= high
    assert misled.attained.accuracy.estimate > honest.attained.accuracy.estimate - 0.05  # pooling is not forced on it


def test_noise_decides_nothing():
    generator = np.random.default_rng(0)
    train = Rows(generator.normal(size=(400, 16)), generator.integers(0, 5, 400))
    unseen = Rows(generator.normal(size=(200, 16)), np.repeat(np.arange(5), 40))
    bound = learning_curve(train, unseen)
    assert bound.extrapolated is None
    assert bound.reason == "what is attained is not above chance"
    assert not bound.attained.above_chance


def test_a_curve_that_bends_upwards_is_not_followed():
    unseen, test = gaussian(10, 300, 24, 2, 0.13), gaussian(10, 300, 100, 3, 0.13)
    train = gaussian(10, 300, 24, 1, 0.13)
    other = Rows(train.features, (train.labels + 1) % 10)  # nothing to pool
    bound = learning_curve(other, unseen, test, bound_at=500)
    assert not bound.exchange.alike
    assert bound.attained.above_chance
    assert bound.extrapolated is None
    assert bound.reason == "the accuracies still rise faster and faster"


def test_attained_is_paired_with_the_draws():
    train, unseen, test, _ = digits(10, 80, 30.0, 0)
    bound = learning_curve(train, unseen, test)
    attained, found = bound.attained, bound.extrapolated
    assert len(attained.correct) == len(attained.rows) == len(test.labels)
    assert attained.correct.mean() == attained.accuracy.estimate
    assert found.gains.shape == found.draws.shape == (DRAWS,)
    assert found.gains.min() >= 0
    assert found.draws.mean() == pytest.approx(attained.correct.mean() + found.gains.mean(), abs=0.01)
    assert np.quantile(found.draws, (0.025, 0.975)) == pytest.approx(found.ci95)
    crossed = learning_curve(train, unseen).attained
    assert sorted(crossed.rows) == list(range(len(unseen.labels)))


def test_a_classifier_that_gets_more_right_is_attained_and_the_bound_is_no_lower():
    train, unseen, test, _ = digits(10, 80, 30.0, 0)
    bound = learning_curve(train, unseen, test)
    wrong = np.flatnonzero(~bound.attained.correct)
    better = bound.attained.correct.copy()
    better[wrong[: len(wrong) // 2]] = True
    raised = bound.at_least(better, "ncm")
    assert raised.attained.classifier == "ncm"
    assert raised.attained.accuracy.estimate == better.mean() > bound.attained.accuracy.estimate
    before, after = bound.extrapolated, raised.extrapolated
    assert after.gains.min() >= 0
    assert (after.gains <= before.gains).all()
    assert (after.draws >= before.draws - 1e-12).all()
    assert after.mean >= before.mean


def test_classes_without_unseen_samples_are_withheld_and_numbers_may_differ():
    train = gaussian(5, 8, [60, 30, 20, 10, 6], 1)
    unseen, test = gaussian(5, 8, [40, 0, 17, 5, 1], 2), gaussian(5, 8, 50, 3)
    bound = learning_curve(train, unseen, test)
    assert bound.withheld == (1, 4)
    assert "2 classes lack unseen samples" in bound.notes[0]
    assert set(test.labels[bound.attained.rows]) == {0, 2, 3}
    without = []
    for rows in (train, unseen, test):
        keep = np.isin(rows.labels, [0, 2, 3])
        without.append(Rows(rows.features[keep], np.searchsorted([0, 2, 3], rows.labels[keep])))
    alone = learning_curve(*without)
    assert alone.attained.accuracy == bound.attained.accuracy
    assert alone.extrapolated.ci95 == bound.extrapolated.ci95


def test_too_few_classes_or_one_burst_are_refused():
    train = gaussian(3, 4, 10, 1)
    with pytest.raises(ValueError, match="fewer than two classes"):
        learning_curve(train, gaussian(3, 4, [9, 1, 0], 2))
    with pytest.raises(ValueError, match="no test sample"):
        learning_curve(train, gaussian(3, 4, [9, 9, 0], 2), gaussian(3, 4, [0, 0, 9], 3))
    with pytest.raises(ValueError, match="single burst"):
        learning_curve(train, gaussian(3, 4, 9, 2), bursts=np.zeros(27))


def test_the_seed_decides_everything_and_scale_nothing():
    train, unseen, _, _ = digits(10, 60, 20.0, 0)
    once, again = learning_curve(train, unseen, seed=3), learning_curve(train, unseen, seed=3)
    assert np.array_equal(once.extrapolated.draws, again.extrapolated.draws)
    assert once.points == again.points
    scaled = learning_curve(*(Rows(rows.features * np.float32(1024), rows.labels) for rows in (train, unseen)), seed=3)
    assert scaled.extrapolated.mean == pytest.approx(once.extrapolated.mean, abs=0.02)
    assert learning_curve(train, unseen, seed=4).points != once.points


def test_order_of_rows_and_classes_matters_within_noise_only():
    train, unseen, test, _ = digits(25, 60, 20.0, 0)
    turn, other = np.random.default_rng(0).permutation(10), np.random.default_rng(1)
    rows = []
    for table in (train, unseen, test):
        order = other.permutation(len(table.labels))
        rows.append(Rows(table.features[order], turn[table.labels[order]]))
    bound, turned = learning_curve(train, unseen, test), learning_curve(*rows)
    assert turned.attained.accuracy.estimate == pytest.approx(bound.attained.accuracy.estimate, abs=0.02)
    assert turned.extrapolated.mean == pytest.approx(bound.extrapolated.mean, abs=0.03)


def test_more_features_than_samples():
    generator = np.random.default_rng(0)
    train, unseen, test = (gaussian(4, 6, n, seed) for seed, n in enumerate(([40, 20, 10, 5], 8, 60)))
    wide = generator.normal(size=(6, 900)).astype("f4")
    spread = [Rows(rows.features @ wide, rows.labels) for rows in (train, unseen, test)]
    bound, wider = learning_curve(train, unseen, test), learning_curve(*spread)
    assert wider.attained.accuracy.estimate == pytest.approx(bound.attained.accuracy.estimate, abs=0.06)
    assert wider.extrapolated is not None


def test_one_feature_of_another_unit_does_not_hide_the_others():
    train, unseen, test = (gaussian(4, 6, n, seed) for seed, n in enumerate(([40, 20, 10, 5], 20, 100)))
    generator = np.random.default_rng(0)
    tables = [
        Rows(np.column_stack([rows.features, 1e4 * generator.normal(size=len(rows.labels))]).astype("f4"), rows.labels)
        for rows in (train, unseen, test)
    ]
    plain = learning_curve(train, unseen, test).attained.accuracy.estimate
    assert learning_curve(*tables).attained.accuracy.estimate > plain - 0.05


def test_many_rows_are_capped_and_said(monkeypatch):
    monkeypatch.setattr(curve_rows, "MOST_WORK", 2000)
    monkeypatch.setattr(curve_fits, "FEWER_FOLDS", 1)
    train, unseen = gaussian(4, 5, [200, 90, 30, 10], 1, 2.0), gaussian(4, 5, 40, 2, 2.0)
    bound = learning_curve(train, unseen)
    kept = 330 + 160 - int(bound.notes[0].split()[0])
    assert kept <= 100
    assert "left out" in bound.notes[0]
    assert len(bound.attained.correct) < 60  # two of five folds


def test_bursts_share_a_fold():
    unseen = gaussian(3, 4, 20, 2)
    bursts = np.arange(60) // 4
    task = curve_fits.Task.of(gaussian(3, 4, 9, 1), unseen, None, bursts, 0)
    for burst in range(15):
        assert len(set(task.fold[bursts[task.rows] == burst])) == 1


def test_the_path_meets_scikit_learns_optimum(monkeypatch):
    rows = gaussian(5, 7, [40, 30, 20, 10, 8], 0, 0.7)
    samples = curve_fits.Samples.of(rows.features, rows.labels, 5)
    monkeypatch.setattr(curve_fits, "STEPS", 300)
    monkeypatch.setattr(curve_fits, "ENOUGH", 1e-9)
    [classifier] = curve_fits.softmax_path(samples, np.arange(108), np.arange(0), [0.01], stop=False)
    variance = rows.features.var(axis=0).mean()
    model = LogisticRegression(C=1 / (108 * 0.01 * variance), class_weight="balanced", tol=1e-8, max_iter=2000)
    model.fit(rows.features, rows.labels)
    ours = (samples.placed @ classifier.T).softmax(1).numpy()
    assert np.abs(ours - model.predict_proba(rows.features)).max() < 5e-3


def test_discriminants_meet_scikit_learns():
    rows, test = gaussian(5, 7, [40, 30, 20, 10, 8], 0, 0.7), gaussian(5, 7, 100, 1, 0.7)
    samples = curve_fits.Samples.of(rows.features, rows.labels, 5)
    kept = np.arange(3, 108)  # the scatter of the others is taken off
    for shrinkage, classifier in zip(curve_fits.SHRINKAGES, curve_fits.shrinkage_lda(samples, kept), strict=True):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        model.fit(rows.features[kept], rows.labels[kept])
        logits = model.decision_function(test.features) - np.log(model.priors_)  # equal priors
        ours = curve_fits.predict(classifier, samples.space.place(test.features))
        assert (ours == logits.argmax(axis=1)).mean() > 0.98


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_small_sizes_give_an_answer_or_one_reason(data):
    classes, dims = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 40))
    sizes = st.lists(st.integers(0, 9), min_size=classes, max_size=classes)
    train, unseen = gaussian(classes, dims, data.draw(sizes), 1), gaussian(classes, dims, data.draw(sizes), 2)
    enough = np.bincount(unseen.labels, minlength=classes) >= 2
    if not len(train.labels):
        return
    if enough.sum() < 2:
        with pytest.raises(ValueError, match="fewer than two"):
            learning_curve(train, unseen)
        return
    bound = learning_curve(train, unseen)
    assert (bound.extrapolated is None) == (bound.reason is not None)
    low, high = ends(bound)
    assert 0 <= low <= high <= 1
    assert set(bound.withheld) == {k for k in range(classes) if not enough[k] and (train.labels == k).any()} | {
        k for k in range(classes) if not enough[k] and (unseen.labels == k).any()
    }
