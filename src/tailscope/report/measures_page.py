"""`docs/measures.md`: every field of a diagnosis with its explanation and definition.

`python -m tailscope.report.measures_page docs/measures.md` writes it; a test checks that it is current.
"""

import sys
from pathlib import Path

from tailscope.geometry.fields import FIELDS
from tailscope.geometry.fields import SHOWN as BY_FIELD
from tailscope.report.files import write

INTRODUCTION = """# Measures

The fields of `classes` and `groups` in `diagnosis.json` and `geometry.json`. This page is generated
(`python -m tailscope.report.measures_page docs/measures.md`).

S are a class's n training samples, U its m unseen ones, T both together; mu_S, mu_U and mu_T their means, Sigma_S,
Sigma_U and Sigma_T their sample covariances (denominator n - 1). Angles are in degrees between raw vectors. A field is
`null` where it is undefined. "By chance" means: on average over splits of T into n training and m unseen samples at
random. p comes from those splits (permutations), q from Benjamini-Hochberg over the classes. Below 5 training samples a
class has no p and q; its group is tested instead. A group's field is the mean over its classes, its counts are sums.
"""


def text() -> str:
    """Return the page in Markdown."""
    entries = []
    for field, definition in FIELDS.items():
        measure = BY_FIELD.get(field)
        lines = [f"## {field}", ""]
        lines += [f"*{measure.label[0].upper()}{measure.label[1:]}.* {measure.meaning}", ""] if measure else []
        entries.append("\n".join([*lines, f"Defined as: {definition}.", ""]))
    return "\n".join([INTRODUCTION, *entries])


if __name__ == "__main__":
    write(Path(sys.argv[1]), text())
