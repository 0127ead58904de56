"""Write the section of `docs/methods.md` on published methods: formulas, published figures, and what ours did.

Formulas and figures are those of `methods/published.toml`; ours come from every `compare.json` under `results`.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailscope.methods import SYSTEMS, systems
from tailscope.report.text import DASH, Column, Table, percent, points, to_markdown, with_interval

Result = dict[str, Any]
PUBLISHED = Path(systems.__file__).with_name("published.toml")
DATA = ("CIFAR-10-LT", "CIFAR-100-LT")
INTRODUCTION = """## Systems

Every method by name, and sums of them that were published as one, with what it computes. n_y is the number of images of
class y, pi_y its share, z are the logits, p their softmax, f the features, w_y and b_y a class's weights and bias, C
the number of classes, lam a draw from Beta(alpha, alpha). Published figures are accuracies in % at imbalance factor 100
with, in parentheses, the difference from the cross-entropy of the same source: figures from different sources were
obtained under different conditions, which are listed below the table. None of them is ours.

`pseudo_labels` trains on more than the others: on the images of the training set that the long-tailed subset leaves
out, without their labels. Its accuracies, here and in results, stand beside those of methods that do not see these
images, and a gain over them is not that of a method alone.
"""
NOT_HERE = """### Not here

- Of **BBN**, the authors' normalisation: they show the shared layers one batch after the other, each with its own
  statistics; here both are normalised together. It does not add up with mixings or pre-training.
- Of **pseudo-labelling**, images from elsewhere: the authors take five times as many as the long-tailed set has, with a
  distribution of their own, and an epoch over all of them. Here an epoch stays as long as for other methods.
- Of **bag of tricks**, images pasted from class activation maps, and last epochs without MixUp; of **BALMS**, the meta
  sampler; of **SSP**, contrastive pre-training.
"""


def section(results: Path) -> str:
    """Return the section in Markdown."""
    published = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    calls = [*(entry.name for entry in SYSTEMS), *(c for c in published["methods"] if c not in _names())]
    rows = [_published(call, published) for call in calls]
    columns = [Column("method", "method"), Column("formula", "computes")]
    columns += [Column(data, f"{data}, published") for data in DATA]
    parts = [INTRODUCTION, to_markdown(Table("systems", "Methods and what is published of them", columns, rows))]
    parts += ["Sources:\n", *(_source(name, source) for name, source in published["sources"].items()), ""]
    for path in sorted(results.glob("*/compare.json")):
        parts.append(ours(path.parent.name, json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join([*parts, NOT_HERE])


def _names() -> set[str]:
    return {entry.name for entry in SYSTEMS}


def _published(call: str, published: Mapping[str, Any]) -> dict[str, str]:
    """Return a row: the method's formula, and each source's figure with the gain on its own cross-entropy."""
    entry, row = published["methods"].get(call, {}), {"method": call}
    row["formula"] = entry.get("formula", DASH)
    for place, data in enumerate(DATA):
        found = [_figure(call, figure, place, published["sources"]) for figure in entry.get("figures", ())]
        row[data] = "; ".join(filter(None, found)) or DASH
    return row


def _figure(call: str, figure: Sequence[Any], place: int, sources: Mapping[str, Any]) -> str:
    """Return a figure of a source, `place` 0 or 1 for CIFAR-10-LT or CIFAR-100-LT; nothing where there is none.

    >>> _figure("crt", ["a", 74.99, 0], 0, {"a": {"baseline": [71.95, 37.73]}})
    '74.99 (+3.04), a'
    """
    source, accuracy = figure[0], figure[1 + place]
    if not accuracy:
        return ""
    baseline = sources[source].get("baseline")
    gain = f" ({accuracy - baseline[place]:+.2f})" if baseline and call != "ce" else ""
    return f"{accuracy:.2f}{gain}, {source}"


def _source(name: str, source: Mapping[str, Any]) -> str:
    baseline = source.get("baseline")
    own = (
        f"its own cross-entropy: {baseline[0]:.2f} and {baseline[1]:.2f}" if baseline else "no cross-entropy of its own"
    )
    return f"- **{name}**: {source['where']}. {source['conditions'][0].upper()}{source['conditions'][1:]}; {own}."


# -- ours -----------------------------------------------------------------------------------------------------------


def ours(folder: str, result: Result) -> str:
    """Return the table of a comparison."""
    tuned = "" if result["tune"] == "none" else ", hyper-parameters chosen on a cut of the training images"
    title = (
        f"{result['dataset']['name']}, recipe {result['recipe']['name']}, {result['spec']['profile']}:"
        f" {len(result['methods'])} methods, seeds {' '.join(map(str, result['seeds']))}{tuned}"
    )
    rows = [_ours(method) for method in result["methods"]]
    columns = [
        Column("method", "method"),
        Column("accuracy", "accuracy"),
        Column("tail", "tail"),
        Column("gain", f"against {result['baseline']} [95 %]"),
        Column("clear", "clear"),
        Column("representation", "representation gap"),
        Column("classifier", "classifier gap"),
        Column("seconds", "seconds"),
    ]
    lines = [
        f"### Ours: {folder}",
        "",
        f"Of `results/{folder}/compare.json`. The two gaps: how many points a method widens (+) or closes (−) the"
        " baseline's; a gain is *clear* where its p-value is below 0.05 after counting all methods (Holm).",
        *_reference(result),
        "",
        to_markdown(Table("ours", title, columns, rows)),
    ]
    return "\n".join(lines)


def _reference(result: Result) -> Iterable[str]:
    first = result["methods"][0]
    gaps, reference = first["gaps"], result["reference"]
    if not gaps or not reference:
        return
    yield (
        f"`{first['name']}` loses {points(gaps['representation']['points'])} points to its representation and"
        f" {points(gaps['classifier']['points'])} to its classifier, against the"
        f" {percent(reference['mean'])} of true → true."
    )


def _ours(method: Result) -> dict[str, str]:
    difference, gaps = method["difference"], method["gaps"] or {}
    change = gaps.get("change") or {}
    p = difference and difference["p_holm"]
    return {
        "method": method["name"],
        "accuracy": percent(method["mean"]),
        "tail": percent(method["groups"].get("tail")),
        "gain": with_interval(points(difference["points"], signed=True), difference["ci95"]) if difference else DASH,
        "clear": DASH if p is None else "yes" if p < 0.05 else "no",
        **{
            part: points(change[part]["points"], signed=True) if part in change else DASH
            for part in ("representation", "classifier")
        },
        "seconds": f"{sum(method['seconds'].values()):.1f}",
    }
