"""Reading the stored results of one directory. The report reads nothing else and computes no experiment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailscope.errors import UserError
from tailscope.report import schema
from tailscope.report.text import writable
from tailscope.result_files import read_json

Result = dict[str, Any]
Results = Mapping[str, Result]

TRAINED = ("swap", "ladder", "geometry")


def load(out: Path | str) -> dict[str, Result]:
    """Read the result files in `out`, by verb.

    Raises:
        UserError: there is none, or one is not what its verb writes; the line names file and field.
    """
    out = Path(out)
    found = {verb: out / f"{verb}.json" for verb in (*TRAINED, "claims") if (out / f"{verb}.json").exists()}
    if not any(verb in found for verb in TRAINED):
        names = ", ".join(f"{verb}.json" for verb in TRAINED)
        raise UserError(f"{out}: no results to report; run one of the verbs that write {names}")
    return {verb: read(path, verb) for verb, path in found.items()}


def first(results: Results) -> Result:
    """Return the result that describes the data: swap's, else the first of the others."""
    return next(results[verb] for verb in TRAINED if verb in results)


def mismatches(results: Results) -> list[str]:
    """Return a warning for each file that another data set, profile or recipe made than the first."""
    reference = first(results)
    name = next(verb for verb in TRAINED if verb in results)
    found = []
    for verb in TRAINED:
        if verb not in results:
            continue
        for field, here, there in _identity(reference, results[verb]):
            if here != there:
                found.append(f"{verb}.json and {name}.json differ in their {field}: do not compare their numbers")
    return found


def ranks(counts: list[int]) -> list[int]:
    """Return each class's frequency rank: 1 has the most training images, ties by index.

    >>> ranks([5, 50, 5])
    [2, 1, 3]
    """
    order = sorted(range(len(counts)), key=lambda k: (-counts[k], k))
    rank = [0] * len(counts)
    for position, k in enumerate(order, start=1):
        rank[k] = position
    return rank


def _identity(a: Result, b: Result) -> list[tuple[str, Any, Any]]:
    return [
        ("data set", a["dataset"]["name"], b["dataset"]["name"]),
        ("counts", a["counts"], b["counts"]),
        ("recipe", a["recipe"]["name"], b["recipe"]["name"]),
    ]


def read(path: Path, verb: str) -> Result:
    """Read a result file of a verb, whoever wrote it.

    Raises:
        UserError: it cannot be read, or is not what the verb writes; the line names file and field.
    """
    try:
        result = writable(read_json(path))
    except UserError as error:
        raise UserError(f"{error}; {schema.AGAIN}") from None
    schema.check(path, result, verb)
    found: Result = result
    return found
