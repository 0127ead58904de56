"""Figure 3: how far augmentation and class-balanced retraining climb towards the classifier's bound."""

from typing import Any

import numpy as np

from tailscope.attribution import summarize
from tailscope.errors import UserError
from tailscope.experiments.lab import Lab, TrainingSet
from tailscope.experiments.results import header, provenance
from tailscope.experiments.settings import Settings
from tailscope.experiments.swap import evaluate, training_sets
from tailscope.spec import RunSpec, StageSpec

AUGMENTATIONS = {
    "none": {"autoaugment": False, "mix": False},
    "mixup": {"autoaugment": False, "mix": True},
    "autoaugment": {"autoaugment": True, "mix": False},
    "autoaugment+mixup": {"autoaugment": True, "mix": True},
}
"""What augments stage 1, beyond the crop and flip that are on everywhere."""


def ladder(lab: Lab, settings: Settings) -> dict[str, Any]:
    """Train a long-tailed backbone per augmentation and seed, and evaluate four classifiers on each.

    `stage1` is the backbone's own classifier; `stage2` cRT: a new one with class-balanced resampling of D_LT;
    `stage2_aa` the same with AutoAugment in stage 2; `bound` a new one trained on D*.

    Returns:
        The result: see the documentation of `ladder.json`.

    Raises:
        UserError: AutoAugment cannot take the images.
    """
    channels = lab.data.train.channels
    if channels not in (1, 3):
        raise UserError(f"{lab.data.name}: images have {channels} channels; the ladder's AutoAugment takes 1 or 3")
    correct: dict[str, dict[str, list[Any]]] = {}
    rows, lt_sets = [], []
    for seed in settings.seeds:
        sets = training_sets(lab, settings, seed)
        lt_sets.append(sets["lt"])
        for name, augmentation in AUGMENTATIONS.items():
            stage1 = settings.recipe.backbone(sets["lt"].spec, **augmentation)
            backbone = lab.backbone(stage1, sets["lt"].rows, seed, f"seed {seed}: backbone on lt, {name}")
            rungs = correct.setdefault(name, {})
            rungs.setdefault("stage1", []).append(lab.correct(backbone, backbone.weight, backbone.bias))
            rows.append(provenance(f"{name}: stage1", seed, backbone, stage1, None, ("lt", None)))
            for rung, (stage2, data) in _classifiers(settings, sets).items():
                run = RunSpec(stage1=stage1, stage2=stage2, seed=seed)
                right = evaluate(lab, run, backbone, data, f"seed {seed}: {name}, {rung}")
                rungs.setdefault(rung, []).append(right)
                trained_on = "true" if rung == "bound" else "lt"
                rows.append(provenance(f"{name}: {rung}", seed, backbone, stage1, stage2, ("lt", trained_on)))
    result = header("ladder", settings, lab, lt_sets)
    labels = lab.data.test.labels.numpy()
    return {
        **result,
        "provenance": rows,
        "augmentations": {
            name: {rung: summarize(np.stack(right), labels, result["groups"]) for rung, right in rungs.items()}
            for name, rungs in correct.items()
        },
    }


def _classifiers(settings: Settings, sets: dict[str, TrainingSet]) -> dict[str, tuple[StageSpec, TrainingSet]]:
    lt, true = sets["lt"], sets["true"]
    recipe = settings.recipe
    return {
        "stage2": (recipe.classifier(lt.spec, sampler="class_balanced"), lt),
        "stage2_aa": (recipe.classifier(lt.spec, sampler="class_balanced", autoaugment=True), lt),
        "bound": (recipe.classifier(true.spec), true),
    }
