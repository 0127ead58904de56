"""The textbook loop in Lightning: the same data, the same network, float32, with everything optional switched off."""

import logging
import warnings
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from benchmarks.arms.common import CLASSES, load_images, on_device
from benchmarks.arms.rivals import make_loader
from benchmarks.measure import Pace
from tailscope.networks import MODELS


class Classifier(lightning.LightningModule):
    """A network with a cross-entropy loss."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.network: nn.Module = MODELS.make(model, 3, CLASSES)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss: Tensor = self.criterion(self.network(x), y)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the same optimiser as the textbook's."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


class Steps(lightning.Callback):
    """Tells the pace of every batch."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_train_batch_end(self, _: Any, __: Any, ___: Any, batch: tuple[Tensor, Tensor], ____: int) -> None:
        """Count a step."""
        self._pace.step(len(batch[1]))


def train(pace: Pace, *, data: str | None, images: int, batch: int, model: str, workers: int, device: str) -> None:
    """Train the network."""
    on_device(pace, device)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it advertises
    loader = make_loader(load_images(data, images), batch, workers, device)
    module = Classifier(model)
    trainer = lightning.Trainer(
        max_epochs=10_000,
        accelerator="gpu" if device.startswith("cuda") else "cpu",
        devices=1,
        precision="32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Steps(pace)],
    )
    pace.ready()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the number of workers, which is the better of those tried
        trainer.fit(module, loader)
