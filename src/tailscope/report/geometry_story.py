"""What the geometry of the features says, in plain English."""

from tailscope.report import geometry_rows, rows
from tailscope.report.results import Results
from tailscope.report.text import listed, number, percent, plural, significant

Row = rows.Row


def geometry_findings(results: Results) -> list[str]:
    """Return the sentences on memorisation and on the shift of class centres."""
    found = [f"{memorised(results)}."]
    shifted = _shift(results)
    return [*found, shifted] if shifted else found


def memorised(results: Results) -> str:
    """Return in how many classes unseen samples lie farther out than training samples, by encoder."""
    found = []
    for encoder in rows.encoders(results):
        entries = [row for row in geometry_rows.classes(results, "calibrated") if row["encoder"] == encoder]
        tested = [row for row in entries if row["spread_gap_q"] is not None]
        hits = [row for row in tested if geometry_rows.flagged(row, "spread_gap_q") and row["spread_gap_deg"] > 0]
        largest = max(hits, key=lambda row: row["spread_gap_deg"], default=None)
        most = "" if largest is None else f", most for “{largest['name']}” ({number(largest['spread_gap_deg'])}°)"
        found.append(f"{encoder} {len(hits)} of {plural(len(tested), 'testable class')}{most}")
    return (
        "Unseen samples lie farther from their class centre than training samples (q ≤ 0.05 in most seeds): "
        f"{'; '.join(found)}"
    )


def readings(results: Results, variant: str) -> dict[str, str]:
    """Return one sentence a geometry figure, by figure name: what these data show there."""
    groups = geometry_rows.groups(results, variant)
    classes = geometry_rows.classes(results, variant)
    names = rows.encoders(results)
    if variant == "paper":
        return {
            "fig4": _tail_to_head(names, groups, "variance", "Scatter of tail classes relative to head classes"),
            "fig5": _means(names, classes, "first_pc_share", "Mean first PC share"),
            "fig6": _tails(names, groups, "escape_rate", "Unseen tail samples beyond the edge that training saw"),
            "fig7": _narrowing(names, classes),
            "fig8": _shift_against_spread(names, groups),
        }
    return {
        "fig4": _tail_to_head(names, groups, "covariance_norm_unbiased", "Covariance of tail relative to head classes"),
        "fig5": _ranks(names, classes),
        "fig6": f"{memorised(results)}.",
        "fig7": _narrowing(names, classes),
        "fig8": _shift(results) or "",
    }


def _shift(results: Results) -> str | None:
    groups = geometry_rows.groups(results, "calibrated")
    found = []
    for encoder in rows.encoders(results):
        raw = geometry_rows.group_value(groups, encoder, "tail", "center_shift_deg")
        chance = geometry_rows.group_value(groups, encoder, "tail", "center_shift_null_deg")
        if raw is not None and chance is not None:
            found.append(f"{number(raw)}° for {encoder}, of which chance alone explains {number(chance)}°")
    return f"Centres of tail classes shift by {'; '.join(found)}." if found else None


def _tail_to_head(names: list[str], groups: list[Row], field: str, label: str) -> str:
    found = []
    for encoder in names:
        tail = geometry_rows.group_value(groups, encoder, "tail", field)
        head = geometry_rows.group_value(groups, encoder, "head", field)
        if tail is not None and head:
            found.append(f"{significant(tail / head)} times for {encoder}")
    return f"{label}: {listed(found)}." if found else ""


def _means(names: list[str], classes: list[Row], field: str, label: str) -> str:
    found = [
        f"{percent(mean)} for {encoder}" for encoder in names if (mean := _mean(classes, encoder, field)) is not None
    ]
    return f"{label}: {listed(found)}." if found else ""


def _ranks(names: list[str], classes: list[Row]) -> str:
    values = {encoder: _mean(classes, encoder, "effective_rank") for encoder in names}
    found = [f"{significant(mean)} for {encoder}" for encoder, mean in values.items() if mean is not None]
    return f"A class uses about as many directions, on average, as: {listed(found)}." if found else ""


def _tails(names: list[str], groups: list[Row], field: str, label: str) -> str:
    values = {encoder: geometry_rows.group_value(groups, encoder, "tail", field) for encoder in names}
    found = [f"{percent(value)} for {encoder}" for encoder, value in values.items() if value is not None]
    return f"{label}: {listed(found)}." if found else ""


def _narrowing(names: list[str], classes: list[Row]) -> str:
    found = []
    for encoder in names:
        before = _mean(classes, encoder, "nearest_center_train_deg")
        after = _mean(classes, encoder, "nearest_center_true_deg")
        if before is not None and after is not None:
            found.append(f"from {number(before)}° to {number(after)}° for {encoder}")
    return f"Once unseen samples count, the nearest wrong centre moves on average {listed(found)}." if found else ""


def _shift_against_spread(names: list[str], groups: list[Row]) -> str:
    found = []
    for encoder in names:
        shift = geometry_rows.group_value(groups, encoder, "tail", "center_shift_deg")
        spread = geometry_rows.group_value(groups, encoder, "tail", "spread_train_deg")
        if shift is not None and spread:
            found.append(f"{number(shift)}° against a spread of {number(spread)}° for {encoder}")
    return f"Centre shift of tail classes: {listed(found)}." if found else ""


def _mean(classes: list[Row], encoder: str, field: str) -> float | None:
    values = [row[field] for row in classes if row["encoder"] == encoder and row[field] is not None]
    return sum(values) / len(values) if values else None
