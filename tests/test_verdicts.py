"""The verdict's own test: its truth, its draws and its counts are right, and it goes on where it was stopped."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from benchmarks import __main__ as command
from benchmarks import record
from benchmarks.record import Options
from benchmarks.verdicts import cases, run, summary, truth
from benchmarks.verdicts.cases import Case
from benchmarks.verdicts.sources import Encoded, Place, Source, ranks, tail_counts
from benchmarks.verdicts.truth import Facts
from tailscope.classifiers import CRT

TINY = Options(size="tiny")


def blobs(counts, width=3, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = 2 * np.eye(len(counts), width)
    return (centres[labels] + spread * rng.normal(size=(len(labels), width))).astype(np.float32), labels


def source(**changes):
    settings = {"name": "made", "encoder": "frozen", "bound_at": 20, "tested": 5, "from_test": False}
    settings |= {"factors": (10,), "held_out": (8,), "draws": 1, "load": lambda place: None}
    return Source(**(settings | changes))


# -- truth ------------------------------------------------------------------------------------------------------------


def test_the_truth_is_what_scikit_learn_reaches(monkeypatch):
    (x, y), (z, labels), l2 = blobs([60, 60, 60]), blobs([50, 50, 50], seed=1), 1e-2
    monkeypatch.setattr(truth, "PENALTIES", (l2,))
    strength = 1 / (len(x) * l2 * x.var(axis=0).mean())
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(x, y).predict(z) == labels
    assert (truth.reached(x, y, z, labels) == theirs).all()


def test_the_penalty_of_each_half_is_chosen_on_the_other(monkeypatch):
    (x, y), (z, labels) = blobs([12, 12, 12], width=30, spread=2), blobs([40, 40, 40], width=30, spread=2, seed=1)
    monkeypatch.setattr(truth, "PAST", 1.0)
    theirs = []
    for l2 in truth.PENALTIES:
        model = LogisticRegression(C=1 / (len(x) * l2 * x.var(axis=0).mean()), tol=1e-8, max_iter=5000).fit(x, y)
        theirs.append((model.predict(z) == labels).mean())
    ours = truth.reached(x, y, z, labels).mean()
    assert max(theirs) - min(theirs) > 0.02  # there is something to choose
    assert min(theirs) - 0.01 <= ours <= max(theirs) + 0.01


def test_what_the_encoder_saw_comes_first():
    rng = np.random.default_rng(0)
    labels, first = rng.integers(0, 4, 50), rng.random(50) < 0.3
    order = ranks(labels, rng)
    found = truth.ranks_with_first(labels, first, order)
    for k in range(4):
        members = np.flatnonzero(labels == k)
        in_order = sorted(members, key=lambda row: (not first[row], order[row]))
        assert [found[row] for row in in_order] == list(range(len(members)))


def test_the_bound_takes_as_many_of_every_class_and_all_that_was_seen(monkeypatch):
    taken = []
    monkeypatch.setattr(truth, "reached", lambda x, y, z, labels: taken.append((x, y)) or np.ones(len(labels), bool))
    x, y = blobs([40, 40, 40])
    seen = ranks(y, np.random.default_rng(0)) < np.array([20, 6, 2])[y]
    right = truth.bound(source(), Encoded(x, y, *blobs([9, 9, 9]), seen=seen))
    assert right.tolist() == [1.0] * 27
    assert len(taken) == truth.MOST
    for rows, labels in taken:
        assert np.bincount(labels).tolist() == [20, 20, 20]
        assert {tuple(row) for row in x[seen]} <= {tuple(row) for row in rows}


# -- draws ------------------------------------------------------------------------------------------------------------


def numbered(table):
    return set(table[0][:, 0].astype(int).tolist())


@pytest.mark.parametrize("kind", ["frozen", "seen", "seen, held out from the test set"])
def test_a_case_draws_rows_that_have_no_part_in_one_another(kind):
    features = np.arange(600, dtype=np.float32)[:, None]
    labels, tests = np.arange(360) % 3, np.arange(240) % 3
    seen = None if kind == "frozen" else ranks(labels, np.random.default_rng(0)) < np.array([20, 6, 2])[labels]
    encoded = Encoded(features[:360], labels, features[360:], tests, seen=seen)
    made = source(from_test="test set" in kind)
    found = {test: cases.draw(Case("made", 10, 8, 0, test), made, encoded) for test in (False, True)}
    drawn = found[True]
    untouched = numbered((encoded.test_features[drawn.untouched], 0))
    parts = [numbered(drawn.train), numbered(drawn.unseen), numbered(drawn.test), untouched]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert sorted(np.bincount(drawn.train[1])) == [2, 6, 20]
    assert np.bincount(drawn.unseen[1]).tolist() == [8, 8, 8]
    assert np.bincount(drawn.test[1]).tolist() == [5, 5, 5]
    assert numbered(drawn.test) | untouched <= set(range(360, 600))
    assert (min(numbered(drawn.unseen)) >= 360) == made.from_test
    assert found[False].test is None
    assert numbered(found[False].train) == numbered(drawn.train)
    if seen is not None:
        assert numbered(drawn.train) == set(np.flatnonzero(seen).tolist())


def test_profiles_fall_to_their_factor():
    assert tail_counts(300, 100, 100)[[0, -1]].tolist() == [300, 3]


# -- one case ---------------------------------------------------------------------------------------------------------


def test_a_case_says_what_is_true_of_it():
    x, y = blobs([60, 60, 60], spread=1.5)
    z, labels = blobs([200, 200, 200], spread=1.5, seed=1)
    encoded, made = Encoded(x, y, z, labels), source()
    facts = Facts(truth.bound(made, encoded), None)
    case = Case("made", 10, 8, 0, test=True)
    found = json.loads(json.dumps(cases.examine(case, made, encoded, facts), allow_nan=False))
    drawn = cases.draw(case, made, encoded)
    model = LogisticRegression(C=1 / (len(drawn.train[0]) * 1e-3 * drawn.train[0].var(axis=0).mean()), tol=1e-8)
    current = (model.fit(*drawn.train).predict(z) == labels)[drawn.untouched].mean()
    assert found["current"]["true"] == pytest.approx(current, abs=0.005)
    bound = facts.right[drawn.untouched].mean()
    for verdict in found["verdicts"]:
        assert verdict["true"] == pytest.approx(2 * bound - found["current"]["true"] - verdict["ceiling"])
        if verdict["of"].startswith("planted"):
            ratio = float(verdict["of"].split()[1])
            assert verdict["representation_gap"] == pytest.approx(ratio * verdict["classifier_gap"])
    advised = found["remedies"][found["advised"]]
    assert found["gain"]["true"] == pytest.approx(advised[1] - found["current"]["true"])
    assert found["scored"] == 15
    assert found["untouched"] == 585


def test_an_advice_that_is_followed_is_the_classifier_that_it_names():
    drawn = cases.Drawn(blobs([30, 10, 3]), blobs([8, 8, 8], seed=1), None, np.arange(0))
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    adjusted = cases.followed("logit_adjustment(tau=0.5)", drawn, (weight, bias))
    expected = drawn.unseen[0] @ weight.T + bias - 0.5 * np.log(np.array([30, 10, 3]) / 43)
    assert (adjusted.predict(drawn.unseen[0]) == expected.argmax(1)).all()
    pooled = cases.followed("crt(l2=0.01) on training and unseen samples", drawn, (weight, bias))
    both = [np.concatenate(parts) for parts in zip(drawn.train, drawn.unseen, strict=True)]
    assert pooled.coef_ == pytest.approx(CRT(l2=0.01, tol=cases.TOL).fit(*both).coef_)


def test_the_naive_bound_is_what_a_fit_to_held_out_samples_reaches():
    drawn = cases.Drawn(blobs([30, 10, 3]), blobs([20, 20, 20], seed=1), blobs([90, 90, 90], seed=2), np.arange(0))
    for naive in (cases.naive_bound(drawn, 0), cases.naive_bound(drawn._replace(test=None), 0)):
        low, high = naive.interval
        assert low < naive.right.mean() < high
        assert 0.7 < naive.right.mean() < 0.95
        assert naive.verdict(np.zeros(len(naive.right), bool), 0.9) == "classifier"
        assert naive.verdict(naive.right, 1.0) == "representation"


# -- counts -----------------------------------------------------------------------------------------------------------


def verdict(said, true, gaps=(0.04, 0.01), **changes):
    found = {"of": "1", "ceiling": 1.0, "bottleneck": said, "kind": None, "true": true, "true_error": 0.001}
    found |= {
        "difference": {"points": true, "ci95": [round(true - 0.01, 3), round(true + 0.01, 3)]},
        "spread_rejects": False,
    }
    return found | {"classifier_gap": gaps[0], "representation_gap": gaps[1], "naive": "representation"} | changes


def made_record(number, **changes):
    found = {
        "case": f"case {number}", "source": "made", "encoder": "frozen", "factor": 10, "held_out": 25, "draw": number,
        "test": False, "classes": 3, "features": 3, "bound_at": 20, "scored": 75, "untouched": 500, "seconds": 2.0,
        "withheld": [], "swap": None, "current": {"said": 0.5, "true": 0.5},
        "bound": {
            "true": 0.6, "true_error": 0.01, "attained": 0.55, "attained_ci95": [0.5, 0.6], "extrapolated": 0.59,
            "ci95": [0.55, 0.65], "reason": None, "naive": [0.5, 0.54],
        },
        "verdicts": [verdict("classifier", 0.03)],
        "remedies": {"ncm": [0.55, 0.55], "crt(l2=0.1)": [0.6, 0.58]}, "advised": "crt(l2=0.1)",
        "gain": {"points": 0.09, "ci95": [0.05, 0.13], "true": 0.08, "true_error": 0.01},
    }  # fmt: skip
    return found | changes


def counts(records):
    return {p["name"]: (p["after"] and p["after"]["hits"], p["after"] and p["after"]["of"], p["reached"],
                        p["before"] and p["before"]["hits"]) for p in summary.promises(records)}  # fmt: skip


def test_the_promises_count_what_was_kept():
    short = made_record(1)["bound"] | {"extrapolated": None, "ci95": None, "reason": "too few"}
    missed = made_record(2)["bound"] | {"ci95": [0.5, 0.57], "extrapolated": 0.53}
    records = [
        made_record(0),
        made_record(1, bound=short, verdicts=[verdict("undecided", 0.03), verdict("representation", 0.03)]),
        made_record(2, bound=missed, advised="ncm", gain={"points": 0.2, "ci95": [0.15, 0.25], "true": 0.05,
                                                          "true_error": 0.01}),
    ]  # fmt: skip
    found = counts(records)
    assert found["bound: interval covers the truth"] == (1, 2, False, 0)
    assert found["bound: known, not a lower limit only"][:2] == (2, 3)
    assert found["bound: “at least” holds"][:2] == (3, 3)
    assert found["verdicts against the true sign"] == (1, 4, False, 0)
    assert found["decided where promised"] == (3, 4, False, 0)
    assert found["advised gain: interval covers the truth"][:3] == (2, 3, False)
    assert found["advised remedy is the best or within a point"] == (2, 3, False, 0)
    text = [one["what"] for one in summary.summarise(records)["mistakes"]]
    assert text == ["verdict representation, ceiling 1", "bound", "gain of ncm"]


def test_verdicts_are_promised_by_the_ratio_of_the_gaps_and_by_m():
    for gaps, m, due in (
        ((0.04, 0.01), 25, True), ((0.04, 0.01), 10, False), ((0.04, 0.02), 25, False), ((0.04, 0.02), 100, True),
        ((0.04, 0.03), 500, False), ((0.02, 0.001), 500, False), ((-0.01, 0.3), 25, True),
    ):  # fmt: skip
        assert summary.required({"held_out": m}, verdict("undecided", 0.1, gaps)) is due


def test_the_rule_of_before_wants_the_test_of_spread_for_a_representation():
    assert summary.rule_before(verdict("", 0.1)) == "undecided"
    assert summary.rule_before(verdict("", 0.1, spread_rejects=True)) == "representation"
    assert summary.rule_before(verdict("", 0.1, naive="classifier")) == "classifier"


def test_verdicts_are_counted_by_their_ceiling_and_by_m():
    records = [
        made_record(0, held_out=10, verdicts=[verdict("undecided", 0.1), verdict("classifier", 0.1, of="planted 4")]),
        made_record(
            1, held_out=100, verdicts=[verdict("classifier", 0.1), verdict("classifier", -0.1, of="planted 4")]
        ),
    ]
    found = summary.by_ceiling(records)
    assert found["1"] == {"m below 25": [0, 1], "25 to 99": [0, 0], "100 or more": [1, 1], "wrong": 0,
                          "naive decided": 2, "naive wrong": 2}  # fmt: skip
    assert (found["planted 4"]["wrong"], found["planted 4"]["naive wrong"]) == (1, 1)


def test_the_division_by_swap_is_compared_under_its_own_ceiling():
    cells = {"lt->lt": 0.5, "lt->true": 0.6, "true->true": 0.8}
    swap = {"classifier": 0.1, "representation": 0.2, "cells": cells, "order_matters": False}
    said = [verdict("representation", -0.1, of="swap"), verdict("classifier", 0.1)]
    found = summary.agreement([made_record(0, swap=swap, verdicts=said), made_record(1)])
    assert [(one["larger"], one["same"], one["other"], one["undecided"]) for one in found] == [
        ("representation", 1, 0, 0)
    ]


# -- the whole --------------------------------------------------------------------------------------------------------


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch, capsys):
    place, examine, examined = Place(None, tmp_path / "cache"), cases.examine, []

    def stopped(case, *others):
        if examined:
            raise KeyboardInterrupt
        examined.append(case.key)
        return examine(case, *others)

    monkeypatch.setattr(cases, "examine", stopped)
    assert run.run(TINY, place, tmp_path, 1) == 130
    first = json.loads((tmp_path / run.RESULT).read_text())
    assert (first["complete"], len(first["cases"])) == (False, 1)
    assert "Not complete" in summary.table(first)
    assert "1 of 2 cases; the same command goes on" in capsys.readouterr().err

    with (tmp_path / "cache" / "cases.jsonl").open("a") as file:
        file.write('{"code": "a line that brok')
    monkeypatch.setattr(cases, "examine", lambda case, *others: examined.append(case.key) or examine(case, *others))
    assert run.run(TINY, place, tmp_path, 1) == 0
    whole = json.loads((tmp_path / run.RESULT).read_text())
    assert (whole["complete"], whole["recalled"], len(whole["cases"])) == (True, 1, 2)
    assert examined == [one["case"] for one in whole["cases"]]
    assert whole["cases"][0] == first["cases"][0]

    monkeypatch.setattr(cases, "examine", None)  # nothing is left to do
    assert run.run(TINY, place, tmp_path, 1) == 0
    assert json.loads((tmp_path / run.RESULT).read_text())["summary"] == whole["summary"]


def test_records_of_other_code_are_not_recalled(tmp_path: Path):
    run.Kept(tmp_path / "cases.jsonl", "old").add(made_record(0))
    assert run.Kept(tmp_path / "cases.jsonl", "new").records == {}
    assert list(run.Kept(tmp_path / "cases.jsonl", "old").records) == ["case 0"]


def test_the_page_shows_a_result(tmp_path: Path):
    swap = {"classifier": 0.1, "representation": 0.2, "order_matters": True}
    swap["cells"] = {"lt->lt": 0.5, "lt->true": 0.6, "true->true": 0.8}
    records = [made_record(0, swap=swap), made_record(1, verdicts=[verdict("classifier", -0.03)])]
    environment = {"versions": {"python": "3"}, "hardware": {"cpu": "c", "threads": 2}}
    document = {
        "complete": True, "created": "2026-01-01T00:00:00", "environment": environment, "size": "full", "recalled": 0,
        "seconds": {"this run": 600, "cases": 60}, "skipped": [{"source": "one", "reason": "no file"}],
        "summary": summary.summarise(records), "cases": records,
    }  # fmt: skip
    run.write(tmp_path / "verdicts.json", document)
    assert json.loads((tmp_path / "verdicts.json").read_text()) == json.loads(json.dumps(document))
    shown = summary.table(document)
    now, before = "1 of 2: 50.0 % [9, 91]", "0 of 2: 0.0 % [0, 66]"
    assert f"| verdicts against the true sign | {now} | {before} | none | **missed** |" in shown
    assert "- case 1: verdict classifier, ceiling 1, said [-4.0, -2.0], true -3.0" in shown
    assert "| made | 50.0 | 60.0 | 60.0 | 80.0 | 10.0 | 20.0 | yes | 0 | 0 | 0 |" in shown
    assert "Skipped: one: no file." in shown
    page = command.REPOSITORY / "docs" / command.PAGES["verdicts"]
    assert shown in record.render(page.read_text(encoding="utf-8"), {"verdicts": shown})


def test_what_cannot_be_had_is_named(tmp_path: Path):
    place = Place(tmp_path, tmp_path)
    chosen, skipped = run.choose(Options(size="full"), place)
    reasons = {entry["source"]: entry["reason"] for entry in skipped}
    assert reasons["cifar10-pixels128"] == "no cifar10.npz; give its folder by --data-root"
    assert reasons["stored backbones of CIFAR"] == "no --store"
    assert all(one.name.startswith("digits") for one in chosen)
    assert len([*cases.plan(chosen)]) >= 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_finds_the_same(tmp_path, monkeypatch):
    """As one process of one thread does; what a worker that ends had begun is done again."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    found, pool = {}, run._pool
    monkeypatch.setattr(run, "_pool", lambda processes, inline: pool(processes, inline=False))
    for name, on in (("here", None), ("ray", "ray")):
        assert run.run(TINY, Place(None, tmp_path / name), tmp_path / name, 1, on) == 0
        found[name] = json.loads((tmp_path / name / "verdicts.json").read_text())["cases"]
    assert [{**one, "seconds": 0} for one in found["ray"]] == [{**one, "seconds": 0} for one in found["here"]]

    def ends_once(path: Path) -> str:
        if not path.exists():
            path.touch()
            os._exit(1)
        return path.name

    with run._cluster("ray") as work:
        assert sorted(work(ends_once, [tmp_path / "a", tmp_path / "b"])) == ["a", "b"]


def test_it_runs_by_itself(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--only", "verdicts,train"]) == 2
    assert "by itself verdicts or" in capsys.readouterr().err
