"""How much memory a diagnosis needs, told before it begins: what is larger than a share of the limit lies in files.

Nothing in a result depends on the limit. What grows with the rows lies in mapped files, but for a few numbers of each;
what has to be held grows with the classes and with the most frequent one. The estimate is meant to err high; nothing
watches the process afterwards.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tailscope.diagnosis.inputs import Inputs
from tailscope.effort import are_many_pairs, is_long_curve, is_long_search, usable_memory
from tailscope.errors import UserError
from tailscope.measures.angles import REPLICATE_ELEMENTS
from tailscope.measures.rows import BLOCK_ELEMENTS, CHUNK_ELEMENTS
from tailscope.tables.mapped import HELD, held_below

DEFAULT_SHARE = 0.75  # of the memory there is
LEAST_HELD, SHARE = 2**20, 16  # of the limit: rows of more bytes lie in files
LIBRARIES = 200 * 2**20  # that are imported later: scikit-learn, SciPy, pydantic
A_ROW = 160  # bytes: label, order, length, angles, predictions, weights and their copies
SOLVER, MINI_BATCHES = 32, 16  # layers that a search by SciPy's L-BFGS holds, in 64 bits; by mini-batches, in 32
REMEDIES = 12  # layers of remedies that are kept


@contextmanager
def within(inputs: Mapping[str, Inputs], verdict: bool, permutations: int, limit: int | None) -> Iterator[None]:
    """Keep a diagnosis within so many bytes; None: within `DEFAULT_SHARE` of the memory there is.

    Raises:
        UserError: it needs more.
    """
    limit = int(DEFAULT_SHARE * usable_memory()) if limit is None else limit
    held = min(HELD, max(LEAST_HELD, limit // SHARE))
    needs = [needed(Shape.of(one), verdict, permutations, held) for one in inputs.values()]
    most_of_all = needs[max(range(len(needs)), key=lambda i: sum(needs[i].values()))]
    parts = {"what is held already": anonymous(), **most_of_all}
    if (total := sum(parts.values())) > limit:
        most = max(parts, key=lambda name: parts[name])
        mend = "use --no-verdict" if verdict and most == "classifiers" else "diagnose fewer samples or classes"
        raise UserError(
            f"--memory {in_words(limit)}: a diagnosis of these features needs about {in_words(total)},"
            f" {in_words(parts[most])} of it for {most}; give that much, or {mend}"
        )
    with held_below(held):
        yield


@dataclass(frozen=True)
class Shape:
    """What memory depends on: rows of all files, features, classes, samples of the largest class, bytes of a number."""

    rows: int
    width: int
    classes: int
    largest: int
    item: int = 4

    @classmethod
    def of(cls, inputs: Inputs) -> "Shape":
        """Return that of a diagnosis; the largest class has training and unseen samples."""
        tables = inputs.tables.values()
        largest = max(map(sum, zip(inputs.train.counts(), inputs.unseen.counts(), strict=True)))
        item = max(4, *(table.features.dtype.itemsize for table in tables))
        return cls(sum(map(len, tables)), inputs.train.width, len(inputs.names), largest, item)


def needed(shape: Shape, verdict: bool, permutations: int, held: int) -> dict[str, int]:
    """Return about how many bytes a diagnosis needs, by what for; rows of more than `held` bytes lie in files.

    >>> found = needed(Shape(100_000, 64, 100, 5_000), True, 999, 2**27)
    >>> max(found, key=found.get)
    'classifiers'
    """
    rows, width, largest, item = shape.rows, shape.width, shape.largest, shape.item
    layer = shape.classes * width
    found = {
        "numbers of every row": A_ROW * rows,
        f"the most frequent class, of {largest:,} samples": (
            6 * item * largest * width + 8 * min(largest, 2 * width) ** 2
        ),
        "permutations": (32 * CHUNK_ELEMENTS * 4 + 16 * shape.classes * (permutations + 1) if permutations else 0)
        + 4 * min(99 * layer, max(9 * layer, REPLICATE_ELEMENTS)),
        "blocks of rows, and class means": 4 * 8 * BLOCK_ELEMENTS
        + 8 * 8 * layer
        + (0 if are_many_pairs(shape.classes) else 4 * 8 * shape.classes**2),
    }
    if not verdict:
        return found
    found["classifiers"] = LIBRARIES + _classifiers(shape, held)
    return found


def _classifiers(shape: Shape, held: int) -> int:
    """Return about how many bytes fitted classifiers, and the searches and samples for them take."""
    from tailscope.diagnosis.curve_fits import FEWER_FOLDS, FOLDS, FRACTIONS, MEMORY, PENALTIES  # here because
    from tailscope.diagnosis.curve_rows import LEAST, MOST_HELD, MOST_WORK  # scikit-learn takes seconds to import

    width, layer = shape.width, shape.classes * shape.width
    sampled = min(max(2 * LEAST * shape.classes, min(MOST_WORK / layer, MOST_HELD / width)), shape.rows)
    folds = min(FOLDS, max(2, int(FOLDS * FEWER_FOLDS / (sampled * layer))))
    kept, search = folds * len(PENALTIES), max(SOLVER * 8, (2 * MEMORY + 8) * 4)
    if is_long_curve(int(sampled), width, shape.classes):
        sampled, kept = min(MOST_HELD / width, shape.rows), 2 * FOLDS  # discriminants, of which few are kept
    if is_long_search(shape.rows, width, shape.classes):
        search = MINI_BATCHES * 4
    fits = 4 * layer * ((len(FRACTIONS) + 1) * kept + REMEDIES)
    return int(3 * min(held, 4 * sampled * (width + 1)) + fits + search * layer)


def anonymous() -> int:
    """Return the bytes that this process holds now; where the system does not tell, what the libraries take."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        return 2**29


def in_words(size: int) -> str:
    """Return bytes as a user writes them, rounded up.

    >>> in_words(2**31), in_words(2**31 + 1), in_words(700 * 2**20)
    ('2.0 GiB', '2.1 GiB', '700 MiB')
    """
    return f"{math.ceil(10 * size / 2**30) / 10} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"
