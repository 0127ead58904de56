"""Table 1 and Figure 2: swap the data set between the two stages of decoupled training."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailscope.attribution import CELLS, attribute, summarize
from tailscope.experiments.lab import Backbone, Lab, TrainingSet
from tailscope.experiments.results import header, provenance
from tailscope.experiments.settings import Settings
from tailscope.experiments.shifting import for_stage2
from tailscope.spec import RunSpec


def swap(lab: Lab, settings: Settings) -> dict[str, Any]:
    """Train every backbone and classifier pairing for every seed and attribute the gap.

    The 2x2 trains two backbones a seed, not four: the classifiers on a backbone share its features. Where the settings
    name fewer backbones, only their cells are there, and nothing is attributed.

    Returns:
        The result: see the documentation of `swap.json`.
    """
    correct: dict[str, list[Any]] = {}
    own: dict[str, list[Any]] = {}
    rows = []
    lt_sets = []
    for seed in settings.seeds:
        sets = training_sets(lab, settings, seed)
        lt_sets.append(sets["lt"])
        for backbone_name in settings.backbones or sets:
            backbone_set = sets[backbone_name]
            stage1 = settings.recipe.backbone(backbone_set.spec)
            backbone = lab.backbone(stage1, backbone_set.rows, seed, f"seed {seed}: backbone on {backbone_name}")
            own.setdefault(backbone_name, []).append(lab.correct(backbone, backbone.weight, backbone.bias))
            rows.append(provenance(stage1_row(backbone_name), seed, backbone, stage1, None, (backbone_name, None)))
            for classifier_name, classifier_set in sets.items():
                row = f"{backbone_name}->{classifier_name}"
                stage2 = settings.recipe.classifier(classifier_set.spec)
                run = RunSpec(stage1=stage1, stage2=stage2, seed=seed)
                right = evaluate(lab, run, backbone, classifier_set, f"seed {seed}: {row}")
                correct.setdefault(row, []).append(right)
                rows.append(provenance(row, seed, backbone, stage1, stage2, (backbone_name, classifier_name)))
    outcomes = {row: np.stack(per_seed) for row, per_seed in correct.items()}
    result = header("swap", settings, lab, lt_sets)
    labels = lab.data.test.labels.numpy()
    whole = all(cell in outcomes for cell in CELLS)
    if not whole:
        result["warnings"].append(
            f"only the backbones {', '.join(settings.backbones or ())} were trained: the gap and its attribution need "
            "both lt and true"
        )
    return {
        **result,
        "provenance": rows,
        "cells": {row: summarize(right, labels, result["groups"]) for row, right in outcomes.items()},
        "stage1": {name: summarize(np.stack(right), labels, result["groups"]) for name, right in own.items()},
        "attribution": attribute(outcomes, labels, result["groups"]) if whole else None,
    }


def stage1_row(backbone: str) -> str:
    """Return the row of a backbone under the classifier that stage 1 trained with it.

    >>> stage1_row("lt")
    'lt stage1'
    """
    return f"{backbone} stage1"


def evaluate(lab: Lab, run: RunSpec, backbone: Backbone, data: TrainingSet, label: str) -> NDArray[np.bool_]:
    """Retrain a backbone's classifier on `data`, or recall it; return which test images [M] it gets right."""
    encoder = for_stage2(lab, backbone, run.stage2, data.rows, run.seed)
    fitted = lab.classifier(run, encoder, data.rows, label)
    return lab.correct(encoder, fitted.tensors["weight"], fitted.tensors["bias"])


def training_sets(lab: Lab, settings: Settings, seed: int) -> dict[str, TrainingSet]:
    """Return a seed's training sets by name: lt, true, and matched where asked for."""
    subset_seed = settings.subset_seed_of(seed)
    lt = lab.long_tailed(settings.profile, settings.protocol, subset_seed)
    sets = {"lt": lt, "true": lab.true()}
    if settings.matched:
        sets["matched"] = lab.matched(list(lt.spec.counts), subset_seed)
    return sets
