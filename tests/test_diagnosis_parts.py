"""Verdicts on groups and classes against known truth: they cover it, none is confidently wrong, many stay apart."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import tailscope
from diagnosis_cases import FEW, around, head_biased, separable, table
from tailscope.classifiers import SoftmaxRegression
from tailscope.diagnosis import outcomes
from tailscope.diagnosis.inputs import read
from tailscope.diagnosis.learning_curve import KINDS, Attained, ClassifierBound, Exchange, Extrapolated
from tailscope.diagnosis.outcomes import OWN_CLASSIFIER, Outcomes
from tailscope.diagnosis.remedies import Scored, Selection
from tailscope.diagnosis.samples import Looks
from tailscope.diagnosis.verdict import judge, samples_needed, shares
from tailscope.groups import GROUPS, assign_groups
from tailscope.intervals import Interval, proportion
from tailscope.progress import Progress

ONE = Interval(1.0, None, None, None)
NOTHING = {"spread_gap_flagged": None, "unseen_count": 50}


def entries(counts):
    groups = assign_groups(list(counts))[0]
    return [
        {"index": k, "group": group, "train_count": int(n), **NOTHING}
        for k, (n, group) in enumerate(zip(counts, groups, strict=True))
    ]


def made(current, attained, labels, classifier=KINDS[0], alike=True):
    """Outcomes in which more samples gain nothing: what is attained is the bound."""
    rows, none = np.arange(len(labels)), np.zeros(3000)
    fitted = Attained(proportion(attained[None]), attained, rows, classifier, 1.0, 0.0)
    found = Extrapolated(float(attained.mean()), (0.0, 1.0), 200, none + attained.mean(), none)
    bound = ClassifierBound(fitted, found, None, 200, (), Exchange(0.0, 0.0, alike), (), ())
    now, best = (Scored(correct, np.ones(len(labels))) for correct in (current, attained))
    selection = Selection(best, proportion(attained[None]), ("ncm",), "ncm", {})
    looks, linear = Looks(none, rows, none, none), SoftmaxRegression()
    return Outcomes(labels, rows, labels, labels, now, OWN_CLASSIFIER, selection, bound, (), looks, linear)


def test_of_many_classes_that_are_undecided_in_truth_almost_none_is_decided():
    """Current 30 %, bound 65 %: 2 * 0.65 - 0.3 - 1 = 0 in every class. One by one, one in twenty would be decided."""
    rng, classes, scored = np.random.default_rng(0), 100, 50
    labels = np.repeat(np.arange(classes), scored)
    decided, alone = [], []
    for _ in range(10):
        got = made(rng.random(len(labels)) < 0.3, rng.random(len(labels)) < 0.65, labels)
        parts = judge(got, entries([100] * classes), {}, ONE)[0]["classes"]
        decided += [part["bottleneck"] != "undecided" for part in parts]
        alone += [part["difference"]["ci95"][0] > 0 or part["difference"]["ci95"][1] < 0 for part in parts]
        assert all("of 100 classes" in p["reason"] for p in parts if "by itself" in p["reason"])
    assert sum(alone) / len(alone) == pytest.approx(0.05, abs=0.02)
    assert sum(decided) <= 0.005 * len(decided)


def test_a_class_is_decided_where_there_is_no_doubt_and_never_from_few_samples():
    labels = np.repeat(np.arange(4), [50, 50, 29, 50])
    current, attained = np.zeros(len(labels), dtype=bool), labels != 1
    parts = judge(made(current, attained, labels), entries([200, 50, 50, 4]), {}, ONE)[0]["classes"]
    assert [part["bottleneck"] for part in parts] == ["classifier", "representation", "undecided", "undecided"]
    assert [part["difference_q"] is None for part in parts] == [False, False, True, True]
    assert parts[2]["reason"] == "fewer than 30 scored samples: see its group"
    assert parts[3]["reason"] == "fewer than 5 training samples: see its group"


def test_classes_share_the_gain_by_what_they_lack():
    labels, counts = np.repeat(np.arange(3), 10), [200, 50, 5]
    right = np.ones(len(labels), dtype=bool)
    more = np.log([1, 2, 200 / 55])
    low, high = shares(made(right, right, labels, KINDS[1]), entries(counts))
    assert (low + high) / 2 == pytest.approx(more / more.mean())
    assert high - low == pytest.approx([2, 2, 2])
    for unlike in (made(right, right, labels), made(right, right, labels, KINDS[0], alike=False)):
        assert shares(unlike, entries(counts)).tolist() == [[0, 0, 0], [2, 2, 2]]
    low, high = shares(made(right, right, labels, KINDS[1], alike=False), entries(counts))
    assert (low[0], high[0]) == (-1, 2)  # memorised training samples may count or not
    assert (low[2], high[2]) == pytest.approx((0, 1 + more[2] / more.mean()))


def test_a_bound_below_the_current_accuracy_is_explained():
    labels = np.repeat(np.arange(3), 100)
    current, attained = labels == 0, np.arange(300) % 2 == 0
    verdict, _ = judge(made(current, attained, labels), entries([200, 50, 5]), {}, ONE)
    head, body, _ = (verdict["groups"][name] for name in GROUPS)
    assert head["reason"] == "the classifier in use is within a point of the ceiling: there is nothing to gain"
    assert "favours" not in body["reason"]
    current[:20] = False  # 80 % of the head
    verdict, _ = judge(made(current, attained, labels), entries([200, 50, 5]), {}, ONE)
    assert verdict["groups"]["head"]["bottleneck"] == "representation"
    said = "the classifier in use favours these classes, and one that treats all alike would do worse"
    assert verdict["groups"]["head"]["reason"].endswith(f"{said} (about 50 % right instead of 80 %)")
    assert said in verdict["classes"][0]["reason"]
    assert said not in verdict["reason"]


def test_where_the_classifier_in_use_is_the_best_known_groups_are_left_open():
    labels = np.repeat(np.arange(3), 100)
    current = np.arange(300) % 3 == 0
    verdict, _ = judge(made(current, current, labels, OWN_CLASSIFIER), entries([200, 50, 5]), {}, ONE)
    assert verdict["bottleneck"] == "representation"
    assert verdict["reason"].endswith("known")
    for part in (*verdict["groups"].values(), *verdict["classes"][:2]):
        assert (part["bottleneck"], part["kind"]) == ("undecided", None)
        assert part["reason"].startswith("the classifier in use does better than any that was fitted to held-out")


def test_features_are_not_called_weak_where_training_samples_are_treated_unlike_others():
    labels, right = np.repeat(np.arange(3), 100), np.arange(300) % 3 == 0
    calm = [entry | {"spread_gap_flagged": False} for entry in entries([200, 50, 20])]
    pooled = {name: {"spread_gap_flagged": False} for name in GROUPS}
    for alike, kind in ((True, "weak features"), (False, None)):
        verdict, _ = judge(made(right, right, labels, alike=alike), calm, pooled, ONE)
        kinds = {verdict["kind"], *(p["kind"] for p in (*verdict["groups"].values(), *verdict["classes"]))}
        assert kinds == {kind}


@pytest.mark.parametrize("points", [0.0, 0.2])
def test_what_would_decide_is_said_only_where_it_can(points):
    assert samples_needed(Interval(points, (points - 0.1, points + 0.1), None, "item")) is None
    assert samples_needed(Interval(0.1, (-0.2, 0.4), None, "item")) == pytest.approx(9)


def test_caveats_begin_with_what_could_overturn_the_verdict():
    (train, labels), (unseen, truth) = separable()
    found = tailscope.diagnose(table(train, labels), table(unseen, truth), classifier=head_biased(), **FEW)
    caveats = found["verdict"]["caveats"]
    assert caveats[0].startswith("This holds for one encoder and classifier as they are")
    assert not any("No classifier was given" in text for text in caveats)
    mixed = np.concatenate([unseen, train[:50]]), np.concatenate([truth, labels[:50]])
    found = tailscope.diagnose(table(train, labels), table(*mixed), **FEW)
    caveats = found["verdict"]["caveats"]
    assert caveats[0].startswith("10 % of the held-out samples are training samples too: they flatter the encoder.")
    assert any(text.startswith("No classifier was given") for text in caveats)


CLASSES, WIDTH, MOST, HELD = 20, 32, 300, 50


def _gaussian(rng, means, counts):
    return around(means, counts, 1.0, rng)


def _recalls(model, features, labels):
    right = model.predict(features) == labels
    return np.bincount(labels, right, CLASSES) / np.bincount(labels, minlength=CLASSES)


def test_groups_and_classes_of_gaussian_features_cover_the_truth():
    """Truth: scikit-learn's best of four penalties on 300 samples of every class, scored on 500 others of each."""
    rng = np.random.default_rng(0)
    means = 0.6 * rng.normal(size=(CLASSES, WIDTH))
    counts = (MOST * 100.0 ** (-np.arange(CLASSES) / (CLASSES - 1))).astype(int)
    group = np.array(assign_groups(counts.tolist())[0])
    many, balanced = (_gaussian(rng, means, [n] * CLASSES) for n in (500, MOST))
    models = [LogisticRegression(C=c, max_iter=300, tol=1e-3).fit(*balanced) for c in (0.003, 0.01, 0.03, 0.1)]
    bound = max((_recalls(model, *many) for model in models), key=np.mean)
    covered, wrong = {name: [] for name in (*GROUPS, "class")}, dict.fromkeys((*GROUPS, "class"), 0)
    for seed in range(6):
        train, unseen = _gaussian(rng, means, counts), _gaussian(rng, means, [HELD] * CLASSES)
        found = outcomes.score(read(table(*train), table(*unseen)), MOST, seed, Progress())
        own, strict = LogisticRegression(C=1 / (len(train[1]) * 1e-3), max_iter=300, tol=1e-3).fit(*train), ONE
        current = _recalls(own, *many)
        for ceiling in (1.0, float(2 * bound.mean() - current.mean())):  # the second leaves nothing to decide in all
            strict = dataclasses.replace(ONE, estimate=ceiling)
            verdict, _ = judge(found, entries(counts), {}, strict)
            truth = 2 * bound - current - ceiling
            parts = [(name, verdict["groups"][name], truth[group == name].mean()) for name in GROUPS]
            parts += [("class", part, truth[part["index"]]) for part in verdict["classes"]]
            for name, part, true in parts:
                low, high = part["difference"]["ci95"]
                covered[name].append(low <= true <= high)
                sign = {"classifier": 1, "representation": -1}.get(part["bottleneck"], 0)
                wrong[name] += bool(sign and sign != np.sign(true))
    assert all(np.mean(covered[name]) >= 0.9 for name in covered), covered
    assert wrong == {**dict.fromkeys(GROUPS, 0), "class": wrong["class"]}
    assert wrong["class"] <= 0.05 * len(covered["class"])
