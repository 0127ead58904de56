"""The laboratory: trains what a plan needs, or recalls it from the store, and evaluates it.

Data flow: training set -> backbone (stage 1) -> features (views for stage 2, clean ones for evaluation)
-> classifier (stage 2) -> which test images are right.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.data import splits
from tailscope.data.profiles import canonical, resolve
from tailscope.data.sources import ImageData
from tailscope.data.streams import Rows
from tailscope.experiments.imagery import Imagery, Split
from tailscope.methods import SAMPLERS
from tailscope.models.resnet import CifarResNet
from tailscope.seeds import torch_stream
from tailscope.spec import DataSpec, RunSpec, StageSpec, backbone_key, digest
from tailscope.store import Artifact, Meta, Store, Tensors
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import new_model
from tailscope.training.stage2 import View, fit_classifier
from tailscope.training.team import Team


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Rows of the true training set, by their name (lt, true or matched), with the spec that describes them."""

    name: str
    spec: DataSpec
    rows: Rows


@dataclass(frozen=True, eq=False)
class Backbone:
    """A trained, frozen encoder with where it came from."""

    key: str
    stage1: StageSpec
    model: CifarResNet
    meta: dict[str, Any]
    weight: Tensor
    bias: Tensor


class Lab:
    """Everything that runs on one data set share: its pixel statistics, the store and the runtime."""

    def __init__(
        self, data: ImageData, store: Store, runtime: Runtime, team: Team | None = None, workers: int | None = None
    ) -> None:
        """Take in where to work; `team` are the processes that share the work on files, `workers` those that decode."""
        self.data = data
        self.store = store
        self.runtime = runtime
        self.imagery = Imagery(data, team, workers)
        self.normalize = self.imagery.normalize
        self.trained = 0
        self.recalled = 0
        self._models: dict[str, Backbone] = {}

    def true(self) -> TrainingSet:
        """Return the whole training set, D*."""
        rows = np.arange(len(self.data.train), dtype=np.int64)
        return self._named("true", rows, self.data.train.counts(), "full", "all", 0)

    def long_tailed(self, profile: str, protocol: str, seed: int) -> TrainingSet:
        """Return the long-tailed subset, D_LT."""
        counts = resolve(profile, self.data.train.counts())
        subset = splits.subset(self.data.train.labels, counts, protocol=protocol, seed=seed)
        return self._named("lt", subset.flat, subset.counts, canonical(profile), protocol, seed)

    def matched(self, counts: list[int], seed: int) -> TrainingSet:
        """Return a class-balanced subset with as many images as the long-tailed one."""
        subset = splits.matched(self.data.train.labels, counts, seed=seed)
        return self._named("matched", subset.flat, subset.counts, "matched", "nested", seed)

    def _named(self, name: str, rows: Rows, counts: list[int], profile: str, protocol: str, seed: int) -> TrainingSet:
        spec = DataSpec(
            name=self.data.name,
            fingerprint=self.data.fingerprint,
            profile=profile,
            protocol=protocol,
            subset_seed=seed,
            indices_sha256=splits.Subset((rows,)).sha256,
            counts=tuple(counts),
        )
        return TrainingSet(name, spec, rows)

    def backbone(self, stage: StageSpec, rows: Rows, seed: int, label: str) -> Backbone:
        """Train the backbone or recall it."""
        self.imagery.check(stage)
        key = backbone_key(stage, seed)
        if key not in self._models:

            def make(scratch: Path) -> tuple[Tensors, Meta]:
                tensors, meta = self.imagery.train(stage, rows, seed, self.runtime, scratch, label)
                return {**tensors, "rows": torch.from_numpy(rows)}, meta

            artifact, found = self.store.get_or_make("stage1", key, make, self.runtime.progress)
            self._tell(found, label)
            self._models = {key: self._load(key, stage, artifact)}  # one at a time: a plan groups runs by backbone
        return self._models[key]

    def _load(self, key: str, stage: StageSpec, artifact: Artifact) -> Backbone:
        assert stage.model is not None
        model = new_model(stage.model, self.imagery.channels, self.data.train.num_classes, seed=0)
        state = {name: t for name, t in artifact.tensors.items() if name != "rows"}
        model.load_state_dict(state)
        model = model.to(self.runtime.device).eval()
        weight, bias = state["classifier.weight"].cpu().float(), state["classifier.bias"].cpu().float()
        return Backbone(key, stage, model, artifact.meta, weight, bias)

    def clean_features(self, backbone: Backbone, split: Split) -> Tensor:
        """Return float32 features [N, d] of the un-augmented training or test images."""
        key = {"backbone": backbone.key, "clean": split, **self.imagery.clean_key(backbone.stage1)}
        clean = partial(self.imagery.clean, backbone.model, backbone.stage1, split, self.runtime)
        return self._features("features", key, clean)

    def views(self, backbone: Backbone, stage: StageSpec, rows: Rows, seed: int) -> list[View]:
        """Return the augmented views that stage 2 cycles through.

        With instance sampling every view is extracted once for the whole of D* and shared by all classifiers on this
        backbone, which take their rows of it. Other samplers draw first, and exactly those draws are extracted.
        """
        assert stage.views is not None
        if stage.sampler != "instance":
            drawn = [self.drawn(stage, rows, v, seed) for v in range(stage.views)]
            return [(self._view(backbone, stage, d, v, seed), self.data.train.labels[d]) for v, d in enumerate(drawn)]
        everything, labels = np.arange(len(self.data.train)), self.data.train.labels[rows]
        return [(self._view(backbone, stage, everything, v, seed)[rows], labels) for v in range(stage.views)]

    def drawn(self, stage: StageSpec, rows: Rows, view: int, seed: int) -> Rows:
        """Return what the stage's sampler draws of `rows` for a view."""
        sampler = SAMPLERS.make(stage.sampler, self.data.train.labels[rows], self.data.train.num_classes)
        found: Rows = rows[sampler(len(rows), torch_stream(seed, "stage2", "draw", view)).numpy()]
        return found

    def _view(self, backbone: Backbone, stage: StageSpec, rows: Rows, view: int, seed: int) -> Tensor:
        """Return the features of one augmentation of `rows`, each row augmented by a draw of its own."""
        key = {
            "backbone": backbone.key,
            "augment": list(stage.augment),
            "precision": stage.train.precision,
            "rows": splits.Subset((rows,)).sha256,
            "view": view,
            "seed": seed,
        }
        viewed = partial(self.imagery.view, backbone.model, stage, rows, view, seed, self.runtime)
        return self._features("views", key, viewed)

    def _features(self, kind: str, key: dict[str, Any], extract: Callable[[], Tensor]) -> Tensor:
        """Extract features of the data set, or recall them."""

        def make(_: Path) -> tuple[Tensors, Meta]:
            started = time.monotonic()
            features = extract()
            return {"features": features}, {"seconds": time.monotonic() - started, "images": len(features)}

        key = {**key, "fingerprint": self.data.fingerprint}
        return self.store.get_or_make(kind, digest(key), make, self.runtime.progress)[0].tensors["features"]

    def classifier(self, run: RunSpec, backbone: Backbone, rows: Rows, label: str) -> Artifact:
        """Fit the run's classifier or recall it."""
        start = (backbone.weight, backbone.bias) if run.stage2.start == "stage1" else None
        artifact, found = self.store.get_or_make(
            "stage2",
            run.key(),
            lambda _: fit_classifier(
                run.stage2,
                self.views(backbone, run.stage2, rows, run.seed),
                run.stage2.data.counts,
                run.seed,
                start,
                label,
            ),
            self.runtime.progress,
        )
        self._tell(found, label)
        return artifact

    def correct(self, backbone: Backbone, weight: Tensor, bias: Tensor) -> npt.NDArray[np.bool_]:
        """Return which test images [M] a linear classifier on the backbone gets right (top-1)."""
        logits = self.clean_features(backbone, "test") @ weight.T + bias
        right: npt.NDArray[np.bool_] = (logits.argmax(1) == self.data.test.labels).numpy()
        return right

    def _tell(self, found: bool, label: str) -> None:
        if found:
            self.recalled += 1
        else:
            self.trained += 1
        self.runtime.progress.note(f"{'stored already' if found else 'done'}: {label}")
