"""Interleaved measurement of several arms, and the statistics of paired rounds."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.workers import Arm, Slice, Worker


@dataclass(frozen=True)
class Spread:
    """The median of several rounds with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """What an arm's slices gave, one a round."""

    slices: list[Slice]
    warm_up: Slice
    info: dict[str, Any]

    @property
    def per_item(self) -> list[float]:
        """Seconds per item of each round."""
        return [s.per_item for s in self.slices]

    @property
    def rate(self) -> Spread:
        """Items per second."""
        return Spread.of([1 / seconds for seconds in self.per_item])

    @property
    def seconds_per_item(self) -> Spread:
        """Seconds per item."""
        return Spread.of(self.per_item)

    @property
    def items(self) -> int:
        """How many items were measured in all rounds."""
        return sum(s.items for s in self.slices)

    @property
    def peak_bytes(self) -> int:
        """The process's largest resident memory."""
        return max(s.peak_bytes for s in self.slices)

    def raw(self) -> dict[str, Any]:
        """Return what a record keeps of it."""
        return {
            "seconds_per_item": self.per_item,
            "items": self.items,
            "warm_up_seconds": self.warm_up.seconds,
            "peak_bytes": self.peak_bytes,
        }


def paired(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Return the ratios slow / fast round by round.

    >>> paired([2.0, 6.0, 6.0], [1.0, 2.0, 4.0])
    Spread(median=2.0, low=1.5, high=3.0)
    """
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])


def start(arms: Mapping[str, Arm], stack: ExitStack, *, inline: bool) -> dict[str, Worker]:
    """Start all arms at once; the stack ends them."""
    return {name: stack.enter_context(Worker(arm, inline=inline)) for name, arm in arms.items()}


def interleave(arms: Mapping[str, Arm], *, rounds: int, seconds: float, inline: bool = False) -> dict[str, Measured]:
    """Measure every arm once a round, in turn.

    Args:
        arms: by name.
        rounds: how often each is measured.
        seconds: at least so long a slice.
        inline: for tests, see `Worker`.
    """
    with ExitStack() as stack:
        workers = start(arms, stack, inline=inline)
        infos = {name: worker.wait_until_ready() for name, worker in workers.items()}
        warm_ups = {name: worker.warm_up() for name, worker in workers.items()}
        slices: dict[str, list[Slice]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, worker in workers.items():
                slices[name].append(worker.run(seconds))
    return {name: Measured(slices[name], warm_ups[name], infos[name] | warm_ups[name].told) for name in arms}


def fastest(arms: Mapping[str, Arm], *, seconds: float, inline: bool = False) -> str:
    """Return the name of the arm with the least time per item in a short interleaved trial."""
    if len(arms) == 1:
        return next(iter(arms))
    trial = interleave(arms, rounds=2, seconds=seconds, inline=inline)
    return min(trial, key=lambda name: trial[name].seconds_per_item.median)
