"""Table 1 and Figure 2: swap the data set between the two stages of decoupled training."""

from typing import Any

import numpy as np

from tailscope.attribution import attribute, summarize
from tailscope.experiments.lab import Lab, TrainingSet
from tailscope.experiments.results import header, provenance
from tailscope.experiments.settings import Settings
from tailscope.spec import RunSpec


def swap(lab: Lab, settings: Settings) -> dict[str, Any]:
    """Train every backbone and classifier pairing for every seed and attribute the gap.

    The 2x2 trains two backbones a seed, not four: the classifiers on a backbone share its features.

    Returns:
        The result: see the documentation of `swap.json`.
    """
    correct: dict[str, list[Any]] = {}
    rows = []
    lt_sets = []
    for seed in settings.seeds:
        sets = training_sets(lab, settings, seed)
        lt_sets.append(sets["lt"])
        for backbone_name, backbone_set in sets.items():
            stage1 = settings.recipe.backbone(backbone_set.spec)
            backbone = lab.backbone(stage1, backbone_set.rows, seed, f"seed {seed}: backbone on {backbone_name}")
            for classifier_name, classifier_set in sets.items():
                row = f"{backbone_name}->{classifier_name}"
                stage2 = settings.recipe.classifier(classifier_set.spec)
                run = RunSpec(stage1=stage1, stage2=stage2, seed=seed)
                fitted = lab.classifier(run, backbone, classifier_set.rows, f"seed {seed}: {row}")
                right = lab.correct(backbone, fitted.tensors["weight"], fitted.tensors["bias"])
                correct.setdefault(row, []).append(right)
                rows.append(provenance(row, seed, backbone, stage1, stage2, (backbone_name, classifier_name)))
    outcomes = {row: np.stack(per_seed) for row, per_seed in correct.items()}
    result = header("swap", settings, lab, lt_sets)
    labels = lab.data.test.labels.numpy()
    return {
        **result,
        "provenance": rows,
        "cells": {row: summarize(right, labels, result["groups"]) for row, right in outcomes.items()},
        "attribution": attribute(outcomes, labels, result["groups"]),
    }


def training_sets(lab: Lab, settings: Settings, seed: int) -> dict[str, TrainingSet]:
    """Return a seed's training sets by name: lt, true, and matched where asked for."""
    subset_seed = settings.subset_seed_of(seed)
    lt = lab.long_tailed(settings.profile, settings.protocol, subset_seed)
    sets = {"lt": lt, "true": lab.true()}
    if settings.matched:
        sets["matched"] = lab.matched(list(lt.spec.counts), subset_seed)
    return sets
