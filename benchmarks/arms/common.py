"""What several arms need: images, the training specification, a device, and our progress as a pace."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Pace
from tailscope.data import sources
from tailscope.data.images import ImageSet
from tailscope.device import Runtime, has_bf16
from tailscope.progress import Advance, Quiet
from tailscope.spec import DataSpec, TrainSpec

CLASSES = 10
CLASS_NAMES = tuple(str(k) for k in range(CLASSES))


def machine(pace: Pace, *, device: str) -> None:
    """Report the machine and end."""
    runtime = Runtime.choose(device)
    pace.ready(**runtime.describe(), low_precision=str(runtime.low_precision).removeprefix("torch."))


def load_images(data: str | None, count: int) -> ImageSet:
    """Return `count` CIFAR-10 training images, equally many a class, or random ones: timing ignores content."""
    labels = torch.arange(count) % CLASSES
    if data is None:
        stream = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=stream)
        return ImageSet(images, labels, CLASS_NAMES)
    everything = sources.read(Path(data))[0]
    by_class = torch.argsort(everything.labels, stable=True).reshape(CLASSES, -1)
    return everything.take(by_class.T.flatten()[:count])


def data_spec(images: ImageSet) -> DataSpec:
    """Name a training set; nothing here depends on the name."""
    return DataSpec(
        name="benchmark", fingerprint="", profile="full", protocol="all", subset_seed=0, indices_sha256="",
        counts=tuple(images.counts()),
    )  # fmt: skip


def fast_dtype(device: str) -> torch.dtype:
    """Return bfloat16 where the machine computes in it, else float32."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def on_device(pace: Pace, device: str) -> torch.device:
    """Return the device; on a GPU, slices end when its work is done."""
    if device.startswith("cuda"):
        pace.synchronize = torch.cuda.synchronize
    return torch.device(device)


def pixel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of uint8 [N, H, W, C], in units of 0 to 1."""
    pixels = images[:5000].double().flatten(0, 2) / 255
    return pixels.mean(0).tolist(), pixels.std(0).tolist()


class Paced(Quiet):
    """Our progress, told to a pace: our own loops run unchanged and are measured in slices."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Turn each advance into a step."""
        yield lambda items: self._pace.step(items)


STAGE1 = TrainSpec(epochs=200, batch=128, learning_rate=0.1, weight_decay=2e-4, schedule="multistep")
"""The paper's stage 1."""
