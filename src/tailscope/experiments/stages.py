"""The stages of a run: what a plan needs is trained, or recalled from the store, and evaluated.

Data flow: training set -> backbone (stage 1) -> features (views for stage 2, clean ones for evaluation)
-> classifier (stage 2) -> which test images are right.

Batch normalisation between the stages: `frozen`, or `shifted` to stage 2's data (MiSLAS: Zhong et al. 2021).
Shifted, the running mean and variance of every batch-norm layer are forgotten and estimated anew; weights and affine
parameters stay. The estimate is one pass over one augmented view of stage 2's data as its sampler draws them, in random
order and in batches as large as those that features are extracted in: each layer normalises by the batch's own
statistics, as in training, and keeps the plain mean over the batches of their means and (unbiased) variances. Then the
layers are frozen again. Everything that stage 2 sees, the test images' features too, is computed with them.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tailscope.data import subsets
from tailscope.data.images import ImageSet, Rows
from tailscope.data.sources import ImageData
from tailscope.device import Runtime, Solo, Team
from tailscope.errors import UserError
from tailscope.methods import SAMPLERS, TASKS, for_photos
from tailscope.networks.last_layers import as_linear
from tailscope.networks.resnets import CifarResNet
from tailscope.progress import Quiet
from tailscope.seeds import torch_stream
from tailscope.spec import DataSpec, RunSpec, StageSpec, TrainSpec, backbone_key, digest
from tailscope.store import Artifact, Meta, Store, Tensors
from tailscope.training import SCHEDULES
from tailscope.training.extract import View, WantedFeatures, extract_wanted, fit_classifier
from tailscope.training.loop import Training, new_model
from tailscope.training.recipes import with_plugins
from tailscope.training.step import Normalizer

IMAGENET = Normalizer(torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375]))
"""Pixel statistics that networks for ImageNet are trained with, also by the published systems that ImageNet-LT results
are compared with; measuring them would decode every image once more."""

_SMALLEST = 5
"""Pixels that the longer side needs: the networks' two halvings leave less as one, which batch normalisation cannot
train on."""


def require_trainable(data: ImageData, team: Team, train: TrainSpec, augment: Sequence[str]) -> None:
    """Refuse a stage 1 that a data set's images cannot be trained with.

    Raises:
        UserError: the augmentations are for images of the other kind, or the micro-batches do not suit data and team.
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


def follow(team: Team, runtime: Runtime, workers: int | None) -> NoReturn:
    """Carry out the leader's orders until it has no more, then end this process."""
    runtime = replace(runtime, progress=Quiet())
    for order in team.orders():
        if isinstance(order, WantedFeatures):
            extract_wanted(order, IMAGENET, runtime, "", team=team, workers=workers)
        else:
            stage, data, seed, start = order
            if with_plugins(stage) != stage:
                raise UserError("this process has other plug-ins than the one that leads; give all the same files")
            Training(stage, data, IMAGENET, seed, runtime, None, "", team, workers, start).run()
    raise SystemExit(0)


def pretraining(stage: StageSpec) -> StageSpec:
    """Return the stage before a stage 1 that has `pretrain`: the task in place of labels, optimised alike."""
    assert stage.pretrain is not None
    length = TASKS.make(stage.pretrain).length
    longer = {n: max(1, round(length * v)) for n in ("epochs", "steps") if (v := getattr(stage.train, n)) is not None}
    schedule = stage.train.schedule if length == 1 else _stretched(stage.train.schedule, length)
    train = stage.train.model_copy(update={**longer, "schedule": schedule})
    first = StageSpec(data=stage.data, train=train, model=stage.model, augment=stage.augment, task=stage.pretrain)
    return with_plugins(first)


def _stretched(schedule: str, length: float) -> str:
    """Return a schedule for a training that is so many times as long: what it counts in epochs grows with it.

    >>> _stretched("multistep(drops=(160, 180))", 0.5), _stretched("cosine", 2)
    ('multistep(warmup=2, drops=(80, 90), factor=0.01)', 'cosine()')
    """
    entry, values = SCHEDULES.parse(schedule)
    for name in {"warmup", "drops"} & values.keys():  # a schedule's other values are shares, or factors
        old = values[name]
        values[name] = tuple(round(length * e) for e in old) if isinstance(old, tuple) else round(length * old)
    return f"{entry.name}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def labeller(stage: StageSpec) -> StageSpec:
    """Return the stage whose network labels the images of a stage that has `unlabelled`: the same without them."""
    return stage.model_copy(update={"unlabelled": None})


class Beneath(NamedTuple):
    """Kind and key of a stage that a backbone is trained from, what for, and the stage."""

    kind: Literal["pretrained", "stage1"]
    key: str
    what: str
    stage: StageSpec


def beneath(stage: StageSpec, seed: int) -> list[Beneath]:
    """Return what a stage 1 is trained from: its pre-training, and the network that labels the other images."""
    found = []
    if stage.pretrain:
        first = pretraining(stage)
        found.append(Beneath("pretrained", backbone_key(first, seed), "pre-training", first))
    if stage.unlabelled:
        first = labeller(stage)
        found.append(Beneath("stage1", backbone_key(first, seed), "to label the others", first))
    return found


SPENT = ("pretraining_seconds", "labeller_seconds", "seconds")
"""What the description of a backbone says of the time that it took."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Rows of the true training set, by their name (lt, true or matched), with the spec that describes them."""

    name: str
    spec: DataSpec
    rows: Rows


@dataclass(frozen=True, eq=False)
class Backbone:
    """A trained, frozen encoder with where it came from, and a linear layer that decides as its own classifier does.

    Attributes:
        predicted: labels, int64, that it was trained on of the images that its stage has without labels; None without.
    """

    key: str
    stage1: StageSpec
    model: CifarResNet
    meta: dict[str, Any]
    weight: Tensor
    bias: Tensor
    predicted: Tensor | None = None


class Stages:
    """What everything that runs on one data set shares: its pixel statistics, the store and the runtime.

    Attributes:
        data: every image can be read (`decoding.readable`).
        normalize: pixel statistics, of images in memory those of the true training set.
        trained, recalled: how many stages were, so far.
        workers: processes that decode files; None decides.
    """

    def __init__(
        self, data: ImageData, store: Store, runtime: Runtime, team: Team | None = None, workers: int | None = None
    ) -> None:
        """Take in where to work; `team` are the processes that share the work on files, `workers` those that decode.

        Raises:
            UserError: the images are too small for the networks.
        """
        self.data, self.store, self.runtime = data, store, runtime
        self._team, self.workers = team or Solo(), workers
        self.trained = self.recalled = 0
        self._models: dict[str, Backbone] = {}
        self.normalize = IMAGENET
        if isinstance(data.train, ImageSet):
            height, width = data.train.images.shape[1:3]
            if max(height, width) < _SMALLEST:
                raise UserError(
                    f"{data.name}: images of {height} x {width} pixels are too small; one side needs at least"
                    f" {_SMALLEST}"
                )
            self.normalize = Normalizer.of(data.train.images)

    def working(self, runtime: Runtime, store: Store | None = None) -> "Stages":
        """Return the same on another runtime, in another store perhaps, with a model of its own: for another thread."""
        other = copy.copy(self)
        other.runtime, other.store, other._models = runtime, store or self.store, {}
        return other

    def true(self) -> TrainingSet:
        """Return the whole training set, D*."""
        rows = np.arange(len(self.data.train), dtype=np.int64)
        return self._named("true", rows, self.data.train.counts(), "full", "all", 0)

    def long_tailed(self, profile: str, protocol: str, seed: int) -> TrainingSet:
        """Return the long-tailed subset, D_LT."""
        subset = subsets.draw(self.data.train, profile, protocol, seed)
        return self._named("lt", subset.flat, subset.counts, subsets.canonical(profile), protocol, seed)

    def matched(self, counts: list[int], seed: int) -> TrainingSet:
        """Return a class-balanced subset with as many images as the long-tailed one."""
        subset = subsets.matched(self.data.train.labels, counts, seed=seed)
        return self._named("matched", subset.flat, subset.counts, "matched", "nested", seed)

    def without(self, whole: TrainingSet, held_out: npt.NDArray[np.bool_]) -> TrainingSet:
        """Return a training set without those of its rows that are held out, [N]."""
        rows, spec = whole.rows[~held_out], whole.spec
        counts = self.data.train.take(rows).counts()
        return self._named("cut", rows, counts, f"{spec.profile} without a cut", spec.protocol, spec.subset_seed)

    def _named(self, name: str, rows: Rows, counts: list[int], profile: str, protocol: str, seed: int) -> TrainingSet:
        spec = DataSpec(
            name=self.data.name,
            fingerprint=self.data.fingerprint,
            profile=profile,
            protocol=protocol,
            subset_seed=seed,
            indices_sha256=subsets.sha256_of(rows),
            counts=tuple(counts),
        )
        return TrainingSet(name, spec, rows)

    def backbone(self, stage: StageSpec, rows: Rows, seed: int, label: str) -> Backbone:
        """Train the backbone or recall it."""
        require_trainable(self.data, self._team, stage.train, stage.augment)
        key = backbone_key(stage, seed)
        if key not in self._models:

            def make(scratch: Path) -> tuple[Tensors, Meta]:
                # Here, under the backbone's lock: one that is stored needs nothing of what it was trained from.
                start, before = self.pretrained(stage, rows, seed, label) if stage.pretrain else ({}, {})
                labelled, told = self._labelled(stage, rows, seed, label) if stage.unlabelled else (None, {})
                tensors, meta = self._train(stage, rows, seed, scratch, label, start, labelled)
                predicted = {} if labelled is None else {"predicted": labelled[1]}
                return {**tensors, "rows": torch.from_numpy(rows), **predicted}, {**meta, **before, **told}

            artifact = self._get_or_train("stage1", key, make, label)
            self._models = {key: self._load(key, stage, artifact)}  # one at a time: a plan groups runs by backbone
        return self._models[key]

    def beneath(self, stage: StageSpec, seed: int) -> list[Beneath]:
        """Return what a backbone is trained from, as far as it is stored or, since the backbone is not, is needed."""
        there = self.store.has("stage1", backbone_key(stage, seed))
        return [one for one in beneath(stage, seed) if not there or self.store.has(one.kind, one.key)]

    def pretrained(self, stage: StageSpec, rows: Rows, seed: int, label: str) -> tuple[Tensors, Meta]:
        """Pre-train a backbone or recall it; return its weights, without the classifier's, and what it took."""
        first, said = pretraining(stage), f"{label}, pre-training"
        key = backbone_key(first, seed)
        artifact = self._get_or_train(
            "pretrained", key, lambda scratch: self._train(first, rows, seed, scratch, said, {}), said
        )
        weights = {name: t for name, t in artifact.tensors.items() if not name.startswith("classifier.")}
        return weights, {"pretrained": key, "pretraining_seconds": artifact.meta["seconds"]}

    def _labelled(
        self, stage: StageSpec, rows: Rows, seed: int, label: str
    ) -> tuple[tuple[Rows, Tensor], dict[str, Any]]:
        """Return all rows but `rows` with the labels that are predicted for them, int64, and what predicted these.

        The network that predicts is trained or recalled as `labeller` says, which the stage's key thus covers.
        """
        first = self.backbone(labeller(stage), rows, seed, f"{label}, to label the others")
        others = self._others(rows)
        logits = self.clean_features(first, "train", others) @ first.weight.T + first.bias
        told = {"labeller": first.key, "labeller_seconds": first.meta["seconds"], "unlabelled_images": len(others)}
        return (others, logits.argmax(1)), told

    def _others(self, rows: Rows) -> Rows:
        return np.setdiff1d(np.arange(len(self.data.train), dtype=np.int64), rows)

    def trained_on(self, backbone: Backbone, rows: Rows) -> tuple[Rows, Tensor]:
        """Return the rows that a backbone with the labels of `rows` was trained on, and the labels that it saw."""
        labels = self.data.train.labels[rows]
        if backbone.predicted is None:
            return rows, labels
        return np.concatenate([rows, self._others(rows)]), torch.cat([labels, backbone.predicted])

    def _train(
        self,
        stage: StageSpec,
        rows: Rows,
        seed: int,
        scratch: Path,
        label: str,
        start: Tensors,
        labelled: tuple[Rows, Tensor] | None = None,
    ) -> tuple[Tensors, Meta]:
        data, own = self.data.train.take(rows), (self.runtime, scratch, label, self._team, self.workers, start)
        if labelled is not None:
            whole = self.data.train.take(np.concatenate([rows, labelled[0]]))
            data = replace(cast(Any, whole), labels=torch.cat([data.labels, labelled[1]]))
        with self._team.lead((stage, data, seed, start)):
            return Training(stage, data, self.normalize, seed, *own).run()

    def _load(self, key: str, stage: StageSpec, artifact: Artifact) -> Backbone:
        assert stage.model is not None
        size = self.data.train.channels, self.data.train.num_classes
        model = new_model(stage.model, *size, 0, stage.last_layer, stage.branches)
        state = dict(artifact.tensors)
        predicted, _ = state.pop("predicted", None), state.pop("rows", None)
        model.load_state_dict(state)
        model = model.to(self.runtime.device).eval()
        return Backbone(key, stage, model, artifact.meta, *as_linear(model.classifier), predicted)

    def for_stage2(self, backbone: Backbone, stage2: StageSpec, rows: Rows, seed: int) -> Backbone:
        """Return the backbone as stage 2 on `rows` and the test images see it: itself, or with shifted statistics."""
        if stage2.bn_mode == "frozen":
            return backbone
        order, key = self._shifted(backbone.key, stage2, rows, seed)

        def make(_: Path) -> tuple[Tensors, Meta]:
            started = time.monotonic()
            model = _Estimating(copy.deepcopy(backbone.model))
            self._extract(self._wanted_view(model, stage2, order, 0, seed), _view_label(stage2, 0))
            return model.statistics(), {"seconds": time.monotonic() - started, "images": len(order)}

        statistics = self.store.get_or_make("shifted", key, make, self.runtime.progress)[0].tensors
        model = copy.deepcopy(backbone.model)
        model.load_state_dict({**model.state_dict(), **statistics})
        return replace(backbone, key=key, model=model.eval())

    def _shifted(self, backbone: str, stage2: StageSpec, rows: Rows, seed: int) -> tuple[Rows, str]:
        """Return what statistics are shifted to, in the order in which it is seen, and their key."""
        # In random order: batches of a single class would hide what separates classes.
        drawn = rows if stage2.sampler == "instance" else self._drawn(stage2, rows, 0, seed)
        order = drawn[torch.randperm(len(drawn), generator=torch_stream(seed, "stage2", "bn")).numpy()]
        return order, digest({**self._view_key(backbone, stage2, order, seed), "bn_mode": stage2.bn_mode})

    def extracted(self, run: RunSpec, rows: Rows) -> list[tuple[str, str]]:
        """Return kind and key of what a run's classifier is fitted and judged on, as far as the store has it."""
        stage, key, needed = run.stage2, backbone_key(run.stage1, run.seed), []
        if stage.bn_mode != "frozen":
            key = self._shifted(key, stage, rows, run.seed)[1]
            needed.append(("shifted", key))
        assert stage.views is not None
        views = [(self._seen(stage, rows, view, run.seed), view) for view in range(stage.views)]
        needed += [("views", digest(self._view_key(key, stage, seen, run.seed, view))) for seen, view in views]
        needed.append(("features", digest(self._clean_key(key, run.stage1, "test"))))
        return [entry for entry in needed if self.store.has(*entry)]

    def classifier(self, run: RunSpec, backbone: Backbone, rows: Rows, label: str) -> Artifact:
        """Fit the run's classifier or recall it."""
        stage, start = run.stage2, (backbone.weight, backbone.bias) if run.stage2.start == "stage1" else None

        def make(_: Path) -> tuple[Tensors, Meta]:
            views = self.views(backbone, stage, rows, run.seed)
            return fit_classifier(stage, views, stage.data.counts, run.seed, start, label, self.runtime.progress)

        return self._get_or_train("stage2", run.key(), make, label)

    def _get_or_train(self, kind: str, key: str, make: Callable[[Path], tuple[Tensors, Meta]], label: str) -> Artifact:
        artifact, found = self.store.get_or_make(kind, key, make, self.runtime.progress)
        self._tell(found, label)
        return artifact

    def _tell(self, found: bool, label: str) -> None:
        self.recalled += found
        self.trained += not found
        self.runtime.progress.note(f"{'stored already' if found else 'done'}: {label}")

    def correct(self, backbone: Backbone, weight: Tensor, bias: Tensor) -> npt.NDArray[np.bool_]:
        """Return which test images [M] a linear classifier on the backbone gets right (top-1)."""
        logits = self.clean_features(backbone, "test") @ weight.T + bias
        right: npt.NDArray[np.bool_] = (logits.argmax(1) == self.data.test.labels).numpy()
        return right

    def clean_features(self, backbone: Backbone, split: Literal["train", "test"], rows: Rows | None = None) -> Tensor:
        """Return float32 features [N, d] of un-augmented images of a split, or of some rows; of files centre crops."""
        data, augment = self.data.train if split == "train" else self.data.test, backbone.stage1.augment
        wanted = WantedFeatures(
            backbone.model, data, np.arange(len(data)) if rows is None else rows, augment, None, "fp32"
        )
        key = self._clean_key(backbone.key, backbone.stage1, split, rows)
        return self._features("features", key, wanted, f"features of the {split} images")

    def _clean_key(self, backbone: str, stage1: StageSpec, split: str, rows: Rows | None = None) -> dict[str, Any]:
        size = {} if self.data.in_memory else {"size": stage1.augment[0]}
        some = {} if rows is None else {"rows": subsets.sha256_of(rows)}
        return {"backbone": backbone, "clean": split, "fingerprint": self.data.fingerprint, **size, **some}

    def views(self, backbone: Backbone, stage: StageSpec, rows: Rows, seed: int) -> list[View]:
        """Return the augmented views that stage 2 cycles through.

        With instance sampling every view is extracted once for the whole of D* and shared by all classifiers on this
        backbone, which take their rows of it. Other samplers draw first, and exactly those draws are extracted.
        """
        assert stage.views is not None
        labels, found = self.data.train.labels, []
        for view in range(stage.views):
            seen = self._seen(stage, rows, view, seed)
            features = self._view(backbone, stage, seen, view, seed)
            found.append((features[rows], labels[rows]) if stage.sampler == "instance" else (features, labels[seen]))
        return found

    def _seen(self, stage: StageSpec, rows: Rows, view: int, seed: int) -> Rows:
        """Return the rows whose features a view holds."""
        return np.arange(len(self.data.train)) if stage.sampler == "instance" else self._drawn(stage, rows, view, seed)

    def _drawn(self, stage: StageSpec, rows: Rows, view: int, seed: int) -> Rows:
        """Return what the stage's sampler draws of `rows` for a view."""
        sampler = SAMPLERS.make(stage.sampler, self.data.train.labels[rows], self.data.train.num_classes)
        found: Rows = rows[sampler(len(rows), torch_stream(seed, "stage2", "draw", view)).numpy()]
        return found

    def _view(self, backbone: Backbone, stage: StageSpec, rows: Rows, view: int, seed: int) -> Tensor:
        """Return the features of one augmentation of `rows`, each row augmented by a draw of its own."""
        key = self._view_key(backbone.key, stage, rows, seed, view)
        wanted = self._wanted_view(backbone.model, stage, rows, view, seed)
        return self._features("views", key, wanted, _view_label(stage, view))

    def _view_key(
        self, backbone: str, stage: StageSpec, rows: Rows, seed: int, view: int | None = None
    ) -> dict[str, Any]:
        return {
            "backbone": backbone,
            "augment": list(stage.augment),
            "precision": stage.train.precision,
            "rows": subsets.sha256_of(rows),
            "seed": seed,
            "fingerprint": self.data.fingerprint,
            **({"plugins": stage.plugins} if stage.plugins else {}),
            **({} if view is None else {"view": view}),
        }

    def _wanted_view(self, model: nn.Module, stage: StageSpec, rows: Rows, view: int, seed: int) -> WantedFeatures:
        draws = (seed, "stage2", "augment", view)
        return WantedFeatures(model, self.data.train, rows, stage.augment, draws, stage.train.precision)

    def _features(self, kind: str, key: dict[str, Any], wanted: WantedFeatures, label: str) -> Tensor:
        """Extract features of the data set, or recall them."""

        def make(_: Path) -> tuple[Tensors, Meta]:
            started = time.monotonic()
            features = self._extract(wanted, label)
            return {"features": features}, {"seconds": time.monotonic() - started, "images": len(features)}

        return self.store.get_or_make(kind, digest(key), make, self.runtime.progress)[0].tensors["features"]

    def _extract(self, wanted: WantedFeatures, label: str) -> Tensor:
        # This wrapper gathers statistics of what it sees: this process alone shows it every image.
        team = Solo() if isinstance(wanted.model, _Estimating) else self._team
        with team.lead(replace(wanted, model=copy.deepcopy(wanted.model).cpu()) if team.size > 1 else None):
            return extract_wanted(wanted, self.normalize, self.runtime, label, team=team, workers=self.workers)


def _view_label(stage: StageSpec, view: int) -> str:
    return f"view {view + 1} of {stage.views} for stage 2"


class _Estimating(nn.Module):
    """A network in eval mode that all the same normalises by batches and averages their statistics."""

    def __init__(self, model: nn.Module) -> None:
        """Forget the running statistics of `model`, which is changed."""
        super().__init__()
        self.model = model
        for layer in self._layers().values():
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average instead of an exponential one

    def features(self, images: Tensor) -> Tensor:
        """Return the features [n, d] of a normalised batch [n, C, H, W], and count its statistics in."""
        for layer in self._layers().values():
            layer.train()
        return cast(CifarResNet, self.model).features(images)

    def statistics(self) -> dict[str, Tensor]:
        """Return the running statistics under their names in the model's state."""
        return {f"{name}.{k}": tensor for name, layer in self._layers().items() for k, tensor in layer.named_buffers()}

    def _layers(self) -> dict[str, nn.BatchNorm2d]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
