"""Figure 3: how far augmentation and class-balanced retraining climb towards the classifier's bound."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tailscope.attribution import summarize
from tailscope.errors import UserError
from tailscope.experiments.lab import Lab, TrainingSet
from tailscope.experiments.results import Journal
from tailscope.experiments.runs import Run, evaluate
from tailscope.experiments.settings import Settings

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
    journal = Journal(lab, settings)
    for run, backbone in journal.carry_out(runs):
        name, rung = run.row.split(": ")
        right = evaluate(lab, run, backbone, f"seed {run.seed}: {name}, {rung}")
        correct.setdefault(name, {}).setdefault(rung, []).append(right)
    result = journal.header("ladder")
    labels = lab.data.test.labels.numpy()
    return {
        **result,
        "augmentations": {
            name: {rung: summarize(np.stack(right), labels, result["groups"]) for rung, right in rungs.items()}
            for name, rungs in correct.items()
        },
    }


def runs(settings: Settings, sets: Mapping[str, TrainingSet], seed: int) -> Iterator[Run]:
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
