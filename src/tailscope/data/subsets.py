"""Long-tailed subsets: profiles, the shape of the training counts, and the draws by them.

Class 0 is the most frequent. A profile is `exp:IF` (Cui et al. 2019), `step:IF` (Buda et al. 2018), `balanced`,
`balanced:N`, `full`, `counts:5,3,1`, or a JSON file that holds a list of counts or an object with the field `counts`
(such as a stored `subset.json`). A subset keeps its indices in the order drawn, so that their hash names the draw.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tailscope import seeds
from tailscope.data import PROFILES
from tailscope.data.images import Images
from tailscope.errors import UserError, expanded, guess, message_of, unknown
from tailscope.results import read_json

Indices = npt.NDArray[np.int64]

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
    exponents = [float(k >= classes // 2) if kind == "step" else k / (classes - 1) for k in range(classes)]
    return [int(n_max * factor**-e + _ROUNDING) for e in exponents]


def _parse(profile: str) -> tuple[str, tuple[float, ...]]:
    """Split a profile into its kind and its numbers, both valid by themselves."""
    kind, _, argument = profile.strip().partition(":")
    if profile.strip().endswith(".json"):
        path = argument if kind == "counts" else profile.strip()
        return "counts", _checked_counts(path, _read_counts(path))
    if kind == "counts":
        return kind, _checked_counts(profile, [_number(profile, text) for text in argument.split(",")])
    if kind == "balanced":
        return kind, _checked_counts(profile, [_number(profile, argument)]) if argument else ()
    if kind in ("exp", "step"):
        factor = _number(profile, argument)
        if factor < 1:
            raise UserError(f"profile {profile!r}: the imbalance factor must be at least 1")
        return kind, (factor,)
    if kind == "full" and not argument:
        return kind, ()
    meant = guess(kind, ("exp", "step", "balanced", "full", "counts"))
    raise UserError(f"unknown profile {profile!r};{meant} known: {PROFILES}")


def _number(profile: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"profile {profile!r}: expected a number, got {text.strip()!r}; known: {PROFILES}")
    return value


def _checked_counts(where: str, values: Sequence[object]) -> tuple[int, ...]:
    for k, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1 != 0:
            raise UserError(f"profile {where!r}: count {k} is {value!r}; counts are whole numbers of at least 1")
    return tuple(map(int, values))  # type: ignore[arg-type]


def _read_counts(path: str) -> list[object]:
    file = expanded(path)
    if not file.exists():
        raise UserError(f"profile {path!r}: no such counts file")
    data = read_json(file)
    counts = data.get("counts") if isinstance(data, dict) else data
    if not isinstance(counts, list) or not counts:
        raise UserError(f"profile {path!r}: expected a JSON list of counts or an object with the field 'counts'")
    return counts


@dataclass(frozen=True, eq=False)
class Subset:
    """The kept indices, int64, one array a class, in the order drawn."""

    indices: tuple[Indices, ...]

    @property
    def counts(self) -> list[int]:
        """Kept samples per class."""
        return [len(kept) for kept in self.indices]

    @cached_property
    def flat(self) -> Indices:
        """All kept indices [sum(counts)]: classes ascending, within a class in the order drawn."""
        return np.concatenate(self.indices).astype(np.int64)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of `flat`."""
        return sha256_of(self.flat)


def sha256_of(rows: Indices) -> str:
    """Return the SHA-256 (hex) of rows as little-endian int64."""
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def read_rows(path: Path, labels: Tensor, fingerprint: Callable[[], str | None]) -> Indices:
    """Return the rows that a `subset.json` keeps of images with these labels: classes ascending, in the order drawn.

    `fingerprint` says what the images' data set is told by, where that is known.

    Raises:
        UserError: the file is no `subset.json`, was changed, or was drawn from other images.
    """
    try:
        held = read_json(path)
        if others := [row for kept in held["indices"] for row in kept if type(row) is not int]:
            raise TypeError(f"{others[0]!r} is no whole number")
        by_class = [np.asarray(kept, dtype=np.int64) for kept in held["indices"]]
        rows = np.concatenate(by_class)
    except UserError as error:
        raise UserError(f"--subset {error}; it is no subset.json") from None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"--subset {path}: no subset.json with 'indices' per class ({message_of(error)})") from None
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(labels):
        wrong = f"its indices are not rows of these {len(labels)} images; was it drawn from them?"
    else:
        wrong = _misfit(held, by_class, np.asarray(labels), fingerprint)
    if wrong:
        raise UserError(f"--subset {path}: {wrong}")
    return rows


def _misfit(
    held: dict[str, Any], by_class: list[Indices], labels: npt.NDArray[np.integer], of: Callable[[], str | None]
) -> str:
    """Return what in a `subset.json` contradicts its rows in these images; "" where nothing does."""
    spec = held["spec"] if isinstance(held.get("spec"), dict) else {}
    mend = "draw one from these images with `tailscope subset`, or give its own by --data"
    if held.get("sha256", found := sha256_of(np.concatenate(by_class))) != found:
        return "its sha256 is not that of its indices, so one of the two was changed; draw it anew"
    if (stated := spec.get("fingerprint")) is not None and (known := of()) is not None:
        other = f"its spec.fingerprint is of another data set ({spec.get('data')})"
        return "" if known == stated else f"{other}; {mend}"
    classes = [np.unique(labels[kept]).tolist() for kept in by_class]
    of_one_class_each = classes == [[k] for k in sorted({k for some in classes for k in some})]
    if "counts" in held and not (of_one_class_each and [len(kept) for kept in by_class] == held["counts"]):
        return f"its counts are not those of the classes of its indices here; {mend}"
    return ""


def draw(images: Images, profile: str, protocol: str, seed: int) -> Subset:
    """Draw the long-tailed subset of a data set's training images that a profile asks for.

    Raises:
        UserError: the profile, protocol or seed does not fit the data.
    """
    return subset(images.labels, resolve(profile, images.counts()), protocol=protocol, seed=seed)


def subset(
    labels: Tensor | npt.NDArray[np.integer], counts: Sequence[int], *, protocol: str = "nested", seed: int = 0
) -> Subset:
    """Draw `counts[k]` samples of each class k.

    Protocol `"nested"` shuffles each class with a stream of its own, so that a smaller draw is the beginning of a
    larger one. `"ldam"` reproduces the published CIFAR-LT subsets (Cao et al. 2019) bit for bit: NumPy's legacy
    generator, seeded once, shuffles the classes' indices in ascending order of class.

    Labels are integers [N], 0 to C - 1. The seed is at least 0, and below 2^32 for `"ldam"`.

    >>> labels = np.array([0, 1, 0, 1, 0])
    >>> few, more = subset(labels, [1, 1]), subset(labels, [3, 2])
    >>> few.counts, bool(few.indices[0][0] == more.indices[0][0])
    ([1, 1], True)

    Raises:
        UserError: unknown protocol, a seed out of range, or counts that the labels cannot give.
    """
    if protocol not in _PROTOCOLS:
        raise unknown("protocol", protocol, _PROTOCOLS)
    require_seed(seed, protocol)
    by_class = _group(np.asarray(labels), len(counts))
    for k, (members, count) in enumerate(zip(by_class, counts, strict=True)):
        if not 1 <= count <= len(members):
            raise UserError(f"class {k}: cannot keep {count} of {len(members)} samples; counts are 1 to that")
    drawn = _PROTOCOLS[protocol](by_class, seed)
    return Subset(tuple(order[:count] for order, count in zip(drawn, counts, strict=True)))


def require_seed(seed: int, protocol: str, name: str = "seed") -> None:
    """Refuse a seed that a protocol cannot draw by, with a `UserError` that calls it by `name`."""
    if seed < 0:
        raise UserError(f"{name} {seed}: must be at least 0")
    if protocol == "ldam" and seed >= 2**32:
        raise UserError(f"{name} {seed}: protocol 'ldam' takes 0 to {2**32 - 1}")


def matched(labels: Tensor | npt.NDArray[np.integer], counts: Sequence[int], *, seed: int) -> Subset:
    """Draw a class-balanced subset as large as `sum(counts)`: it separates imbalance from sample count.

    Classes are as equal as possible: a class that has fewer samples gives all it has, and a remainder goes one each
    to the first classes. Uses the `"nested"` draws, so at equal seed it shares as many samples with the nested
    long-tailed subset as it can.

    >>> matched(np.arange(30) % 3, [10, 3, 1], seed=0).counts
    [5, 5, 4]

    Raises:
        UserError: as `subset`.
    """
    available = [len(members) for members in _group(np.asarray(labels), len(counts))]
    return subset(labels, _equal_counts(sum(counts), available), seed=seed)


def _equal_counts(total: int, available: Sequence[int]) -> list[int]:
    """Split `total` over the classes, smallest class first, so that what it lacks is spread over the larger ones."""
    total = min(total, sum(available))
    result = [0] * len(available)
    # Among classes that have enough, later ones are served first: the remainder is left to the first classes.
    order = sorted(range(len(available)), key=lambda k: (available[k], -k))
    for served, k in enumerate(order):
        result[k] = min(available[k], total // (len(order) - served))
        total -= result[k]
    return result


def _group(labels: npt.NDArray[np.integer], classes: int) -> list[Indices]:
    """Return each class's indices, ascending."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels run {labels.min()} to {labels.max()}, but counts are given for {classes} classes")
    order = np.argsort(labels, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(labels, minlength=classes))
    return np.split(order, ends[:-1])


def _nested(by_class: list[Indices], seed: int) -> list[Indices]:
    return [seeds.numpy_stream(seed, "subset", k).permutation(members) for k, members in enumerate(by_class)]


def _ldam(by_class: list[Indices], seed: int) -> list[Indices]:
    generator = np.random.RandomState(seed)
    for members in by_class:
        generator.shuffle(members)
    return by_class


_PROTOCOLS: dict[str, Callable[[list[Indices], int], list[Indices]]] = {"nested": _nested, "ldam": _ldam}
