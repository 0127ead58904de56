"""The laboratory: trains what a plan needs, or recalls it from the store, and evaluates it.

Data flow: training set -> backbone (stage 1) -> features (views for stage 2, clean ones for evaluation)
-> classifier (stage 2) -> which test images are right.

Batch normalisation between the stages: `frozen`, or `shifted` to stage 2's data (MiSLAS: Zhong et al. 2021).

Shifted, the running mean and variance of every batch-norm layer are forgotten and estimated anew; weights and affine
parameters stay. The estimate is one pass over one augmented view of stage 2's data as its sampler draws them, in random
order and in batches as large as those that features are extracted in: each layer normalises by the batch's own
statistics, as in training, and keeps the plain mean over the batches of their means and (unbiased) variances. Then the
layers are frozen again. Everything that stage 2 sees, the test images' features too, is computed with them.

What experiments do with images themselves: train a backbone on them and extract features of them.

Images in memory are augmented in batches on the device; those in files are decoded by workers, and the work is shared
out among the processes of a team.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tailscope.data import subsets
from tailscope.data.images import Images, ImageSet, Rows
from tailscope.data.profiles import canonical, resolve
from tailscope.data.sources import ImageData
from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.methods import SAMPLERS, for_photos
from tailscope.networks.resnets import CifarResNet, ResNet10
from tailscope.progress import Quiet
from tailscope.seeds import torch_stream
from tailscope.spec import DataSpec, RunSpec, StageSpec, TrainSpec, backbone_key, digest
from tailscope.store import Artifact, Meta, Store, Tensors
from tailscope.training.extract import WantedFeatures, extract_wanted
from tailscope.training.loop import View, fit_classifier, new_model, train_backbone, train_on_files
from tailscope.training.step import Normalizer
from tailscope.training.team import Solo, Team, portable

Split = Literal["train", "test"]

IMAGENET = Normalizer(torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375]))
"""Pixel statistics that networks for ImageNet are trained with, also by the published systems that ImageNet-LT results
are compared with; measuring them would decode every image once more."""

SMALLEST = 5
"""Pixels that the longer side needs: the networks' two halvings leave less as one, which batch normalisation cannot
train on."""


@dataclass(frozen=True)
class _Training:
    """Order to the followers: train a backbone on these images. It carries all that they need to know."""

    stage: StageSpec
    data: Images
    seed: int


def check(data: ImageData, team: Team, train: TrainSpec, augment: Sequence[str]) -> None:
    """Refuse a stage 1 that a data set's images cannot be trained with.

    Raises:
        UserError: the augmentations are for images of the other kind, the batch of images in memory is to be cut,
            or the team cannot share the micro-batches.
    """
    name, parts = data.name, train.micro_batches
    if data.in_memory:
        if for_photos(augment):
            raise UserError(
                f"{name}: images in memory cannot be trained with {augment[0]}, which is for files (folder:, list: or"
                " hf:); take a recipe such as fast or paper"
            )
        if parts != 1:
            raise UserError(f"{name}: only images in files are trained in micro-batches or on several devices")
        return
    if not for_photos(augment):
        raise UserError(
            f"{name}: images in files need an augmentation that makes them one size, not"
            f" {', '.join(augment) or 'none'}; take --recipe imagenet or imagenet-fast"
        )
    if parts % team.size or 2 * parts > train.batch:
        raise UserError(
            f"--micro-batches {parts}: must be a multiple of the {team.size} processes and at most half the"
            f" batch of {train.batch}"
        )


class Imagery:
    """The images of a data set, wherever they are."""

    def __init__(self, data: ImageData, team: Team | None = None, workers: int | None = None) -> None:
        """Take in the data set; pixel statistics of images in memory are measured on the true training set.

        Args:
            data: every image can be read (`decoding.readable`).
            team: the processes that share the work on files, led by this one; by default this one alone.
            workers: processes that decode, for each of the team's; None decides.

        Raises:
            UserError: the images are too small for the networks.
        """
        self._data, self._team, self._workers = data, team or Solo(), workers
        self.channels = data.train.channels
        self.normalize = IMAGENET
        if isinstance(data.train, ImageSet):
            height, width = data.train.images.shape[1:3]
            if max(height, width) < SMALLEST:
                raise UserError(
                    f"{data.name}: images of {height} x {width} pixels are too small; one side needs at least"
                    f" {SMALLEST}"
                )
            self.normalize = Normalizer.of(data.train.images)

    def check(self, stage: StageSpec) -> None:
        """Refuse a stage 1 that these images cannot be trained with, as `check` does."""
        check(self._data, self._team, stage.train, stage.augment)

    def train(
        self, stage: StageSpec, rows: Rows, seed: int, runtime: Runtime, scratch: Path, label: str
    ) -> tuple[Tensors, Meta]:
        """Train a backbone on `rows` of the training images."""
        data = self._data.train.take(rows)
        if isinstance(data, ImageSet):
            return train_backbone(stage, data, self.normalize, seed, runtime, scratch, label)
        order = _Training(stage, data, seed)
        with self._team.lead(order):
            return _train(order, runtime, scratch, label, self._team, self._workers)

    def clean_key(self, stage1: StageSpec) -> dict[str, str]:
        """Return what of a backbone's stage decides how its images are evaluated: of files, the size."""
        return {} if self._data.in_memory else {"size": stage1.augment[0]}

    def clean(self, model: CifarResNet, stage1: StageSpec, split: Split, runtime: Runtime) -> Tensor:
        """Return float32 features [N, d] of a split's un-augmented images, of files their centre crops."""
        data = self._data.train if split == "train" else self._data.test
        wanted = WantedFeatures(model, data, np.arange(len(data)), stage1.augment, None, "fp32")
        return self._extract(wanted, runtime, f"features of the {split} images")

    def view(self, model: CifarResNet, stage: StageSpec, rows: Rows, view: int, seed: int, runtime: Runtime) -> Tensor:
        """Return features [len(rows), d] of one augmentation of `rows`, in the stage's precision.

        A row that is drawn twice is augmented twice.
        """
        draws = (seed, "stage2", "augment", view)
        wanted = WantedFeatures(model, self._data.train, rows, stage.augment, draws, stage.train.precision)
        return self._extract(wanted, runtime, f"view {view + 1} of {stage.views} for stage 2")

    def _extract(self, wanted: WantedFeatures, runtime: Runtime, label: str) -> Tensor:
        # A wrapper around a network may gather statistics of what it sees: this process alone shows it every image.
        shared = not self._data.in_memory and isinstance(wanted.model, CifarResNet | ResNet10)
        team = self._team if shared else Solo()
        with team.lead(replace(wanted, model=portable(wanted.model)) if team.size > 1 else None):
            return extract_wanted(wanted, self.normalize, runtime, label, team=team, workers=self._workers)


def _train(
    order: _Training, runtime: Runtime, scratch: Path | None, label: str, team: Team, workers: int | None
) -> tuple[Tensors, Meta]:
    return train_on_files(
        order.stage, order.data, IMAGENET, order.seed, runtime, scratch, label, team=team, workers=workers
    )


def follow(team: Team, runtime: Runtime, workers: int | None) -> NoReturn:
    """Carry out the leader's orders until it has no more, then end this process."""
    runtime = replace(runtime, progress=Quiet())
    for order in team.orders():
        if isinstance(order, _Training):
            _train(order, runtime, None, "", team, workers)
        else:
            extract_wanted(order, IMAGENET, runtime, "", team=team, workers=workers)
    raise SystemExit(0)


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
        subset = subsets.subset(self.data.train.labels, counts, protocol=protocol, seed=seed)
        return self._named("lt", subset.flat, subset.counts, canonical(profile), protocol, seed)

    def matched(self, counts: list[int], seed: int) -> TrainingSet:
        """Return a class-balanced subset with as many images as the long-tailed one."""
        subset = subsets.matched(self.data.train.labels, counts, seed=seed)
        return self._named("matched", subset.flat, subset.counts, "matched", "nested", seed)

    def _named(self, name: str, rows: Rows, counts: list[int], profile: str, protocol: str, seed: int) -> TrainingSet:
        spec = DataSpec(
            name=self.data.name,
            fingerprint=self.data.fingerprint,
            profile=profile,
            protocol=protocol,
            subset_seed=seed,
            indices_sha256=subsets.Subset((rows,)).sha256,
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
            "rows": subsets.Subset((rows,)).sha256,
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


def for_stage2(lab: Lab, backbone: Backbone, stage2: StageSpec, rows: Rows, seed: int) -> Backbone:
    """Return the backbone as stage 2 and the test images see it: itself, or with shifted statistics.

    Args:
        lab: trains, and recalls from its store.
        backbone: trained in stage 1.
        stage2: says whether to shift, and how its samples are drawn and augmented.
        rows: stage 2's training images.
        seed: of the run.
    """
    if stage2.bn_mode == "frozen":
        return backbone
    order = _shuffled_draws(lab, stage2, rows, seed)
    key = digest(
        {
            "backbone": backbone.key,
            "bn_mode": stage2.bn_mode,
            "augment": list(stage2.augment),
            "precision": stage2.train.precision,
            "rows": subsets.Subset((order,)).sha256,
            "seed": seed,
            "fingerprint": lab.data.fingerprint,
        }
    )

    def make(_: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        started = time.monotonic()
        model = Estimating(copy.deepcopy(backbone.model))
        lab.imagery.view(cast(CifarResNet, model), stage2, order, 0, seed, lab.runtime)
        return model.statistics(), {"seconds": time.monotonic() - started, "images": len(order)}

    statistics = lab.store.get_or_make("shifted", key, make, lab.runtime.progress)[0].tensors
    model = copy.deepcopy(backbone.model)
    model.load_state_dict({**model.state_dict(), **statistics})
    return replace(backbone, key=key, model=model.eval())


def _shuffled_draws(lab: Lab, stage2: StageSpec, rows: Rows, seed: int) -> Rows:
    """Return the rows of the first view in random order: batches of a single class would hide what separates classes.

    Instance sampling draws every image once.
    """
    drawn = rows if stage2.sampler == "instance" else lab.drawn(stage2, rows, 0, seed)
    order = torch.randperm(len(drawn), generator=torch_stream(seed, "stage2", "bn"))
    shuffled: Rows = drawn[order.numpy()]
    return shuffled


class Estimating(nn.Module):
    """A network that, whatever mode it is set to, normalises by batches and averages their statistics."""

    def __init__(self, model: nn.Module) -> None:
        """Forget the running statistics of `model`, which is changed."""
        super().__init__()
        self.model = model
        for layer in self._layers().values():
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average instead of an exponential one

    def features(self, images: Tensor) -> Tensor:
        """Return the features [n, d] of a normalised batch [n, C, H, W], and count its statistics in."""
        features = cast(CifarResNet, self.model.train()).features(images)
        return features

    def statistics(self) -> dict[str, Tensor]:
        """Return the running statistics under their names in the model's state."""
        return {f"{name}.{k}": tensor for name, layer in self._layers().items() for k, tensor in layer.named_buffers()}

    def _layers(self) -> dict[str, nn.BatchNorm2d]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
