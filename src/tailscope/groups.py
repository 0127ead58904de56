"""Head, body and tail: groups of classes derived from their training counts."""

from collections.abc import Sequence

import numpy as np

GROUPS = ("head", "body", "tail")


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
    by_count = ["head" if n > 100 else "body" if n >= 20 else "tail" for n in counts]
    if set(by_count) == set(GROUPS):
        return list(by_count), "counts"
    if len(counts) < 3:
        return [None] * len(counts), "thirds"
    thirds = np.array_split(sorted(range(len(counts)), key=lambda k: (-counts[k], k)), 3)
    found = {int(k): name for name, third in zip(GROUPS, thirds, strict=True) for k in third}
    return [found[k] for k in range(len(counts))], "thirds"
