"""What an experiment needs, and what of it is stored already: the plan of its trainings, before any of them."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tailscope.experiments.runs import Run
from tailscope.experiments.stages import Beneath, Stages
from tailscope.spec import StageSpec

Augment = tuple[str, ...]


@dataclass(frozen=True)
class PlannedBackbone:
    """A backbone that the plan needs, or a stage before it: passes and steps of its training, and what is left."""

    seed: int
    encoder: str
    key: str
    stored: bool
    augment: Augment
    images: int
    steps: int
    epochs_done: int
    images_left: int

    @classmethod
    def of(cls, lab: Stages, run: Run, first: Beneath | None = None) -> "PlannedBackbone":
        """Look up in the store a run's backbone, or a stage that it is trained from."""
        kind, key, stage, name = "stage1", run.backbone_key, run.stage1, run.encoder
        if first is not None:
            kind, key, stage, name = first.kind, first.key, first.stage, f"{run.encoder}, {first.what}"
        images = len(run.trained_on.rows)
        passes, steps = stage.train.images(images), stage.train.lengths(images)[1]
        stored = lab.store.has(kind, key)
        saved = None if stored else lab.store.checkpoint(kind, key)
        done = saved["epochs"] if saved else 0
        left = 0 if stored else passes - min(passes, done * images)
        return cls(run.seed, name, key, stored, stage.augment, passes, steps, done, left)

    def describe(self) -> str:
        """Return what is to be done."""
        if self.stored:
            return "stored"
        saved = f"; goes on after epoch {self.epochs_done:,}" if self.epochs_done else ""
        return f"to train: {self.steps:,} steps, {self.images:,} images{saved}"


@dataclass(frozen=True)
class Plan:
    """The work that is left and the work that is stored: each backbone once, in the order of training.

    `views` are images of augmented views to extract for stage 2, `clean` un-augmented ones, in float32, for test
    accuracy and geometry; `fitted` are rows of features that the classifiers' epochs pass.
    """

    backbones: tuple[PlannedBackbone, ...]
    classifiers: int
    classifiers_stored: int
    views: int
    clean: int
    fitted: int = 0

    @property
    def to_train(self) -> list[PlannedBackbone]:
        """The backbones that are not stored."""
        return [b for b in self.backbones if not b.stored]

    @property
    def complete(self) -> bool:
        """Whether every stage is stored."""
        return not self.to_train and not self.classifiers

    def lines(self) -> Iterator[str]:
        """Yield what is to be done, in words."""
        for backbone in self.backbones:
            yield f"seed {backbone.seed}, backbone {backbone.encoder}: {backbone.describe()}"
        if self.classifiers or self.classifiers_stored:
            yield f"classifiers: {self.classifiers} to fit, {self.classifiers_stored} stored"
        if self.complete:
            yield "nothing to train: every stage is stored"


def planned(lab: Stages, needed: Mapping[str, Iterable[Run]]) -> Plan:
    """Look up in the store every stage that runs need, by the name of their experiment.

    Features that are stored are counted as work where that cannot be seen from the stages: the estimate errs high.
    """
    backbones: dict[str, PlannedBackbone] = {}
    classifiers: dict[str, bool] = {}
    views: dict[tuple[str, ...], int] = {}
    clean: dict[tuple[str, str], int] = {}
    fits: dict[str, int] = {}
    for experiment, runs in needed.items():
        for run in runs:
            key = run.backbone_key
            if key not in backbones:
                for first in lab.beneath(run.stage1, run.seed):
                    backbones.setdefault(first.key, PlannedBackbone.of(lab, run, first))
                backbones[key] = PlannedBackbone.of(lab, run)
            if not backbones[key].stored:
                clean[key, "test"] = len(lab.data.test)
            if experiment == "geometry":
                clean[key, "train"] = len(lab.data.train)
            if spec := run.spec():
                classifiers[spec.key()] = stored = lab.store.has("stage2", spec.key())
                views |= {} if stored else _views(spec.stage2, key, len(lab.data.train))
                fits |= {} if stored else {spec.key(): spec.stage2.train.images(sum(spec.stage2.data.counts))}
    done = sum(classifiers.values())
    left = len(classifiers) - done
    return Plan(tuple(backbones.values()), left, done, sum(views.values()), sum(clean.values()), sum(fits.values()))


def _views(stage: StageSpec, backbone: str, everything: int) -> dict[tuple[str, ...], int]:
    """Return the images of a classifier's views, by what decides whether classifiers share them."""
    assert stage.views is not None
    if stage.sampler == "instance":
        return {(backbone, *stage.augment): stage.views * everything}
    drawn = sum(stage.data.counts)
    return {(backbone, *stage.augment, stage.sampler, stage.data.indices_sha256): stage.views * drawn}


def other_work() -> str:
    """Return a warning where other processes keep the processor busy, else nothing."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load < max(1.0, cores / 4):
        return ""
    return f"other work is running here (load {load:.1f} on {cores} cores): without it this may take a fraction"
