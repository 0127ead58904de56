"""Small trees of image files for tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def tree(root: Path, classes: Iterable[str] = ("ant", "bee", "cat"), images: int = 3) -> None:
    for k, name in enumerate(classes):
        for i in range(images):
            draw(root / name / f"{i}.{'jpg' if i % 2 else 'png'}", seed=10 * k + i)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy())
