"""Our geometry engine on features in memory, and the features themselves."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import train_counts
from benchmarks.workers import Pace
from tailscope.geometry import describe
from tailscope.training.runtime import Runtime


@dataclass(frozen=True)
class Features:
    """Training and unseen features, float32 [n, d], with labels."""

    train: Tensor
    train_labels: Tensor
    unseen: Tensor
    unseen_labels: Tensor

    def arrays(self) -> dict[str, np.ndarray]:
        """Return NumPy views of everything."""
        return {name: value.numpy() for name, value in vars(self).items()}


def make_features(rows: int, dimension: int, classes: int) -> Features:
    """Return `rows` features of Gaussian classes with a decaying spectrum, equally many a class, split in two."""
    stream = torch.Generator().manual_seed(0)
    per_class = rows // classes
    counts = train_counts(rows, classes)
    centers = torch.randn(classes, dimension, generator=stream)
    deviation = torch.arange(1, dimension + 1).float().rsqrt() * 3
    parts = []
    for sizes in (counts, [per_class - n for n in counts]):
        labels = torch.repeat_interleave(torch.tensor(sizes))
        x = torch.randn(len(labels), dimension, generator=stream).mul_(deviation)
        for start in range(0, len(labels), 10_000):
            x[start : start + 10_000] += centers[labels[start : start + 10_000]]
        parts.append((x, labels))
    return Features(*parts[0], *parts[1])


def engine(pace: Pace, *, rows: int, dimension: int, classes: int, permutations: int, device: str) -> None:
    """Measure everything, once a step; items are rows."""
    target = Runtime.choose(device).device
    features = make_features(rows, dimension, classes)
    tensors = [value.to(target) for value in vars(features).values()]
    names = [str(k) for k in range(classes)]
    pace.ready(data_bytes=4 * rows * dimension)
    while True:
        describe(tensors[0], tensors[1], tensors[2], tensors[3], names, permutations=permutations)
        pace.step(rows)


def save(pace: Pace, *, folder: str, rows: int, dimension: int, classes: int) -> None:
    """Write feature files train.npz and unseen.npz for the comparison of whole processes, and end."""
    made = make_features(rows, dimension, classes)
    np.savez(f"{folder}/train.npz", features=made.train.numpy(), labels=made.train_labels.numpy())
    np.savez(f"{folder}/unseen.npz", features=made.unseen.numpy(), labels=made.unseen_labels.numpy())
    pace.ready()
