"""Profiles against written-out counts, naive formulas and properties."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailscope.data.subsets import canonical, resolve
from tailscope.errors import UserError

available = st.lists(st.integers(1, 2000), min_size=2, max_size=60)
share = st.floats(0, 1)


def test_published_cifar_counts() -> None:
    ten = resolve("exp:100", [5000] * 10)
    assert ten == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert sum(ten) == 12_406
    hundred = resolve("exp:100", [500] * 100)
    assert (sum(hundred), hundred[0], hundred[-1]) == (10_847, 500, 5)


@pytest.mark.parametrize("factor", [10, 20, 50, 100, 200])
@pytest.mark.parametrize(("classes", "n_max"), [(10, 5000), (100, 500)])
def test_exp_is_the_formula_that_published_subsets_used(factor: int, classes: int, n_max: int) -> None:
    published = [int(n_max * ((1 / factor) ** (k / (classes - 1.0)))) for k in range(classes)]
    assert resolve(f"exp:{factor}", [n_max] * classes) == published


@given(available, share, st.sampled_from(["exp", "step"]))
def test_imbalanced_counts_fall_and_keep_every_class(have: list[int], at: float, kind: str) -> None:
    n_max = min(have)
    counts = resolve(f"{kind}:{1 + at * (n_max - 1)!r}", have)
    assert len(counts) == len(have)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == n_max
    assert counts[-1] >= 1
    assert all(0 < n <= m for n, m in zip(counts, have, strict=True))


@given(available)
def test_the_largest_factor_leaves_one_image(have: list[int]) -> None:
    """IF = n_max must not fall to 0 by rounding (49 * (1 / 49) < 1)."""
    assert resolve(f"exp:{min(have)}", have)[-1] == 1
    assert resolve(f"step:{min(have)}", have)[-1] == 1


@given(available, st.data())
def test_step_against_exact_arithmetic_odd_numbers_of_classes_too(have: list[int], data: st.DataObject) -> None:
    factor, n_max = data.draw(st.integers(1, min(have))), min(have)
    few = Fraction(n_max, factor).__floor__()
    assert resolve(f"step:{factor}", have) == [n_max] * (len(have) // 2) + [few] * (len(have) - len(have) // 2)


@given(available)
def test_balanced_and_full(have: list[int]) -> None:
    assert resolve("balanced", have) == [min(have)] * len(have)
    assert resolve("balanced:1", have) == [1] * len(have)
    assert resolve("full", have) == have
    assert resolve("exp:1", have) == resolve("step:1", have) == resolve("balanced", have)


def test_counts_from_text_and_files(tmp_path: Path) -> None:
    listed, stored = tmp_path / "list.json", tmp_path / "subset.json"
    listed.write_text("[5, 3.0, 1]")
    stored.write_text(json.dumps({"schema": "tailscope.subset/1", "counts": [5, 3, 1]}))
    for profile in ("counts:5,3,1", str(listed), f"counts:{stored}"):
        assert resolve(profile, [5, 5, 5]) == [5, 3, 1]
        assert canonical(profile) == "counts:5,3,1"


@pytest.mark.parametrize(
    ("profile", "spelled"),
    [("exp:100.0", "exp:100"), ("exp: 1e2 ", "exp:100"), ("step:2.5", "step:2.5"), ("balanced:07", "balanced:7")],
)
def test_canonical_is_one_spelling_and_stable(profile: str, spelled: str) -> None:
    assert canonical(profile) == spelled == canonical(spelled)


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("exp:0.5", "at least 1"),
        ("step:-3", "at least 1"),
        ("exp:nan", "expected a number"),
        ("exp:inf", "expected a number"),
        ("exp", "expected a number"),
        ("exp:", "expected a number"),
        ("exp:x", "expected a number"),
        ("exp:51", "largest imbalance factor possible is 50"),
        ("step:50.5", "largest imbalance factor possible is 50"),
        ("pareto:6", "unknown profile 'pareto:6'; known: exp:IF"),
        ("full:3", "unknown profile"),
        ("", "unknown profile"),
        ("balanced:0", "at least 1"),
        ("balanced:51", "asks for 51 images of class 2, which has 50"),
        ("balanced:2.5", "whole numbers"),
        ("counts:5,3", "2 counts for 3 classes"),
        ("counts:5,3,0", "count 2 is 0"),
        ("counts:5,,1", "expected a number"),
        ("counts:5,3,51", "class 2, which has 50"),
        ("none.json", "no such counts file"),
    ],
)
def test_bad_profiles_are_one_line(profile: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(profile, [60, 60, 50])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", "3", '["a", 2]', "[true, 1]", "[NaN, 1]", "[Infinity, 1]", "[1.5, 2]"]
)
def test_bad_counts_files_name_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"counts\.json"):
        resolve(str(path), [9, 9])


def test_profiles_need_classes_with_images() -> None:
    with pytest.raises(UserError, match="at least two classes"):
        resolve("exp:2", [10])
    for have in ([], [3, 0]):
        with pytest.raises(UserError, match="at least one available image"):
            resolve("full", have)
