"""One run of an experiment, known before anything is trained, and its evaluation.

Each experiment lists its runs in a function `runs`: the experiment works them off, a reproduction's plan counts them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailscope.experiments.lab import Backbone, Lab, TrainingSet
from tailscope.experiments.settings import Settings
from tailscope.experiments.shifting import for_stage2
from tailscope.spec import RunSpec, StageSpec, backbone_key


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


def training_sets(lab: Lab, settings: Settings, seed: int) -> dict[str, TrainingSet]:
    """Return a seed's training sets by name: lt, true, and matched where asked for."""
    subset_seed = settings.subset_seed_of(seed)
    lt = lab.long_tailed(settings.profile, settings.protocol, subset_seed)
    sets = {"lt": lt, "true": lab.true()}
    if settings.matched:
        sets["matched"] = lab.matched(list(lt.spec.counts), subset_seed)
    return sets


def evaluate(lab: Lab, run: Run, backbone: Backbone, label: str) -> NDArray[np.bool_]:
    """Return which test images [M] a run gets right; its classifier is retrained or recalled, or the backbone's own."""
    spec = run.spec()
    if spec is None or run.retrained_on is None:
        return lab.correct(backbone, backbone.weight, backbone.bias)
    encoder = for_stage2(lab, backbone, spec.stage2, run.retrained_on.rows, run.seed)
    fitted = lab.classifier(spec, encoder, run.retrained_on.rows, label)
    return lab.correct(encoder, fitted.tensors["weight"], fitted.tensors["bias"])
