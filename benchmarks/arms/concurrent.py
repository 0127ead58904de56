"""Several of our trainings at a time, as `reproduce --jobs` runs them: in threads that share the cores or the GPU."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.arms.common import load_images, on_device
from benchmarks.arms.ours import SIDES, chosen, stage1_spec
from benchmarks.workers import Pace
from tailscope.paper.trainings import prepare_thread
from tailscope.progress import Advance, Quiet
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import Training, train_backbone
from tailscope.training.step import Normalizer


class _InStep(Quiet):
    """Progress of one of several trainings, which wait for one another every so many steps."""

    def __init__(self, together: threading.Barrier, steps: int) -> None:
        self._together, self._steps, self._done = together, steps, 0

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Meet the others where a stretch of steps ends."""
        yield lambda items: self._advance()

    def _advance(self) -> None:
        self._done += 1
        if self._done % self._steps == 0:
            self._together.wait()


def train(
    pace: Pace, *, data: str | None, images: int, batch: int, model: str, device: str, jobs: int, stretch: int
) -> None:
    """Train `jobs` backbones at a time by the paper's recipe; a step of the pace is `stretch` steps of each."""
    on_device(pace, device)
    subset = load_images(data, images)
    spec = stage1_spec(subset, batch, model)
    normalize = Normalizer.of(subset.images)
    together = threading.Barrier(jobs, action=lambda: pace.step(jobs * stretch * batch))

    runtime = Runtime.choose(device)

    def one(seed: int, scratch: Path) -> None:
        try:
            told = replace(runtime, engine=engine, progress=_InStep(together, stretch))
            train_backbone(spec, subset, normalize, seed, told, scratch, "benchmark")
        finally:
            together.abort()  # who waits for it would wait for ever

    share = (runtime.device, max(1, torch.get_num_threads() // jobs))
    pace.ready()
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs, "training", prepare_thread, share) as pool:
        engine = pool.submit(chosen, Training(spec, subset, SIDES, normalize, 0, runtime, None, "")).result()
        pace.told["engine"] = engine
        folders = [Path(scratch) / str(seed) for seed in range(jobs)]
        for folder in folders:
            folder.mkdir()
        ended = [task.exception() for task in [pool.submit(one, seed, folder) for seed, folder in enumerate(folders)]]
    for error in sorted(filter(None, ended), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
