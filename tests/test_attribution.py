"""Attribution of the gap: the paper's rows, written-out formulas, invariants, edge cases."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tailscope.groups import assign_groups
from tailscope.intervals import CELLS, attribute, mean_recalls, summarize

MATCHED = ("matched->lt", "matched->true", "lt->matched", "true->matched")


def random_cells(seed, seeds=3, items=60, classes=6, names=CELLS):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, items)
    cells = {name: rng.random((seeds, items)) < 0.3 + 0.15 * k for k, name in enumerate(names)}
    groups, _ = assign_groups([500 // 3**k + 1 for k in range(classes)])
    return cells, labels, groups


def with_accuracies(accuracies, items):
    """One seed of outcomes that have exactly these accuracies."""
    return {name: (np.arange(items) < round(a * items))[None] for name, a in zip(CELLS, accuracies, strict=True)}


@pytest.mark.parametrize(
    ("row", "representation", "gap"),
    [
        ((0.7212, 0.8261, 0.9106, 0.9302), 0.14675, 0.2090),
        ((0.4090, 0.5157, 0.6620, 0.7109), 0.22410, 0.3019),
        ((0.3531, 0.4586, 0.5383, 0.6393), 0.18295, 0.2862),
    ],
)
def test_the_papers_rows(row, representation, gap):
    got = attribute(with_accuracies(row, 10_000), np.arange(10_000) % 10, assign_groups([10 - k for k in range(10)])[0])
    assert got["gap"] == pytest.approx(gap)
    assert got["representation"]["points"] == pytest.approx(representation)
    assert got["classifier"]["points"] == pytest.approx(gap - representation)
    assert got["representation"]["share"] == pytest.approx(representation / gap)
    assert got["interaction"] == pytest.approx(row[3] - row[2] - row[1] + row[0])
    assert got["ci95_kind"] == "item"
    assert "one seed: this pair of trainings only" in got["notes"]


def test_cell_against_loops():
    cells, labels, groups = random_cells(0)
    correct = cells["lt->lt"]
    got = summarize(correct, labels, groups)
    recall = [np.mean([correct[s, i] for s in range(3) for i in range(60) if labels[i] == k]) for k in range(6)]
    assert got["accuracy"] == pytest.approx([np.mean(row) for row in correct])
    assert got["mean"] == pytest.approx(np.mean(correct))
    assert got["per_class"] == pytest.approx(recall)
    for name in ("head", "body", "tail"):
        assert got["groups"][name] == pytest.approx(np.mean([recall[k] for k in range(6) if groups[k] == name]))
    assert got["ci95_kind"] == "mover"
    assert got["ci95"][0] <= got["ci95_seeds"][0] <= got["mean"] <= got["ci95_seeds"][1] <= got["ci95"][1]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_parts_groups_and_classes_sum_to_the_gap(seed, seeds, classes):
    cells, labels, groups = random_cells(seed, seeds=seeds, classes=classes)
    got = attribute(cells, labels, groups)
    assert got["representation"]["points"] + got["classifier"]["points"] == pytest.approx(got["gap"], abs=1e-12)
    accuracy = {name: summarize(c, labels, groups)["mean"] for name, c in cells.items()}
    assert got["gap"] == pytest.approx(accuracy["true->true"] - accuracy["lt->lt"], abs=1e-12)
    for part in ("representation", "classifier"):
        total = got[part]["points"]
        per_class = zip(got["per_class"]["test_share"], got["per_class"][part], strict=True)
        assert sum(share * points for share, points in per_class if points is not None) == pytest.approx(total)
        found = [g for g in got["groups"].values() if g is not None]
        if classes >= 3:
            assert sum(g["test_share"] * g[part]["points"] for g in found) == pytest.approx(total)
    json.dumps(got, allow_nan=False)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_order_of_items_and_names_of_classes_do_not_matter(seed):
    cells, labels, groups = random_cells(seed)
    before = attribute(cells, labels, groups)
    rng = np.random.default_rng(seed)
    order, rename = rng.permutation(len(labels)), rng.permutation(len(groups))
    renamed_groups = [None] * len(groups)
    for old, new in enumerate(rename):
        renamed_groups[new] = groups[old]
    after = attribute({name: c[:, order] for name, c in cells.items()}, rename[labels[order]], renamed_groups)
    for key in ("gap", "gap_ci95", "gap_ci95_seeds", "interaction", "interaction_ci95"):
        assert after[key] == pytest.approx(before[key])
    for part in ("representation", "classifier"):
        assert [after["per_class"][part][k] for k in rename] == pytest.approx(before["per_class"][part], nan_ok=True)
        for name in ("head", "body", "tail"):
            assert after["groups"][name][part]["points"] == pytest.approx(before["groups"][name][part]["points"])


def test_shares_of_both_parts_mirror_each_other():
    cells, labels, groups = random_cells(1, seeds=4, items=3000)
    got = attribute(cells, labels, groups)
    low, high = got["representation"]["share_ci95"]
    assert low < got["representation"]["share"] < high
    assert got["classifier"]["share_ci95"] == pytest.approx([1 - high, 1 - low])
    assert got["classifier"]["share"] == pytest.approx(1 - got["representation"]["share"])


def test_two_seeds_give_points_only():
    got = attribute(*random_cells(2, seeds=2, items=3000))
    assert got["gap"] > 0.3
    for found in (got["gap_ci95"], got["gap_ci95_seeds"], got["representation"]["share"], got["interaction_ci95"]):
        assert found is None
    assert got["notes"][0].startswith("two seeds")


def test_small_and_absent_gaps_have_no_shares():
    cells, labels, groups = random_cells(3, items=40)
    cells["true->true"] = cells["lt->lt"].copy()
    none = attribute(cells, labels, groups)
    assert none["gap"] == 0.0
    assert none["representation"]["share"] is None
    assert "no long-tail gap" in none["notes"]
    cells["true->true"][:, int(np.flatnonzero(~cells["lt->lt"][0])[0])] = True
    small = attribute(cells, labels, groups)
    assert small["gap"] > 0
    assert small["classifier"]["share_ci95"] is None
    assert "gap too small to divide" in small["notes"]
    reverse = attribute({**cells, "lt->lt": cells["true->true"] | True}, labels, groups)
    assert reverse["gap"] < 0
    assert reverse["representation"]["share"] is None


def test_order_matters_where_the_interaction_exceeds_the_difference():
    labels, groups = np.arange(1000) % 3, assign_groups([3, 2, 1])[0]
    close = attribute(with_accuracies((0.5, 0.6, 0.65, 0.9), 1000), labels, groups)
    clear = attribute(with_accuracies((0.5, 0.55, 0.85, 0.9), 1000), labels, groups)
    assert close["order_matters"]
    assert not clear["order_matters"]


def test_missing_classes_and_two_classes():
    cells, labels, _ = random_cells(4, classes=2)
    two = attribute(cells, labels, [None, None])
    assert two["groups"] == {"head": None, "body": None, "tail": None}
    labels[labels == 1] = 2
    cell = summarize(cells["lt->lt"], labels, ["head", "body", "tail"])
    assert cell["per_class"][1] is None
    assert cell["groups"]["body"] is None
    three = attribute(cells, labels, ["head", "body", "tail"])
    assert three["groups"]["body"] is None
    assert three["per_class"]["representation"][1] is None
    assert three["per_class"]["test_share"][1] == 0


def test_matched_cells_split_each_part_exactly():
    cells, labels, groups = random_cells(5, names=CELLS + MATCHED)
    got = attribute(cells, labels, groups)
    for part in ("representation", "classifier"):
        steps = got["matched"][part]
        assert steps["imbalance"]["points"] + steps["sample_count"]["points"] == pytest.approx(got[part]["points"])
    a = {name: c.mean() for name, c in cells.items()}
    balance_gain = (a["matched->lt"] - a["lt->lt"] + a["matched->true"] - a["lt->true"]) / 2
    assert got["matched"]["representation"]["imbalance"]["points"] == pytest.approx(balance_gain)
    del cells["lt->matched"]
    assert set(attribute(cells, labels, groups)["matched"]) == {"representation"}
    assert attribute({name: cells[name] for name in CELLS}, labels, groups)["matched"] is None


def test_wrong_input_is_refused():
    cells, labels, groups = random_cells(6)
    with pytest.raises(ValueError, match="true->true"):
        attribute({name: cells[name] for name in CELLS[:3]}, labels, groups)
    with pytest.raises(ValueError, match="differ"):
        attribute({**cells, "lt->lt": cells["lt->lt"][:2]}, labels, groups)
    with pytest.raises(ValueError, match="labels"):
        summarize(cells["lt->lt"], labels[:-1], groups)
    with pytest.raises(ValueError, match="bool"):
        summarize(cells["lt->lt"].astype(float), labels, groups)


def test_means_of_recalls_against_scipy():
    recalls = np.random.default_rng(0).uniform(0.01, 1, size=200).tolist()
    found = mean_recalls([*recalls, None])
    assert found == pytest.approx({"g_mean": stats.gmean(recalls), "h_mean": stats.hmean(recalls)})
    assert found["h_mean"] < found["g_mean"] < np.mean(recalls)
    assert mean_recalls([*recalls, 0.0]) == {"g_mean": 0.0, "h_mean": 0.0}
    assert mean_recalls([0.3] * 5) == pytest.approx({"g_mean": 0.3, "h_mean": 0.3})
