"""The tuned loop, as an expert would write it: data in memory, batched augmentation, bf16, channels-last, compiled."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arms.common import CLASSES, fast_dtype, load_images, on_device, pixel_statistics
from benchmarks.workers import Pace
from tailscope.models import MODELS
from tailscope.training.runtime import keep_freed_memory


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


def train(
    pace: Pace,
    *,
    data: str | None,
    images: int,
    batch: int,
    model: str,
    compile: bool,
    keep_memory: bool,
    device: str,
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
