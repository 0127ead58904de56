"""How much is too much: the memory there is, what exact methods cost, and from where on a diagnosis approximates.

Costs are counted in multiply-adds of matrix products. What else is done to one logit (its exponential, a maximum, a
comparison) takes about as long as `ELEMENT` of them, so that few features hardly make it cheaper. Two cores of a laptop
do about 3e10 a second. What is small is computed exactly; a result that is not says so.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from tailscope.errors import UserError

ELEMENT = 100
# One evaluation of a search over all rows: a learning curve takes about 300 of them, one classifier about 40.
MOST_CURVE, MOST_SEARCH = 3e10, 3e11
# Once over held-out samples for each of about 20 classifiers that are only scored.
MOST_SCORING = 1e12
MOST_NEAREST = 1e11  # both the largest logit and the nearest mean of rows, in float64
MOST_PAIRS = 2e7  # of classes: what holds a number for each takes 160 MB in float64
MOST_DRAWN = 5e9  # permutations times samples, of all classes that more permutations than the first might yet flag
MOST_CHOSEN_ON = 30_000  # samples that tell which remedy is best, where they are more: standard error 0.3 points


def of_logits(rows: int, features: int, classes: int) -> float:
    """Return the cost of all classes' logits for some rows.

    >>> of_logits(1_000, 28, 10)
    1280000.0
    """
    return float(rows) * classes * (features + ELEMENT)


def is_long_curve(rows: int, features: int, classes: int) -> bool:
    """Return whether the searches of a learning curve take too long.

    >>> is_long_curve(50_000, 512, 100), is_long_curve(40_000, 64, 10_000)
    (False, True)
    """
    return of_logits(rows, features, classes) > MOST_CURVE


def is_long_search(rows: int, features: int, classes: int) -> bool:
    """Return whether a search for one classifier over all rows takes too long.

    >>> is_long_search(50_000, 512, 100), is_long_search(500_000, 64, 10_000)
    (False, True)
    """
    return of_logits(rows, features, classes) > MOST_SEARCH


def are_many_pairs(classes: int) -> bool:
    """Return whether pairs of classes are too many to hold a number for each.

    >>> are_many_pairs(4_000), are_many_pairs(10_000)
    (False, True)
    """
    return classes**2 > MOST_PAIRS


def nearest_step(rows: int, features: int, classes: int) -> int:
    """Return which k of every k-th row says often enough whether the largest logit is that of the nearest mean.

    >>> nearest_step(50_000, 512, 100), nearest_step(500_000, 64, 10_000)
    (1, 9)
    """
    return max(1, math.ceil(of_logits(rows, features, classes) / MOST_NEAREST))


def parse_size(text: str, option: str) -> int:
    """Return the bytes that a user means: `MB` are a million, `MiB` and a bare `M` 2 ** 20.

    >>> parse_size("2GiB", "--memory"), parse_size("16 MB", "--memory"), parse_size("1.5g", "--memory")
    (2147483648, 16000000, 1610612736)

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    number = float(found[1]) if found else 0.0
    if found is None or not number:
        raise UserError(f"{option} {text}: expected a size such as 2GiB, 800MiB or 16MB")
    base = 1000 if found[3] == "b" else 1024
    return int(number * base ** " kmgt".index(found[2] or " "))


def usable_memory(system: Path = Path("/")) -> int:
    """Return how many bytes this process may hold: the machine's, or less where its container or job may have less.

    Args:
        system: where the files lie that tell of Linux's control groups, of both versions.
    """
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # the system does not tell: what 48 bits address
        machine = 2**48
    return min([machine, *_limits_of_groups(system)])


def _limits_of_groups(system: Path) -> Iterator[int]:
    """Yield what limits the memory of this process's control groups and of those around them."""
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted, file = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        parts = PurePosixPath(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):  # a container may see its own group as the outermost one
            with suppress(OSError, ValueError):  # there is none, or it says "max"
                yield int((system / "sys/fs/cgroup" / mounted).joinpath(*parts[:depth], file).read_text())
