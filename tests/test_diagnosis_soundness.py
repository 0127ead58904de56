"""When no verdict may be given: labels, scales, samples or classifiers that do not belong together; odd rows."""

import json
import math
import re

import numpy as np
import pytest
import torch

import tailscope
from diagnosis_cases import CENTRES, CLASSES, COUNTS, FEW, UNSEEN, around, head_biased, scattered, separable, table
from tailscope import cli
from tailscope.diagnosis.inputs import Inputs, far_notes, without_far_rows
from tailscope.diagnosis.soundness import _Centers, below_chance, common_factor, mixed_rows, moved_labels
from tailscope.errors import UserError
from tailscope.measures import group_rows
from tailscope.tables.table import LinearLayer


def by_class(*sides):
    names = [str(k) for k in range(sides[0][1].max() + 1)]
    return [group_rows(torch.from_numpy(x).float(), torch.from_numpy(y), names, "") for x, y in sides]


def match(train, labels, unseen, truth):
    return moved_labels(*by_class((train, labels), (unseen, truth)))


def long_tail(rng, classes, dims, size, most, fewest, unseen, memorised=0.0, shrunk=1.0):
    """Gaussian classes whose centres are `size` standard deviations long, displaced in training by memory."""
    counts = np.maximum(1, np.round(most * (fewest / most) ** (np.arange(classes) / max(1, classes - 1)))).astype(int)
    deviation = (1 + np.arange(dims)) ** -0.25
    deviation /= np.sqrt((deviation**2).mean())
    centres = size * rng.normal(size=(classes, dims)) / math.sqrt(dims)
    shift = memorised * deviation * rng.normal(size=(classes, dims)) / counts[:, None] ** 0.25
    labels, truth = np.repeat(np.arange(classes), counts), np.repeat(np.arange(classes), unseen)
    train = (
        centres[labels] + shift[labels] + (1 - 0.3 * bool(memorised)) * deviation * rng.normal(size=(len(labels), dims))
    )
    return train, labels, shrunk * centres[truth] + deviation * rng.normal(size=(len(truth), dims)), truth


def test_merely_bad_features_raise_no_alarm():
    """Noise, weak classes, memorised and displaced training centres, shrunk held-out ones, and absent classes."""
    rng = np.random.default_rng(0)
    alarms = []
    for draw in range(200):
        classes = int(rng.choice([2, 3, 10, 30]))
        given = {
            "classes": classes,
            "dims": int(rng.choice([1, 4, 16, 64])),
            "size": float(rng.choice([0, 0.3, 1, 2])),
            "most": int(rng.choice([5, 50, 200])),
            "fewest": int(rng.choice([1, 2, 5])),
            "unseen": int(rng.choice([5, 30, 100])),
            "memorised": float(rng.choice([0, 0.5, 1])),
            "shrunk": float(rng.choice([0.4, 1])),
        }
        train, labels, unseen, truth = long_tail(rng, **given)
        absent = rng.integers(classes) if classes > 2 and draw % 2 else -1
        if match(train, labels, unseen[truth != absent], truth[truth != absent]) is not None:
            alarms.append(given | {"absent": absent})
    assert alarms == []


def moved(kind, classes):
    """Return the label that the held-out file gives to each class, -1 for one that is missing."""
    order = np.arange(classes)
    if kind == "a class is missing":
        return np.where(order < classes // 2, order, np.where(order == classes // 2, -1, order - 1))
    if kind == "one pair":
        order[[classes // 2, classes // 2 - 1]] = order[[classes // 2 - 1, classes // 2]]
    return {
        "one pair": order,
        "reversed": order[::-1],
        "random": np.roll(np.random.default_rng(1).permutation(classes), classes == 2),
        "one too high": (order + 1) % classes,
        "one too low": (order - 1) % classes,
    }[kind]


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize(
    "kind", ["one pair", "a class is missing", "reversed", "random", "one too high", "one too low"]
)
def test_labels_that_mean_other_classes_are_found_and_named(kind, classes):
    if classes == 2 and kind == "a class is missing":
        pytest.skip("one class is left")
    order = moved(kind, classes)
    wrong = {(int(a), k) for k, a in enumerate(order) if a not in (k, -1)}
    for seed in range(3):
        train, labels, unseen, truth = long_tail(np.random.default_rng(seed), classes, 64, 6, 200, 5, 30)
        called = order[truth]
        found = match(train, labels, unseen[called >= 0], called[called >= 0])
        assert found is not None
        assert found.items() <= wrong
        assert len(found) > 0.9 * len(wrong)


def test_classes_without_part_in_a_closed_cycle_add_nothing_to_its_error(monkeypatch):
    """Hundreds of swapped pairs would otherwise each ask for every class's variance."""
    train, labels, unseen, truth = long_tail(np.random.default_rng(0), 60, 64, 6, 200, 5, 30)
    asked, variances = [], _Centers._variances
    monkeypatch.setattr(_Centers, "_variances", lambda self, *a: asked.append(len(a[1])) or variances(self, *a))
    found = match(train, labels, unseen, truth ^ 1)
    assert found == {k: k ^ 1 for k in range(60)}
    assert sorted(asked)[:-2] == [2] * (len(asked) - 2)  # the first two are of all centres as a whole


def test_weak_features_show_a_permutation_though_no_single_pair_is_sure():
    train, labels, unseen, truth = long_tail(np.random.default_rng(0), 100, 64, 2, 200, 2, 30)
    assert match(train, labels, unseen, truth) is None
    assert match(train, labels, unseen, (truth + 1) % 100) is not None


def test_a_missing_class_shows_in_weak_features_because_it_is_one_hypothesis():
    train, labels, unseen, truth = long_tail(np.random.default_rng(0), 100, 64, 2, 200, 5, 30)
    called = moved("a class is missing", 100)[truth]
    assert match(train, labels, unseen[called >= 0], called[called >= 0]) is not None


def test_too_little_to_compare_is_agreement():
    rows = np.random.default_rng(0).normal(size=(4, 3))
    assert match(rows, np.arange(4), rows[::-1].copy(), np.arange(4)) is None  # one sample a class has no spread
    assert match(rows, np.arange(4) % 2, rows, np.zeros(4, int)) is None


def labelled(change):
    train, (unseen, truth) = separable()
    kept = change[truth] >= 0
    return train, (unseen[kept], change[truth][kept])


@pytest.mark.parametrize("kind", ["reversed", "a class is missing", "one pair"])
def test_the_verdict_is_withheld_and_names_the_classes(kind):
    train, unseen = labelled(moved(kind, CLASSES))
    names = [f"name {k}" for k in range(CLASSES)]
    sides = [table(*side, class_names=names, source=f"{n}.npz") for side, n in ((train, "seen"), (unseen, "held"))]
    found = tailscope.diagnose(*sides, **FEW)
    verdict, first = found["verdict"], found["warnings"][0]
    assert first == verdict["reason"] == verdict["withheld"][0]
    assert first.startswith("the labels of --unseen (held.npz) and of --train (seen.npz) seem to mean different")
    given = min(a for k, a in enumerate(moved(kind, CLASSES)) if a not in (k, -1))
    real = list(moved(kind, CLASSES)).index(given)
    assert f"class 'name {given}' of --unseen looks like class 'name {real}' of --train" in first
    parts = [verdict, *filter(None, verdict["groups"].values()), *verdict["classes"]]
    assert {part["bottleneck"] for part in parts} == {"undecided"}
    assert [piece["about"] for piece in found["advice"]] == ["evidence"]
    measured = tailscope.diagnose(*sides, permutations=0, verdict=False)
    assert measured["warnings"][0] == first


def test_a_test_set_and_every_encoder_are_asked():
    train, unseen = separable()
    (features, truth) = separable(1)[1]
    backwards = table(features, CLASSES - 1 - truth, source="t.npz")
    found = tailscope.diagnose(table(*train), table(*unseen), test=backwards, permutations=0)
    assert found["verdict"]["reason"].startswith("the labels of --test (t.npz)")
    rng = np.random.default_rng(0)
    blind = [table(rng.normal(size=(len(y), 5)), y) for y in (train[1], CLASSES - 1 - unseen[1])]
    seeing = [table(*train), table(unseen[0], CLASSES - 1 - unseen[1])]
    both = tailscope.diagnose(*zip(blind, seeing, strict=True), permutations=0)
    assert all("withheld" in one["verdict"] for one in both["encoders"].values())


def test_the_command_line_says_it_first_and_ends_well(tmp_path, monkeypatch, capsys):
    train, unseen = labelled(moved("reversed", CLASSES))
    for name, side in (("train", train), ("unseen", unseen)):
        table(*side).save(tmp_path / f"{name}.npz")
    paths = [str(tmp_path / name) for name in ("train.npz", "unseen.npz", "out")]
    options = ["--permutations", "19"]
    monkeypatch.setattr(
        "sys.argv", ["tailscope", "diagnose", "--train", paths[0], "--unseen", paths[1], "--out", paths[2], *options]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "No verdict: the labels of --unseen (unseen.npz)" in printed
    assert "costs" not in printed
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["verdict"]["bottleneck"] == "undecided"


def test_a_classifier_of_other_classes_or_features_decides_nothing():
    train, unseen = separable()
    model, tables = head_biased(), (table(*train), table(*unseen))
    turned = LinearLayer.from_arrays(model.weight.flip(0), model.bias.flip(0), source="turned.npz")
    found = tailscope.diagnose(*tables, classifier=turned, permutations=0)
    assert found["verdict"]["bottleneck"] == "undecided"
    assert found["warnings"][0].startswith("the rows of --classifier (turned.npz) and the labels of --train")
    assert "its row 8 gets class '0' of --train" in found["warnings"][0]
    against = LinearLayer.from_arrays(-model.weight, -model.bias, source="against.npz")
    found = tailscope.diagnose(*tables, classifier=against, permutations=0)
    assert found["warnings"][0].startswith("--classifier (against.npz) gets")


def test_guessing_and_what_is_worse():
    labels = np.arange(100) % 4
    assert not below_chance(np.zeros(100, int), labels)
    assert below_chance((labels + 1) % 4, labels)
    rng = np.random.default_rng(0)
    for _ in range(100):  # classifiers that know nothing, or only the head
        labels = np.repeat(np.arange(20), np.maximum(1, 200 // np.arange(1, 21) ** 2))
        guesses = np.where(rng.random(len(labels)) < rng.random(), rng.integers(0, 20, len(labels)), rng.integers(3))
        assert mixed_rows(guesses, labels, 20) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: 10 * x, "are 10 times as long"),
        (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True), "seems to be scaled or normalised"),
    ],
)
def test_files_of_different_scale_decide_nothing(change, words):
    train, (unseen, truth) = scattered()
    found = tailscope.diagnose(table(*train), table(change(unseen), truth), permutations=0)
    assert found["verdict"]["bottleneck"] == "undecided"
    assert words in found["warnings"][0]
    whole = [table(change(x), y) for x, y in (train, (unseen, truth))]
    assert "withheld" not in tailscope.diagnose(*whole, permutations=0)["verdict"]


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.6, 2, 3])
def test_one_factor_of_spread_and_distance_is_a_scale_and_no_other_class(factor):
    train, (unseen, truth) = separable()
    found = tailscope.diagnose(table(*train), table(factor * unseen, truth, source="u.npz"), permutations=0)
    assert found["verdict"]["bottleneck"] == "undecided"
    said = re.match(
        r"the rows of --unseen \(u\.npz\) lie (.*) times as far apart as those of --train", found["warnings"][0]
    )
    assert float(said[1]) == pytest.approx(factor, rel=0.05)


def test_memory_and_shrunken_centres_are_no_scale():
    rng, found, asked = np.random.default_rng(0), [], 0
    for draw in range(60):
        kind = {"memorised": (0.0, 0.5, 1.0)[draw % 3], "shrunk": (0.4, 0.7, 1.0)[draw // 3 % 3]}
        classes = (2, 10, 30)[draw % 7 % 3]
        train, labels, unseen, truth = long_tail(rng, classes, 16, 2, 200, 5, 50, **kind)
        found.append(common_factor(*by_class((train, labels), (unseen, truth))))
        if kind == {"memorised": 0.0, "shrunk": 1.0} and classes > 2:
            asked += 1
            assert common_factor(*by_class((train, labels), (unseen / 2, truth))) == pytest.approx(0.5, rel=0.1)
    assert found == [None] * 60
    assert asked >= 3


def test_training_samples_given_as_held_out_decide_nothing():
    train, (unseen, truth) = separable()
    found = tailscope.diagnose(table(*train), table(*train), permutations=0)
    assert found["verdict"]["bottleneck"] == "undecided"
    assert found["warnings"][0].startswith("100 % of the rows of --unseen")
    corners = [table((x > 4).astype(float) + 1, y) for x, y in (train, (unseen, truth))]  # few different rows at all
    assert "withheld" not in tailscope.diagnose(*corners, permutations=0)["verdict"]


def numbers(value):
    """Yield all numbers of a result, in order."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ("created", "spec", "environment", "provenance", "command"):
                yield from numbers(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


SQUARED = ("variance", "variance_unseen", "covariance_norm", "covariance_norm_unbiased")


def unscaled(result, factor):
    for entry in [*result["classes"], *filter(None, result["groups"].values())]:
        for name in SQUARED:
            if entry[name] is not None:
                entry[name] /= factor**2
    return result


@pytest.fixture(scope="module")
def plain():
    return tailscope.diagnose(*(table(*side) for side in scattered()), **FEW)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-13, 2.0**70, 2.0**120, 1e-30, 1e18])
def test_every_scale_gives_the_same_numbers(plain, factor):
    sides = [(table(x, y).features * factor, y) for x, y in scattered()]
    found = tailscope.diagnose(*(table(x.numpy(), y) for x, y in sides), **FEW)
    assert found["verdict"]["bottleneck"] == plain["verdict"]["bottleneck"] == "representation"
    assert found["warnings"] == plain["warnings"]
    exact = math.frexp(factor)[0] == 0.5
    expected = list(numbers(plain))
    assert list(numbers(unscaled(found, factor))) == (
        expected if exact else pytest.approx(expected, rel=1e-5, abs=1e-5)
    )


def test_a_classifier_follows_the_scale():
    train, unseen = separable()
    model, factor = head_biased(), 2.0**-90
    plain = tailscope.diagnose(table(*train), table(*unseen), classifier=model, permutations=0)
    sides = [table((table(*side).features * factor).numpy(), side[1]) for side in (train, unseen)]
    fitting = LinearLayer.from_arrays(model.weight / factor, model.bias)
    found = tailscope.diagnose(*sides, classifier=fitting, permutations=0)
    assert found["accuracy"]["current"]["per_class"] == plain["accuracy"]["current"]["per_class"]
    assert found["verdict"]["bottleneck"] == plain["verdict"]["bottleneck"] == "classifier"


def test_subnormal_features_are_refused_for_what_they_are():
    sides = [(table(x, y).features * 1e-41, y) for x, y in separable()]
    with pytest.raises(UserError, match=r"small\.npz: features: values are about .*subnormal"):
        tailscope.diagnose(*(table(x.numpy(), y, source="small.npz") for x, y in sides), permutations=0)


@pytest.mark.parametrize("factor", [1e3, 1e30])
def test_a_row_far_too_long_is_named_and_changes_nothing(factor):
    train, unseen = scattered()
    ids = np.array([f"image {k}" for k in range(len(train[1]))])
    plain = tailscope.diagnose(table(*train, ids=ids), table(*unseen), **FEW)
    longer = (train[0].copy(), train[1])
    longer[0][30] *= factor
    found = tailscope.diagnose(table(*longer, ids=ids, source="t.npz"), table(*unseen), **FEW)
    assert found["warnings"][0].startswith("t.npz: row 30 (id image 30) is ")
    assert found["verdict"]["bottleneck"] == plain["verdict"]["bottleneck"]
    assert found["counts"] == plain["counts"] == list(COUNTS)
    assert found["classes"][0]["train_count"] == COUNTS[0] - 1
    assert not any("copy" in text or "are also in" in text for text in found["warnings"])
    assert found["accuracy"]["current"]["mean"] == pytest.approx(plain["accuracy"]["current"]["mean"], abs=0.02)


def test_rows_are_left_out_until_none_is_far_and_all_are_counted():
    rng = np.random.default_rng(0)
    lengths, labels = np.exp(rng.normal(size=300)), np.arange(300) % 3
    lengths[:140] *= np.exp(rng.uniform(2, 9, size=140))  # each that is removed lowers the median
    kept = lengths
    while (near := kept <= 100 * np.sort(kept)[(len(kept) - 1) // 2]).sum() < len(kept):
        kept = kept[near]
    assert 2 < (lengths > kept.max()).sum() != (lengths > 100 * np.median(lengths)).sum()
    rows = table(lengths[:, None] * [[0.6, 0.8]], labels, source="t.npz")
    one = Inputs(rows, rows, None, None, ("a", "b", "c"), ())
    left = without_far_rows({"": one})[""].train
    assert len(left) == len(kept)
    assert group_rows(left.features, left.labels, "abc", "").far == [0, 0, 0]
    assert f" and {300 - len(kept) - 5} more are up to" in far_notes(one, "train")[0]


def test_rows_far_too_long_stay_paired_over_encoders_and_may_not_be_a_class():
    train, unseen = separable()
    other = (unseen[0].copy(), unseen[1])
    other[0][7] *= 1e6
    found = tailscope.diagnose([table(*train)] * 2, [table(*unseen), table(*other)], permutations=0)
    assert [one["verdict"]["scored"] for one in found["encoders"].values()] == [UNSEEN * CLASSES - 1] * 2
    lone = (train[0].copy(), train[1])
    lone[0][lone[1] == 8] *= 1e6
    with pytest.raises(UserError, match="class '8' has no other rows"):
        tailscope.diagnose(table(*lone), table(*unseen), permutations=0)


def test_a_classifier_beyond_its_type_ends_with_one_line():
    train, unseen = separable()
    huge = LinearLayer.from_arrays(np.full((CLASSES, CENTRES.shape[1]), 3e38, np.float32), source="huge.npz")
    with pytest.raises(
        UserError, match=r"no classifier can be fitted, which starts from huge\.npz: .* not finite"
    ) as told:
        tailscope.diagnose(table(*train), table(*unseen), classifier=huge, permutations=0)
    assert "\n" not in str(told.value)


KINDS = {
    "all one": lambda x, y, c: np.ones_like(x),
    "a class is one": lambda x, y, c: np.where(y[:, None] == 0, c[0], x),
    "classes are one": lambda x, y, c: c[y],
    "in pairs": lambda x, y, c: x[np.arange(len(x)) // 2 * 2],
    "a class is zero": lambda x, y, c: np.where(y[:, None] == 0, 0, x),
    "zero": lambda x, y, c: 0 * x,
    "whole": lambda x, y, c: np.round(x),
    "far from zero": lambda x, y, c: x + 1e6,
    "opposite": lambda x, y, c: x * (-1) ** np.arange(len(x))[:, None],
    "of all lengths": lambda x, y, c: x * np.exp(8 * np.cos(np.arange(len(x))[:, None])),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "dims", "train", "unseen"), [(2, 1, 6, 9), (3, 40, 1, 6)])
def test_degenerate_features_hold_no_nan_and_no_traceback(kind, classes, dims, train, unseen):
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(classes, dims))
    sides = [around(centres, [count] * classes, 1.0, rng) for count in (train, unseen)]
    given = [table(KINDS[kind](x, y, centres), y) for x, y in sides]
    found = tailscope.diagnose(*given, permutations=19)
    json.dumps(found, allow_nan=False)
    assert found["verdict"]["bottleneck"] in ("undecided", "classifier")


@pytest.mark.parametrize("types", [(np.float64, np.float32), (np.float32, np.float64), (np.float16, np.float64)])
def test_files_of_different_types_go_together(types):
    """A .csv file holds float64, the .npz file beside it float32."""
    (train, labels), (unseen, truth) = separable()
    sides = ((train.astype(types[0]), labels), (unseen.astype(types[1]), truth))
    alike = ((train.astype(np.float32), labels), (unseen.astype(np.float32), truth))
    mixed, same = (tailscope.diagnose(*given, seed=0, **FEW) for given in (sides, alike))
    assert mixed["verdict"]["bottleneck"] == same["verdict"]["bottleneck"]
    assert mixed["accuracy"]["current"]["accuracy"] == pytest.approx(same["accuracy"]["current"]["accuracy"], abs=0.01)
