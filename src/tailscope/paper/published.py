"""The paper's printed numbers, read from `published.json`: one value for each cell of Table 1 and Figure 3.

Figures 4 to 8 are plots whose values are printed nowhere, so there is nothing to read for them.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

_SCALE = {"fraction": 1.0, "percent": 100.0}


@cache
def document() -> dict[str, Any]:
    """Return the whole file: numbers as printed, each block with `where` it stands in the paper and its `unit`."""
    read: dict[str, Any] = json.loads(files("tailscope.paper").joinpath("published.json").read_text(encoding="utf-8"))
    return read


def table1(dataset: str) -> dict[str, float]:
    """Return Table 1's accuracies, as fractions, by `backbone->classifier`; empty where the paper has no such row.

    >>> table1("cifar10-lt")["true->lt"]
    0.9106
    """
    printed: Mapping[str, float] = document()["table1"]["accuracy"].get(dataset, {})
    return {cell: value / _SCALE[document()["table1"]["unit"]] for cell, value in printed.items()}


def figure3(dataset: str) -> dict[str, float]:
    """Return Figure 3's accuracies, as fractions, by `augmentation: rung`; empty where the paper has no such figure.

    >>> figure3("cifar10-lt")["autoaugment+mixup: stage2"], figure3("cifar100-lt")
    (0.825, {})
    """
    columns: Mapping[str, Any] = document()["fig3"]["accuracy"].get(dataset, {})
    scale = _SCALE[document()["fig3"]["unit"]]
    # Rounding takes off what dividing by 100 adds beyond the printed digits.
    return {f"{name}: {rung}": round(v / scale, 6) for name, column in columns.items() for rung, v in column.items()}


def stage1(dataset: str) -> dict[str, float]:
    """Return the lt backbone's own accuracy, a fraction, which the paper prints in Figure 3 alone; empty without one.

    >>> stage1("cifar10-lt"), stage1("cifar100-lt")
    ({'lt stage1': 0.7178}, {})
    """
    printed = figure3(dataset)
    return {"lt stage1": printed["none: stage1"]} if printed else {}


def where(block: str) -> str:
    """Return the table or figure that a block of numbers comes from.

    >>> where("table1")
    'Table 1 (drawn again as Figure 2)'
    """
    text: str = document()[block]["where"]
    return text
