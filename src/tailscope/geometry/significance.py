"""Verdicts on classes: permutation tests of every class, continued where many classes demand it, then BH."""

from collections.abc import Sequence

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
    needs_more,
)
from tailscope.geometry.fields import Entry
from tailscope.geometry.measure import gather
from tailscope.geometry.permutation import make_pool
from tailscope.geometry.pooling import GroupTests
from tailscope.geometry.rows import ClassRows
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


class ClassTests:
    """Permutation tests of all classes: `run` once a class, then `finish`."""

    def __init__(
        self, train: ClassRows, unseen: ClassRows, units: UnitMaker,
        permutations: int, alpha: float, seed: int, keys: Sequence[str],
    ) -> None:  # fmt: skip
        self._sides = train, unseen
        self._units = units
        self._permutations, self._alpha, self._seed, self._keys = permutations, alpha, seed, keys
        self.groups = GroupTests(permutations) if permutations else None
        # Per test: the comparison with raw and with unit vectors of each class that gets a verdict.
        self._counts: dict[str, list[Count | None]] = {field: [] for field, _, _ in TESTS}
        self._unit_counts: dict[str, list[Count | None]] = {field: [] for field, _, _ in TESTS}

    def run(self, rows: Tensor, k: int, group: str | None) -> Entry:
        """Permute class k, whose rows [n + m, d] hold training samples first; return its values by chance."""
        n, m = (side.count(k) for side in self._sides)
        verdict = n >= VERDICT_SAMPLES and m > 0
        found: Entry = {}
        counts: list[list[Count | None]] = [[None] * len(TESTS)] * 2
        if self.groups is not None and n and m:
            pools = [make_pool(rows)]
            if verdict:
                pools.append(make_pool(torch.nn.functional.normalize(rows, dim=1)))
            rng = numpy_stream(self._seed, "geometry", "permute", self._keys[k])
            drawn = draw(pools, self._units.units(k), self._permutations, rng, resolution_deg(rows.dtype))
            self.groups.add(group, drawn[0], rng)
            ratio = drawn[0].null("log_variance_ratio")
            found = {
                "center_shift_null_deg": drawn[0].null("shift"),
                "spread_gap_null_deg": drawn[0].null("gap"),
                "spread_train_null_deg": drawn[0].null("spread"),
                "escape_rate_null": drawn[0].null("escape"),
                "variance_ratio_null": None if ratio is None else float(np.exp(ratio)),
            }
            if verdict:
                counts = [[draws.count(statistic) for _, statistic, _ in TESTS] for draws in drawn]
        for i, (field, _, _) in enumerate(TESTS):
            self._counts[field].append(counts[0][i])
            self._unit_counts[field].append(counts[1][i])
        return found

    def finish(self, entries: Sequence[Entry]) -> list[bool]:
        """Fill in p, q and verdicts; return for which classes unit vectors would change the verdict on the gap."""
        differing = [False] * len(entries)
        for field, statistic, two_sided in TESTS:
            p = _p_values(self._counts[field], two_sided)
            unit_p = _p_values(self._unit_counts[field], two_sided)
            if field == "spread_gap":
                flags = zip(false_discovery(p), false_discovery(unit_p), strict=True)
                differing = [
                    a is not None and b is not None and (a <= self._alpha) != (b <= self._alpha) for a, b in flags
                ]
            draws = [None if count is None else count.draws for count in self._counts[field]]
            self._continue(field, statistic, two_sided, p, draws)
            q = false_discovery(p)
            for entry, *values, number in zip(entries, p, q, unit_p, draws, strict=True):
                entry[f"{field}_p"], entry[f"{field}_q"], entry[f"{field}_unit_p"] = values
                entry[f"{field}_permutations"] = number
                entry[f"{field}_flagged"] = None if values[1] is None else values[1] <= self._alpha
        for entry in entries:
            if entry["spread_gap_deg"] is not None and entry["train_count"] >= VERDICT_SAMPLES:
                large = entry["spread_gap_deg"] >= MATERIAL_GAP_DEG
                entry["spread_gap_material"] = bool(large or entry["escape_rank"] >= MATERIAL_RANK)
        return differing

    def _continue(
        self, field: str, statistic: int, two_sided: bool, p: list[float | None], draws: list[int | None]
    ) -> None:
        """Draw more permutations, in place, where their number alone keeps classes from being flagged."""
        sides = 2 if two_sided else 1
        if not needs_more(p, sides / (self._permutations + 1), self._alpha):
            return
        limit = int(np.ceil(sides * sum(value is not None for value in p) / self._alpha))
        for k, count in enumerate(self._counts[field]):
            if count is not None and count.is_open(two_sided) and limit > count.draws:
                pool = make_pool(gather(*self._sides, k))
                rng = numpy_stream(self._seed, "geometry", "continue", field, self._keys[k])
                p[k], draws[k] = continue_draws(pool, self._units.units(k), count, statistic, limit, two_sided, rng)


def _p_values(counts: Sequence[Count | None], two_sided: bool) -> list[float | None]:
    return [None if count is None else count.p(two_sided) for count in counts]
