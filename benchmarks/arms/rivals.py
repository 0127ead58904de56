"""The loops that people write, and the limits of the machine: convolutions, matrix products, reading memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import AutoAugmentPolicy

from benchmarks.arms.common import CLASSES, fast_dtype, load_images, on_device, pixel_statistics
from benchmarks.measure import Pace
from tailscope.data.images import ImageSet
from tailscope.device import keep_freed_memory
from tailscope.networks import MODELS
from tailscope.networks.resnets import CifarResNet

# -- the loop of the tutorials: torchvision data set, PIL transforms, DataLoader, float32, eager ----------------------


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


def textbook(
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


def textbook_classifier(
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


# -- the tuned loop of an expert: data in memory, batched augmentation, bf16, channels-last, compiled -----------------


def batches(
    images: Tensor, labels: Tensor, batch: int, mean: list[float], std: list[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cropped, flipped and normalised batches for ever: one gather a batch from padded uint8 [N, 40, 40, 3]."""
    device = images.device
    padded = F.pad(images, (0, 0, 4, 4, 4, 4))
    scale = 1 / (255 * torch.tensor(std, device=device))
    offset = torch.tensor(mean, device=device) / torch.tensor(std, device=device)
    window = torch.arange(32, device=device)
    while True:
        for rows in torch.split(torch.randperm(len(labels), device=device), batch):
            corner = torch.randint(9, (2, len(rows), 1), device=device)
            flip = torch.rand(len(rows), 1, device=device) < 0.5
            y, x = corner[0] + window, corner[1] + torch.where(flip, window.flip(0), window)
            crops = padded[rows[:, None, None], y[:, :, None], x[:, None, :]]
            yield (crops * scale - offset).permute(0, 3, 1, 2), labels[rows]


def tuned(
    pace: Pace, *, data: str | None, images: int, batch: int, model: str, compile: bool, keep_memory: bool, device: str
) -> None:
    """Train the network; `keep_memory` adds the allocator setting that our engine uses."""
    if keep_memory:
        keep_freed_memory()
    target, dtype = on_device(pace, device), fast_dtype(device)
    subset = load_images(data, images)
    network = MODELS.make(model, 3, CLASSES).to(target).to(memory_format=torch.channels_last).train()
    forward = torch.compile(network) if compile else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, fused=True)
    statistics = pixel_statistics(subset.images)
    pace.ready()
    for x, y in batches(subset.images.to(target), subset.labels.to(target), batch, *statistics):
        with torch.autocast(target.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pace.step(len(y))


# -- limits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """Operands of one convolution's forward and backward; the first of a network needs no gradient of its input."""

    layer: nn.Conv2d
    x: Tensor
    weight: Tensor
    gradient: Tensor
    needs_input_gradient: bool

    def forward(self) -> Tensor:
        """Return the output."""
        return F.conv2d(self.x, self.weight, None, self.layer.stride, self.layer.padding)

    def backward(self) -> None:
        """Compute both gradients."""
        given = (self.gradient, self.x, self.weight, None, self.layer.stride, self.layer.padding)
        mask = [self.needs_input_gradient, True, False]
        torch.ops.aten.convolution_backward(*given, [1, 1], False, [0, 0], 1, mask)


def convolutions_of(network: CifarResNet, batch: int, dtype: torch.dtype, device: torch.device) -> list[Convolution]:
    """Return random operands for every convolution of the network at 32x32, in channels-last layout."""
    shapes: list[tuple[nn.Conv2d, tuple[int, ...], tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        shapes.append((module, tuple(inputs[0].shape[1:]), tuple(output.shape[1:])))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()

    def operand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last)

    return [
        Convolution(
            layer=module,
            x=operand(batch, *inputs),
            weight=operand(*module.weight.shape),
            gradient=operand(batch, *outputs),
            needs_input_gradient=i > 0,
        )
        for i, (module, inputs, outputs) in enumerate(shapes)
    ]


@torch.no_grad()
def convolutions(pace: Pace, *, batch: int, model: str, device: str) -> None:
    """Run the convolutions and the classifier's product of one step, forward and backward, and nothing else.

    Type, layout and allocator are those of our step. Outputs live until the backward pass, as in a real step.
    """
    keep_freed_memory()
    target, dtype = on_device(pace, device), fast_dtype(device)
    network = MODELS.make(model, 3, CLASSES)
    layers = convolutions_of(network, batch, dtype, target)
    features = torch.randn(batch, network.feature_dim, device=target).to(dtype)
    weight = torch.randn(CLASSES, network.feature_dim, device=target).to(dtype)
    pace.ready()
    while True:
        outputs = [layer.forward() for layer in layers]
        logits = features @ weight.T
        _ = logits @ weight, logits.T @ features
        for layer in reversed(layers):
            layer.backward()
            outputs.pop()
        pace.step(batch)


def matrix_product(pace: Pace, *, size: int, device: str) -> None:
    """Multiply square float32 matrices; items are floating-point operations."""
    target = on_device(pace, device)
    a, b = torch.randn(size, size, device=target), torch.randn(size, size, device=target)
    out = torch.empty_like(a)
    pace.ready()
    while True:
        torch.mm(a, b, out=out)
        pace.step(2 * size**3)


def read_memory(pace: Pace, *, megabytes: int, device: str) -> None:
    """Add up float32 numbers that fit no cache; items are bytes."""
    target = on_device(pace, device)
    numbers = torch.ones(megabytes << 18, device=target)
    pace.ready()
    while True:
        numbers.sum()
        pace.step(megabytes << 20)
