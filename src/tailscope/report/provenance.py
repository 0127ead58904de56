"""How each row was trained: a card a row with its seeds side by side, and what surrounds a result file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tailscope.report.results import TRAINED, Result, Results
from tailscope.report.text import DASH, arrow, number, significant


@dataclass(frozen=True)
class Card:
    """One row's provenance: `fields` holds a field's value once where seeds agree, else one value a seed."""

    title: str
    summary: str
    seeds: Sequence[int | None]
    fields: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class ResultProvenance:
    """One result file: its verb, its facts, its full spec and a card a row."""

    verb: str
    facts: Sequence[tuple[str, str]]
    spec: str
    cards: Sequence[Card]


def by_result(results: Results) -> list[ResultProvenance]:
    """Return what is known about how each result file was made."""
    return [_of_result(verb, results[verb]) for verb in TRAINED if verb in results]


def _of_result(verb: str, result: Result) -> ResultProvenance:
    environment = result.get("environment", {})
    hardware = environment.get("hardware", {})
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    facts = [
        ("command", result.get("command")),
        ("written", result.get("created")),
        ("versions", versions),
        ("processor", f"{hardware.get('cpu') or DASH}, {hardware.get('cores') or DASH} cores"),
        ("accelerator", hardware.get("gpu") or "none"),
        ("arithmetic of backbones", _arithmetics(result["provenance"], "arithmetic")),
        ("arithmetic of classifiers", _arithmetics(result["provenance"], "stage2_arithmetic")),
        ("subset SHA-256", ", ".join(str(digest)[:16] for digest in _distinct(result.get("subset_sha256", [])))),
    ]
    spec = json.dumps(result.get("spec"), indent=2, ensure_ascii=False)
    return ResultProvenance(
        verb, [(name, str(value or DASH)) for name, value in facts], spec, _cards(result["provenance"])
    )


def _arithmetics(entries: Sequence[Result], field: str) -> str:
    """Return what the rows' stages were computed by, each once; more than one is worth a word."""
    found = _distinct(_text(field, entry[field]) for entry in entries if entry.get(field))
    return f"differs between rows or seeds: {'; '.join(found)}" if len(found) > 1 else "".join(found)


def _cards(entries: Sequence[Result]) -> list[Card]:
    by_row: dict[str, list[Result]] = {}
    for entry in entries:
        by_row.setdefault(str(entry.get("row")), []).append(entry)
    return [_card(row, members) for row, members in by_row.items()]


def _card(row: str, members: Sequence[Result]) -> Card:
    names = [name for name in _distinct(name for member in members for name in member) if name not in ("row", "seed")]
    fields = []
    for name in names:
        values = [_text(name, member.get(name)) for member in members]
        fields.append((name.replace("_", " "), values if len(set(values)) > 1 else values[:1]))
    seconds = [member["seconds"] for member in members if member.get("seconds") is not None]
    first = members[0]
    facts = [
        str(first.get("model") or DASH),
        f"{_text('epochs', first.get('epochs'))} epochs",
        f"{number(sum(seconds) / len(seconds))} s a seed" if seconds else "",
        "arithmetic differs between seeds" if len({str(member.get("arithmetic")) for member in members}) > 1 else "",
    ]
    seeds = [member.get("seed") for member in members]
    return Card(arrow(row), ", ".join(fact for fact in facts if fact), seeds, fields)


def _text(name: str, value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return f"{len(value)} values, {max(value)} to {min(value)}" if value else DASH
    if isinstance(value, dict):
        return ", ".join(DASH if part is None else str(part) for part in value.values())
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value) if name in ("seconds", "images_per_second") else significant(value, 6)
    return str(value)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
