"""Several encoders of the same images side by side, from a stored diagnosis: which is better, in words and tables.

Accuracies lead. Geometry follows, and never recommends: what favours an encoder whose accuracies are clearly worse is
said to be no advantage.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tailscope.groups import GROUPS
from tailscope.measures.fields import FEW_UNSEEN
from tailscope.report.diagnosis_schema import Compared, Comparison, Diagnosis, Differences
from tailscope.report.rows import Row, ends
from tailscope.report.schema import Points
from tailscope.report.text import DASH, Column, Table, in_points, listed, percent, with_interval

ASPECTS = {
    "localises": "localises unseen samples better",
    "separates": "separates classes more",
    "compacts": "keeps classes more compact",
    "margin": "has the larger margin for its spread",
}
KINDS = {
    "current": "in use",
    "rebalanced": "re-balanced",
    "attained": "best fitted",
    "extrapolated": "classifier bound",
}

STANDINGS = (
    Column("encoder", "encoder"),
    Column("conclusion", "against the first", "text", "Whether it is clearly better or worse than the first encoder."),
    Column("current", "in use", "share", "Accuracy of the classifier in use."),
    Column("rebalanced", "re-balanced", "share", "Accuracy of the best remedy."),
    Column("attained", "best fitted", "share", "Accuracy of the best classifier of the samples that are there."),
    Column("extrapolated", "classifier bound", "share", "Accuracy of a classifier of as many samples of every class."),
    *(
        Column(
            f"{kind}_gap", f"{label}, difference", "points", "From the first encoder.", (f"{kind}_low", f"{kind}_high")
        )
        for kind, label in KINDS.items()
    ),
)
COMPARISON = (
    Column("encoder", "encoder"),
    Column("of", "classes"),
    Column("aspect", "aspect"),
    Column("difference", "difference", "plain", "From the first encoder, with its paired 95 % interval."),
    Column("low", "from", "plain"),
    Column("high", "to", "plain"),
    Column("better", "favours", "text", "Where the interval excludes 0."),
    Column("note", "note", "text", "What limits it."),
)


# ---- rows


def standings(result: Diagnosis) -> list[Row]:
    """Return one row an encoder, the best first: its accuracies, their differences from the first, what follows."""
    stored, every = result["comparison"], result.get("encoders") or {}
    assert stored is not None
    reference = stored["reference"]
    found = []
    for name in stored.get("ranking") or [reference, *stored["encoders"]]:
        entry = stored["encoders"].get(name)
        own = every[name]["accuracy"] if name in every else None
        row: Row = {"encoder": name, **_accuracies(own)}
        differences: Any = (entry and entry["accuracy"]) or {}
        for kind in KINDS:
            gap: Points | None = differences.get(kind)
            row |= {f"{kind}_gap": gap and gap["points"], **ends(kind, gap and gap["ci95"])}
        found.append(row | {"conclusion": None if entry is None else _in_short(entry)})
    return found


def dots(result: Diagnosis) -> list[Row]:
    """Return one row an encoder and accuracy, the best encoder first: its mean and interval, as numbers and text."""
    found: list[Row] = []
    for row in standings(result) if result.get("comparison") else []:
        encoders: Mapping[str, Any] = result.get("encoders") or {}
        stored = encoders.get(row["encoder"], {}).get("accuracy")
        for kind, label in KINDS.items():
            if stored is not None and row[kind] is not None:
                bounds = _cell(stored, kind)["ci95"]
                about = {"encoder": row["encoder"], "kind": label, "mean": row[kind], **ends("ci", bounds)}
                short = percent(row[kind])
                text = {"short": short, "text": with_interval(short, bounds)}
                found.append({**about, **text, "label_at": bounds[1] if bounds else row[kind]})
    return found


def _cell(stored: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return one of an encoder's own accuracies with its interval; an empty mean where it is not known."""
    bound = stored["classifier_bound"]
    cells: Mapping[str, Mapping[str, Any]] = {"attained": bound, "extrapolated": bound.get("extrapolated") or {}}
    own: Mapping[str, Mapping[str, Any]] = {**stored, **cells}
    return own[kind]


def _accuracies(stored: Mapping[str, Any] | None) -> Row:
    """Return one encoder's own accuracies."""
    if stored is None:
        return dict.fromkeys(KINDS)
    return {kind: _cell(stored, kind).get("mean") for kind in KINDS}


def _in_short(entry: Compared) -> str:
    if entry["accuracy"] is None:
        return "not measured"
    if entry.get("reason"):
        return "cannot be said"
    return {"other": "better", "reference": "worse"}.get(entry.get("better") or "", "no clear difference")


def comparisons(result: Diagnosis) -> list[Row]:
    """Return one row an encoder, group and aspect, accuracies first: its difference from the first, whom it favours."""
    if (stored := result.get("comparison")) is None:
        return []
    found: list[Row] = []
    for encoder, entry in stored["encoders"].items():
        names: dict[str | None, str] = {"reference": stored["reference"], "other": encoder}
        for group, part in (("all", entry["accuracy"]), *entry.get("by_group", {}).items()):
            found += [{"encoder": encoder, "of": group, **row} for row in _of_accuracies(part, names)]
        for group, aspects in entry["groups"].items():
            for aspect, one in aspects.items():
                about = {"encoder": encoder, "of": group, "aspect": aspect, "note": one.get("note")}
                found.append(about | _difference(one["difference"], one["ci95"]) | {"better": names.get(one["better"])})
    return found


def _of_accuracies(part: Differences | None, names: Mapping[str | None, str]) -> Iterator[Row]:
    for kind, label in KINDS.items():
        stored: Any = part or {}
        gap: Points | None = stored.get(kind, stored.get("classifier_bound") if kind == "attained" else None)
        if gap is None and kind != "extrapolated":
            continue
        points, ci95 = (gap["points"], gap["ci95"]) if gap else (None, None)
        few = stored.get("scored", FEW_UNSEEN) < FEW_UNSEEN
        better = None if ci95 is None or few else "reference" if ci95[1] < 0 else "other" if ci95[0] > 0 else None
        note = f"fewer than {FEW_UNSEEN} scored samples" if few else stored.get("reason") if gap is None else None
        about = {"aspect": f"accuracy, {label} (points)", "better": names.get(better), "note": note}
        if gap is not None or note:
            yield about | _difference(points, ci95, 100)


def _difference(value: float | None, ci95: Sequence[float] | None, scale: float = 1.0) -> Row:
    found = zip(("difference", "low", "high"), (value, *(ci95 or (None, None))), strict=True)
    return {name: None if number is None else scale * number for name, number in found}


def tables(result: Diagnosis) -> list[Table]:
    """Return the encoders in one table, and every difference in another; none where there is one encoder."""
    if (stored := result.get("comparison")) is None:
        return []
    title = f"Encoders against {stored['reference']}"
    return [
        Table("diagnosis-encoders", title, STANDINGS, standings(result)),
        Table("diagnosis-comparison", f"{title}, every difference", COMPARISON, comparisons(result)),
    ]


def lines(result: Diagnosis) -> list[tuple[str, ...]]:
    """Return the encoders as lines of text, under a heading: name, accuracies, and what follows."""
    if (stored := result.get("comparison")) is None or not stored.get("text"):
        return []
    heading = ("", *KINDS.values(), f"against {stored['reference']}")
    found = [(r["encoder"], *(percent(r[kind]) for kind in KINDS), r["conclusion"] or DASH) for r in standings(result)]
    return [heading, *found]


# ---- sentences


def headline(stored: Comparison) -> str:
    """Return which encoder is better in a few words; empty in results from before this was asked.

    >>> headline({"reference": "a", "encoders": {}, "text": "“b” is the best of 3 encoders: clearly better than “a”."})
    '“b” is the best of 3 encoders'
    """
    text = stored.get("text", "").partition(": ")[0].removesuffix(".")
    first = next(iter(stored["encoders"].values()), None)
    if len(stored["encoders"]) == 1 and first and first.get("better"):
        text += f", by {in_points(*_oriented(first))}"
    return text


def _oriented(entry: Compared) -> tuple[float | None, list[float] | None]:
    """Return the difference that decided as that of the better encoder minus the worse."""
    points, ci95 = entry.get("points"), entry.get("ci95")
    if entry.get("better") == "other" or points is None:
        return points, ci95
    return -points, ci95 and [-ci95[1], -ci95[0]]


def findings(result: Diagnosis) -> list[str]:
    """Return which encoder is better, then by group, then what geometry adds."""
    if (stored := result.get("comparison")) is None:
        return []
    reference, text = stored["reference"], stored.get("text")
    order = [name for name in stored.get("ranking", []) if name in stored["encoders"]] or list(stored["encoders"])
    found = [_explained(text)] if text else []
    for name in order[:1]:  # of several, the best beside the first; the table has the others
        entry = stored["encoders"][name]
        found += [entry["text"]] if len(stored["encoders"]) > 1 and entry.get("text") else []
        found += [*_by_group(reference, name, entry), *_geometry(reference, name, entry)]
    return found


def _explained(text: str) -> str:
    """Return what follows the `headline` of a text, or all of it.

    >>> _explained("No clear difference between “a” and “b”: what they reach ...")
    'What they reach ...'
    """
    rest = text.partition(": ")[2]
    return f"{rest[0].upper()}{rest[1:]}" if rest else text


def _by_group(reference: str, name: str, entry: Compared) -> list[str]:
    parts = {group: part for group, part in entry.get("by_group", {}).items() if part}
    ahead: dict[str, list[str]] = {"other": [], "reference": []}
    for group, part in parts.items():
        if part.get("better"):
            ahead[str(part["better"])].append(group)
    told = [
        f"“{who}” is clearly better in the {listed(ahead[side])}"
        for side, who in (("other", name), ("reference", reference))
        if ahead[side]
    ]
    rest = [group for group in parts if not any(group in groups for groups in ahead.values())]
    if told and rest:
        told.append(f"no difference is clear in the {listed(rest)}")
    return [f"By group: {', '.join(told)}."] if told else []


def _geometry(reference: str, name: str, entry: Compared) -> list[str]:
    """Return whom the geometry of the tail favours, as far as accuracies do not call that encoder the worse one."""
    if entry.get("reason") and entry["accuracy"] is not None:
        return []  # the files may not belong together
    favoured: dict[str, list[str]] = {name: [], reference: []}
    idle: dict[str, list[str]] = {name: [], reference: []}
    for aspect, one in entry["groups"].get(GROUPS[-1], {}).items():
        if one["better"] in ("other", "reference"):
            who = name if one["better"] == "other" else reference
            (idle if one.get("note") else favoured)[who].append(ASPECTS[aspect])
    decided = any(idle.values()) or bool(entry.get("better"))
    found = [
        f"The geometry of the tail agrees: “{who}” {listed(does)}."
        if decided
        else f"In the tail, “{who}” {listed(does)}; that alone does not make it the better encoder."
        for who, does in favoured.items()
        if does
    ]
    return found + [
        f"In the tail, “{who}” {listed(does)}, which is no advantage here: its features tell classes apart less."
        for who, does in idle.items()
        if does
    ]
