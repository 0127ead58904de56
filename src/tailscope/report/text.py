"""Numbers as readers see them: per cent, points, degrees, intervals. Undefined is an en dash, never 0."""

import re
from collections.abc import Sequence
from typing import Any

DASH = "–"
MINUS = "\u2212"
# Control characters, which XML cannot hold, and halves of surrogate pairs, which UTF-8 cannot.
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")


def writable(value: Any) -> Any:
    r"""Return a JSON value whose texts fit into any file: names of classes may hold anything.

    The library that draws the figures ends the whole process at characters that XML does not know.

    >>> writable({"names": ["a", "b\x1b[31m"], "n": 3})
    {'names': ['a', 'b�[31m'], 'n': 3}
    """
    if isinstance(value, str):
        return UNWRITABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [writable(item) for item in value]
    if isinstance(value, dict):
        return {writable(key): writable(item) for key, item in value.items()}
    return value


def number(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """Return `value` with `digits` decimals and a real minus sign; an en dash where it is undefined.

    >>> number(-0.26, 1), number(None), number(-0.01, 1), number(12406, 0), number(0.26, signed=True)
    ('−0.3', '–', '0.0', '12,406', '+0.3')
    """
    if value is None:
        return DASH
    rounded = float(f"{value:.{digits}f}") + 0.0  # which is never -0
    return f"{rounded:{'+' if signed else ''},.{digits}f}".replace("-", MINUS)


def significant(value: float | None, digits: int = 3) -> str:
    """Return `value` with that many significant digits, for quantities without a natural scale.

    >>> significant(12.3456), significant(0.000123), significant(None)
    ('12.3', '0.000123', '–')
    """
    return DASH if value is None else f"{value:.{digits}g}".replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in per cent.

    >>> percent(0.7212), percent(None)
    ('72.1 %', '–')
    """
    return DASH if value is None else f"{number(100 * value, digits)} %"


def points(value: float | None, *, signed: bool = False) -> str:
    """Return a difference of fractions in percentage points.

    >>> points(0.209)
    '20.9'
    """
    return DASH if value is None else number(100 * value, signed=signed)


def interval(bounds: Sequence[float] | None, digits: int = 1, scale: float = 100.0) -> str:
    """Return an interval in brackets, times `scale`; nothing where there is none.

    >>> interval([0.184, 0.2335]), interval(None)
    ('[18.4, 23.4]', '')
    """
    if bounds is None:
        return ""
    low, high = (number(scale * bound, digits) for bound in bounds)
    return f"[{low}, {high}]"


def with_interval(value: str, bounds: Sequence[float] | None, digits: int = 1, scale: float = 100.0) -> str:
    """Return an already written value, followed by its interval if it has one.

    >>> with_interval("61 %", [0.52, 0.70], digits=0)
    '61 % [52, 70]'
    """
    return f"{value} {interval(bounds, digits, scale)}".rstrip()


def in_points(value: float | None, ci95: Sequence[float] | None, *, signed: bool = False) -> str:
    """Return a difference of accuracies with its interval.

    >>> in_points(0.209, [0.184, 0.2335]), in_points(0.012, None, signed=True)
    ('20.9 points [18.4, 23.4]', '+1.2 points')
    """
    return with_interval(f"{points(value, signed=signed)} points", ci95)


def accuracy(mean: float | None, ci95: Sequence[float] | None) -> str:
    """Return an accuracy with its interval.

    >>> accuracy(0.7212, [0.7, 0.74])
    '72.1 % [70.0, 74.0]'
    """
    return with_interval(percent(mean), ci95)


def p_value(value: float | None) -> str:
    """Return a p or q value.

    >>> p_value(0.0004), p_value(0.031)
    ('<0.001', '0.031')
    """
    if value is None:
        return DASH
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "seed"), plural(3, "class")
    ('1 seed', '3 classes')
    """
    suffix = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{suffix}"


def listed(items: Sequence[Any]) -> str:
    """Return items as prose.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def arrow(cell: str) -> str:
    """Return the name of a cell as prose.

    >>> arrow("true->lt")
    'true → lt'
    """
    return cell.replace("->", " → ")
