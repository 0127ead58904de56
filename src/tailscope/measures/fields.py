"""The measurements of a class: every field of a result, as `measures.toml` has it for JSON, documentation and report.

S are the class's n training samples, U its m unseen ones, T both together; mu_S, mu_U and mu_T their means, Sigma_S,
Sigma_U and Sigma_T their sample covariances. Angles are in degrees between raw vectors. A field is None where it is
undefined. "By chance" means: on average over splits of T into n training and m unseen samples at random.
"""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

Entry = dict[str, Any]

MOST = 1e100
"""No measure is beyond: what is computed or drawn from one does not overflow."""

FEW_UNSEEN = 30
"""Unseen samples of a class, below which comparisons are imprecise and it has no verdict of its own."""

NUMBERS = ("degrees", "share", "squared", "plain", "p")
"""Units of measures that are one number."""


@dataclass(frozen=True)
class Measure:
    """One field of a result.

    Attributes:
        name: of the field.
        unit: "degrees"; "share", a fraction that is shown in per cent; "squared", in squared units of the features;
            "plain", a number without a unit; "p", a p or q value; "quantiles", five angles in degrees; "count";
            "permutations"; "class", a number of a class; "flag"; "text".
        definition: in the terms above.
        null: its value where nothing but chance is at work: a number, or the field that holds it for each class.
        label: its name for readers; empty where reports leave it to the files.
        meaning: one line for a reader who never saw the paper.
    """

    name: str
    unit: str
    definition: str
    null: float | str | None = None
    label: str = ""
    meaning: str = ""

    @property
    def title(self) -> str:
        """The label with a capital letter."""
        return self.label[:1].upper() + self.label[1:]


_TABLE = tomllib.loads(files(__package__).joinpath("measures.toml").read_text(encoding="utf-8"))

COLLAPSE = {name: Measure(name, **about) for name, about in _TABLE.pop("collapse").items()}
"""Every measure of all classes together, by name: see `tailscope.measures.collapse`."""

MEASURES = {name: Measure(name, **about) for group in _TABLE.values() for name, about in group.items()}
"""Every field of a class's entry, by name."""

FIELDS = {name: measure.definition for name, measure in MEASURES.items()}
"""Every field of a class's entry with its definition."""

EXCESSES = [
    (measure.name, measure.null, excess)
    for measure in MEASURES.values()
    if isinstance(measure.null, str) and (excess := measure.null.replace("null", "excess")) in MEASURES
]
"""Measures with the fields of their value by chance, and of what they are beyond it."""

SHOWN = {name: measure for name, measure in MEASURES.items() if measure.label}
"""What reports show: the measures as the paper has them, then those that are set against chance."""


def empty_entry() -> Entry:
    """Return an entry with every field undefined."""
    return dict.fromkeys(MEASURES)
