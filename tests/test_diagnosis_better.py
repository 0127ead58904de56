"""Which of several encoders is better: differences written out, planted encoders whose geometry looks otherwise."""

import dataclasses
import json
import re

import numpy as np
import pytest

import tailscope
from diagnosis_cases import CENTRES, CLASSES, COUNTS, DIMS, UNSEEN, around, table
from tailscope import report
from tailscope.diagnosis import better
from tailscope.diagnosis.inputs import read
from tailscope.diagnosis.outcomes import score
from tailscope.diagnosis.remedies import Scored
from tailscope.errors import UserError
from tailscope.report import diagnosis, encoders
from tailscope.results import write

GROUPS = ["head"] * 3 + ["body"] * 3 + ["tail"] * 3
NONE = {"a": (), "b": (), "c": ()}


def planted(separation, scale, seed):
    """Training and unseen samples about centres so far apart, of the same classes for every seed."""
    rng, centres = np.random.default_rng(seed), separation * np.eye(CLASSES, DIMS)
    return around(centres + 2, COUNTS, scale, rng), around(centres + 2, [UNSEEN] * CLASSES, scale, rng)


def scored(sides, progress):
    inputs = read(*(table(*side) for side in sides), None, None)
    return score(inputs, 200, 0, progress)


@pytest.fixture(scope="module")
def outcomes():
    """The same images through a good encoder, a worse one, and one as good as the first."""
    from tailscope.progress import Progress

    made = {"a": planted(1.0, 0.5, 0), "b": planted(2.0, 0.5, 1), "c": planted(2.0, 0.5, 2)}
    return {name: scored(sides, Progress()) for name, sides in made.items()}


def test_differences_are_those_written_out(outcomes):
    a, b = outcomes["a"], outcomes["b"]
    found = better.which("a", "b", outcomes, NONE, GROUPS)
    assert a.inflation == 1.3  # cross-fitted: of all but the classifier in use
    for part, rows in [(found["accuracy"], a.labels >= 0)] + [
        (found["by_group"][name], np.array([GROUPS[label] == name for label in a.labels]))
        for name in ("head", "body", "tail")
    ]:
        number = rows.sum()
        for kind, before, after, factor in [
            ("current", a.current, b.current, 1.0),
            ("rebalanced", a.rebalanced.correct, b.rebalanced.correct, 1.3),
            ("attained", a.bound.attained.correct, b.bound.attained.correct, 1.3),
        ]:
            items = [float(y) - float(x) for x, y in zip(before[rows], after[rows], strict=True)]
            mean = sum(items) / number
            half = 1.959964 * factor * (sum((x - mean) ** 2 for x in items) / (number - 1) / number) ** 0.5
            assert part[kind]["points"] == pytest.approx(mean)
            assert part[kind]["ci95"] == pytest.approx([mean - half, mean + half], abs=1e-6)
        assert part["classifier_bound"] == part["attained"]
        assert part["scored"] == number


def test_the_difference_of_the_bounds_has_the_noise_of_items_and_of_both_curves(outcomes):
    a, b = outcomes["a"], outcomes["b"]
    gap = better.which("a", "b", outcomes, NONE)["accuracy"]["extrapolated"]
    items = b.bound.attained.correct.astype(float) - a.bound.attained.correct
    gains = [one.bound.extrapolated.gains for one in (a, b)]
    assert gap["points"] == pytest.approx(items.mean() + gains[1].mean() - gains[0].mean())
    variance = ((items - items.mean()) ** 2).sum() / len(items) ** 2 + gains[0].var() + gains[1].var()
    assert gap["ci95"][1] - gap["ci95"][0] == pytest.approx(2 * 1.96 * variance**0.5, rel=0.15)
    means = [one.bound.extrapolated.mean for one in (a, b)]
    assert gap["points"] == pytest.approx(means[1] - means[0], abs=0.01)


def test_the_mirror_image_says_the_same(outcomes):
    one, other = better.which("a", "b", outcomes, NONE), better.which("b", "a", outcomes, NONE)
    assert (one["better"], other["better"]) == ("other", "reference")
    assert one["by"] == other["by"] == "extrapolated"
    assert one["text"].startswith("“b” is better than “a”: with 200 samples of every class")
    for kind in ("current", "rebalanced", "attained"):
        assert one["accuracy"][kind]["points"] == -other["accuracy"][kind]["points"]


def test_encoders_that_are_as_good_are_called_a_tie(outcomes):
    found = better.which("b", "c", outcomes, NONE)
    assert (found["better"], found["by"], found["points"]) == (None, None, None)
    assert found["text"].startswith("No clear difference between “b” and “c”")
    same = better.which("b", "b", outcomes, NONE)["accuracy"]
    assert same["attained"] == {"points": 0, "ci95": [0, 0]}
    low, high = same["extrapolated"]["ci95"]
    assert low < 0 < high


def test_ties_are_rarely_called_otherwise(outcomes):
    """Outcomes of two encoders that are right equally often, item by item at random."""
    a, rng, wrong = outcomes["a"], np.random.default_rng(0), 0
    for _ in range(200):
        pair = {}
        for name in "ab":
            attained = a.bound.attained
            right = dataclasses.replace(attained, correct=rng.random(len(attained.correct)) < 0.8)
            pair[name] = dataclasses.replace(a, bound=dataclasses.replace(a.bound, attained=right))
        wrong += better.which("a", "b", pair, NONE)["better"] is not None
    assert wrong <= 14  # 5 % of 200 are 10, and 1.3 times as wide intervals miss in 1.1 %


def without_bound(one, reason):
    return dataclasses.replace(one, bound=dataclasses.replace(one.bound, extrapolated=None, reason=reason))


def test_an_unknown_bound_is_null_with_its_reason(outcomes):
    few = {"a": outcomes["a"], "b": without_bound(outcomes["b"], "there are too few samples")}
    found = better.which("a", "b", few, NONE, GROUPS)
    for part in (found["accuracy"], *found["by_group"].values()):
        assert (part["extrapolated"], part["reason"]) == (None, "there are too few samples")
    assert (found["better"], found["by"]) == ("other", "attained")
    assert found["text"].startswith("With the samples that are there, “b” is better than “a”")
    assert "not known: there are too few samples" in found["text"]


def shifted(one, points):
    """Outcomes whose bound lies so much higher, without doubt."""
    gains = np.full_like(one.bound.extrapolated.gains, points)
    far = dataclasses.replace(one.bound.extrapolated, gains=gains)
    return dataclasses.replace(one, bound=dataclasses.replace(one.bound, extrapolated=far))


def test_where_more_samples_turn_the_order_neither_is_better(outcomes):
    crossing = {"a": shifted(outcomes["a"], 0.9), "b": shifted(outcomes["b"], 0.0)}
    found = better.which("a", "b", crossing, NONE)
    assert (found["better"], found["by"]) == (None, None)
    assert found["text"].startswith("Which encoder is better depends on the number of samples: with those that are")


def cut(one, rows, attained=None):
    """Return the outcomes of some samples, all of which a fitted classifier gets right, or none, where it is said."""
    bound, number = without_bound(one, "there are too few").bound, len(rows)
    right = bound.attained.correct[rows] if attained is None else np.full(number, attained)
    kept = dataclasses.replace(bound.attained, correct=right, rows=bound.attained.rows[rows])
    changed = {name: getattr(one, name)[rows] for name in ("labels", "rows", "predicted")} | {"now": one.now.at(rows)}
    rebalanced = dataclasses.replace(one.rebalanced, scored=one.rebalanced.scored.at(rows))
    bound = dataclasses.replace(bound, attained=kept)
    return dataclasses.replace(one, rebalanced=rebalanced, bound=bound, **changed)


@pytest.mark.parametrize(("number", "expected"), [(29, None), (30, "other")])
def test_few_samples_decide_nothing(outcomes, number, expected):
    rows = np.r_[:number, 150:300]  # so many of the head, and the whole body
    pair = {name: cut(outcomes["a"], rows, attained) for name, attained in (("a", False), ("b", True))}
    found = better.which("a", "b", pair, NONE, GROUPS)
    assert found["by_group"]["head"]["scored"] == number
    assert [found["by_group"][name] and found["by_group"][name]["better"] for name in ("head", "body", "tail")] == [
        expected,
        "other",
        None,
    ]
    alone = better.which("a", "b", {name: cut(one, rows[:number]) for name, one in pair.items()}, NONE)
    assert alone["better"] == expected
    assert (f"they share only {number} scored samples" in alone["text"]) == (expected is None)


def test_a_classifier_in_use_makes_no_encoder_better(outcomes):
    bad = dataclasses.replace(
        outcomes["c"], now=Scored(np.zeros_like(outcomes["c"].current), outcomes["c"].now.confidence)
    )
    found = better.which("b", "c", {"b": outcomes["b"], "c": bad}, NONE)
    assert found["better"] is None
    assert "The classifier in use on “b” reaches" in found["text"]
    assert "its features are not clearly better" in found["text"]
    found = better.which("a", "c", {"a": outcomes["a"], "c": bad}, NONE)
    assert found["better"] == "other"
    assert found["text"].endswith("less than that of “a”: “c” needs another one.")


def test_three_encoders_are_ranked(outcomes):
    found = better.rank(outcomes, NONE)
    assert set(found["leaders"]) == {"b", "c"}
    assert (found["ranking"][-1], found["best"]) == ("a", None)
    assert "come first, with no clear difference between them: “a” is clearly worse" in found["text"]
    best = better.rank({"a": outcomes["a"], "c": shifted(outcomes["a"], 0.0), "b": outcomes["b"]}, NONE)
    assert (best["best"], best["leaders"], best["ranking"][0]) == ("b", ["b"], "b")
    assert best["text"].startswith("“b” is the best of 3 encoders")
    withheld = better.rank(outcomes, NONE | {"c": ("its labels are shuffled",)})
    assert withheld["text"] == "Which of the 3 encoders is best cannot be said: its labels are shuffled."


def test_nothing_is_concluded_without_accuracies_or_from_noise(outcomes):
    found = better.which("a", "b", {"a": None, "b": None}, NONE)
    assert (found["better"], found["accuracy"], found["by_group"]) == (None, None, {})
    assert found["text"].endswith("geometry alone does not say it.")
    attained = outcomes["a"].bound.attained
    noise = dataclasses.replace(attained, chance=0.999)
    blind = dataclasses.replace(outcomes["a"], bound=dataclasses.replace(outcomes["a"].bound, attained=noise))
    found = better.which("a", "b", {"a": blind, "b": blind}, NONE)
    assert "the features of neither carry class information" in found["text"]
    assert found["reason"] == better.NO_INFORMATION


# -- the whole way


@pytest.fixture(scope="module")
def looks():
    """The better encoder is the second, and the first keeps classes more compact; ids are in another order."""
    (x, y), (u, v) = scattered_lightly()
    (p, _), (q, _) = spread_but_separate()
    ids, unseen_ids = np.arange(len(y)), np.arange(len(v))
    order, unseen_order = (np.random.default_rng(k).permutation(n) for k, n in ((0, len(y)), (1, len(v))))
    trains = [
        table(x, y, ids=ids, source="tight.npz"),
        table(p[order], y[order], ids=ids[order], source="wide.npz"),
    ]
    others = [table(u, v, ids=unseen_ids), table(q[unseen_order], v[unseen_order], ids=unseen_ids[unseen_order])]
    return tailscope.diagnose(trains, others, permutations=19)


def scattered_lightly():
    """Compact classes that lie in pairs on top of one another."""
    rng, centres = np.random.default_rng(3), 4 * np.eye(CLASSES, DIMS)[np.arange(CLASSES) // 2 * 2] + 2
    return around(centres, COUNTS, 0.1, rng), around(centres, [UNSEEN] * CLASSES, 0.1, rng)


def spread_but_separate():
    """Wide classes, all apart."""
    rng = np.random.default_rng(4)
    return around(CENTRES, COUNTS, 0.9, rng), around(CENTRES, [UNSEEN] * CLASSES, 0.9, rng)


def test_the_better_encoder_leads_and_geometry_that_favours_the_other_is_marked(looks):
    stored = looks["comparison"]
    other = stored["encoders"]["wide"]
    assert (stored["best"], stored["ranking"], other["better"]) == ("wide", ["wide", "tight"], "other")
    compact = other["groups"]["all"]["compacts"]
    assert (compact["better"], compact["note"]) == (
        "reference",
        "smaller spread, but of features that tell classes apart less",
    )
    found = [one for aspects in other["groups"].values() for one in aspects.values()]
    assert {one["note"] for one in found if one["better"] != "reference"} == {None}
    assert diagnosis.headline(looks).startswith("“wide” is better than “tight”, by ")


def test_no_sentence_favours_the_worse_encoder(looks):
    for text in encoders.findings(looks):
        if "“tight”" in text:
            assert "is better than “tight”" in text or "which is no advantage here" in text
    assert not any("“tight” is better" in text for text in diagnosis.findings(looks))


def test_files_that_do_not_belong_together_are_not_compared():
    """Labels of the unseen samples in another order: geometry is measured, and nothing said of either encoder."""
    sides = [
        (train, (unseen, CLASSES - 1 - truth)) for train, (unseen, truth) in (planted(2.0, 0.4, k) for k in (5, 6))
    ]
    found = tailscope.diagnose(
        [table(*side[0]) for side in sides], [table(*side[1]) for side in sides], permutations=19
    )
    assert diagnosis.headline(found).endswith("is better cannot be said")
    assert len(encoders.findings(found)) == 1
    assert [row["conclusion"] for row in encoders.standings(found) if row["conclusion"]] == ["cannot be said"]


def test_the_order_of_ids_changes_nothing(looks):
    sides = [scattered_lightly(), spread_but_separate()]
    names = [{"source": "tight.npz"}, {"source": "wide.npz"}]
    trains, unseen = ([table(*side[k], **name) for side, name in zip(sides, names, strict=True)] for k in (0, 1))
    plain = tailscope.diagnose(trains, unseen, permutations=19)
    assert plain["comparison"]["encoders"]["wide"]["accuracy"] == looks["comparison"]["encoders"]["wide"]["accuracy"]


def test_the_page_and_its_tables_lead_with_accuracies(looks, tmp_path):
    write(tmp_path, "diagnosis", looks)
    text = report.build(tmp_path, figures=False).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "“wide” is better than “tight”" in re.search(r"<h1>(.*?)</h1>", text)[1]
    assert text.index('id="encoders"') < text.index('id="groups"')
    rows = (tmp_path / "tables" / "diagnosis-encoders.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["wide", "better"], ["tight", ""]]
    every = encoders.comparisons(looks)
    assert [row["aspect"] for row in every[:4]] == [f"accuracy, {name} (points)" for name in encoders.KINDS.values()]
    assert any(row["note"] == "smaller spread, but of features that tell classes apart less" for row in every)
    assert encoders.lines(looks)[1][-1] == "better"


def test_a_comparison_from_before_is_shown_without_a_conclusion(looks):
    old = json.loads(json.dumps(looks))
    stored = old["comparison"]
    for name in ("ranking", "leaders", "best", "text"):
        del stored[name]
    entry = stored["encoders"]["wide"]
    for name in ("better", "by", "points", "ci95", "text", "by_group"):
        del entry[name]
    entry["accuracy"] = {name: entry["accuracy"][name] for name in ("current", "rebalanced", "classifier_bound")}
    assert diagnosis.headline(old).startswith(("The ", "Undecided"))
    assert [row["aspect"] for row in encoders.comparisons(old)][2] == "accuracy, best fitted (points)"
    assert encoders.lines(old) == []


def test_the_best_of_a_comparison_is_the_ceiling_and_agrees_with_it(looks, tmp_path):
    stored = write(tmp_path, "diagnosis", looks)
    first, second = ([table(*part) for part in sides] for sides in (scattered_lightly(), spread_but_separate()))
    found = tailscope.diagnose(*first, ceiling_from=stored, permutations=0)
    gap, difference = found["verdict"]["representation_gap"], looks["comparison"]["encoders"]["wide"]["accuracy"]
    assert found["spec"]["ceiling_from"]["source"] == "diagnosis.json, wide"
    assert gap["points"] == pytest.approx(difference["extrapolated"]["points"], abs=0.01)
    assert gap["ci95"][0] > 0
    with pytest.raises(UserError, match="the best of its encoders, wide, is that of --train"):
        tailscope.diagnose(*second, ceiling_from=stored, permutations=0)
    tie = json.loads(json.dumps(looks))
    tie["comparison"]["best"] = None
    with pytest.raises(UserError, match="none of its encoders is clearly the best"):
        tailscope.diagnose(*first, ceiling_from=write(tmp_path, "diagnosis", tie), permutations=0)
