"""Table 1 and Figure 2: swap the data set between the two stages of decoupled training."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tailscope.attribution import CELLS, attribute, summarize
from tailscope.experiments.lab import Lab, TrainingSet
from tailscope.experiments.results import Journal
from tailscope.experiments.runs import Run, evaluate
from tailscope.experiments.settings import Settings


def swap(lab: Lab, settings: Settings) -> dict[str, Any]:
    """Train every backbone and classifier pairing for every seed and attribute the gap.

    The 2x2 trains two backbones a seed, not four: the classifiers on a backbone share its features. Where the settings
    name fewer backbones, only their cells are there, and nothing is attributed.

    Returns:
        The result: see the documentation of `swap.json`.
    """
    cells: dict[str, list[Any]] = {}
    own: dict[str, list[Any]] = {}
    journal = Journal(lab, settings)
    for run, backbone in journal.carry_out(runs):
        found, name = (own, run.encoder) if run.stage2 is None else (cells, run.row)
        found.setdefault(name, []).append(evaluate(lab, run, backbone, f"seed {run.seed}: {run.row}"))
    outcomes = {row: np.stack(per_seed) for row, per_seed in cells.items()}
    result = journal.header("swap")
    labels = lab.data.test.labels.numpy()
    whole = all(cell in outcomes for cell in CELLS)
    if not whole:
        result["warnings"].append(
            f"only the backbones {', '.join(settings.backbones or ())} were trained: the gap and its attribution need "
            "both lt and true"
        )
    return {
        **result,
        "cells": {row: summarize(right, labels, result["groups"]) for row, right in outcomes.items()},
        "stage1": {name: summarize(np.stack(right), labels, result["groups"]) for name, right in own.items()},
        "attribution": attribute(outcomes, labels, result["groups"]) if whole else None,
    }


def runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
    """Yield a seed's runs: of each backbone its own classifier, then one retrained on each training set."""
    recipe = settings.recipe
    for b in settings.backbones or sets:
        stage1 = recipe.backbone(sets[b].spec)
        yield Run(f"{b} stage1", seed, b, stage1, sets[b])
        for c in sets:
            yield Run(f"{b}->{c}", seed, b, stage1, sets[b], recipe.classifier(sets[c].spec), sets[c])
