"""Independent random streams derived from one seed.

Each use of randomness (subset, init, order, augment, ...) has a stream of its own, so that changing how one of
them draws never shifts another, and an epoch's stream can be rebuilt when a run resumes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *path: str | int) -> int:
    """Return the 63-bit seed of the stream named by `path` under `seed`.

    >>> derive(0, "order", 3) == derive(0, "order", 3)
    True
    >>> derive(0, "order", 3) == derive(0, "augment", 3)
    False
    """
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "little") >> 1


def torch_stream(seed: int, *path: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a new torch generator on `device` for the stream named by `path`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *path))


def numpy_stream(seed: int, *path: str | int) -> np.random.Generator:
    """Return a new NumPy generator for the stream named by `path`."""
    return np.random.default_rng(derive(seed, *path))


@contextmanager
def keyed(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator for the block, for code that takes no generator; put it back afterwards."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
