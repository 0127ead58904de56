"""Rows of a feature matrix: their lengths, their classes, copies among them, and work on several classes at once.

Squares of float32 leave its range beyond 1e19 and below 1e-19. What measures or fits features therefore multiplies
them first by one power of two, the same for all of an encoder's files, which changes no digit. A row that is over 100
times as long as the median one (clipped float16, a broken image) is no sample of anything: left in, it alone would
decide means, variances and penalties. One of less than 1e-12 of the median length has no direction that counts.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from tailscope.errors import UserError

FAR = 100.0
NOTHING = 2.0**-40
AT_EASE = 16  # powers of two about 1 within which features stay as they are
BLOCK_ELEMENTS, CHUNK_ELEMENTS = 1 << 22, 1 << 18
MOST_WORKERS = 8
T = TypeVar("T")


def row_blocks(rows: Tensor, columns: int = 1) -> tuple[Tensor, ...]:
    """Cut a matrix [n, d] into blocks of rows, small ones, as is what has so many columns a row."""
    return torch.split(rows, max(1, BLOCK_ELEMENTS // max(columns, rows.shape[1])))


def log2_lengths(features: Tensor, what: str) -> Tensor:
    """Return the binary logarithms of the lengths of rows [n, d], float64 [n]; -inf for rows of zeros.

    >>> log2_lengths(torch.tensor([[3e30, 4e30], [0.0, 0.0], [0.5, 0.0]]), "x.npz").round().tolist()
    [102.0, -inf, -1.0]

    Raises:
        UserError: values are NaN or infinite, or so small that their type keeps few digits; `what` names them.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    found = [_log2_lengths(block.to(wide)) for block in row_blocks(features)]
    lengths = torch.cat(found) if found else features.new_empty(0, dtype=torch.float64)
    wrong = (~(lengths < math.inf)).nonzero().flatten()
    if len(wrong):
        raise UserError(f"{what}: {len(wrong)} rows are NaN or infinite, the first is row {int(wrong[0])}")
    smallest, middle = torch.finfo(features.dtype).tiny, median(lengths)
    usual = math.inf if middle is None else 2 ** (middle - math.log2(features.shape[1]) / 2)
    if usual < smallest:
        kind = str(features.dtype).removeprefix("torch.")
        raise UserError(
            f"{what}: values are about {usual:.0e}; below {smallest:.0e} {kind} keeps fewer digits (subnormal numbers)"
            ". Multiply all features by one number before they are saved"
        )
    return lengths


def median(lengths: Tensor) -> float | None:
    """Return the median of the logarithms of lengths, rows of zeros left out; None where there are no others."""
    known = lengths[lengths > -math.inf]
    return known.median().item() if len(known) else None


def far(lengths: Tensor) -> Tensor:
    """Return which rows are over 100 times as long as the median one, bool [n], from the logarithms of lengths.

    The median is that of the rows that are left, so that none of these is far itself.

    >>> far(torch.tensor([0.0, 0.1, -0.1, 6.0, 7.0])).tolist()
    [False, False, False, False, True]
    """
    found = torch.zeros_like(lengths, dtype=torch.bool)
    while (middle := median(lengths[~found])) is not None:
        beyond = lengths > middle + math.log2(FAR)
        if bool((beyond == found).all()):
            break
        found = beyond
    return found


def exponent(*lengths: Tensor) -> int:
    """Return by which power of two to multiply rows, so that the median length is near 1; 0 where it is near enough.

    Args:
        lengths: logarithms of the lengths of all files that are to stay comparable.

    >>> exponent(torch.tensor([100.5, 100.5])), exponent(torch.tensor([9.0]))
    (-100, 0)
    """
    middle = median(torch.cat([part.cpu() for part in lengths]))
    return 0 if middle is None or abs(middle) <= AT_EASE else -math.floor(middle)


def scaled(features: Tensor, power: int) -> Tensor:
    """Return features times 2 ** power, in float32 or float64; as they are for 0."""
    if not power:
        return features
    half = power // 2  # 2 ** power itself may lie outside the type's range
    rows: Tensor = features.to(torch.promote_types(features.dtype, torch.float32)) * math.ldexp(1.0, half)
    return torch.mul(rows, math.ldexp(1.0, power - half))


def _log2_lengths(rows: Tensor) -> Tensor:
    """Return the logarithms; where a square leaves the type's range, each row counts in its own largest value."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1).double().log2()
    outside = (~(lengths.abs() < -math.log2(torch.finfo(rows.dtype).tiny) / 4)).nonzero().flatten()
    if len(outside):
        part = rows[outside].double()
        largest = part.abs().amax(dim=1)
        unit = part / torch.where(largest > 0, largest, 1)[:, None]
        lengths[outside] = torch.linalg.vector_norm(unit, dim=1).log2() + largest.log2()
    return lengths


@dataclass(frozen=True)
class ClassRows:
    """The usable rows of one feature matrix [n, d], sorted by class: class k owns `order[starts[k]:starts[k + 1]]`.

    `dropped[k]` counts the class's rows without a direction (of length 0, or as good as 0) and `far[k]` those over 100
    times as long as the median row, which `order` leaves out; `alive`, bool [d], says which features are not 0 in every
    row, and `lengths`, float64 [n], are the binary logarithms of the rows' lengths.
    """

    features: Tensor
    order: Tensor
    starts: list[int]
    dropped: list[int]
    alive: Tensor
    far: list[int]
    lengths: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.starts) - 1

    @property
    def dtype(self) -> torch.dtype:
        """float64 for float64 features, float32 for every other kind."""
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32

    def index(self, k: int) -> Tensor:
        """Return the row numbers of class k in the original matrix."""
        return self.order[self.starts[k] : self.starts[k + 1]]

    def count(self, k: int) -> int:
        """Return the number of usable rows of class k."""
        return self.starts[k + 1] - self.starts[k]

    def labels(self) -> Tensor:
        """Return the class of each entry of `order`."""
        counts = torch.tensor(self.starts).diff()
        return torch.repeat_interleave(counts).to(self.order.device)


def group_rows(features: Tensor, labels: Tensor, class_names: Sequence[str], what: str) -> ClassRows:
    """Check features [n, d] and labels [n] and group the rows by class with one stable sort; `what` is for messages.

    Raises:
        UserError: wrong shapes or dtypes, labels out of range, features that are NaN, infinite or subnormal.
    """
    features = features.detach()
    _check_shapes(features, labels, len(class_names), what)
    lengths = log2_lengths(features, f"{what} features")
    middle = median(lengths)
    nothing, beyond = lengths < (math.inf if middle is None else middle + math.log2(NOTHING)), far(lengths)
    labels = labels.to(device=features.device, dtype=torch.long)
    classes = len(class_names)
    kept = (~(nothing | beyond)).nonzero().flatten()
    order = kept[torch.argsort(labels[kept], stable=True)]
    counts = torch.bincount(labels[kept], minlength=classes)
    dropped, distant = (torch.bincount(labels[rows], minlength=classes).tolist() for rows in (nothing, beyond))
    starts = [0, *torch.cumsum(counts, 0).tolist()]
    return ClassRows(features, order, starts, dropped, _alive(features), distant, lengths)


def gather(train: ClassRows, unseen: ClassRows, k: int) -> Tensor:
    """Return a copy of class k's rows [n + m, d], training rows first."""
    n, m = train.count(k), unseen.count(k)
    dtype = torch.promote_types(train.dtype, unseen.dtype)
    rows = torch.empty(n + m, train.features.shape[1], dtype=dtype, device=train.features.device)
    for part, source in ((rows[:n], train), (rows[n:], unseen)):
        if source.features.dtype == dtype:
            torch.index_select(source.features, 0, source.index(k), out=part)
        else:
            part.copy_(source.features[source.index(k)])
    return rows


def _check_shapes(features: Tensor, labels: Tensor, classes: int, what: str) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        got = f"{features.dtype} {list(features.shape)}"
        raise UserError(f"{what} features: expected floating-point numbers of shape [n, d], got {got}")
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise UserError(f"{what} labels: expected integers of shape [n], got {labels.dtype} {list(labels.shape)}")
    if len(labels) != len(features):
        raise UserError(f"{what}: {len(features)} feature rows but {len(labels)} labels")
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        low, high = int(labels.min()), int(labels.max())
        raise UserError(f"{what} labels: found {low} to {high}, expected 0 to {classes - 1} for {classes} class names")


def _alive(features: Tensor) -> Tensor:
    """Return which features are ever not 0, bool [d]."""
    alive = torch.zeros(features.shape[1], dtype=torch.bool, device=features.device)
    for block in row_blocks(features):
        if bool(alive.all()):
            break
        alive |= (block != 0).any(dim=0)
    return alive


def subsets(seen: int, units: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield random subsets of `seen` out of `units`, bool [<= chunk, units], `draws` in all.

    A row takes the units with the `seen` smallest of as many random numbers; rows whose boundary is tied are drawn
    again, which keeps every subset equally likely.
    """
    chunk = max(1, CHUNK_ELEMENTS // units)
    for start in range(0, draws, chunk):
        keys = rng.integers(0, 1 << 32, (min(chunk, draws - start), units), dtype=np.uint32)
        while True:
            taken = keys <= np.partition(keys, seen - 1, axis=1)[:, seen - 1 : seen]
            tied = np.flatnonzero(taken.sum(axis=1) != seen)
            if not len(tied):
                break
            keys[tied] = rng.integers(0, 1 << 32, (len(tied), units), dtype=np.uint32)
        yield taken


def all_subsets(seen: int, units: int) -> np.ndarray:
    """Return every subset of `seen` out of `units`, bool [number, units], the first `seen` units first."""
    rows = list(itertools.combinations(range(units), seen))
    taken = np.zeros((len(rows), units), dtype=bool)
    np.put_along_axis(taken, np.array(rows), True, axis=1)
    return taken


def find_copies(rows: Tensor, n: int) -> tuple[Tensor, int]:
    """Return which unseen rows copy a training row, bool [m], and how many rows repeat their own set.

    `rows` [n + m, d] are a class's, training rows first. Copies are rows whose bytes are the same: rows that are only
    close are neighbours, at whatever scale.

    >>> find_copies(torch.tensor([[1.0, 2.0], [1.0, 2.5], [1.0, 2.0]]), 2)
    (tensor([True]), 0)
    """
    count = len(rows)
    bits = rows.contiguous().view(torch.int64 if rows.dtype == torch.float64 else torch.int32)
    key, order = _digest(bits).sort()
    linked = (key.diff() == 0).nonzero().flatten()
    linked = linked[(bits[order[linked]] == bits[order[linked + 1]]).all(dim=1)]
    if not len(linked):
        return torch.zeros(count - n, dtype=torch.bool, device=rows.device), 0
    unseen = torch.arange(count, device=rows.device) >= n
    follows = torch.zeros(count, dtype=torch.long, device=rows.device)
    follows[linked + 1] = 1
    cluster = torch.empty_like(follows)
    cluster[order] = torch.cumsum(1 - follows, 0) - 1
    seen_in = torch.bincount(cluster[~unseen], minlength=count)
    unseen_in = torch.bincount(cluster[unseen], minlength=count)
    repeats = (seen_in - 1).clamp(min=0).sum() + (unseen_in - 1).clamp(min=0).sum()
    return (seen_in[cluster] > 0)[unseen], int(repeats)


def _digest(bits: Tensor) -> Tensor:
    """Return a number for each row of integers, int64 [n], by which equal rows become neighbours."""
    factors = _factors(bits.shape[1]).to(bits.device)
    return torch.cat([(block * factors).sum(dim=1) for block in row_blocks(bits)])  # both wrap round


@lru_cache(maxsize=1)
def _factors(d: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (d,), generator=torch.Generator().manual_seed(0))


def unseen_copies(train: ClassRows, unseen: ClassRows) -> Tensor:
    """Return which unseen rows are copies of a training row of their class, bool [m] in the original row order."""
    found = torch.zeros(len(unseen.features), dtype=torch.bool, device=unseen.features.device)

    def one(k: int) -> None:
        n, m = train.count(k), unseen.count(k)
        if n and m:
            found[unseen.index(k)] = find_copies(gather(train, unseen, k), n)[0]

    map_parallel(one, train.classes, unseen.features.device)
    return found


def map_parallel(function: Callable[[int], T], number: int, device: torch.device) -> list[T]:
    """Return [function(0), ..., function(number - 1)], computed by threads that share torch's CPU threads.

    >>> map_parallel(lambda i: i * i, 4, torch.device("cpu"))
    [0, 1, 4, 9]
    """
    found = {i: result for _, i, result in map_mixed([(function, number)], device)}
    return [found[i] for i in range(number)]


def map_mixed(jobs: Sequence[tuple[Callable[[int], Any], int]], device: torch.device) -> Iterator[tuple[int, int, Any]]:
    """Yield (kind, i, function(i)) for every i below each kind's number, in the order in which they are done.

    Kinds take turns: work of many short calls holds Python's lock, work of few long ones does not, so that side by side
    they keep two cores busy. On an accelerator one thread issues all work.
    """
    turns = sorted(((i + 0.5) / number, kind, i) for kind, (_, number) in enumerate(jobs) for i in range(number))
    threads = torch.get_num_threads()
    workers = min(threads, len(turns), MOST_WORKERS) if device.type == "cpu" else 1
    if workers <= 1:
        yield from ((kind, i, jobs[kind][0](i)) for _, kind, i in turns)
        return
    own = threads // workers
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(own,))
    try:
        with threadpool_limits(own, user_api="blas"):  # of NumPy and SciPy; torch is told by the initializer
            running = {pool.submit(jobs[kind][0], i): (kind, i) for _, kind, i in turns}
            for future in as_completed(running):
                yield *running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # else threads that start later would inherit the workers' number
