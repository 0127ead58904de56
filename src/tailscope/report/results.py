"""Reading the stored results of one directory. The report reads nothing else and computes no experiment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailscope.errors import UserError
from tailscope.report.text import writable

Result = dict[str, Any]
Results = Mapping[str, Result]

COMMON = (
    "schema",
    "dataset/name",
    "dataset/class_names",
    "recipe/name",
    "recipe/card",
    "recipe/converged",
    "counts",
    "groups",
    "groups_rule",
    "seeds",
    "warnings",
    "provenance",
)

PARTS = ("gap", "gap_ci95", "representation", "classifier", "interaction", "interaction_ci95")

# What each verb's file must hold, with the path of each field; `*` is every entry. A new verb is added here, in
# `story`, `charts` and the template.
REQUIRED: dict[str, tuple[str, ...]] = {
    "swap": (
        *COMMON,
        *(f"cells/*/{field}" for field in ("accuracy", "mean", "ci95", "per_class", "groups")),
        "attribution",
    ),
    "ladder": (*COMMON, "augmentations"),
    "geometry": (*COMMON, "encoders/*/seeds", "encoders/*/mean/paper/classes", "encoders/*/mean/calibrated/classes"),
    "claims": ("schema", "claims"),
}
# A swap without one of its backbones has fewer cells and null for the attribution.
WHOLE_SWAP = (
    *(f"cells/{b}->{c}" for b in ("lt", "true") for c in ("lt", "true")),
    *(f"attribution/{part}" for part in PARTS),
)
TRAINED = ("swap", "ladder", "geometry")


def load(out: Path | str) -> dict[str, Result]:
    """Read the result files in `out`, by verb.

    Raises:
        UserError: there is none, or one is truncated, of an unknown schema, or lacks a field.
    """
    out = Path(out)
    found = {verb: out / f"{verb}.json" for verb in REQUIRED if (out / f"{verb}.json").is_file()}
    if not any(verb in found for verb in TRAINED):
        names = ", ".join(f"{verb}.json" for verb in TRAINED)
        raise UserError(f"{out}: no results to report; run one of the verbs that write {names}")
    return {verb: _read(path, verb) for verb, path in found.items()}


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


def _read(path: Path, verb: str) -> Result:
    try:
        result = writable(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the verb again with --overwrite") from None
    schema = f"tailscope.{verb}/1"
    if not isinstance(result, dict) or result.get("schema") != schema:
        found = result.get("schema") if isinstance(result, dict) else type(result).__name__
        raise UserError(
            f"{path}: field 'schema' is {found!r}, expected {schema!r}; run the verb again with --overwrite"
        )
    _check_fields(path, result, verb)
    return result


def _check_fields(path: Path, result: Result, verb: str) -> None:
    required = REQUIRED[verb]
    if verb == "swap" and result.get("attribution") is not None:
        required += WHOLE_SWAP
    for field in required:
        missing = _missing(result, field.split("/"))
        if missing is not None:
            raise UserError(f"{path}: field '{missing}' is missing; run the verb again with --overwrite")
    if verb == "claims":
        return
    lengths = {
        "counts": len(result["counts"]),
        "groups": len(result["groups"]),
        "dataset.class_names": len(result["dataset"]["class_names"]),
    }
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{field} {length}" for field, length in lengths.items())
        raise UserError(f"{path}: fields of different lengths ({text}); run the verb again with --overwrite")


def _missing(node: Any, steps: list[str]) -> str | None:
    """Return the path of the first field on the way that is not there, None if all are."""
    if not steps:
        return None
    names = list(node) if steps[0] == "*" and isinstance(node, dict) else steps[:1]
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return name
        below = _missing(node[name], steps[1:])
        if below is not None:
            return f"{name}.{below}"
    return None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")
