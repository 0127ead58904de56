"""The laboratory: trains what a plan needs, or recalls it from the store, and evaluates it.

Data flow: training set -> backbone (stage 1) -> features (views for stage 2, clean ones for evaluation)
-> classifier (stage 2) -> which test images are right.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.data import splits
from tailscope.data.filedata import Data, FileData
from tailscope.data.profiles import canonical, resolve
from tailscope.experiments.files import OnDisk
from tailscope.experiments.imagery import Imagery, InMemory, Split
from tailscope.methods import SAMPLERS
from tailscope.models.resnet import CifarResNet
from tailscope.seeds import torch_stream
from tailscope.spec import DataSpec, RunSpec, StageSpec, backbone_key, digest
from tailscope.store import Artifact, Store
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import new_model
from tailscope.training.stage2 import View, fit_classifier


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Rows of the true training set, by their name (lt, true or matched), with the spec that describes them."""

    name: str
    spec: DataSpec
    rows: npt.NDArray[np.int64]


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

    def __init__(self, data: Data, store: Store, runtime: Runtime, imagery: Imagery | None = None) -> None:
        self.data = data
        self.store = store
        self.runtime = runtime
        self.imagery: Imagery = imagery or (OnDisk(data) if isinstance(data, FileData) else InMemory(data))
        self.normalize = self.imagery.normalize
        self.trained = 0
        self.recalled = 0
        self._models: dict[str, Backbone] = {}

    # -- training sets ------------------------------------------------------------------------------------------

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

    def _named(
        self, name: str, rows: npt.NDArray[np.int64], counts: list[int], profile: str, protocol: str, seed: int
    ) -> TrainingSet:
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

    # -- stage 1 ------------------------------------------------------------------------------------------------

    def backbone(self, stage: StageSpec, rows: npt.NDArray[np.int64], seed: int, label: str) -> Backbone:
        """Train the backbone or recall it."""
        self.imagery.check(stage.train, stage.augment)
        key = backbone_key(stage, seed)
        if key not in self._models:
            artifact, found = self.store.get_or_make(
                "stage1",
                key,
                lambda scratch: self._with_rows(
                    self.imagery.train(stage, rows, seed, self.runtime, scratch, label), rows
                ),
                self.runtime.progress,
            )
            self._tell(found, label)
            self._models = {key: self._load(key, stage, artifact)}  # one at a time: a plan groups runs by backbone
        return self._models[key]

    @staticmethod
    def _with_rows(
        trained: tuple[dict[str, Tensor], dict[str, Any]], rows: npt.NDArray[np.int64]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Store the kept indices with the backbone."""
        return {**trained[0], "rows": torch.from_numpy(rows)}, trained[1]

    def _load(self, key: str, stage: StageSpec, artifact: Artifact) -> Backbone:
        assert stage.model is not None
        model = new_model(stage.model, self.imagery.channels, self.data.train.num_classes, seed=0)
        state = {name: t for name, t in artifact.tensors.items() if name != "rows"}
        model.load_state_dict(state)
        model = model.to(self.runtime.device).eval()
        weight, bias = state["classifier.weight"].cpu().float(), state["classifier.bias"].cpu().float()
        return Backbone(key, stage, model, artifact.meta, weight, bias)

    # -- features -----------------------------------------------------------------------------------------------

    def clean_features(self, backbone: Backbone, split: Split) -> Tensor:
        """Return float32 features [N, d] of the un-augmented training or test images."""
        evaluated = self.imagery.clean_key(backbone.stage1)
        key = digest({"backbone": backbone.key, "clean": split, "fingerprint": self.data.fingerprint, **evaluated})

        def make(_: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
            started = time.monotonic()
            features = self.imagery.clean(backbone.model, backbone.stage1, split, self.runtime)
            return {"features": features}, {"seconds": time.monotonic() - started, "images": len(features)}

        return self.store.get_or_make("features", key, make, self.runtime.progress)[0].tensors["features"]

    def views(self, backbone: Backbone, stage: StageSpec, rows: npt.NDArray[np.int64], seed: int) -> list[View]:
        """Return the augmented views that stage 2 cycles through.

        With instance sampling every view is extracted once for the whole of D* and shared by all classifiers on this
        backbone, which take their rows of it. Other samplers draw first, and exactly those draws are extracted.
        """
        assert stage.views is not None
        if stage.sampler != "instance":
            return [self._drawn_view(backbone, stage, rows, v, seed) for v in range(stage.views)]
        everything = np.arange(len(self.data.train), dtype=np.int64)
        labels, index = self.data.train.labels[rows], torch.from_numpy(rows)
        return [(self._view(backbone, stage, everything, v, seed)[index], labels) for v in range(stage.views)]

    def _drawn_view(
        self, backbone: Backbone, stage: StageSpec, rows: npt.NDArray[np.int64], view: int, seed: int
    ) -> View:
        labels = self.data.train.labels[rows]
        sampler = SAMPLERS.make(stage.sampler, labels, self.data.train.num_classes)
        drawn = sampler(len(rows), torch_stream(seed, "stage2", "draw", view))
        return self._view(backbone, stage, rows[drawn.numpy()], view, seed), labels[drawn]

    def _view(self, backbone: Backbone, stage: StageSpec, rows: npt.NDArray[np.int64], view: int, seed: int) -> Tensor:
        """Return the features of one augmentation of `rows`, each row augmented by a draw of its own."""
        key = digest(
            {
                "backbone": backbone.key,
                "augment": list(stage.augment),
                "precision": stage.train.precision,
                "rows": splits.Subset((rows,)).sha256,
                "view": view,
                "seed": seed,
                "fingerprint": self.data.fingerprint,
            }
        )

        def make(_: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
            started = time.monotonic()
            features = self.imagery.view(backbone.model, stage, rows, view, seed, self.runtime)
            return {"features": features}, {"seconds": time.monotonic() - started, "images": len(rows)}

        return self.store.get_or_make("views", key, make, self.runtime.progress)[0].tensors["features"]

    # -- stage 2 and evaluation ---------------------------------------------------------------------------------

    def classifier(self, run: RunSpec, backbone: Backbone, rows: npt.NDArray[np.int64], label: str) -> Artifact:
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
