"""The lab's images where they stay in files: decoded by workers, the work shared out among the processes of a team."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from tailscope.data.filedata import FileData, FileSet, Rows
from tailscope.errors import UserError
from tailscope.experiments.imagery import Split
from tailscope.features_files import WantedFeatures, extract_files
from tailscope.methods import for_photos
from tailscope.models.resnet import CifarResNet
from tailscope.models.resnet10 import ResNet10
from tailscope.progress import Quiet
from tailscope.spec import StageSpec, TrainSpec
from tailscope.store import Meta, Tensors
from tailscope.training.runtime import Runtime
from tailscope.training.stage1_files import train_on_files
from tailscope.training.step import Normalizer
from tailscope.training.team import Solo, Team, portable

IMAGENET = Normalizer(torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375]))
"""Pixel statistics that networks for ImageNet are trained with, also by the published systems that ImageNet-LT results
are compared with; measuring them would decode every image once more."""


@dataclass(frozen=True)
class _Training:
    """Order to the followers: train a backbone on these images. It carries all that they need to know."""

    stage: StageSpec
    data: FileSet
    seed: int


class OnDisk:
    """Images in files."""

    def __init__(self, data: FileData, team: Team | None = None, workers: int | None = None) -> None:
        """Take in the data set and the processes that share the work.

        Args:
            data: every image can be read (`filedata.readable`).
            team: the processes, led by this one; by default this one alone.
            workers: processes that decode, for each of the team's; None decides.
        """
        self._data, self._team, self._workers = data, team or Solo(), workers
        self.channels = data.train.channels
        self.normalize = IMAGENET

    def check(self, train: TrainSpec, augment: Sequence[str]) -> None:
        """Refuse recipes for images in memory, and micro-batches that the team cannot share.

        Raises:
            UserError: saying which, and what to take instead.
        """
        if not for_photos(augment):
            raise UserError(
                f"{self._data.name}: images in files need an augmentation that makes them one size, not"
                f" {', '.join(augment) or 'none'}; take --recipe imagenet or imagenet-fast"
            )
        parts = train.micro_batches
        if parts % self._team.size or 2 * parts > train.batch:
            raise UserError(
                f"--micro-batches {parts}: must be a multiple of the {self._team.size} processes and at most half the"
                f" batch of {train.batch}"
            )

    def train(
        self, stage: StageSpec, rows: Rows, seed: int, runtime: Runtime, scratch: Path, label: str
    ) -> tuple[Tensors, Meta]:
        """Train a backbone on `rows` of the training images."""
        order = _Training(stage, self._data.train.take(rows), seed)
        with self._team.lead(order):
            return _train(order, runtime, scratch, label, self._team, self._workers)

    def clean_key(self, stage1: StageSpec) -> dict[str, str]:
        """Return the augmentation that gives the evaluated images their size."""
        return {"size": stage1.augment[0]}

    def clean(self, model: CifarResNet, stage1: StageSpec, split: Split, runtime: Runtime) -> Tensor:
        """Return float32 features [N, d] of the centre crops of a split."""
        data = self._data.train if split == "train" else self._data.test
        wanted = WantedFeatures(model, data, np.arange(len(data)), stage1.augment, None, low_precision=False)
        return self._extract(wanted, runtime, f"features of the {split} images")

    def view(self, model: CifarResNet, stage: StageSpec, rows: Rows, view: int, seed: int, runtime: Runtime) -> Tensor:
        """Return features of one augmentation of `rows`; a row that is drawn twice is augmented twice."""
        draws = (seed, "stage2", "augment", view)
        low = stage.train.precision == "auto"
        wanted = WantedFeatures(model, self._data.train, rows, stage.augment, draws, low_precision=low)
        return self._extract(wanted, runtime, f"view {view + 1} of {stage.views} for stage 2")

    def _extract(self, wanted: WantedFeatures, runtime: Runtime, label: str) -> Tensor:
        # A wrapper around a network may gather statistics of what it sees: this process alone shows it every image.
        if not isinstance(wanted.model, CifarResNet | ResNet10):
            return extract_files(wanted, self.normalize, runtime, label, team=Solo(), workers=self._workers)
        with self._team.lead(replace(wanted, model=portable(wanted.model))):
            return extract_files(wanted, self.normalize, runtime, label, team=self._team, workers=self._workers)


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
            extract_files(order, IMAGENET, runtime, "", team=team, workers=workers)
    raise SystemExit(0)
