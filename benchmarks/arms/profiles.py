"""Where the time goes: our training step by kind of kernel, our geometry by stage."""

import cProfile
import pstats
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.arms.common import STAGE1, data_spec, load_images
from benchmarks.arms.geometry import make_features
from benchmarks.arms.ours import AUGMENT
from benchmarks.workers import Pace
from tailscope.geometry import describe
from tailscope.progress import Advance, Quiet
from tailscope.spec import StageSpec
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import train_backbone
from tailscope.training.step import Normalizer

# The first kind that fits: a compiled kernel's name lists what was fused, a backward kernel's holds the forward's.
KINDS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": (
        "mkldnn_convolution",
        "cudnn_convolution",
        "thnn_conv2d",
        "_convolution_pointwise",
    ),
    "our batch norm, shortcut and ReLU": ("tailscope::",),
    "compiled kernels between convolutions": ("compiled", "cpp_fused", "triton"),
    "batch norm": ("batch_norm",),
    "ReLU and shortcut": ("relu", "threshold_backward", "aten::add"),
    "optimiser": ("fused_sgd", "optimizer"),
    "crop, flip, gather": ("aten::index", "aten::unfold", "aten::flip", "aten::where", "aten::constant_pad_nd"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::clone"),
}

STAGES = ("describe", "one", "measure_class")
"""Functions of the geometry whose callees are its parts; they are no parts themselves."""


class _Profiled(Quiet):
    """Progress that profiles the steps after a warm-up."""

    def __init__(self, warm_up: int) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.steps = -warm_up
        self.seconds = 0.0

    @contextmanager
    def task(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Start the profiler after the warm-up, stop it with the training."""

        def advance(items: int, /) -> None:
            self.steps += 1
            if self.steps == 0:
                self.profiler.start()
                self.seconds = -time.perf_counter()

        yield advance
        self.seconds += time.perf_counter()
        self.profiler.stop()


def training(
    pace: Pace, *, data: str | None, images: int, batch: int, model: str, steps: int, engine: str, device: str
) -> dict[str, float]:
    """Return milliseconds a step by kind of kernel, over `steps` steps after as many for warm-up."""
    subset = load_images(data, images)
    train = STAGE1.model_copy(update={"epochs": None, "steps": 2 * steps, "batch": batch})
    spec = StageSpec(data=data_spec(subset), train=train, model=model, augment=AUGMENT)
    progress = _Profiled(warm_up=steps)
    runtime = Runtime.choose(device, engine=engine, progress=progress)
    pace.ready()
    with TemporaryDirectory() as scratch:
        train_backbone(spec, subset, Normalizer.of(subset.images), 0, runtime, Path(scratch), "benchmark")
    found = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in progress.profiler.key_averages():
        found[_kind(event.key)] += event.self_cpu_time_total / 1000 / steps
    found["whole step"] = progress.seconds * 1000 / steps
    return found


def _kind(key: str) -> str:
    name = key.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "other operations")


def geometry(
    pace: Pace, *, rows: int, dimension: int, classes: int, permutations: int, device: str
) -> dict[str, float]:
    """Return seconds by part and for the whole, on one thread: the profiler sees no other."""
    torch.set_num_threads(1)
    target = Runtime.choose(device).device
    tensors = [value.to(target) for value in vars(make_features(rows, dimension, classes)).values()]
    names = [str(k) for k in range(classes)]
    pace.ready()
    profiler = cProfile.Profile()
    profiler.enable()
    describe(tensors[0], tensors[1], tensors[2], tensors[3], names, permutations=permutations)
    profiler.disable()
    found: dict[str, float] = {}
    for (_, _, name), (_, _, _, total, callers) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        seconds = sum(times[3] for caller, times in callers.items() if caller[2] in STAGES)
        if name == "describe":
            found["whole"] = total
        elif seconds > 0 and name not in (*STAGES, "map_parallel", "map_mixed"):
            found[name] = found.get(name, 0.0) + seconds
    return found
