"""Remedies: nested choice, the pooled fit, what they gain where the truth is known, and calibration."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from sklearn.frozen import FrozenEstimator

import tailscope
from diagnosis_cases import FEW, around, head_biased, noise, scattered, separable, table, weak
from tailscope.classifiers import CLASSIFIERS, NearestClassMean, SoftmaxRegression
from tailscope.classifiers.base import fixed
from tailscope.classifiers.estimators import CRT, LabelAwareSmoothing, LogitAdjustedSoftmax
from tailscope.diagnosis import remedies
from tailscope.diagnosis.curve_fits import PENALTIES, Rows, assign_folds
from tailscope.diagnosis.learning_curve import Fits, follow
from tailscope.diagnosis.remedies import POOLED, Scored, choose, fitted_remedy, fitted_to_training, select_nested
from tailscope.errors import UserError
from tailscope.report.reading import read
from tailscope.results import write
from tailscope.tables.table import LinearLayer

NOBODY = None  # the classifier in use is not asked where the best remedy is a linear layer
NOT_TRIED = {"softmax", "mislas", "feature_clouds", "cosine", "oltr"}  # the last four: not measured as remedies


def scored(correct):
    return Scored(np.asarray(correct), np.full(len(correct), 0.5))


def rows(features, labels):
    return Rows(np.asarray(features, dtype=np.float32), np.asarray(labels))


# ---- the nested choice


def test_selection_is_scored_on_items_that_did_not_choose():
    """Fifty classifiers that guess: the best on all items looks better than it is, the nested score does not."""
    flattered, honest, items, repeats = [], [], 60, 60
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        tried = {f"guess {k}": scored(rng.random(items) < 0.5) for k in range(50)}
        got = select_nested(tried, assign_folds(np.arange(items) % 3, 5, None, seed))
        flattered.append(tried[got.best].correct.sum())
        honest.append(got.correct.sum())
    assert stats.binomtest(int(sum(flattered)), items * repeats, 0.5).pvalue < 1e-6
    assert stats.binomtest(int(sum(honest)), items * repeats, 0.5).pvalue > 0.001


@pytest.mark.parametrize(("more", "best"), [(2, "pooled"), (20, "alone")])
def test_a_pooled_fit_is_taken_unless_another_is_clearly_better(more, best):
    """Of 200 samples both get 120 right, then either 20 that the other does not; so many `more` the other alone."""
    pooled, alone = np.zeros(200, bool), np.zeros(200, bool)
    pooled[:140], alone[:120] = True, True
    alone[140 : 160 + more] = True
    lead = alone.astype(float) - pooled
    assert (lead.mean() > lead.std() / 200**0.5) == (best == "alone")
    names = {"alone": "crt(l2=0.1)", "pooled": f"crt(l2=0.1){POOLED}"}
    got = select_nested({names["alone"]: scored(alone), names["pooled"]: scored(pooled)}, np.arange(200) % 5)
    assert got.best == names[best]


def test_selection_against_loops():
    rng = np.random.default_rng(6)
    tried = {name: Scored(rng.random(40) < 0.5, rng.random(40)) for name in "abc"}
    fold_of = assign_folds(rng.integers(0, 4, 40), 4, None, 1)
    got = select_nested(tried, fold_of)
    for i, k in enumerate(fold_of):
        others = [j for j in range(40) if fold_of[j] != k]
        means = {name: np.mean([one.correct[j] for j in others]) for name, one in tried.items()}
        best = max(means, key=means.get)
        assert got.chosen[k] == best
        assert got.correct[i] == tried[best].correct[i]
        assert got.scored.confidence[i] == tried[best].confidence[i]
    assert got.tried == {name: one.correct.mean() for name, one in tried.items()}
    tie = select_nested({"simple": tried["a"], "complex": tried["a"]}, fold_of)
    assert set(tie.chosen) == {"simple"}
    assert tie.best == "simple"


# ---- which remedies there are


def overlapping(seed, scale=1.6, per_class=50, dims=20):
    """Classes that overlap, of 300 to 6 training samples, and equally many unseen ones."""
    rng = np.random.default_rng(seed)
    counts = np.array([300, 150, 80, 40, 20, 10, 6])
    centres = 2.2 * np.eye(len(counts), dims)
    return rows(*around(centres, counts, scale, rng)), rows(*around(centres, [per_class] * len(counts), scale, rng))


def test_the_names_are_call_strings_that_make_the_very_classifier():
    train, unseen = overlapping(0)
    current = SoftmaxRegression(tol=1e-8).fit(*train)
    fitted = fitted_to_training(FrozenEstimator(current), train)
    assert {name.partition("(")[0] for name in fitted} == {entry.name for entry in CLASSIFIERS} - NOT_TRIED
    for name, classifier in fitted.items():
        theirs = CLASSIFIERS.make(name).fit(*train)
        agree = (theirs.predict(unseen.features) == classifier.predict(unseen.features)).mean()
        assert agree > 0.97, name  # but for tolerance


@pytest.mark.parametrize("kind", [SoftmaxRegression, CRT, LogitAdjustedSoftmax, LabelAwareSmoothing])
def test_a_path_holds_what_single_fits_give(kind):
    train, _ = overlapping(1)
    model = kind(tol=1e-10, max_iter=2000)
    start = SoftmaxRegression().fit(*train)
    path = model.path(*train, (0.001, 0.1), (start.coef_, start.intercept_))
    assert [one.l2 for one in path] == [0.001, 0.1]
    for one in path:
        alone = kind(l2=one.l2, tol=1e-10, max_iter=2000).fit(*train)
        assert np.abs(one.predict_proba(train.features) - alone.predict_proba(train.features)).max() < 0.01
        assert type(one) is kind


def test_a_classifier_with_the_penalty_chosen_is_better_than_one_with_a_fixed_one():
    """The penalty that is best for these samples is not the default: the truth is measured on many fresh samples."""
    train, unseen = overlapping(2, dims=200)
    _, fresh = overlapping(3, per_class=1000, dims=200)
    right = {model.l2: model.score(*fresh) for model in CRT().path(*train, remedies.L2S)}
    fits = Fits.of(train, unseen, None, None, 0)
    base = FrozenEstimator(SoftmaxRegression().fit(*train))
    fitted = {k: v for k, v in fitted_to_training(base, train).items() if k.startswith("crt")}
    got, _ = choose(fitted, base, fits, unseen, None, follow(fits, 300).attained.rows)
    own = {float(name[len("crt(l2=") : -1]): mean for name, mean in got.tried.items() if not name.endswith(POOLED)}
    assert right[0.1] > right[0.001] + 0.02
    assert max(own, key=own.get) == 0.1


def test_no_layer_is_offered_that_is_worse_than_the_one_in_use():
    """Class means, no linear layer here, are best; the only layer among the remedies guesses."""
    train, unseen = overlapping(3)
    fits = Fits.of(train, unseen, None, None, 0)
    fits = dataclasses.replace(fits, task=dataclasses.replace(fits.task, withheld=True))  # without pooled fits
    base, width = SoftmaxRegression().fit(*train), train.features.shape[1]
    guess = fixed(np.zeros((7, width), np.float32), np.zeros(7, np.float32))
    fitted = {"ncm": NearestClassMean().fit(*train), "crt": guess}
    for current, offered in ((base, False), (fixed(-base.coef_, -base.intercept_), True)):
        got, layer = choose(fitted, current, fits, unseen, None, fits.task.rows)
        assert got.best == "ncm"
        assert (layer is not None) == offered


def test_a_remedy_re_balances_the_classifier_in_use():
    train, unseen = overlapping(3)
    weight = np.random.default_rng(0).normal(size=(7, train.features.shape[1])).astype(np.float32)
    current = fixed(weight, np.zeros(7, np.float32))
    of_another = fitted_remedy("logit_adjustment(base='crt', tau=0)", train, current)
    as_it_is = fitted_remedy("logit_adjustment(tau=0)", train, current)
    assert np.array_equal(as_it_is.predict(unseen.features), current.predict(unseen.features))
    assert not np.array_equal(of_another.predict(unseen.features), current.predict(unseen.features))


def test_a_diagnosis_with_remedies_can_be_repeated(tmp_path):
    given = [table(*one) for one in separable()]
    for tau in (0.7, 0.7, 0.8):
        options = {"remedy": [f"logit_adjustment(tau={tau})"], "out": tmp_path, "report": False}
        if tau == 0.8:
            with pytest.raises(UserError, match="remedies differ"):
                tailscope.diagnose(*given, permutations=0, **options)
        else:
            tailscope.diagnose(*given, permutations=0, **options)


# ---- the pooled fit


def test_the_pooled_fit_scores_no_sample_that_it_was_fitted_to():
    """Labels that are drawn at random can be learned by heart, and not foreseen."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(240, 300)).astype(np.float32)
    labels = np.repeat(np.arange(4), 60)
    train, unseen = rows(features[::2], labels[::2]), rows(features[1::2], labels[1::2])
    fits = Fits.of(train, unseen, None, None, 0)
    got, _ = choose({}, NOBODY, fits, unseen, None, fits.task.rows)
    assert all(name.endswith(POOLED) for name in got.tried)
    everything = CRT(l2=1e-4).fit(features, labels)
    assert everything.score(features, labels) == 1
    assert all(mean < 0.4 for mean in [got.accuracy.estimate, *got.tried.values()])


def test_the_pooled_fit_is_class_balanced_retraining_on_all_samples_but_those_of_the_fold():
    train, unseen = overlapping(4)
    fits = Fits.of(train, unseen, None, None, 0)
    got, _ = choose({}, NOBODY, fits, unseen, None, fits.task.rows)
    held, task = np.empty(len(unseen.labels), dtype=int), fits.task
    l2 = PENALTIES[
        max([s for s in fits.pooled.classifiers[0] if PENALTIES[s] > 1e-3], key=lambda s: fits.pooled.right[s].mean())
    ]
    for q in range(5):
        out = task.rows[task.fold == q]
        kept = np.setdiff1d(np.arange(len(held)), out)
        both = (
            np.concatenate([train.features, unseen.features[kept]]),
            np.concatenate([train.labels, unseen.labels[kept]]),
        )
        held[out] = CRT(l2=l2).fit(*both).predict(unseen.features[out])
    mean = got.tried[f"crt(l2={l2:.3g}){POOLED}"]
    assert mean == pytest.approx((held == unseen.labels).mean(), abs=0.015)


def test_with_a_test_file_the_pooled_fit_holds_all_unseen_samples():
    train, unseen = overlapping(5, scale=2.2)
    _, test = overlapping(6, scale=2.2, per_class=400)
    fits = Fits.of(train, unseen, test, None, 0)
    items = follow(fits, 300).attained.rows
    got, _ = choose({}, NOBODY, fits, unseen, test, items)
    both = (np.concatenate(pair) for pair in zip(train, unseen, strict=True))
    l2 = float(got.best.removesuffix(POOLED)[len("crt(l2=") : -1])
    assert got.chosen == (got.best,)
    assert len(got.correct) == len(test.labels)
    assert got.accuracy.estimate == pytest.approx(CRT(l2=l2).fit(*both).score(*test), abs=0.015)


def test_a_test_file_is_not_looked_at_in_choosing():
    train, unseen = overlapping(7)
    _, test = overlapping(8)
    fits = Fits.of(train, unseen, test, None, 0)
    base = FrozenEstimator(SoftmaxRegression().fit(*train))
    fitted = fitted_to_training(base, train)
    got, _ = choose(fitted, base, fits, unseen, test, np.arange(len(test.labels)))
    wrong = test._replace(labels=(test.labels + 1) % 7)
    again = Fits.of(train, unseen, wrong, None, 0)
    other, _ = choose(fitted, base, again, unseen, wrong, np.arange(len(test.labels)))
    assert (other.best, other.tried) == (got.best, got.tried)
    assert other.accuracy.estimate < got.accuracy.estimate


# ---- gains


def test_on_pure_noise_no_remedy_gains():
    """Thirty remedies on features without information: the promised gain is 0 within its interval, seed after seed."""
    gains = []
    for seed in range(8):
        (features, labels), (unseen, truth) = noise(seed)
        given = table(features, labels), table(unseen, truth)
        found = tailscope.diagnose(*given, permutations=0, seed=seed)
        gains.append(found["accuracy"]["rebalanced"]["mean"] - 1 / 9)
    assert abs(np.mean(gains)) < 3 * np.std(gains, ddof=1) / np.sqrt(len(gains)) + 0.003


def test_the_promised_gain_is_what_fresh_samples_see():
    """Over draws, the interval of the gain covers what the advised remedy gains on many fresh samples."""
    covered = []
    for seed in range(6):
        train, unseen = overlapping(100 + seed)
        _, fresh = overlapping(200 + seed, per_class=400)
        options = {"permutations": 0, "seed": seed}
        found = tailscope.diagnose(table(*train), table(*unseen), **options)
        truth = tailscope.diagnose(table(*train), table(*unseen), test=table(*fresh), **options)
        gap = found["verdict"]["rebalancing_gap"]
        covered.append(gap["ci95"][0] <= truth["verdict"]["rebalancing_gap"]["points"] <= gap["ci95"][1])
        assert gap["points"] > 0.05
    assert sum(covered) >= 5


# ---- calibration


def written_out(confidence, correct, bins):
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins <= c < (b + 1) / bins or (c == 1 and b == bins - 1)]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_a_loop(bins):
    rng = np.random.default_rng(bins)
    confidence = np.concatenate([rng.uniform(0.1, 1, 300), [1.0, 1.0, 0.0]])
    correct = rng.random(303) < confidence**2
    got = Scored(correct, confidence).calibration_error(bins)
    assert got.estimate == pytest.approx(written_out(confidence, correct, bins))
    assert got.ci95[0] < got.estimate < got.ci95[1]


@pytest.mark.parametrize("items", [200, 2000])
@pytest.mark.parametrize("power", [1.0, 1.3, 3.0])
def test_the_interval_of_the_calibration_error_covers_the_truth(items, power):
    """The truth is that of the bins, computed from the rule that draws what is right."""
    rng = np.random.default_rng(int(10 * power))
    grid = np.linspace(0.2, 1, 200_001)[:-1]
    place = (grid * 15).astype(int)
    truth = np.abs(np.bincount(place, grid**power - grid)).sum() / len(grid)
    covered, means = [], []
    for _ in range(200):
        confidence = rng.uniform(0.2, 1, items)
        got = Scored(rng.random(items) < confidence**power, confidence).calibration_error()
        covered.append(got.ci95[0] <= truth <= got.ci95[1])
        means.append(got.estimate)
    assert np.mean(covered) > 0.92
    assert np.mean(means) > truth - 0.003  # the estimate's known bias is upwards


def test_confidence_is_that_of_softmax():
    train, unseen = overlapping(9)
    model = SoftmaxRegression().fit(*train)
    got = Scored.by(model, unseen)
    probability = model.predict_proba(unseen.features)
    assert got.confidence == pytest.approx(probability.max(axis=1), rel=1e-5)
    assert (got.correct == (probability.argmax(axis=1) == unseen.labels)).all()


def test_calibration_in_a_diagnosis():
    train, unseen = separable()
    found = tailscope.diagnose(table(*train), table(*unseen), classifier=head_biased(), permutations=0)
    calibration = found["accuracy"]["calibration"]
    model = head_biased()
    logits = unseen[0].astype(np.float32) @ model.weight.numpy().T + model.bias.numpy()
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    expected = written_out(probability.max(axis=1), logits.argmax(axis=1) == unseen[1], 15)
    assert calibration["bins"] == 15
    assert calibration["current"]["mean"] == pytest.approx(expected, abs=1e-4)


def test_advice_tells_of_a_confidence_that_becomes_truer():
    train, unseen = overlapping(12, scale=1.1)
    model = SoftmaxRegression().fit(*train)
    head = 3 * (np.arange(7) < 2)
    certain = LinearLayer.from_arrays(8 * model.coef_, 8 * (model.intercept_ + head))
    found = tailscope.diagnose(table(*train), table(*unseen), classifier=certain, permutations=0)
    calibration = found["accuracy"]["calibration"]
    assert calibration["rebalanced"]["ci95"][1] < calibration["current"]["ci95"][0] - 0.1
    [piece] = [piece for piece in found["advice"] if piece["about"] == "classifier"]
    assert "expected calibration error" in piece["text"]


def test_a_result_without_calibration_is_still_read(tmp_path):
    train, unseen = separable()
    found = tailscope.diagnose(table(*train), table(*unseen), permutations=0)
    del found["accuracy"]["calibration"]
    assert "calibration" not in read(write(tmp_path, "diagnosis", found), "diagnosis")["accuracy"]
    found["accuracy"]["calibration"] = {"bins": 15}
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match=r"accuracy\.calibration\.current"):
        read(write(tmp_path / "again", "diagnosis", found), "diagnosis")


# ---- advice


def test_weak_features_are_to_be_compared_with_anothers():
    found = tailscope.diagnose(*(table(*one) for one in weak()), **FEW)
    first = found["advice"][0]
    assert first["about"] == "representation"
    assert "tailscope diagnose --train this.npz --train other.npz" in first["text"]
    assert [piece["about"] for piece in found["advice"]].index("classifier") == 1


def test_memorised_classes_are_named():
    found = tailscope.diagnose(*(table(*one) for one in scattered()), **FEW)
    first = found["advice"][0]
    assert first["about"] == "representation"
    assert first["classes"]
    assert all(f"“{name}”" in first["text"] for name in first["classes"][:5])
    assert "memorised" in first["text"]


def test_an_undecided_verdict_names_the_remedy_its_gain_and_what_would_decide():
    found = tailscope.diagnose(*(table(*one) for one in overlapping(11, scale=1.2)), permutations=0)
    verdict, first, last = found["verdict"], found["advice"][0], found["advice"][-1]
    assert verdict["bottleneck"] == "undecided"
    assert first["remedy"] == found["accuracy"]["rebalanced"]["classifier"]
    assert first["gain"] == verdict["rebalancing_gap"]
    assert last["about"] == "evidence"
    assert "--ceiling-from" in last["text"]
    assert json.dumps(found["advice"], allow_nan=False)
