"""What a reproduction will train and what is stored already."""

from collections.abc import Sequence
from dataclasses import dataclass

from tailscope.experiments.lab import Lab
from tailscope.experiments.runs import Run
from tailscope.experiments.settings import Settings
from tailscope.paper.runs import runs
from tailscope.spec import StageSpec


@dataclass(frozen=True)
class PlannedBackbone:
    """A backbone that the plan needs.

    Attributes:
        seed: of the run.
        encoder: lt, true, lt+mixup ...
        key: the store's key.
        stored: whether it is trained already.
        augment: what augments its images.
        images: image passes that its training takes.
        steps: optimisation steps that its training takes.
        epochs_done: epochs that a run that was interrupted has saved.
        images_left: image passes that are left after them.
    """

    seed: int
    encoder: str
    key: str
    stored: bool
    augment: tuple[str, ...]
    images: int
    steps: int
    epochs_done: int
    images_left: int

    def describe(self) -> str:
        """Return what is to be done."""
        if self.stored:
            return "stored"
        saved = f"; goes on after epoch {self.epochs_done:,}" if self.epochs_done else ""
        return f"to train: {self.steps:,} steps, {self.images:,} images{saved}"


@dataclass(frozen=True)
class Plan:
    """The work that is left and the work that is stored.

    Attributes:
        backbones: each once, in the order of training.
        classifiers: classifiers to fit.
        classifiers_stored: classifiers fitted already.
        views: images of augmented views to extract for stage 2.
        clean: un-augmented images to extract, in float32, for test accuracy and geometry.
    """

    backbones: tuple[PlannedBackbone, ...]
    classifiers: int
    classifiers_stored: int
    views: int
    clean: int

    @property
    def to_train(self) -> list[PlannedBackbone]:
        """The backbones that are not stored."""
        return [b for b in self.backbones if not b.stored]

    @property
    def complete(self) -> bool:
        """Whether every stage is stored."""
        return not self.to_train and not self.classifiers


def make_plan(lab: Lab, settings: Settings, experiments: Sequence[str]) -> Plan:
    """Look up in the store every stage that the experiments need.

    Features that are stored are counted as work where that cannot be seen from the stages: the estimate errs high.
    """
    backbones: dict[str, PlannedBackbone] = {}
    classifiers: dict[str, bool] = {}
    views: dict[tuple[str, ...], int] = {}
    clean: dict[tuple[str, str], int] = {}
    for experiment in experiments:
        for run in runs(lab, settings, experiment):
            backbone = backbones.setdefault(run.backbone_key, _planned(lab, run))
            if not backbone.stored:
                clean[backbone.key, "test"] = len(lab.data.test)
            if experiment == "geometry":
                clean[backbone.key, "train"] = len(lab.data.train)
            spec = run.spec()
            if spec is not None:
                classifiers[spec.key()] = stored = lab.store.has("stage2", spec.key())
                views |= {} if stored else _views(spec.stage2, backbone.key, len(lab.data.train))
    fitted = sum(classifiers.values())
    unfitted = len(classifiers) - fitted
    return Plan(tuple(backbones.values()), unfitted, fitted, sum(views.values()), sum(clean.values()))


def _planned(lab: Lab, run: Run) -> PlannedBackbone:
    images = len(run.trained_on.rows)
    passes = run.stage1.train.images(images)
    stored = lab.store.has("stage1", run.backbone_key)
    saved = None if stored else lab.store.checkpoint("stage1", run.backbone_key)
    done = saved["epochs"] if saved else 0
    return PlannedBackbone(
        seed=run.seed,
        encoder=run.encoder,
        key=run.backbone_key,
        stored=stored,
        augment=run.stage1.augment,
        images=passes,
        steps=run.stage1.train.lengths(images)[1],
        epochs_done=done,
        images_left=0 if stored else passes - min(passes, done * images),
    )


def _views(stage: StageSpec, backbone: str, everything: int) -> dict[tuple[str, ...], int]:
    """Return the images of a classifier's views, by what decides whether classifiers share them."""
    assert stage.views is not None
    if stage.sampler == "instance":
        return {(backbone, *stage.augment): stage.views * everything}
    drawn = sum(stage.data.counts)
    return {(backbone, *stage.augment, stage.sampler, stage.data.indices_sha256): stage.views * drawn}
