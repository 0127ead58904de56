"""Groups of classes derived from their training counts: head, body and tail; many, medium and few shots."""

from collections.abc import Sequence

import numpy as np

GROUPS = ("head", "body", "tail")
SHOTS = ("many", "medium", "few")


def assign_groups(counts: Sequence[int]) -> tuple[list[str | None], str]:
    """Return each class's group and the rule that gave it.

    Head has more than 100 training images, body 20 to 100, tail fewer than 20 (rule `"counts"`). Where one of them
    would be empty, classes are cut into thirds by descending count, ties by index, 10 -> 4/3/3 (rule `"thirds"`).
    Fewer than three classes have no groups: every entry is None.

    >>> assign_groups([500, 50, 5])
    (['head', 'body', 'tail'], 'counts')
    >>> assign_groups([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])[0].count("head")
    4
    """
    by_count = [GROUPS[SHOTS.index(shot)] for shot in shots(counts)]
    if set(by_count) == set(GROUPS):
        return list(by_count), "counts"
    if len(counts) < 3:
        return [None] * len(counts), "thirds"
    thirds = np.array_split(sorted(range(len(counts)), key=lambda k: (-counts[k], k)), 3)
    found = {int(k): name for name, third in zip(GROUPS, thirds, strict=True) for k in third}
    return [found[k] for k in range(len(counts))], "thirds"


def shots(counts: Sequence[int]) -> list[str]:
    """Return "many" for classes with more than 100 training images, "medium" for 20 to 100, else "few".

    These are the thresholds of Liu et al. (2019, section 4), whether or not any class is in each group; `assign_groups`
    cuts into thirds where one would be empty.

    >>> shots([101, 100, 20, 19])
    ['many', 'medium', 'medium', 'few']
    """
    return ["many" if n > 100 else "medium" if n >= 20 else "few" for n in counts]
