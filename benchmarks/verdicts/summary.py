"""What the cases say together: each promise with its count and interval, beside the rule of before; and the page."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tailscope.intervals import Z, proportion

Record = dict[str, Any]
UNDECIDED = "undecided"
LEAST = 0.03  # a gap below this is nobody's bottleneck: verdicts are not required there
POINT = 0.01
OLD_REMEDIES = re.compile(r"(logit_adjustment|tau_norm)\(.*\)|ncm|crt|crt\(l2=0\.001\)")

# -- one case ---------------------------------------------------------------------------------------------------------


def covers(ci95: Sequence[float] | None, middle: float, true: float, error: float) -> bool | None:
    """Whether an interval holds the truth, which was itself measured with an error: None without an interval.

    Each half of the interval is widened by the truth's own error, in quadrature.

    >>> covers([0.4, 0.6], 0.5, 0.61, 0.0), covers([0.4, 0.6], 0.5, 0.61, 0.03)
    (False, True)
    """
    if ci95 is None:
        return None
    own = Z * error
    low, high = (np.hypot(end - middle, own) for end in ci95)
    return bool(middle - low <= true <= middle + high)


def strictly(ci95: Sequence[float] | None, true: float) -> bool | None:
    """Whether an interval holds the number that was measured for the truth."""
    return None if ci95 is None else ci95[0] <= true <= ci95[1]


def required(record: Record, verdict: Record) -> bool:
    """Whether a verdict is promised: the larger gap 4 times the smaller and m at least 25, or 2 times and 100."""
    gaps = sorted((float(verdict["classifier_gap"]), float(verdict["representation_gap"])))
    if gaps[1] < LEAST:
        return False
    ratio, slack = gaps[1] / max(gaps[0], 1e-9), 1e-6  # a planted ratio is exact up to rounding
    return bool(any(ratio >= least - slack and record["held_out"] >= m for least, m in ((4, 25), (2, 100))))


def wrong(said: str, true: float) -> bool:
    """Whether a verdict was given, and for the wrong side."""
    return said != UNDECIDED and bool((said == "classifier") != (true > 0))


def rule_before(verdict: Record) -> str:
    """Return the verdict of before: by the naive bound, a representation only where the test of spread rejects."""
    naive: str = verdict["naive"]
    return UNDECIDED if naive == "representation" and not verdict["spread_rejects"] else naive


def advice_is_good(record: Record, chosen: str) -> bool:
    """Whether a remedy is the best on untouched samples, or within a point of it."""
    reached = {name: two[1] for name, two in record["remedies"].items()}
    best: float = max(*reached.values(), record["current"]["true"])
    return bool(reached[chosen] >= best - POINT)


def advised_before(record: Record) -> str:
    """Return the best, on held-out samples, of the remedies that there were before."""
    old: dict[str, float] = {name: two[0] for name, two in record["remedies"].items() if OLD_REMEDIES.fullmatch(name)}
    return max(old, key=old.__getitem__)


# -- all of them ------------------------------------------------------------------------------------------------------


def summarise(records: Sequence[Record]) -> Record:
    """Return the promises, what each source and each m contributes, the mistakes, and the agreement with `swap`."""
    if not records:
        return {"cases": 0}
    sources = dict.fromkeys(record["source"] for record in records)
    sizes = sorted({record["held_out"] for record in records})
    return {
        "cases": len(records),
        "verdicts": sum(len(record["verdicts"]) for record in records),
        "promises": promises(records),
        "by_source": {name: _part([r for r in records if r["source"] == name]) for name in sources},
        "by_held_out": {str(m): _part([r for r in records if r["held_out"] == m]) for m in sizes},
        "by_test": {
            name: _part([r for r in records if r["test"] is test])
            for name, test in (("cross-fitted", False), ("with a test file", True))
            if any(r["test"] is test for r in records)
        },
        "by_ceiling": by_ceiling(records),
        "kinds": kinds(records),
        "swap": agreement(records),
        "mistakes": [*_mistakes(records)],
    }


def promises(records: Sequence[Record]) -> list[Record]:
    """Return each promise: how often it is kept, by this rule and by the one of before."""
    judged = [(record, verdict) for record in records for verdict in record["verdicts"]]
    due = [(record, verdict) for record, verdict in judged if required(record, verdict)]
    bounds = [record["bound"] for record in records]
    gains = [record["gain"] for record in records]
    return [
        _promise(
            "bound: interval covers the truth",
            (covers(b["ci95"], b["extrapolated"], b["true"], b["true_error"]) for b in bounds if b["ci95"]),
            (covers(b["naive"], sum(b["naive"]) / 2, b["true"], b["true_error"]) for b in bounds),
            0.9,
        ),
        _promise(
            "the same, the truth taken as exact",
            (strictly(b["ci95"], b["true"]) for b in bounds),
            (strictly(b["naive"], b["true"]) for b in bounds),
        ),
        _promise(
            "bound: “at least” holds",
            (b["attained_ci95"][0] <= b["true"] + Z * b["true_error"] for b in bounds),
            (b["naive"][0] <= b["true"] + Z * b["true_error"] for b in bounds),
        ),
        _promise("bound: known, not a lower limit only", (b["ci95"] is not None for b in bounds), ()),
        _promise(
            "verdicts against the true sign",
            (wrong(v["bottleneck"], v["true"]) for _, v in judged),
            (wrong(rule_before(v), v["true"]) for _, v in judged),
            0.0,
        ),
        _promise(
            "decided where promised",
            (v["bottleneck"] != UNDECIDED for _, v in due),
            (rule_before(v) != UNDECIDED and not wrong(rule_before(v), v["true"]) for _, v in due),
            0.8,
        ),
        _promise(
            "advised gain: interval covers the truth",
            (covers(g["ci95"], g["points"], g["true"], g["true_error"]) for g in gains),
            (),
            0.9,
        ),
        _promise("the same, the truth taken as exact", (strictly(g["ci95"], g["true"]) for g in gains), ()),
        _promise(
            "advised remedy is the best or within a point",
            (advice_is_good(r, r["advised"]) for r in records),
            (advice_is_good(r, advised_before(r)) for r in records),
            0.8,
        ),
    ]


def _promise(
    name: str, after: Iterable[bool | None], before: Iterable[bool | None], goal: float | None = None
) -> Record:
    counts = [_count(outcomes) for outcomes in (after, before)]
    reached = None
    if goal is not None and counts[0] is not None:
        share = counts[0]["share"]
        reached = bool(share <= 0 if goal == 0 else share >= goal)
    return {"name": name, "goal": goal, "reached": reached, "after": counts[0], "before": counts[1]}


def _count(outcomes: Iterable[bool | None]) -> Record | None:
    """Return how many are true, of how many that are known, and the share with Wilson's interval."""
    known = [bool(one) for one in outcomes if one is not None]
    if not known:
        return None
    found = proportion([[float(one) for one in known]])
    return {"hits": sum(known), "of": len(known), "share": found.estimate, "ci95": list(found.ci95 or (0.0, 1.0))}


def _part(records: Sequence[Record]) -> Record:
    """Return what some of the cases contribute."""
    known = [r["bound"] for r in records if r["bound"]["ci95"]]
    due = [v for r in records for v in r["verdicts"] if required(r, v)]
    gains = [r["gain"] for r in records]
    return {
        "cases": len(records),
        "truth": _mean(r["bound"]["true"] for r in records),
        "current": _mean(r["current"]["true"] for r in records),
        "known": len(known),
        "covered": sum(bool(covers(b["ci95"], b["extrapolated"], b["true"], b["true_error"])) for b in known),
        "bias": _mean(b["extrapolated"] - b["true"] for b in known),
        "width": _mean(b["ci95"][1] - b["ci95"][0] for b in known),
        "naive_bias": _mean(sum(r["bound"]["naive"]) / 2 - r["bound"]["true"] for r in records),
        "due": len(due),
        "decided": sum(v["bottleneck"] != UNDECIDED for v in due),
        "wrong": sum(wrong(v["bottleneck"], v["true"]) for r in records for v in r["verdicts"]),
        "gains_covered": sum(bool(covers(g["ci95"], g["points"], g["true"], g["true_error"])) for g in gains),
        "advice_good": sum(advice_is_good(r, r["advised"]) for r in records),
        "withheld": sum(bool(r["withheld"]) for r in records),
        "seconds": _mean(r["seconds"] for r in records),
    }


SIZES = {"m below 25": (0, 25), "25 to 99": (25, 100), "100 or more": (100, np.inf)}


def by_ceiling(records: Sequence[Record]) -> dict[str, Record]:
    """Return, for each kind of ceiling, how many verdicts were given, by m, and how many of them were wrong."""
    found = {}
    for of in dict.fromkeys(v["of"] for r in records for v in r["verdicts"]):
        judged = [(r["held_out"], v) for r in records for v in r["verdicts"] if v["of"] == of]
        given: Record = {}
        for name, (low, high) in SIZES.items():
            some = [v["bottleneck"] != UNDECIDED for m, v in judged if low <= m < high]
            given[name] = [sum(some), len(some)]
        found[of] = given | {
            "wrong": sum(wrong(v["bottleneck"], v["true"]) for _, v in judged),
            "naive decided": sum(v["naive"] != UNDECIDED for _, v in judged),
            "naive wrong": sum(wrong(v["naive"], v["true"]) for _, v in judged),
        }
    return found


def _mean(values: Iterable[float]) -> float | None:
    found = [*values]
    return float(np.mean(found)) if found else None


def kinds(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Return, for frozen and trained encoders, which kinds the verdicts "representation" gave."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        for verdict in record["verdicts"]:
            if verdict["bottleneck"] == "representation":
                kind, counts = verdict["kind"] or "not known", found.setdefault(record["encoder"], {})
                counts[kind] = counts.get(kind, 0) + 1
    return found


def agreement(records: Sequence[Record]) -> list[Record]:
    """Return, for each encoder that `swap` divided the gap of, its division and the verdicts under the same ceiling."""
    found = []
    for name in dict.fromkeys(record["source"] for record in records if record["swap"]):
        cases = [record for record in records if record["source"] == name]
        said = [v["bottleneck"] for r in cases for v in r["verdicts"] if v["of"] == "swap"]
        shares = cases[0]["swap"]
        larger = "classifier" if shares["classifier"] > shares["representation"] else "representation"
        found.append(
            {
                "source": name,
                **shares,
                "larger": larger,
                "bound": _mean(r["bound"]["true"] for r in cases),
                "same": said.count(larger),
                "other": len(said) - said.count(larger) - said.count(UNDECIDED),
                "undecided": said.count(UNDECIDED),
            }
        )
    return found


def _mistakes(records: Sequence[Record]) -> Iterable[Record]:
    for record in records:
        bound, gain = record["bound"], record["gain"]
        if covers(bound["ci95"], bound["extrapolated"] or 0, bound["true"], bound["true_error"]) is False:
            yield {"case": record["case"], "what": "bound", "said": bound["ci95"], "true": bound["true"]}
        if covers(gain["ci95"], gain["points"], gain["true"], gain["true_error"]) is False:
            yield {"case": record["case"], "what": f"gain of {record['advised']}", "said": gain["ci95"], **_true(gain)}
        for verdict in record["verdicts"]:
            if wrong(verdict["bottleneck"], verdict["true"]):
                what = f"verdict {verdict['bottleneck']}, ceiling {verdict['of']}"
                yield {"case": record["case"], "what": what, "said": verdict["difference"]["ci95"], **_true(verdict)}
        if record["withheld"]:
            yield {"case": record["case"], "what": f"withheld: {record['withheld'][0]}", "said": None, "true": None}


def _true(measured: Record) -> Record:
    return {"true": measured["true"]}


# -- the page ---------------------------------------------------------------------------------------------------------


def table(document: Record) -> str:
    """Return a result as Markdown."""
    found = document["summary"]
    if not found["cases"]:
        return "*No case was examined.*"
    parts = [
        *([] if document["complete"] else ["**Not complete: the same command goes on.**"]),
        f"{found['cases']} cases, {found['verdicts']} verdicts.",
        _rows(("promise", "now", "before", "goal", ""), map(_promise_row, found["promises"])),
        "Where the cases come from:",
        _rows(PART_HEAD, (_part_row(name, part) for name, part in found["by_source"].items())),
        "By held-out samples a class, and by what is scored:",
        _rows(PART_HEAD, (_part_row(f"m = {m}", part) for m, part in found["by_held_out"].items())),
        _rows(PART_HEAD, (_part_row(name, part) for name, part in found["by_test"].items())),
        "Verdicts given, by the ceiling that was planted (its representation gap over the classifier gap) and by m; "
        "“naive” takes the naive bound's side without the test of spread:",
        _rows(("ceiling", *SIZES, "wrong", "naive: given", "wrong"), _ceiling_rows(found["by_ceiling"])),
        _kinds(found["kinds"]),
        *_swap(found["swap"]),
        *_missed(found["mistakes"]),
        *(f"Skipped: {entry['source']}: {entry['reason']}." for entry in document["skipped"]),
        _caption(document),
    ]
    return "\n\n".join(parts)


PART_HEAD = (
    "", "cases", "truth", "in use", "bound known", "covered", "bias", "width", "naive bias", "decided where promised",
    "wrong", "gains covered", "advice good", "s",
)  # fmt: skip


def _promise_row(promise: Record) -> list[str]:
    goal, reached = promise["goal"], promise["reached"]
    return [
        promise["name"],
        _share(promise["after"]),
        _share(promise["before"]),
        "" if goal is None else "none" if goal == 0 else f"≥ {100 * goal:.0f} %",
        "" if reached is None else "reached" if reached else "**missed**",
    ]


def _share(count: Record | None) -> str:
    if count is None:
        return ""
    low, high = (100 * end for end in count["ci95"])
    return f"{count['hits']} of {count['of']}: {100 * count['share']:.1f} % [{low:.0f}, {high:.0f}]"


def _part_row(name: str, part: Record) -> list[str]:
    percent, points = _scaled("{:.1f}"), _scaled("{:+.1f}")
    return [
        name, str(part["cases"]), percent(part["truth"]), percent(part["current"]), str(part["known"]),
        str(part["covered"]), points(part["bias"]), percent(part["width"]), points(part["naive_bias"]),
        f"{part['decided']} of {part['due']}", str(part["wrong"]), str(part["gains_covered"]), str(part["advice_good"]),
        f"{part['seconds']:.1f}",
    ]  # fmt: skip


def _ceiling_rows(found: dict[str, Record]) -> Iterable[list[str]]:
    names = {"1": "100 %", "swap": "that of `swap`"}
    for of, row in found.items():
        given = [f"{row[name][0]} of {row[name][1]}" for name in SIZES]
        rest = [str(row[name]) for name in ("wrong", "naive decided", "naive wrong")]
        yield [names.get(of, of), *given, *rest]


def _scaled(form: str) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else form.format(100 * value)


def _kinds(found: dict[str, dict[str, int]]) -> str:
    texts = [
        f"{name} encoders: " + ", ".join(f"{kind} {n}" for kind, n in sorted(counts.items()))
        for name, counts in found.items()
    ]
    return f"Kinds of the verdicts “representation”: {'; '.join(texts)}." if texts else "No verdict “representation”."


def _swap(found: Sequence[Record]) -> list[str]:
    if not found:
        return []
    head = (
        "encoder", "lt → lt", "lt → true", "true bound", "true → true", "classifier", "representation", "order decides",
        "verdicts of the same side", "other", "undecided",
    )  # fmt: skip
    points = _scaled("{:.1f}")
    rows = (
        [
            one["source"], *(points(one["cells"][cell]) for cell in ("lt->lt", "lt->true")), points(one["bound"]),
            points(one["cells"]["true->true"]),
            points(one["classifier"]), points(one["representation"]), "yes" if one["order_matters"] else "no",
            str(one["same"]), str(one["other"]), str(one["undecided"]),
        ]
        for one in found
    )  # fmt: skip
    return ["Beside `swap`, which trains the other encoder too: its division of the gap, and verdicts with the accuracy"
            " of that encoder as the ceiling:", _rows(head, rows)]  # fmt: skip


def _missed(found: Sequence[Record]) -> list[str]:
    if not found:
        return []
    rows = []
    for one in found:
        numbers = f", said {_interval(one['said'])}, true {100 * one['true']:.1f}" if one["said"] else ""
        rows.append(f"- {one['case']}: {one['what']}{numbers}")
    return [f"<details markdown><summary>All {len(found)} misses</summary>", "\n".join(rows), "</details>"]


def _interval(ci95: Sequence[float]) -> str:
    return f"[{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _caption(document: Record) -> str:
    environment, seconds = document["environment"], document["seconds"]
    machine = f"{environment['hardware']['cpu']}, {environment['hardware']['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    recalled = f" ({document['recalled']} cases were there before)" if document["recalled"] else ""
    minutes, of_cores = (seconds[name] / 60 for name in ("this run", "cases"))
    return (
        f"{document['created'][:10]}, {machine}, {packages}; {document['size']} size, {minutes:.1f} minutes{recalled}; "
        f"diagnosing all cases takes {of_cores:.1f} minutes of one core."
    )
