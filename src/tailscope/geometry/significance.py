"""Verdicts on classes: permutation tests of every class, continued where many classes demand it, then BH."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailscope.errors import UserError
from tailscope.geometry.angles import resolution_deg
from tailscope.geometry.calibration import (
    GAP,
    SHIFT,
    VERDICT_SAMPLES,
    Count,
    Units,
    continue_draws,
    draw,
    false_discovery,
    group_p,
    needs_more,
    standardize,
)
from tailscope.geometry.fields import Entry
from tailscope.geometry.parallel import map_parallel
from tailscope.geometry.permutation import make_pool
from tailscope.geometry.rows import ClassRows, gather
from tailscope.seeds import numpy_stream

MATERIAL_GAP_DEG = 2.0
MATERIAL_RANK = 0.6
TESTS = (("spread_gap", GAP, False), ("center_shift", SHIFT, True))


class UnitMaker:
    """What changes sides together in a class: single samples, or bursts of related ones.

    A burst with rows on both sides counts as one unit on each; `straddling` counts such bursts.
    """

    def __init__(self, train: ClassRows, unseen: ClassRows, first: Tensor | None, second: Tensor | None) -> None:
        self._sides = train, unseen
        self._bursts: tuple[Tensor, Tensor] | None = None
        self.straddling = 0
        if (first is None) != (second is None):
            raise UserError("bursts: give train_bursts and unseen_bursts, or neither")
        if first is None or second is None:
            return
        for rows, bursts, what in ((train, first, "train"), (unseen, second, "unseen")):
            if bursts.shape != rows.features.shape[:1] or bursts.is_floating_point():
                raise UserError(f"{what}_bursts: expected {len(rows.features)} integers, got {list(bursts.shape)}")
        self._bursts = first, second
        self.straddling = len(np.intersect1d(first.cpu().numpy(), second.cpu().numpy()))

    def units(self, k: int) -> Units:
        """Return the units of class k."""
        n, m = (side.count(k) for side in self._sides)
        if self._bursts is None:
            return Units(np.arange(n + m), n, n + m)
        codes = [b.to(s.order.device)[s.index(k)].cpu() for b, s in zip(self._bursts, self._sides, strict=True)]
        first, second = (np.unique(code.numpy(), return_inverse=True) for code in codes)
        seen, total = len(first[0]), len(first[0]) + len(second[0])
        return Units(np.concatenate([first[1], seen + second[1]]), seen, total)


@dataclass(frozen=True)
class Chance:
    """What permutations say about one class: values by chance, and per test of `TESTS` the comparison with them.

    `counts` are None below 5 training samples; `units` compares with centres that are means of unit vectors.
    """

    nulls: Entry = field(default_factory=dict)
    counts: tuple[Count | None, ...] = (None, None)
    units: tuple[Count | None, ...] = (None, None)


class ClassTests:
    """Permutation tests of all classes: `run` once a class, in any thread, then `finish`."""

    def __init__(
        self, train: ClassRows, unseen: ClassRows, units: UnitMaker,
        permutations: int, alpha: float, seed: int, keys: Sequence[str],
    ) -> None:  # fmt: skip
        self._sides = train, unseen
        self._units = units
        self._permutations, self._alpha, self._seed, self._keys = permutations, alpha, seed, keys
        # For the group tests; one array, since thousands of small ones would keep the threads' memory from being freed.
        self._standardized = np.full((len(TESTS), len(keys), permutations + 1), np.nan)

    def run(self, rows: Tensor, k: int) -> Chance:
        """Permute class k, whose rows [n + m, d] hold training samples first."""
        n, m = (side.count(k) for side in self._sides)
        if not (self._permutations and n and m):
            return Chance()
        pools = [make_pool(rows)]
        if n >= VERDICT_SAMPLES:
            pools.append(make_pool(torch.nn.functional.normalize(rows, dim=1)))
        rng = numpy_stream(self._seed, "geometry", "permute", self._keys[k])
        drawn = draw(pools, self._units.units(k), self._permutations, rng, resolution_deg(rows.dtype))
        raw = drawn[0]
        ratio = raw.null("log_variance_ratio")
        nulls = {
            "center_shift_null_deg": raw.null("shift"),
            "spread_gap_null_deg": raw.null("gap"),
            "spread_train_null_deg": raw.null("spread"),
            "escape_rate_null": raw.null("escape"),
            "variance_ratio_null": None if ratio is None else float(np.exp(ratio)),
        }
        for i, (_, statistic, _) in enumerate(TESTS):
            self._standardized[i, k] = standardize(raw, statistic, self._permutations, rng)
        if n < VERDICT_SAMPLES:
            return Chance(nulls)
        counts, units = (tuple(draws.count(statistic) for _, statistic, _ in TESTS) for draws in drawn)
        return Chance(nulls, counts, units)

    def finish(self, entries: Sequence[Entry], chances: Sequence[Chance]) -> list[bool]:
        """Fill in p, q and verdicts; return for which classes unit vectors would change the verdict on the gap."""
        differing: list[bool] = []
        for i, (name, _, two_sided) in enumerate(TESTS):
            counts = [chance.counts[i] for chance in chances]
            p = _p_values(counts, two_sided)
            unit_p = _p_values([chance.units[i] for chance in chances], two_sided)
            if name == "spread_gap":
                differing = [a != b for a, b in zip(self._flags(p), self._flags(unit_p), strict=True)]
            draws = [None if count is None else count.draws for count in counts]
            self._continue(i, counts, p, draws)
            columns: dict[str, Sequence[Any]] = {
                "p": p,
                "q": false_discovery(p),
                "flagged": self._flags(p),
                "unit_p": unit_p,
                "permutations": draws,
            }
            for part, column in columns.items():
                for entry, value in zip(entries, column, strict=True):
                    entry[f"{name}_{part}"] = value
        for entry in entries:
            if entry["spread_gap_deg"] is not None and entry["train_count"] >= VERDICT_SAMPLES:
                large = entry["spread_gap_deg"] >= MATERIAL_GAP_DEG
                entry["spread_gap_material"] = bool(large or entry["escape_rank"] >= MATERIAL_RANK)
        return differing

    def group_p(self, name: str, classes: Sequence[int]) -> float | None:
        """Return the p-value of one test over a group of classes, however small each is; None where undefined."""
        i = [test[0] for test in TESTS].index(name)
        return group_p(self._standardized[i, list(classes)], TESTS[i][2])

    def _flags(self, p: Sequence[float | None]) -> list[bool | None]:
        return [None if q is None else q <= self._alpha for q in false_discovery(p)]

    def _continue(
        self, test: int, counts: Sequence[Count | None], p: list[float | None], draws: list[int | None]
    ) -> None:
        """Draw more permutations, in place, where their number alone keeps classes from being flagged."""
        name, statistic, two_sided = TESTS[test]
        sides = 2 if two_sided else 1
        if not needs_more(p, sides / (self._permutations + 1), self._alpha):
            return
        limit = math.ceil(sides * sum(value is not None for value in p) / self._alpha)
        found = [(k, c) for k, c in enumerate(counts) if c is not None and c.is_open(two_sided) and c.draws < limit]

        def one(i: int) -> tuple[float, int]:
            k, count = found[i]
            rng = numpy_stream(self._seed, "geometry", "continue", name, self._keys[k])
            pool = make_pool(gather(*self._sides, k))
            return continue_draws(pool, self._units.units(k), count, statistic, limit, two_sided, rng)

        longer = map_parallel(one, len(found), self._sides[0].features.device)
        for (k, _), (value, number) in zip(found, longer, strict=True):
            p[k], draws[k] = value, number


def _p_values(counts: Sequence[Count | None], two_sided: bool) -> list[float | None]:
    return [None if count is None else count.p(two_sided) for count in counts]
