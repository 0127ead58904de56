"""Warnings about features: what makes a measurement undefined, imprecise or easy to misread."""

from collections.abc import Sequence

from tailscope.geometry.calibration import VERDICT_SAMPLES
from tailscope.geometry.fields import MOST, Entry
from tailscope.geometry.lengths import FAR
from tailscope.geometry.measure import Facts
from tailscope.geometry.rows import ClassRows

FEW_UNSEEN = 30
NAMED = 5


def input_notes(train: ClassRows, unseen: ClassRows, dead: int, split_bursts: int) -> list[str]:
    """Return warnings about the feature matrices as a whole."""
    notes = []
    dropped = sum(train.dropped) + sum(unseen.dropped)
    if dropped:
        rows = len(train.features) + len(unseen.features)
        many = f"; that is {100 * dropped / rows:.1f} % of all, check the features" if dropped > rows / 100 else ""
        notes.append(
            f"{dropped} feature vectors of length 0 have no direction and were left out "
            f"({sum(train.dropped)} training, {sum(unseen.dropped)} unseen){many}"
        )
    distant = sum(train.far) + sum(unseen.far)
    if distant:
        notes.append(
            f"{distant} feature vectors are over {FAR:.0f} times as long as the median one and were left out "
            f"({sum(train.far)} training, {sum(unseen.far)} unseen)"
        )
    if dead:
        width = train.features.shape[1]
        notes.append(f"{dead} of {width} features are 0 in every row: read effective_rank, not the dimension")
    if split_bursts:
        notes.append(f"{split_bursts} bursts have rows both in train and in unseen: each side is permuted by itself")
    return notes


def class_notes(entries: Sequence[Entry], facts: Sequence[Facts], dropped: Sequence[int]) -> list[str]:
    """Return warnings about what could not be measured, or only badly, each naming its classes."""

    def named(condition: Sequence[bool]) -> str:
        return _named([e for e, true in zip(entries, condition, strict=True) if true])

    n = [e["train_count"] for e in entries]
    m = [e["unseen_count"] for e in entries]
    copies = sum(f.copies for f in facts)
    repeats = sum(f.repeats for f in facts)
    found = [
        (named([x > 0 for x in dropped]), "some vectors of length 0 were left out"),
        (
            named([x == 0 for x in n]),
            "no training vector with a direction and an ordinary length: nothing about training can be measured",
        ),
        (named([x == 0 for x in m]), "no unseen samples: shift, gap and escape not assessable"),
        (named([0 < x < FEW_UNSEEN for x in m]), f"fewer than {FEW_UNSEEN} unseen samples: comparisons are imprecise"),
        (named([x == 1 for x in n]), "1 training sample: spread, width, gap and escape undefined, see the group"),
        (
            named([1 < x < VERDICT_SAMPLES for x in n]),
            f"fewer than {VERDICT_SAMPLES} training samples: estimates without a verdict, see the group",
        ),
        (named([f.collapsed for f in facts]), "collapsed: all training vectors are one, shapes and ratios undefined"),
        (named([f.centerless for f in facts]), "a class mean is 0: angles to it are undefined"),
        (
            named([a > 4 * b > 0 for a, b in zip(n, m, strict=True)]),
            "training samples are over 80 % of the pool: chance values contain memorisation, read gap and displacement",
        ),
        (
            named([f.copies > 0 for f in facts]),
            f"{copies} unseen vectors copy a training vector of their class: gap and escape come out too small",
        ),
        (
            named([f.repeats > 0 for f in facts]),
            f"{repeats} vectors repeat another of their set and class: related rows make p-values too small "
            "unless they are permuted together as bursts",
        ),
    ]
    return [f"{text}: {names}" for names, text in found if names]


def verdict_notes(entries: Sequence[Entry], differing: Sequence[bool]) -> list[str]:
    """Return warnings about verdicts that depend on a convention, on label noise, or on the sheer number of samples."""
    noisy, small = [], []
    for entry in entries:
        flagged = entry["spread_gap_flagged"]
        if flagged and entry["spread_gap_trimmed_deg"] < entry["spread_gap_deg"] / 2:
            noisy.append(entry)
        if flagged and not entry["spread_gap_material"]:
            small.append(entry)
    differ = [entry for entry, does in zip(entries, differing, strict=True) if does]
    found = [
        (_named(noisy), "the gap halves without the furthest tenth of samples: it may be label noise among the unseen"),
        (_named(small), "significant but small gap (below 2 degrees, rank below 0.6)"),
        (_named(differ), "the verdict on the gap changes when centres average unit vectors instead of raw ones"),
    ]
    return [f"{text}: {names}" for names, text in found if names]


def undefined_notes(entries: Sequence[Entry]) -> list[str]:
    """Make NaN, and what is beyond `MOST`, None, in place, and return a warning for each field that held any."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        for field, value in entry.items():
            if not all(abs(v) <= MOST for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)):
                entry[field] = None
                found.setdefault(field, []).append(entry)
    return [
        f"{field} lies outside the range of numbers and is left undefined: {_named(e)}" for field, e in found.items()
    ]


def _named(entries: Sequence[Entry]) -> str:
    names = ", ".join(str(e["name"]) for e in entries[:NAMED])
    more = f" and {len(entries) - NAMED} more" if len(entries) > NAMED else ""
    return f"{names}{more}"
