"""Every run behind an experiment's rows, listed before anything is trained.

The plan counts them, and the claims recall their outcomes from the store.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailscope.experiments.geometry import ENCODERS
from tailscope.experiments.lab import Lab, TrainingSet
from tailscope.experiments.ladder import AUGMENTATIONS
from tailscope.experiments.settings import Settings
from tailscope.experiments.swap import evaluate, stage1_row, training_sets
from tailscope.progress import Quiet
from tailscope.spec import RunSpec, StageSpec, backbone_key

Outcomes = dict[str, NDArray[np.bool_]]
"""Of each row, [S, M]: seeds by test items, whether top-1 was right."""


@dataclass(frozen=True, eq=False)
class Run:
    """One evaluated row of one seed: a backbone, and a classifier retrained on it or its own.

    Attributes:
        row: the row's name in the result file's provenance.
        encoder: the backbone's name for people.
        stage1, trained_on: the backbone's stage and training set.
        stage2, retrained_on: the classifier's; None where the backbone's own classifier, or none, is used.
    """

    row: str
    seed: int
    encoder: str
    stage1: StageSpec
    trained_on: TrainingSet
    stage2: StageSpec | None = None
    retrained_on: TrainingSet | None = None

    @property
    def backbone_key(self) -> str:
        """The store's key of the backbone."""
        return backbone_key(self.stage1, self.seed)

    def spec(self) -> RunSpec | None:
        """Return what the retrained classifier is stored under; None without one."""
        return RunSpec(stage1=self.stage1, stage2=self.stage2, seed=self.seed) if self.stage2 else None


def runs(lab: Lab, settings: Settings, experiment: str) -> Iterator[Run]:
    """Yield the runs of `swap`, `ladder` or `geometry`, those of a backbone together."""
    listed = {"swap": _swap, "ladder": _ladder, "geometry": _geometry}[experiment]
    for seed in settings.seeds:
        yield from listed(settings, training_sets(lab, settings, seed), seed)


def outcomes(lab: Lab, settings: Settings, experiment: str) -> Outcomes:
    """Return which test images each row of `swap` or `ladder` gets right; everything must have been trained."""
    quiet = copy.copy(lab)
    quiet.runtime = replace(lab.runtime, progress=Quiet())
    found: dict[str, list[Any]] = {}
    for run in runs(lab, settings, experiment):
        backbone = quiet.backbone(run.stage1, run.trained_on.rows, run.seed, run.encoder)
        spec = run.spec()
        if spec is not None and run.retrained_on is not None:
            right = evaluate(quiet, spec, backbone, run.retrained_on, run.row)
        else:
            right = quiet.correct(backbone, backbone.weight, backbone.bias)
        found.setdefault(run.row, []).append(right)
    return {row: np.stack(per_seed) for row, per_seed in found.items()}


def _swap(settings: Settings, sets: dict[str, TrainingSet], seed: int) -> Iterator[Run]:
    recipe = settings.recipe
    for b in settings.backbones or sets:
        stage1 = recipe.backbone(sets[b].spec)
        yield Run(stage1_row(b), seed, b, stage1, sets[b])
        for c in sets:
            yield Run(f"{b}->{c}", seed, b, stage1, sets[b], recipe.classifier(sets[c].spec), sets[c])


def _ladder(settings: Settings, sets: dict[str, TrainingSet], seed: int) -> Iterator[Run]:
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


def _geometry(settings: Settings, sets: dict[str, TrainingSet], seed: int) -> Iterator[Run]:
    for name, (data, mix) in ENCODERS.items():
        yield Run(name, seed, name, settings.recipe.backbone(sets[data].spec, mix=mix), sets[data])
