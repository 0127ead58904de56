"""Profiles: the shape of the training counts, class 0 the most frequent.

`exp:IF` (Cui et al. 2019), `step:IF` (Buda et al. 2018), `balanced`, `balanced:N`, `full`, `counts:5,3,1`, or a JSON
file that holds a list of counts or an object with the field `counts` (such as a stored `subset.json`).
"""

import math
from collections.abc import Sequence

from tailscope.errors import UserError, expanded
from tailscope.results import read_json

KNOWN = "exp:IF, step:IF, balanced, balanced:N, full, counts:N,N,..., COUNTS.json"
# n_max / IF may come out a rounding error below a whole number (49 * (1/49) < 1): that is no reason to lose an image.
_ROUNDING = 1e-9


def resolve(profile: str, available: Sequence[int]) -> list[int]:
    """Return the images per class that `profile` keeps of the `available` ones.

    With n_max the smallest class's available count and C classes: `exp` keeps int(n_max * IF^(-k/(C-1))) of class k,
    truncated; `step` n_max of the first C // 2 classes and int(n_max / IF) of the rest; `balanced` n_max of each.

    >>> resolve("exp:100", [5000] * 10)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    >>> resolve("step:10", [100] * 5)
    [100, 100, 10, 10, 10]

    Raises:
        UserError: the profile is unknown or malformed, IF < 1, a class would be left without images (says the largest
            IF possible), or more images are asked for than there are.
    """
    kind, values = _parse(profile)
    if not available or min(available) < 1:
        raise UserError(f"profile {profile!r}: every class needs at least one available image, got {list(available)}")
    n_max, classes = min(available), len(available)
    if kind == "full":
        return list(available)
    if kind in ("exp", "step"):
        return _imbalanced(profile, kind, values[0], n_max, classes)
    counts = [int(v) for v in values] if kind == "counts" else [int(values[0]) if values else n_max] * classes
    if len(counts) != classes:
        raise UserError(f"profile {profile!r}: {len(counts)} counts for {classes} classes; give one a class")
    for k, (count, have) in enumerate(zip(counts, available, strict=True)):
        if count > have:
            raise UserError(f"profile {profile!r}: asks for {count} images of class {k}, which has {have}")
    return counts


def canonical(profile: str) -> str:
    """Return the profile in one spelling, a file replaced by its counts: equal meaning, equal text, equal hash.

    >>> canonical(" exp:1e2"), canonical("counts:5, 3"), canonical("balanced")
    ('exp:100', 'counts:5,3', 'balanced')

    Raises:
        UserError: as `resolve`, for what can be seen without the data.
    """
    kind, values = _parse(profile)
    texts = [str(int(v)) if float(v).is_integer() else repr(v) for v in values]
    return f"{kind}:{','.join(texts)}" if texts else kind


def _imbalanced(profile: str, kind: str, factor: float, n_max: int, classes: int) -> list[int]:
    if classes < 2:
        raise UserError(f"profile {profile!r}: needs at least two classes, the data have {classes}")
    if factor > n_max:
        raise UserError(
            f"profile {profile!r}: the rarest class would keep no image of {n_max}; "
            f"the largest imbalance factor possible is {n_max}"
        )
    if kind == "step":
        exponents = [0.0 if k < classes // 2 else 1.0 for k in range(classes)]
    else:
        exponents = [k / (classes - 1) for k in range(classes)]
    return [int(n_max * factor**-e + _ROUNDING) for e in exponents]


def _parse(profile: str) -> tuple[str, tuple[float, ...]]:
    """Split a profile into its kind and its numbers, both valid by themselves."""
    kind, _, argument = profile.strip().partition(":")
    if profile.strip().endswith(".json"):
        path = argument if kind == "counts" else profile.strip()
        return "counts", _checked_counts(path, _read_counts(path))
    if kind == "counts":
        return "counts", _checked_counts(profile, [_number(profile, text) for text in argument.split(",")])
    if kind in ("exp", "step"):
        factor = _number(profile, argument)
        if factor < 1:
            raise UserError(f"profile {profile!r}: the imbalance factor must be at least 1")
        return kind, (factor,)
    if kind == "balanced":
        return kind, _checked_counts(profile, [_number(profile, argument)]) if argument else ()
    if kind == "full" and not argument:
        return kind, ()
    raise UserError(f"unknown profile {profile!r}; known: {KNOWN}")


def _number(profile: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"profile {profile!r}: expected a number, got {text.strip()!r}; known: {KNOWN}")
    return value


def _checked_counts(where: str, values: Sequence[object]) -> tuple[int, ...]:
    counts = []
    for k, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1 != 0:
            raise UserError(f"profile {where!r}: count {k} is {value!r}; counts are whole numbers of at least 1")
        counts.append(int(value))
    return tuple(counts)


def _read_counts(path: str) -> list[object]:
    file = expanded(path)
    if not file.exists():
        raise UserError(f"profile {path!r}: no such counts file")
    data = read_json(file)
    counts = data.get("counts") if isinstance(data, dict) else data
    if not isinstance(counts, list) or not counts:
        raise UserError(f"profile {path!r}: expected a JSON list of counts or an object with the field 'counts'")
    return counts
