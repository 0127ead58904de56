"""What must not change a result, and what inputs at the edge must give."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailscope.errors import UserError
from tailscope.measures import FIELDS, describe
from tailscope.measures.angles import angle_between, angles_to, nearest_center
from tailscope.measures.rows import group_rows, unseen_copies

ABSOLUTE = ("variance", "variance_unseen", "covariance_norm", "covariance_norm_unbiased")


def made_up(seed, classes=4, d=6, most=12, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, d)) + 1
    sets = []
    for counts in (rng.integers(1, most, classes), rng.integers(0, most, classes)):
        labels = np.repeat(np.arange(classes), counts)
        rows = centers[labels] + 0.5 * rng.normal(size=(len(labels), d))
        sets += [torch.from_numpy(rows).to(dtype), torch.from_numpy(labels)]
    return sets


def names(classes):
    return [f"class {k}" for k in range(classes)]


def assert_close(first, second, relative=1e-6, skip=()):
    for a, b in zip(first, second, strict=True):
        for field in FIELDS:
            if field in skip or field in ("index", "group"):
                continue
            if isinstance(a[field], float | list):
                assert a[field] == pytest.approx(b[field], rel=relative, abs=1e-5), field
            else:
                assert a[field] == b[field], field


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(4)))
def test_permuting_classes_permutes_results(seed, order):
    sets = made_up(seed)
    new = torch.tensor(order).argsort()  # class order[i] becomes class i
    moved = [sets[0], new[sets[1]], sets[2], new[sets[3]]]
    result = describe(*sets, names(4), permutations=29)
    json.dumps(result.to_json(), allow_nan=False)
    before = result.classes
    after = describe(*moved, [names(4)[k] for k in order], permutations=29).classes
    chance = ("nearest_center_train_null_deg", "nearest_center_train_excess_deg")  # one stream for all classes
    classes = ("nearest_center_train_class", "nearest_center_true_class")
    assert_close([before[k] for k in order], after, skip=chance + classes)
    for field in classes:
        assert [order[e[field]] for e in after] == [before[k][field] for k in order]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_rotating_features_changes_nothing(seed):
    sets = made_up(seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.manual_seed(seed), dtype=torch.float64))[0]
    turned = [sets[0] @ rotation, sets[1], sets[2] @ rotation, sets[3]]
    before, after = (describe(*x, names(4), permutations=29) for x in (sets, turned))
    assert_close(before.classes, after.classes)
    assert before.warnings == after.warnings


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_scaling_features_changes_no_angle(seed, factor):
    sets = made_up(seed)
    scaled = [sets[0] * factor, sets[1], sets[2] * factor, sets[3]]
    before, after = (describe(*x, names(4), permutations=29).classes for x in (sets, scaled))
    assert_close(before, after, skip=ABSOLUTE)
    for a, b in zip(before, after, strict=True):
        if a["variance"]:
            assert b["variance"] == pytest.approx(a["variance"] * factor**2)
            assert b["covariance_norm"] == pytest.approx(a["covariance_norm"] * factor**2)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_appending_unused_features_changes_nothing(seed):
    sets = made_up(seed)
    wider = [torch.nn.functional.pad(x, (0, 5)) if x.ndim == 2 else x for x in sets]
    before, after = (describe(*x, names(4), permutations=29) for x in (sets, wider))
    assert_close(before.classes, after.classes)
    assert [note for note in after.warnings if note not in before.warnings] == [
        "5 of 11 features are 0 in every row: read effective_rank, not the dimension"
    ]


def test_same_seed_same_digits_and_another_seed_other_draws():
    sets = made_up(1, most=30)
    first, second, other = (describe(*sets, names(4), permutations=49, seed=s) for s in (0, 0, 1))
    assert first == second
    assert first.classes[0]["center_shift_null_deg"] != other.classes[0]["center_shift_null_deg"]
    assert first.classes[0]["center_shift_deg"] == other.classes[0]["center_shift_deg"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_inputs_are_measured_in_float32(dtype):
    sets = made_up(2, dtype=dtype)
    as_float32 = [x.float() if x.is_floating_point() else x for x in sets]
    assert_close(
        describe(*sets, names(4), permutations=9).classes, describe(*as_float32, names(4), permutations=9).classes
    )


def test_threads_change_no_digit():
    sets = made_up(2, most=60)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(describe(*sets, names(4), permutations=49))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert_close(results[0].classes, results[1].classes, relative=1e-9)
    assert results[0].warnings == results[1].warnings


def test_inputs_are_left_as_they_were():
    sets = made_up(3)
    before = [x.clone() for x in sets]
    sets[0].requires_grad_()
    describe(*sets, names(4), permutations=9)
    assert sets[0].grad is None
    assert all(torch.equal(a, b) for a, b in zip(sets, before, strict=True))


def test_one_training_sample_has_no_spread_and_no_verdict():
    rows = torch.randn(30, 4, generator=torch.manual_seed(0), dtype=torch.float64) + 1
    labels = torch.tensor([0] * 9 + [1])
    result = describe(rows[:10], labels, rows[10:], torch.arange(20) % 2, ["a", "b"])
    lone = result.classes[1]
    undefined = (
        "spread_train_deg", "angular_width_deg", "escape_rate", "spread_gap_deg", "escape_conformal", "escape_rank",
        "displacement", "variance_ratio", "angles_train_quantiles_deg", "spread_gap_p", "spread_gap_q",
        "center_shift_p", "center_shift_q", "group",
    )  # fmt: skip
    assert [field for field in undefined if lone[field] is not None] == []
    assert lone["center_shift_deg"] > 0
    assert lone["nearest_center_train_deg"] > 0
    everything = torch.cat([rows[9:10], rows[10:][1::2]])  # every sample may have been the one: chance is exact
    assert lone["center_shift_null_deg"] == pytest.approx(angles_to(everything, everything.mean(0)).mean().item())
    assert any("1 training sample" in note and note.endswith("b") for note in result.warnings)
    assert result.groups == {"head": None, "body": None, "tail": None}


def test_without_unseen_samples_nothing_is_made_up():
    sets = made_up(4)
    kept = sets[3] != 2
    result = describe(sets[0], sets[1], sets[2][kept], sets[3][kept], names(4))
    entry = result.classes[2]
    needs_unseen = [f for f in FIELDS if f.startswith(("center_shift", "spread_gap", "escape"))]
    assert [f for f in needs_unseen if entry[f] is not None] == []
    assert entry["spread_true_deg"] == pytest.approx(entry["spread_train_deg"])
    assert any("no unseen samples" in note and "class 2" in note for note in result.warnings)
    empty = describe(sets[0], sets[1], sets[2][:0], sets[3][:0], names(4))
    assert [e["center_shift_deg"] for e in empty.classes] == [None] * 4
    assert [e["unseen_count"] for e in empty.classes] == [0] * 4


def test_zero_vectors_are_left_out_and_counted():
    sets = made_up(5)
    zero = torch.zeros(3, 6, dtype=torch.float64)
    more = [torch.cat([sets[0], zero]), torch.cat([sets[1], torch.tensor([0, 0, 1])]), sets[2], sets[3]]
    before, after = (describe(*x, names(4), permutations=29) for x in (sets, more))
    assert_close(before.classes, after.classes)
    notes = [note for note in after.warnings if note not in before.warnings]
    assert notes[0].startswith(
        "3 feature vectors of length 0 have no direction and were left out (3 training, 0 unseen)"
    )
    assert notes[1].endswith("class 0, class 1")


def test_a_class_of_zero_vectors_only_is_undefined():
    sets = made_up(6)
    sets[0][sets[1] == 1] = 0
    sets[2][sets[3] == 1] = 0
    result = describe(*sets, names(4), permutations=29)
    given_anyway = ("index", "name", "group", "train_count", "unseen_count")
    assert [f for f, v in result.classes[1].items() if v is not None and f not in given_anyway] == []
    assert result.classes[0]["nearest_center_true_class"] != 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_rows_collapse_without_noise(dtype):
    row = torch.tensor([[0.1, 0.7, 0.3]], dtype=dtype)
    other = torch.randn(40, 3, generator=torch.manual_seed(0)).to(dtype) + 2
    train, unseen = torch.cat([row.repeat(7, 1), other[:20]]), torch.cat([row.repeat(31, 1), other[20:]])
    labels, unseen_labels = torch.arange(27).ge(7).long(), torch.arange(51).ge(31).long()
    result = describe(train, labels, unseen, unseen_labels, ["same", "other"], permutations=99)
    same = result.classes[0]
    for field in (
        "variance",
        "spread_train_deg",
        "angular_width_deg",
        "spread_true_deg",
        "escape_rate",
        "escape_conformal",
    ):
        assert same[field] == 0, field
    assert same["spread_gap_deg"] == pytest.approx(0, abs=1e-5)
    assert same["escape_rank"] == 0.5
    assert same["spread_gap_p"] == 1
    assert same["first_pc_share"] is None
    assert same["variance_ratio"] is None
    assert any(note.startswith("collapsed") and note.endswith("same") for note in result.warnings)


def test_copies_are_found_and_repeats_counted():
    sets = made_up(7, classes=2, most=40)
    first, second = (torch.where(sets[1] == k)[0] for k in (0, 1))
    train, train_labels = torch.cat([sets[0], sets[0][first[:2]]]), torch.cat([sets[1], sets[1][first[:2]]])
    unseen, unseen_labels = torch.cat([sets[0][second[:3]], sets[2]]), torch.cat([sets[1][second[:3]], sets[3]])
    notes = describe(train, train_labels, unseen, unseen_labels, ["a", "b"], permutations=0).warnings
    assert any(note.startswith("3 unseen vectors copy") and note.endswith(": b") for note in notes)
    assert any(note.startswith("2 vectors repeat") and note.endswith(": a") for note in notes)
    sides = (
        group_rows(train, train_labels, ["a", "b"], "train"),
        group_rows(unseen, unseen_labels, ["a", "b"], "unseen"),
    )
    assert unseen_copies(*sides).tolist() == [True] * 3 + [False] * len(sets[2])


def test_label_noise_among_the_unseen_is_pointed_out():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(300, 8)) + 3)
    rows[290:] *= -1
    labels = torch.arange(150) % 2
    result = describe(rows[:150], labels, rows[150:], labels, ["a", "b"], permutations=199)
    flagged = [e["name"] for e in result.classes if e["spread_gap_flagged"]]
    assert flagged
    assert any("label noise" in note and note.endswith(", ".join(flagged)) for note in result.warnings)


def test_large_classes_of_other_lengths_and_small_gaps_are_pointed_out():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(4400, 8)) + 3)
    rows[:2000] = 3 + 0.97 * (rows[:2000] - 3)
    labels = torch.arange(4400) // 20 % 2
    result = describe(rows[:4000], labels[:4000], rows[4000:], labels[4000:], ["a", "b"], permutations=99)
    assert any(note.startswith("training samples are over 80 %") for note in result.warnings)


def test_bursts_are_permuted_whole_and_straddling_ones_reported():
    sets = made_up(8, most=20)
    bursts = [torch.arange(len(sets[1])) // 2, 5 + torch.arange(len(sets[3])) // 2]
    plain = describe(*sets, names(4), permutations=49)
    result = describe(*sets, names(4), permutations=49, train_bursts=bursts[0], unseen_bursts=bursts[1])
    assert any("bursts have rows both in train and in unseen" in note for note in result.warnings)
    assert result.classes[0]["spread_gap_deg"] == plain.classes[0]["spread_gap_deg"]
    assert result.classes[0]["center_shift_null_deg"] != plain.classes[0]["center_shift_null_deg"]
    with pytest.raises(UserError, match="train_bursts and unseen_bursts"):
        describe(*sets, names(4), train_bursts=bursts[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: lambda x: x.index_fill(0, torch.tensor([3]), torch.nan)},
            "train features: 1 rows are NaN or infinite, the first is row 3",
        ),
        (
            {2: lambda x: x.index_fill(0, torch.tensor([1]), torch.inf)},
            "unseen features: 1 rows are NaN or infinite, the first is row 1",
        ),
        ({0: lambda x: x.float() * 1e30}, "e-31 times as long as that of the train features"),
        ({0: lambda x: x.long()}, "train features: expected floating-point"),
        ({0: lambda x: x[:, 0]}, "train features: expected floating-point"),
        ({2: lambda x: x[:, :3]}, "unseen features have 3 columns, train features have 6"),
        ({1: lambda x: x.double()}, "train labels: expected integers"),
        ({1: lambda x: x[1:]}, "feature rows but"),
        ({3: lambda x: x + 1}, "unseen labels: found"),
        ({1: lambda x: x - 1}, "train labels: found -1"),
        ({1: lambda x: x.clamp(max=2)}, "train labels: no samples of class 'class 3'"),
    ],
)
def test_user_mistakes_are_named_in_one_line(change, message):
    sets = made_up(9)
    for position, edit in change.items():
        sets[position] = edit(sets[position])
    with pytest.raises(UserError) as error:
        describe(*sets, names(4))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"permutations": -1}, "permutations"),
        ({"alpha": 0.0}, "alpha"),
        ({"train_counts": [1, 2]}, "train_counts: 2 counts for 4 classes"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        describe(*made_up(9), names(4), **options)


def test_groups_follow_the_given_counts_and_progress_is_told():
    seen = []
    result = describe(
        *made_up(0), names(4), train_counts=[500, 50, 5, 3], permutations=0, progress=lambda *x: seen.append(x)
    )
    assert [e["group"] for e in result.classes] == ["head", "body", "tail", "tail"]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert set(result.classes[0]) == set(FIELDS)
    assert set(result.to_json()) == {"classes", "groups", "groups_rule", "warnings"}


def test_angles_are_exact_where_the_arc_cosine_is_not():
    tiny = torch.tensor([1e-4])
    center = torch.tensor([1.0, 0.0])
    rows = torch.stack([torch.cos(tiny), torch.sin(tiny)], dim=1)
    assert angles_to(rows, center).item() == pytest.approx(np.degrees(1e-4), rel=1e-4)
    assert angle_between(rows[0], center).item() == pytest.approx(np.degrees(1e-4), rel=1e-4)
    assert angle_between(torch.zeros(2), center).isnan()
    assert angles_to(rows, torch.zeros(2)).isnan().all()
    angles, classes = nearest_center(torch.tensor([[1.0, 0.0], [0.0, 0.0], [torch.nan, 0.0]]))
    assert angles.isnan().all()
    assert classes.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("power", [-110, -40, -15, 15, 40, 120])
def test_every_scale_is_measured_the_same(power):
    sets = made_up(3, most=30, dtype=torch.float32)
    scaled = [x * 2.0**power if x.is_floating_point() else x for x in sets]
    before, after = (describe(*x, names(4), permutations=29) for x in (sets, scaled))
    for a, b in zip([*before.classes, *before.groups.values()], [*after.classes, *after.groups.values()], strict=True):
        squared = {field: b[field] / 4.0**power for field in ABSOLUTE if b[field] is not None}
        assert b | squared == a
    assert before.warnings == after.warnings


def test_squares_beyond_the_range_of_numbers_are_undefined_and_said():
    sets = [x * 1e200 if x.is_floating_point() else x for x in made_up(3, most=30)]
    found = describe(*sets, names(4), permutations=29)
    json.dumps(found.to_json(), allow_nan=False)
    assert all(entry["variance"] is None and entry["spread_train_deg"] > 0 for entry in found.classes)
    assert any(note.startswith("variance lies outside the range of numbers") for note in found.warnings)


def test_a_row_far_too_long_is_left_out_and_counted():
    sets = made_up(3, most=30)
    longer = [torch.cat([sets[0], 1e5 * sets[0][:1]]), torch.cat([sets[1], sets[1][:1]]), *sets[2:]]
    before, after = (describe(*x, names(4), permutations=29) for x in (sets, longer))
    assert_close(before.classes, after.classes)
    added = [note for note in after.warnings if note not in before.warnings]
    assert added[0].startswith("1 feature vectors are over 100 times as long as the median one and were left out (1 tr")


def test_close_rows_are_no_copies_at_any_scale():
    sets = made_up(3, most=30)
    for scale in (1e-30, 1.0, 1e18):
        near = sets[0] * scale
        close = torch.cat([near[:5] * (1 + 1e-12), near[5:7]]).float()
        sides = [group_rows(x, y, names(4), "") for x, y in ((near.float(), sets[1]), (close, sets[1][:7]))]
        equal = (close[:, None] == near.float()[None]).all(dim=2).any(dim=1)
        assert torch.equal(unseen_copies(*sides), equal)
        moved = torch.cat([near[:5] * (1 + 1e-6), near[5:7]]).float()
        assert (
            unseen_copies(sides[0], group_rows(moved, sets[1][:7], names(4), "")).tolist() == [False] * 5 + [True] * 2
        )
