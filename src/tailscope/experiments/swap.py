"""Table 1 and Figure 2: swap the data set between the two stages of decoupled training."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tailscope.attribution import CELLS, attribute, summarize
from tailscope.experiments.lab import Lab, TrainingSet
from tailscope.experiments.results import header, provenance
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
    rows = []
    lt_sets = []
    for seed in settings.seeds:
        sets = training_sets(lab, settings, seed)
        lt_sets.append(sets["lt"])
        for run in runs(settings, sets, seed):
            backbone = lab.backbone(run.stage1, run.trained_on.rows, seed, f"seed {seed}: backbone on {run.encoder}")
            right = evaluate(lab, run, backbone, f"seed {seed}: {run.row}")
            found, name = (own, run.encoder) if run.stage2 is None else (cells, run.row)
            found.setdefault(name, []).append(right)
            rows.append(provenance(lab, run, backbone))
    outcomes = {row: np.stack(per_seed) for row, per_seed in cells.items()}
    result = header("swap", settings, lab, lt_sets, rows)
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


def training_sets(lab: Lab, settings: Settings, seed: int) -> dict[str, TrainingSet]:
    """Return a seed's training sets by name: lt, true, and matched where asked for."""
    subset_seed = settings.subset_seed_of(seed)
    lt = lab.long_tailed(settings.profile, settings.protocol, subset_seed)
    sets = {"lt": lt, "true": lab.true()}
    if settings.matched:
        sets["matched"] = lab.matched(list(lt.spec.counts), subset_seed)
    return sets
