"""What the lab does with images themselves: train a backbone on them and extract features of them.

There are two kinds: tensors in memory (here) and files that worker processes decode (`experiments/files.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tailscope.data.sources import ImageData
from tailscope.errors import UserError
from tailscope.features import extract
from tailscope.methods import for_photos
from tailscope.methods.augmentations import build
from tailscope.models.resnet import CifarResNet
from tailscope.seeds import torch_stream
from tailscope.spec import StageSpec, TrainSpec
from tailscope.store import Meta, Tensors
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import train_backbone
from tailscope.training.step import Normalizer

Split = Literal["train", "test"]
Rows = npt.NDArray[np.int64]


class Imagery(Protocol):
    """Images of a data set, wherever they are."""

    @property
    def channels(self) -> int:
        """Channels of an image."""

    @property
    def normalize(self) -> Normalizer:
        """The pixel statistics that all backbones share."""

    def check(self, train: TrainSpec, augment: Sequence[str]) -> None:
        """Refuse a stage 1 that these images cannot be trained with.

        Raises:
            UserError: saying why, and what to take instead.
        """

    def train(
        self, stage: StageSpec, rows: Rows, seed: int, runtime: Runtime, scratch: Path, label: str
    ) -> tuple[Tensors, Meta]:
        """Train a backbone on `rows` of the training images."""

    def clean_key(self, stage1: StageSpec) -> dict[str, str]:
        """Return what of a backbone's stage decides how its images are evaluated."""

    def clean(self, model: CifarResNet, stage1: StageSpec, split: Split, runtime: Runtime) -> Tensor:
        """Return float32 features [N, d] of a split's un-augmented images."""

    def view(self, model: CifarResNet, stage: StageSpec, rows: Rows, view: int, seed: int, runtime: Runtime) -> Tensor:
        """Return features [len(rows), d] of one augmentation of `rows`, in the stage's precision."""


class InMemory:
    """Images as tensors: augmented and extracted in batches, on the device."""

    def __init__(self, data: ImageData) -> None:
        """Measure the pixel statistics of the true training set.

        Raises:
            UserError: the images are too small for the networks.
        """
        _check_size(data)
        self._data = data
        self.normalize = Normalizer.of(data.train.images)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self._data.train.images.shape[-1]

    def check(self, train: TrainSpec, augment: Sequence[str]) -> None:
        """Refuse recipes for files.

        Raises:
            UserError: the augmentations are those of photographs, or the batch is to be cut.
        """
        if for_photos(augment):
            raise UserError(
                f"{self._data.name}: images in memory cannot be trained with {augment[0]}, which is for files "
                "(folder: or list:); take a recipe such as fast or paper"
            )
        if train.micro_batches != 1:
            raise UserError(
                f"{self._data.name}: only images in files are trained in micro-batches or on several devices"
            )

    def train(
        self, stage: StageSpec, rows: Rows, seed: int, runtime: Runtime, scratch: Path, label: str
    ) -> tuple[Tensors, Meta]:
        """Train a backbone on `rows` of the training images."""
        return train_backbone(stage, self._data.train.take(rows), self.normalize, seed, runtime, scratch, label)

    def clean_key(self, stage1: StageSpec) -> dict[str, str]:
        """Return nothing: images are evaluated as they are."""
        return {}

    def clean(self, model: CifarResNet, stage1: StageSpec, split: Split, runtime: Runtime) -> Tensor:
        """Return float32 features [N, d] of a split's un-augmented images."""
        images = (self._data.train if split == "train" else self._data.test).images
        return extract(model, images, self.normalize, torch.float32, runtime, f"features of the {split} images")

    def view(self, model: CifarResNet, stage: StageSpec, rows: Rows, view: int, seed: int, runtime: Runtime) -> Tensor:
        """Return features of one augmentation of `rows`, each row augmented by a draw of its own."""
        stream = torch_stream(seed, "stage2", "augment", view)
        augmented = build(stage.augment)(self._data.train.images[torch.from_numpy(rows)], stream)
        label = f"view {view + 1} of {stage.views} for stage 2"
        return extract(model, augmented, self.normalize, runtime.dtype(stage.train.precision), runtime, label)


def _check_size(data: ImageData) -> None:
    """Refuse images that the networks' two halvings leave as one pixel, which batch normalisation cannot train on.

    Raises:
        UserError: both sides are shorter than 5 pixels.
    """
    height, width = data.train.images.shape[1:3]
    if max(height, width) < 5:
        raise UserError(f"{data.name}: images of {height} x {width} pixels are too small; one side needs at least 5")
