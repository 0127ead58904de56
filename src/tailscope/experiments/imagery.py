"""What experiments do with images themselves: train a backbone on them and extract features of them.

Images in memory are augmented in batches on the device; those in files are decoded by workers, and the work is shared
out among the processes of a team.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from tailscope.data.imageset import ImageSet
from tailscope.data.sources import ImageData
from tailscope.data.streams import Images, Rows
from tailscope.errors import UserError
from tailscope.features import WantedFeatures, extract_wanted
from tailscope.methods import for_photos
from tailscope.models.resnet import CifarResNet
from tailscope.models.resnet10 import ResNet10
from tailscope.progress import Quiet
from tailscope.spec import StageSpec, TrainSpec
from tailscope.store import Meta, Tensors
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import train_backbone
from tailscope.training.stage1_files import train_on_files
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
