"""What the claims are decided on: stored results, and the per-item outcomes where the store still has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tailscope.intervals import Interval, paired
from tailscope.paper.targets import dataset_of

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Results of one data set, recipe and list of seeds.

    Attributes:
        results: by experiment: the contents of swap.json, ladder.json and geometry.json, as far as there are any.
        outcomes: by row, [S, M] of bool: which test images are right. Without them, intervals of accuracies are over
            seeds alone.
    """

    results: Mapping[str, Mapping[str, Any]]
    outcomes: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def dataset(self) -> str | None:
        """The paper's data set that this is about, if any."""
        return dataset_of(next(iter(self.results.values())))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Name, card and convergence of the recipe that made the results."""
        recipe: Mapping[str, Any] = next(iter(self.results.values()))["recipe"]
        return recipe

    def accuracies(self) -> dict[str, list[float]]:
        """Return accuracy per seed of every row: `lt->lt` ..., `lt stage1` ... and `none: stage1` ..."""
        swap = self.results.get("swap", {})
        cells = dict(swap.get("cells", {}))
        cells |= {f"{backbone} stage1": cell for backbone, cell in swap.get("stage1", {}).items()}
        for name, rungs in self.results.get("ladder", {}).get("augmentations", {}).items():
            cells |= {f"{name}: {rung}": cell for rung, cell in rungs.items()}
        return {row: list(cell["accuracy"]) for row, cell in cells.items()}

    def difference(self, higher: str, lower: str) -> Interval:
        """Return by how much one row's accuracy exceeds another's, paired by seed and, where known, by test item."""
        if higher in self.outcomes and lower in self.outcomes:
            return paired(self.outcomes[higher].astype(np.float64) - self.outcomes[lower])
        rows = self.accuracies()
        return paired([[a - b] for a, b in zip(rows[higher], rows[lower], strict=True)])


@dataclass(frozen=True, eq=False)
class Geometry:
    """`geometry.json` as arrays: one value a seed and class."""

    result: Mapping[str, Any]

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.result["seeds"])

    def rarity(self) -> FloatArray:
        """Return each class's rank [C] from the most frequent (1) to the rarest; ties share their mean rank."""
        ranks: FloatArray = stats.rankdata(-np.asarray(self.result["counts"], dtype=np.float64))
        return ranks

    def values(self, encoder: str, measure: str, variant: str = "paper") -> FloatArray:
        """Return a measure [S, C] of an encoder, NaN where it is undefined."""
        runs = self.result["encoders"][encoder]["seeds"].values()
        rows = [[_number(entry.get(measure)) for entry in run[variant]["classes"]] for run in runs]
        return np.asarray(rows, dtype=np.float64)

    def tail(self, values: FloatArray) -> list[float | None]:
        """Return the mean over the tail classes of each seed [S]; None where none of them is defined."""
        return means(values[:, [group == "tail" for group in self.result["groups"]]])


def means(values: FloatArray) -> list[float | None]:
    """Return each row's mean over its defined entries, None where there is none.

    >>> means(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    [2.0, None]
    """
    return [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else None for row in values]


def over_seeds(values: Sequence[float | None]) -> Interval | None:
    """Return the mean over seeds with its t interval; None where a seed has no value.

    >>> over_seeds([1.0, 2.0, 3.0]).estimate, over_seeds([1.0, None]) is None
    (2.0, True)
    """
    known = [v for v in values if v is not None]
    return paired([[v] for v in known]) if known and len(known) == len(values) else None


def _number(value: float | None) -> float:
    return np.nan if value is None else value
