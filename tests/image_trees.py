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


def photos(root: Path, counts: Iterable[int], *, split: str, seed: int = 0, side: int = 40) -> str:
    """JPEGs whose colour tells the class, and the list that names them; return the list's text."""
    lines = []
    for k, count in enumerate(counts):
        for i in range(count):
            stream = np.random.default_rng([seed, k, i])
            colour = np.array([60 + 60 * (k % 3), 60 + 60 * (k // 3 % 3), 128])
            pixels = np.clip(colour + stream.normal(0, 40, (side, side + i % 5, 3)), 0, 255).astype(np.uint8)
            path = root / split / f"n{k:02}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=90)
            lines.append(f"{path.relative_to(root).as_posix()} {k}")
    text = "\n".join(lines) + "\n"
    (root / f"{split}.txt").write_text(text)
    return text
