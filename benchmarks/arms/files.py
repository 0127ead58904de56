"""Loaders of images in files: ours, as training uses it, and torchvision's as its documentation has it."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.measure import Pace
from tailscope.data.decoding import decode_drawn
from tailscope.data.folders import load_folder
from tailscope.methods import augmentations
from tailscope.seeds import derive, torch_stream

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.4, 0.4, 0.4)


def ours(pace: Pace, *, tree: str, crop: int, batch: int, workers: int, jitter: bool) -> None:
    """Decode and augment epoch after epoch, each in a new order and with draws of its own, as stage 1 does."""
    images = load_folder(Path(tree))["train"]
    calls = [f"resized_crop(size={crop})", *(["color_jitter"] if jitter else []), "flip"]
    transform, epoch = augmentations.training(calls), 0
    pace.ready()
    while True:
        order = torch.randperm(len(images), generator=torch_stream(0, "order", epoch)).numpy().astype(np.int64)
        parts = [slice(start, start + batch) for start in range(0, len(order), batch)]
        seed_of = partial(derive, 0, "augment", epoch)
        for decoded in decode_drawn(images, transform, order, parts, workers=workers, seed_of=seed_of):
            _step(pace, len(decoded.images))
        epoch += 1


def torchvision(pace: Pace, *, tree: str, crop: int, batch: int, workers: int, jitter: bool) -> None:
    """Do the same by ImageFolder and DataLoader; workers stay alive between epochs, which is in its favour."""
    steps = [
        transforms.RandomResizedCrop(crop),
        *([transforms.ColorJitter(*JITTER)] if jitter else []),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, DEVIATION),
    ]
    loader = DataLoader(
        datasets.ImageFolder(str(Path(tree, "train")), transforms.Compose(steps)),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    pace.ready()
    while True:
        for images, _ in loader:
            _step(pace, len(images))


def _step(pace: Pace, images: int) -> None:
    """Count a batch, and tell the processor's time so far: it counts where no workers decode."""
    seen = pace.told.get("seen", 0) + images
    pace.told = {"seen": seen, "cpu": time.process_time()}
    pace.step(images)
