"""Subsets of a labelled set as indices, kept in the order drawn so that their hash names the draw."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tailscope import seeds
from tailscope.errors import UserError

Indices = npt.NDArray[np.int64]


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
        """SHA-256 (hex) of `flat` as little-endian int64."""
        return hashlib.sha256(self.flat.astype("<i8").tobytes()).hexdigest()


def subset(
    labels: Tensor | npt.NDArray[np.integer], counts: Sequence[int], *, protocol: str = "nested", seed: int = 0
) -> Subset:
    """Draw `counts[k]` samples of each class k.

    Protocol `"nested"` shuffles each class with a stream of its own, so that a smaller draw is the beginning of a
    larger one. `"ldam"` reproduces the published CIFAR-LT subsets (Cao et al. 2019) bit for bit: NumPy's legacy
    generator, seeded once, shuffles the classes' indices in ascending order of class.

    Args:
        labels: integers [N], 0 to C - 1.
        counts: samples to keep of each of the C classes.
        protocol: `"nested"` or `"ldam"`.
        seed: of the draw; at least 0, and below 2^32 for `"ldam"`.

    >>> labels = np.array([0, 1, 0, 1, 0])
    >>> few, more = subset(labels, [1, 1]), subset(labels, [3, 2])
    >>> few.counts, bool(few.indices[0][0] == more.indices[0][0])
    ([1, 1], True)

    Raises:
        UserError: unknown protocol, a seed out of range, or counts that the labels cannot give.
    """
    if protocol not in _PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; known: {', '.join(_PROTOCOLS)}")
    if seed < 0 or (protocol == "ldam" and seed >= 2**32):
        raise UserError(f"seed {seed}: protocol {protocol!r} takes 0 to {2**32 - 1}")
    by_class = _group(np.asarray(labels), len(counts))
    for k, (members, count) in enumerate(zip(by_class, counts, strict=True)):
        if not 1 <= count <= len(members):
            raise UserError(f"class {k}: cannot keep {count} of {len(members)} samples; counts are 1 to that")
    drawn = _PROTOCOLS[protocol](by_class, seed)
    return Subset(tuple(order[:count] for order, count in zip(drawn, counts, strict=True)))


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
