"""Groups of classes (head, body, tail): mean measurements, and tests that need no class to be large enough alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tailscope.geometry.calibration import GAP, SHIFT, Draws, GroupTest, false_discovery
from tailscope.geometry.fields import FIELDS, Entry
from tailscope.groups import GROUPS

_SUMMED = ("train_count", "unseen_count")
_TESTED = tuple(f"{test}_{part}" for test in ("spread_gap", "center_shift") for part in ("p", "q", "flagged"))
_NOT_POOLED = (
    *_TESTED,
    "index",
    "name",
    "nearest_center_train_class",
    "nearest_center_true_class",
    "spread_gap_material",
    *(f"{test}_{part}" for test in ("spread_gap", "center_shift") for part in ("permutations", "unit_p")),
)


class GroupTests:
    """The permutation tests of all groups, to which classes are added one by one."""

    def __init__(self, draws: int) -> None:
        self._gap = {group: GroupTest(draws) for group in GROUPS}
        self._shift = {group: GroupTest(draws) for group in GROUPS}

    def add(self, group: str | None, draws: Draws, rng: np.random.Generator) -> None:
        """Add one class's statistics to its group, however few samples it has."""
        if group is not None:
            self._gap[group].add(draws, GAP, rng)
            self._shift[group].add(draws, SHIFT, rng)

    def gap(self, group: str) -> float | None:
        """Return the one-sided p-value that the group's spread gaps are larger than by chance."""
        return self._gap[group].p(two_sided=False)

    def shift(self, group: str) -> float | None:
        """Return the two-sided p-value that the group's centres are shifted as by chance."""
        return self._shift[group].p(two_sided=True)


def pool_groups(entries: Sequence[Entry], tests: GroupTests | None, alpha: float) -> dict[str, Entry | None]:
    """Return one pooled entry for head, body and tail; None for each where there are no groups.

    Counts are summed; every other number is the mean over the classes where it is defined, each class counting once;
    lists are averaged place by place. p-values are those of the group tests, q-values over the groups.
    """
    pooled = {group: [e for e in entries if e["group"] == group] for group in GROUPS}
    result: dict[str, Entry | None] = {
        group: _pool(group, members) if members else None for group, members in pooled.items()
    }
    found = [group for group in GROUPS if result[group] is not None]
    if tests is None:
        return result
    for field, p in (("spread_gap", tests.gap), ("center_shift", tests.shift)):
        values = [p(group) for group in found]
        for group, value, q in zip(found, values, false_discovery(values), strict=True):
            entry = result[group]
            if entry is not None:
                entry[f"{field}_p"], entry[f"{field}_q"] = value, q
                entry[f"{field}_flagged"] = None if q is None else q <= alpha
    return result


def _pool(group: str, members: Sequence[Entry]) -> Entry:
    entry: Entry = {"group": group, "classes": len(members)}
    for field in FIELDS:
        if field in _SUMMED:
            entry[field] = sum(member[field] for member in members)
        elif field not in _NOT_POOLED and field != "group":
            entry[field] = _mean([member[field] for member in members if member[field] is not None])
    entry.update(dict.fromkeys(_TESTED))
    return entry


def _mean(values: Sequence[Any]) -> Any:
    if not values:
        return None
    if isinstance(values[0], list):
        return [sum(place) / len(values) for place in zip(*values, strict=True)]
    return sum(values) / len(values)
