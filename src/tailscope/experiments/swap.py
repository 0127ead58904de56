"""Table 1 and Figure 2, the swap of data sets between the stages; Figure 3, the ladder of augmentations."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tailscope.attribution import CELLS, attribute, summarize
from tailscope.errors import UserError
from tailscope.experiments.runs import Experiment, Run, Settings, evaluate
from tailscope.experiments.stages import Stages, TrainingSet


def swap(stages: Stages, settings: Settings) -> dict[str, Any]:
    """Train every backbone and classifier pairing for every seed and attribute the gap.

    The 2x2 trains two backbones a seed, not four: the classifiers on a backbone share its features. Where the settings
    name fewer backbones, only their cells are there, and nothing is attributed. Returns what `swap.json` holds.
    """
    cells, own = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
    experiment = Experiment(stages, settings)
    for run, backbone in experiment.backbones(swap_runs):
        found, name = (own, run.encoder) if run.stage2 is None else (cells, run.row)
        found[name].append(evaluate(stages, run, backbone, f"seed {run.seed}: {run.row}"))
    outcomes = {row: np.stack(per_seed) for row, per_seed in cells.items()}
    result = experiment.header("swap")
    labels = stages.data.test.labels.numpy()
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


def swap_runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
    """Yield a seed's runs: of each backbone its own classifier, then one retrained on each training set."""
    recipe = settings.recipe
    for b in settings.backbones or sets:
        stage1 = recipe.backbone(sets[b].spec)
        yield Run(f"{b} stage1", seed, b, stage1, sets[b])
        for c in sets:
            yield Run(f"{b}->{c}", seed, b, stage1, sets[b], recipe.classifier(sets[c].spec), sets[c])


AUGMENTATIONS = {
    "none": {"autoaugment": False, "mix": False},
    "mixup": {"autoaugment": False, "mix": True},
    "autoaugment": {"autoaugment": True, "mix": False},
    "autoaugment+mixup": {"autoaugment": True, "mix": True},
}
"""What augments stage 1, beyond the crop and flip that are on everywhere."""


def ladder(stages: Stages, settings: Settings) -> dict[str, Any]:
    """Train a long-tailed backbone per augmentation and seed, and evaluate four classifiers on each.

    `stage1` is the backbone's own classifier; `stage2` cRT: a new one with class-balanced resampling of D_LT;
    `stage2_aa` the same with AutoAugment in stage 2; `bound` a new one trained on D*. Returns what `ladder.json` holds.

    Raises:
        UserError: AutoAugment cannot take the images.
    """
    channels = stages.data.train.channels
    if channels not in (1, 3):
        raise UserError(f"{stages.data.name}: images have {channels} channels; the ladder's AutoAugment takes 1 or 3")
    correct: dict[str, dict[str, list[Any]]] = {}
    experiment = Experiment(stages, settings)
    for run, backbone in experiment.backbones(ladder_runs):
        name, rung = run.row.split(": ")
        right = evaluate(stages, run, backbone, f"seed {run.seed}: {name}, {rung}")
        correct.setdefault(name, {}).setdefault(rung, []).append(right)
    result = experiment.header("ladder")
    labels = stages.data.test.labels.numpy()
    return {
        **result,
        "augmentations": {
            name: {rung: summarize(np.stack(right), labels, result["groups"]) for rung, right in rungs.items()}
            for name, rungs in correct.items()
        },
    }


def ladder_runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
    """Yield a seed's runs: the four classifiers of each augmentation's backbone."""
    recipe, lt, true = settings.recipe, sets["lt"], sets["true"]
    classifiers = {
        "stage2": (recipe.classifier(lt.spec, sampler="class_balanced"), lt),
        "stage2_aa": (recipe.classifier(lt.spec, sampler="class_balanced", autoaugment=True), lt),
        "bound": (recipe.classifier(true.spec), true),
    }
    for name, augmentation in AUGMENTATIONS.items():
        encoder = "lt" if name == "none" else f"lt+{name}"
        stage1 = recipe.backbone(lt.spec, **augmentation)
        yield Run(f"{name}: stage1", seed, encoder, stage1, lt)
        for rung, (stage2, data) in classifiers.items():
            yield Run(f"{name}: {rung}", seed, encoder, stage1, lt, stage2, data)
