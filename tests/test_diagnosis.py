"""Diagnoses of planted features, and each number against one computed another way."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression

import tailscope
from diagnosis_cases import CLASSES, COUNTS, FEW, UNSEEN, head_biased, noise, scattered, separable, table, weak
from tailscope.diagnosis import learning_curve, remedies
from tailscope.diagnosis.compare import closest, confusable_pairs, linear_cka
from tailscope.diagnosis.remedies import select_nested
from tailscope.diagnosis.verdict import decide
from tailscope.errors import UserError
from tailscope.intervals import Interval
from tailscope.measures import FIELDS, describe
from tailscope.measures.collapse import collapse
from tailscope.report import diagnosis
from tailscope.results import write


@pytest.fixture(scope="module")
def biased():
    train, unseen = separable()
    return tailscope.diagnose(table(*train), table(*unseen), classifier=head_biased(), **FEW)


@pytest.fixture(scope="module")
def lost():
    train, unseen = scattered()
    return tailscope.diagnose(table(*train), table(*unseen), **FEW)


def test_a_classifier_biased_to_the_head_is_the_bottleneck(biased):
    verdict = biased["verdict"]
    assert verdict["bottleneck"] == "classifier"
    assert verdict["groups"]["tail"]["bottleneck"] == "classifier"
    assert verdict["classifier_gap"]["ci95"][0] > verdict["representation_gap"]["ci95"][1]
    assert {biased["classes"][k]["group"] for k in (6, 7, 8)} == {"tail"}
    assert all(verdict["classes"][k]["bottleneck"] == "classifier" for k in (6, 7, 8))
    advice = biased["advice"][0]
    assert advice["about"] == "classifier"
    assert advice["remedy"] == biased["accuracy"]["rebalanced"]["classifier"]
    assert advice["gain"] == verdict["rebalancing_gap"]


def test_collapse_is_measured_beside_the_classifier_in_use(biased):
    (X, y), (U, v) = separable()
    layer = head_biased()
    means = np.array([X[y == k].mean(axis=0) for k in range(CLASSES)])
    for part, rows, labels in (("train", X, y), ("unseen", U, v)):
        found = biased["collapse"][part]
        assert found == pytest.approx(
            collapse(*map(torch.tensor, (rows, labels)), layer.weight, layer.bias, torch.tensor(means))
        )
        by_layer = (rows @ layer.weight.numpy().T + layer.bias.numpy()).argmax(axis=1)
        nearest = np.array([np.argmin(((means - row) ** 2).sum(axis=1)) for row in rows])
        assert found["nc4"] == pytest.approx((by_layer != nearest).mean())


def test_without_a_verdict_collapse_needs_no_classifier_and_no_unit():
    (X, y), (U, v) = separable()
    zeros = np.zeros((2, X.shape[1]), X.dtype)  # which have no direction and are left out
    with_zeros, labels = np.concatenate([X, zeros]), np.append(y, [0, 8])
    plain, scaled = (
        tailscope.diagnose(table(factor * rows, of), table(factor * U, v), verdict=False, permutations=0)["collapse"]
        for factor, rows, of in ((1, X, y), (np.float32(1e-25), with_zeros, labels))
    )
    for part in ("train", "unseen"):
        undefined = {name for name, value in plain[part].items() if value is None}
        assert undefined == {name for name, value in scaled[part].items() if value is None} == {"nc3", "nc4"}
        known = set(plain[part]) - undefined
        assert [scaled[part][k] for k in known] == pytest.approx([plain[part][k] for k in known], rel=1e-4)


def test_means_of_recalls_and_the_authors_groups(biased):
    counts = np.array(biased["counts"])
    for name in ("current", "rebalanced", "classifier_bound"):
        cell = biased["accuracy"][name]
        recalls = np.array(cell["per_class"])
        positive = bool(recalls.all())
        assert cell["g_mean"] == pytest.approx(stats.gmean(recalls) if positive else 0)
        assert cell["h_mean"] == pytest.approx(stats.hmean(recalls) if positive else 0)
        for shot, members in (
            ("many", counts > 100),
            ("medium", (counts <= 100) & (counts >= 20)),
            ("few", counts < 20),
        ):
            assert cell["shots"][shot] == (pytest.approx(recalls[members].mean()) if members.any() else None)


def test_scattered_tail_samples_are_the_representations_fault(lost):
    verdict = lost["verdict"]
    assert (verdict["bottleneck"], verdict["kind"]) == ("representation", "memorised")
    assert verdict["group_tested"] in ("body", "tail")
    assert lost["groups"][verdict["group_tested"]]["spread_gap_flagged"]
    assert verdict["groups"]["tail"]["bottleneck"] == "representation"
    assert verdict["groups"]["head"]["bottleneck"] == "undecided"
    assert verdict["groups"]["head"]["reason"].endswith("nothing to gain")
    assert lost["advice"][0]["about"] == "representation"
    assert lost["advice"][0]["at_most"]
    assert lost["advice"][0]["gain"] == {k: verdict["representation_gap"][k] for k in ("points", "ci95")}


def test_weak_features_are_the_representations_fault_of_another_kind():
    found = tailscope.diagnose(*(table(*one) for one in weak()), **FEW)
    assert (found["verdict"]["bottleneck"], found["verdict"]["kind"]) == ("representation", "weak features")
    advice = found["advice"][0]
    assert (advice["about"], advice["remedy"]) == ("representation", "another or a fine-tuned encoder")
    assert advice["gain"] == {k: found["verdict"]["representation_gap"][k] for k in ("points", "ci95")}
    said = diagnosis.headline(found)
    assert said.startswith("The representation is the bottleneck: on these features even the best linear classifier ")
    assert diagnosis.findings(found)[0].endswith(" held-out samples.")


@pytest.mark.parametrize("permutations", [0, 9, 19])
def test_without_a_test_of_spread_that_can_reject_the_kind_is_not_told(permutations):
    found = tailscope.diagnose(*(table(*one) for one in scattered()), permutations=permutations)
    assert (found["verdict"]["bottleneck"], found["verdict"]["kind"]) == ("representation", None)
    assert found["verdict"]["reason"].endswith("is not known")
    assert any("unlike" in note for note in found["accuracy"]["classifier_bound"]["notes"])
    if permutations == 9:
        assert found["warnings"][0] == "9 permutations cannot flag a group at 0.05; give 19 or more"


def test_pure_noise_says_so():
    train, unseen = noise()
    found = tailscope.diagnose(table(*train), table(*unseen), **FEW)
    assert found["verdict"]["bottleneck"] == "undecided"
    assert not found["verdict"]["above_chance"]
    assert {part["bottleneck"] for part in found["verdict"]["classes"]} == {"undecided"}
    assert any(
        text.startswith("no classifier does better than guessing on these features: the best gets ")
        for text in found["warnings"]
    )
    assert found["advice"][0]["about"] == "evidence"


def test_numbers_are_what_they_are_defined_as(biased):
    _, (features, labels) = separable()
    model = head_biased()
    predicted = (features.astype(np.float32) @ model.weight.numpy().T.astype(np.float32) + model.bias.numpy()).argmax(1)
    accuracy, verdict = biased["accuracy"], biased["verdict"]
    assert accuracy["current"]["mean"] == pytest.approx((predicted == labels).mean())
    recall = [(predicted[labels == k] == k).mean() for k in range(CLASSES)]
    assert accuracy["current"]["per_class"] == pytest.approx(recall)
    assert accuracy["current"]["groups"]["tail"] == pytest.approx(np.mean(recall[6:]))
    means = {name: cell["mean"] for name, cell in accuracy.items() if name != "calibration"}
    bound = verdict["classifier_bound"]
    assert bound >= means["classifier_bound"]
    assert verdict["classifier_gap"]["points"] == pytest.approx(bound - means["current"])
    assert verdict["rebalancing_gap"]["points"] == pytest.approx(means["rebalanced"] - means["current"])
    assert verdict["representation_gap"]["points"] == pytest.approx(1 - bound)
    assert verdict["difference"]["points"] == pytest.approx(2 * bound - means["current"] - 1)
    tail = [k for k in range(CLASSES) if biased["classes"][k]["group"] == "tail"]
    here = np.isin(labels, tail)
    assert verdict["groups"]["tail"]["current"] == pytest.approx((predicted[here] == labels[here]).mean())
    assert verdict["groups"]["tail"]["scored"] == here.sum()


def test_the_fitted_classifier_is_a_softmax_regression_on_the_training_features(lost):
    (features, labels), (unseen, truth) = scattered()
    variance = features.var(axis=0).mean()
    theirs = LogisticRegression(C=1 / (len(labels) * 1e-3 * variance), tol=1e-8, max_iter=5000).fit(features, labels)
    assert lost["accuracy"]["current"]["mean"] == pytest.approx(theirs.score(unseen, truth), abs=0.01)


def test_fields_of_a_diagnosis(lost):
    assert json.loads(json.dumps(lost, allow_nan=False)) == lost
    assert lost["schema"] == "tailscope.diagnosis/1"
    assert lost["counts"] == list(COUNTS)
    assert all(set(entry) == set(FIELDS) for entry in lost["classes"])
    assert lost["dataset"]["unseen_images"] == UNSEEN * CLASSES
    assert {"ncm", "lws", "crt(l2=0.01)", "disalign"} <= set(lost["accuracy"]["rebalanced"]["remedies"])
    assert len(lost["accuracy"]["rebalanced"]["chosen"]) == 5
    assert lost["verdict"]["intervals"].startswith("95 % intervals over samples")
    bound = lost["accuracy"]["classifier_bound"]
    assert bound["attained"] == {"mean": bound["mean"], "ci95": bound["ci95"]}
    assert bound["extrapolated"]["bound_at"] == max(COUNTS)
    assert bound["reason"] is None


def test_the_same_seed_gives_the_same_diagnosis(biased):
    train, unseen = separable()
    again = tailscope.diagnose(table(*train), table(*unseen), classifier=head_biased(), **FEW)
    for field in ("classes", "accuracy", "verdict", "pairs"):
        assert again[field] == biased[field]


def test_a_test_set_only_scores():
    (features, labels), _ = separable()
    _, unseen = separable(1)
    _, (scored, truth) = separable(2)
    given = {"classifier": head_biased(), "permutations": 0}
    found = tailscope.diagnose(table(features, labels), table(*unseen), test=table(scored, truth), **given)
    other = tailscope.diagnose(table(features, labels), table(*unseen), **given)
    assert found["classes"] == other["classes"]
    assert found["accuracy"]["rebalanced"]["remedies"] == other["accuracy"]["rebalanced"]["remedies"]
    remedies = found["accuracy"]["rebalanced"]["remedies"]
    [chosen] = found["accuracy"]["rebalanced"]["chosen"]
    assert remedies[chosen] >= max(remedies.values()) - 0.02
    model = head_biased()
    predicted = (scored @ model.weight.numpy().T + model.bias.numpy()).argmax(1)
    assert found["accuracy"]["current"]["mean"] == pytest.approx((predicted == truth).mean(), abs=0.005)


def test_no_verdict_leaves_out_what_fits_classifiers():
    train, unseen = separable()
    found = tailscope.diagnose(table(*train), table(*unseen), verdict=False, permutations=0)
    assert found["accuracy"] is found["verdict"] is None
    assert found["advice"] == []
    assert len(found["pairs"]) == 10
    assert found["pairs"][0]["first_as_second"] is None


def test_two_classes_have_no_groups_but_a_verdict():
    (features, labels), (unseen, truth) = separable()
    found = tailscope.diagnose(
        table(features[labels < 2], labels[labels < 2]), table(unseen[truth < 2], truth[truth < 2]), **FEW
    )
    assert found["groups"] == {"head": None, "body": None, "tail": None}
    assert found["verdict"]["bottleneck"] in ("classifier", "representation", "undecided")
    assert found["accuracy"]["current"]["mean"] > 0.95


@pytest.mark.parametrize("kept", [slice(0, 1), slice(0, 40)], ids=["one sample", "one class"])
def test_too_little_for_a_verdict_is_refused(kept):
    train, (unseen, truth) = separable()
    few = table(unseen[kept], truth[kept], source="few.npz")
    with pytest.raises(UserError, match=r"few\.npz: .*--no-verdict"):
        tailscope.diagnose(table(*train), few, permutations=0)
    assert tailscope.diagnose(table(*train), few, permutations=0, verdict=False)["verdict"] is None


def test_large_problems_are_solved_less_exactly_to_the_same_end(monkeypatch):
    monkeypatch.setattr(remedies, "LARGE", 1)
    train, unseen = separable()
    found = tailscope.diagnose(table(*train), table(*unseen), classifier=head_biased(), permutations=0)
    assert found["accuracy"]["classifier_bound"]["mean"] == pytest.approx(1, abs=0.01)
    assert found["accuracy"]["rebalanced"]["mean"] == pytest.approx(1, abs=0.01)
    tried = found["accuracy"]["rebalanced"]["remedies"]
    assert [name for name in tried if name.startswith("crt(") and not name.endswith("samples")] == ["crt(l2=0.001)"]
    assert not any(name.startswith(("lws", "disalign", "logit_adjusted", "label_aware")) for name in tried)
    assert remedies.LEFT_OUT in found["warnings"]


@pytest.mark.parametrize(
    ("bounds", "memorised", "expected", "kind"),
    [
        ((0.1, 0.2), None, "classifier", None),
        ((0.1, 0.2), True, "classifier", None),
        ((-0.1, 0.2), True, "undecided", None),
        ((-0.2, -0.1), True, "representation", "memorised"),
        ((-0.2, -0.1), False, "representation", "weak features"),
        ((-0.2, -0.1), None, "representation", None),
        (None, True, "undecided", None),
    ],
)
def test_the_rule(bounds, memorised, expected, kind):
    assert decide(Interval(0.0, bounds, None, "item"), memorised)[:2] == (expected, kind)


def test_another_encoders_bound_as_the_ceiling(lost, tmp_path):
    train, unseen = separable(4)
    good = tailscope.diagnose(table(*train), table(*unseen), permutations=0)
    stored = write(tmp_path, "diagnosis", good)
    ceiling = good["accuracy"]["classifier_bound"]["extrapolated"]
    given = [table(*one) for one in scattered()]
    found = tailscope.diagnose(*given, ceiling_from=stored, permutations=0)
    assert found["verdict"]["ceiling"] == ceiling["mean"]
    assert found["verdict"]["bottleneck"] == "representation"
    assert found["spec"]["ceiling_from"] == {
        "source": "diagnosis.json",
        "mean": ceiling["mean"],
        "ci95": ceiling["ci95"],
    }
    width, before = (one["verdict"]["representation_gap"]["ci95"] for one in (found, lost))
    assert width[1] - width[0] >= before[1] - before[0]
    with pytest.raises(UserError, match="its encoder is that of --train; leave out --ceiling-from"):
        tailscope.diagnose(table(*train), table(*unseen), ceiling_from=stored, permutations=0)
    for options, message in (
        ({"ceiling": 0.9}, "--ceiling and --ceiling-from: give one"),
        ({"bound_at": 20}, "its bound is at 200 samples a class"),
    ):
        with pytest.raises(UserError, match=message):
            tailscope.diagnose(*given, ceiling_from=stored, permutations=0, **options)
    with pytest.raises(UserError, match="of the same images"):
        tailscope.diagnose(given[0].take(np.arange(1, len(given[0]))), given[1], ceiling_from=stored, permutations=0)
    good["accuracy"]["classifier_bound"]["extrapolated"] = None
    with pytest.raises(UserError, match="only a lower limit is known"):
        tailscope.diagnose(*given, ceiling_from=write(tmp_path, "diagnosis", good), permutations=0)


def test_the_bound_may_be_at_another_number_of_samples():
    given = [table(*one) for one in weak()]
    few, many = (tailscope.diagnose(*given, bound_at=n, permutations=0) for n in (30, 5000))
    bounds = [one["accuracy"]["classifier_bound"]["extrapolated"] for one in (few, many)]
    assert [bound["bound_at"] for bound in bounds] == [30, 5000]
    assert bounds[0]["mean"] < bounds[1]["mean"]


def test_a_bound_that_is_not_determined_is_a_lower_limit(monkeypatch):
    """Anything up to the ceiling is possible then: a classifier may be blamed, a representation not."""
    monkeypatch.setattr(learning_curve, "_refusal", lambda *_: "the accuracies still rise")
    train, unseen = separable()
    biased = tailscope.diagnose(table(*train), table(*unseen), classifier=head_biased(), permutations=0)
    assert biased["verdict"]["bottleneck"] == "classifier"
    lost = tailscope.diagnose(*(table(*one) for one in scattered()), permutations=0)
    said = "how much a better classifier would gain is known only from below"
    reason = f"{said}, because the accuracies still rise"
    assert (lost["verdict"]["bottleneck"], lost["verdict"]["reason"]) == ("undecided", reason)
    caveat = f"H{said[1:]}: the accuracies still rise."
    assert lost["verdict"]["caveats"][0] == caveat
    assert caveat in lost["warnings"]
    assert any("the accuracies still rise" in piece["text"] for piece in lost["advice"])
    for found in (biased, lost):
        bound, verdict = found["accuracy"]["classifier_bound"], found["verdict"]
        assert (bound["extrapolated"], bound["reason"]) == (None, "the accuracies still rise")
        assert verdict["classifier_bound"] == pytest.approx(bound["mean"])
        assert verdict["representation_gap"]["ci95"][0] <= 1e-9
        assert verdict["difference"]["ci95"][1] >= 1 - verdict["current"] - 1e-9


def test_pairs_are_the_smallest_angles_of_all():
    train, unseen = separable(3)
    names = [str(k) for k in range(CLASSES)]
    sets = [torch.from_numpy(part) for part in (*train, *unseen)]
    found = confusable_pairs(describe(*sets, names, permutations=0).centers, names, most=5)
    features, labels = (np.concatenate(parts) for parts in zip(train, unseen, strict=True))
    means = np.stack([features[labels == k].mean(axis=0) for k in range(CLASSES)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    angles = {(i, j): np.degrees(np.arccos(means[i] @ means[j])) for i in range(CLASSES) for j in range(i + 1, CLASSES)}
    best = sorted(angles, key=angles.get)[:5]
    assert [(pair["first_index"], pair["second_index"]) for pair in found] == best
    assert [pair["angle_deg"] for pair in found] == pytest.approx([angles[pair] for pair in best], abs=1e-3)


def test_closest_pairs_over_several_blocks():
    unit = torch.nn.functional.normalize(torch.randn(1100, 3, generator=torch.manual_seed(0)), dim=1)
    cosine = (unit @ unit.T).triu(diagonal=1)
    cosine[cosine == 0] = -2
    flat = cosine.flatten().topk(10).indices
    assert closest(unit, 10) == [(int(i) // 1100, int(i) % 1100) for i in flat]


def test_linear_cka_is_the_kernels_alignment():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 8))
    y[:, :3] += x[:, :3]
    centre = np.eye(60) - 1 / 60
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)
    assert linear_cka(torch.ones(9, 2), torch.randn(9, 2)) is None
    few = torch.from_numpy(x)[:4], torch.from_numpy(y)[:4]  # fewer samples than features: the same by kernels
    centred = [side - side.mean(dim=0) for side in few]
    products = [float((b.T @ a).square().sum()) for a, b in (centred, centred[:1] * 2, centred[1:] * 2)]
    assert linear_cka(*few) == pytest.approx(products[0] / (products[1] * products[2]) ** 0.5, rel=1e-9)
    assert linear_cka(1e-25 * few[0].float(), 1e30 * few[1].float()) == pytest.approx(linear_cka(*few), rel=1e-5)


@pytest.fixture(scope="module")
def compared():
    (features, labels), (unseen, truth) = scattered()
    ids, unseen_ids = np.arange(len(labels)), np.arange(len(truth))
    (good, _), (good_unseen, _) = separable(4)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    trains = [table(features, labels, ids=ids, source="bad.npz")]
    trains.append(table(2 * good[shuffled, :9], labels[shuffled], ids=ids[shuffled], source="good.npz"))
    others = [table(unseen, truth, ids=unseen_ids), table(2 * good_unseen[:, :9], truth, ids=unseen_ids)]
    return tailscope.diagnose(trains, others, permutations=19)


def test_encoders_are_compared_by_paired_intervals(compared):
    found = compared
    assert list(found["encoders"]) == ["bad", "good"]
    first, change = found["encoders"]["bad"], found["advice"][0]
    assert {field: found[field] for field in first} == {**first, "advice": [change, *first["advice"]]}
    assert change["text"].startswith("Use “good” instead of “bad”: ")
    other = found["comparison"]["encoders"]["good"]
    assert other["accuracy"]["classifier_bound"]["ci95"][0] > 0.3
    gains = [found["encoders"][name]["accuracy"]["current"]["mean"] for name in ("bad", "good")]
    assert other["accuracy"]["current"]["points"] == pytest.approx(gains[1] - gains[0])
    spread = other["groups"]["tail"]["localises"]
    assert spread["better"] == "other"
    entries = [found["encoders"][name]["classes"] for name in ("bad", "good")]
    differences = np.array([b["spread_gap_deg"] - a["spread_gap_deg"] for a, b in zip(*entries, strict=True)])[6:]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    assert spread["difference"] == pytest.approx(differences.mean())
    assert spread["ci95"] == pytest.approx([low, high])


def test_encoders_of_other_samples_cannot_be_compared():
    train, unseen = separable()
    fewer = (train[0][1:], train[1][1:])
    with pytest.raises(UserError, match="its samples are not those of"):
        tailscope.diagnose([table(*train), table(*fewer)], [table(*unseen)] * 2, permutations=0, verdict=False)
    with pytest.raises(UserError, match="1 given for 2 --train"):
        tailscope.diagnose([table(*train)] * 2, table(*unseen))


def test_bursts_stay_together(monkeypatch):
    (features, labels), (unseen, truth) = separable()
    bursts = np.array([f"b{k // 2}" for k in range(len(truth))])
    folds = []

    def spy(tried, fold_of):
        folds.append(fold_of)
        return select_nested(tried, fold_of)

    monkeypatch.setattr(remedies, "select_nested", spy)
    tailscope.diagnose(table(features, labels), table(unseen, truth, groups=bursts), permutations=0)
    assert (folds[0][::2] == folds[0][1::2]).all()
    assert len(folds[0]) == len(truth)
