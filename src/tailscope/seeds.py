"""Independent random streams derived from one seed.

Each use of randomness (subset, init, order, augment, ...) has a stream of its own, so that changing how one of
them draws never shifts another, and an epoch's stream can be rebuilt when a run resumes.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

_DEFAULT_GENERATOR = threading.RLock()
"""Torch's default generator is one for all threads of a process: who seeds it holds this until it has drawn."""

if hasattr(os, "register_at_fork"):  # a process that is forked while another thread holds the lock could never take it
    os.register_at_fork(
        before=_DEFAULT_GENERATOR.acquire,
        after_in_parent=_DEFAULT_GENERATOR.release,
        after_in_child=_DEFAULT_GENERATOR.release,
    )


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


def alone() -> AbstractContextManager[object]:
    """Keep every other thread from torch's default generator for the block, for code that puts back its state."""
    return _DEFAULT_GENERATOR


@contextmanager
def keyed(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator for the block, for code that takes no generator; put it back afterwards.

    Such blocks run one at a time in a process: the generator is shared by its threads, and the only lock is here.
    """
    with _DEFAULT_GENERATOR:
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)
