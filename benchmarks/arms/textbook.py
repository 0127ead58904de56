"""The loop of the tutorials: torchvision data set, PIL transforms, DataLoader, float32, eager."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import AutoAugmentPolicy

from benchmarks.arms.common import CLASSES, load_images, on_device, pixel_statistics
from benchmarks.workers import Pace
from tailscope.data.imageset import ImageSet
from tailscope.models import MODELS
from tailscope.models.resnet import CifarResNet


class ArrayCifar(datasets.CIFAR10):  # type: ignore[misc]  # torchvision has no types
    """torchvision's CIFAR-10, its own `__getitem__`, on images that are in memory already."""

    def __init__(self, images: ImageSet, transform: Any) -> None:
        """Skip the search for files."""
        datasets.VisionDataset.__init__(self, root="", transform=transform)
        self.data = images.images.numpy()
        self.targets = images.labels.tolist()


def make_loader(images: ImageSet, batch: int, workers: int, device: str, autoaugment: bool = False) -> DataLoader[Any]:
    """Return the usual loader; workers stay alive between epochs, which is in its favour."""
    mean, std = pixel_statistics(images.images)
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    if autoaugment:
        steps.append(transforms.AutoAugment(AutoAugmentPolicy.CIFAR10))
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])
    return DataLoader(
        ArrayCifar(images, transform),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.startswith("cuda"),
    )


def forever(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches, epoch after epoch."""
    while True:
        yield from loader


def train(
    pace: Pace,
    *,
    data: str | None,
    images: int,
    batch: int,
    model: str,
    workers: int,
    device: str,
    mixup: bool = False,
    autoaugment: bool = False,
) -> None:
    """Train the network."""
    target = on_device(pace, device)
    loader = make_loader(load_images(data, images), batch, workers, device, autoaugment)
    network = MODELS.make(model, 3, CLASSES).to(target).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    rng = np.random.default_rng(0)
    running_loss = 0.0
    pace.ready()
    for x, y in forever(loader):
        x, y = x.to(target, non_blocking=True), y.to(target, non_blocking=True)
        optimizer.zero_grad()
        if mixup:
            lam, partner = rng.beta(1.0, 1.0), torch.randperm(len(x), device=target)
            logits = network(lam * x + (1 - lam) * x[partner])
            loss = lam * criterion(logits, y) + (1 - lam) * criterion(logits, y[partner])
        else:
            loss = criterion(network(x), y)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        pace.step(len(y))


def fit_classifier(
    pace: Pace, *, data: str | None, images: int, batch: int, model: str, workers: int, device: str
) -> None:
    """Fit a new classifier on a frozen backbone that runs again for every image of every epoch."""
    target = on_device(pace, device)
    loader = make_loader(load_images(data, images), batch, workers, device)
    network: CifarResNet = MODELS.make(model, 3, CLASSES).to(target).eval()
    classifier = nn.Linear(network.feature_dim, CLASSES).to(target)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    running_loss = 0.0
    pace.ready()
    for x, y in forever(loader):
        x, y = x.to(target, non_blocking=True), y.to(target, non_blocking=True)
        with torch.no_grad():
            features = network.features(x)
        optimizer.zero_grad()
        loss = criterion(classifier(features), y)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        pace.step(len(y))
