"""Our engine, through the functions that the command line calls, and where its time goes."""

import cProfile
import pstats
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.arms.common import CLASSES, STAGE1, Paced, data_spec, load_images, on_device
from benchmarks.geometry import train_counts
from benchmarks.measure import Pace
from tailscope.data.images import ImageSet
from tailscope.data.sources import ImageData
from tailscope.device import Engine, Runtime
from tailscope.experiments.plans import swap
from tailscope.experiments.runs import Settings, training_sets
from tailscope.experiments.stages import Stages
from tailscope.experiments.trainings import prepare_thread
from tailscope.measures import describe
from tailscope.methods.augmentations import build
from tailscope.progress import Advance, Progress, Quiet
from tailscope.spec import StageSpec, TrainSpec
from tailscope.store import Store
from tailscope.training.extract import extract, fit_classifier
from tailscope.training.loop import CHUNK_BATCHES, Training, new_model
from tailscope.training.recipes import Recipe
from tailscope.training.step import Normalizer, capturing

# -- stage 1 ----------------------------------------------------------------------------------------------------------


AUGMENT = ("crop(padding=4)", "flip")


def stage1_spec(subset: ImageSet, batch: int, model: str) -> StageSpec:
    """Return the paper's stage 1 on some images, with crop and flip."""
    train = STAGE1.model_copy(update={"batch": batch})
    return StageSpec(data=data_spec(subset), train=train, model=model, augment=AUGMENT)


def chosen(training: Training) -> Engine:
    """Return the engine that a training takes: the one that was asked for, else the fastest, measured now."""
    with capturing(training.runtime.device) as capture:
        return training.engine(training.stepper(capture))


def train(
    pace: Pace,
    *,
    data: str | None,
    images: int,
    batch: int,
    model: str,
    device: str,
    engine: str = "auto",
    mixup: bool = False,
    autoaugment: bool = False,
) -> None:
    """Train a backbone by the paper's recipe: sampling, augmentation, step and checkpoints, everything included."""
    on_device(pace, device)
    subset = load_images(data, images)
    spec = stage1_spec(subset, batch, model).model_copy(
        update={
            "augment": (*AUGMENT, "autoaugment()") if autoaugment else AUGMENT,
            "mix": "mixup(alpha=1.0)" if mixup else None,
        }
    )
    runtime = Runtime.choose(device, engine=engine, progress=Paced(pace))
    normalize = Normalizer.of(subset.images)
    pace.ready()
    pace.told["engine"] = engine = chosen(Training(spec, subset, normalize, 0, runtime, None, ""))
    runtime = replace(runtime, engine=engine)
    with TemporaryDirectory() as scratch:
        Training(spec, subset, normalize, 0, runtime, Path(scratch), "benchmark").run()


# -- several trainings at a time, as `reproduce --jobs` runs them -----------------------------------------------------


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


def train_together(
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
            Training(spec, subset, normalize, seed, told, scratch, "benchmark").run()
        finally:
            together.abort()  # who waits for it would wait for ever

    share = (runtime.device, max(1, torch.get_num_threads() // jobs))
    pace.ready()
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs, "training", prepare_thread, share) as pool:
        engine = pool.submit(chosen, Training(spec, subset, normalize, 0, runtime, None, "")).result()
        pace.told["engine"] = engine
        folders = [Path(scratch) / str(seed) for seed in range(jobs)]
        for folder in folders:
            folder.mkdir()
        ended = [task.exception() for task in [pool.submit(one, seed, folder) for seed, folder in enumerate(folders)]]
    for error in sorted(filter(None, ended), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error


# -- stage 2 ----------------------------------------------------------------------------------------------------------


def extract_views(pace: Pace, *, data: str | None, images: int, model: str, device: str) -> None:
    """Augment all images and extract their features, a view a step; items are images."""
    on_device(pace, device)
    runtime = Runtime.choose(device)
    subset = load_images(data, images)
    normalize, augment = Normalizer.of(subset.images), build(AUGMENT)
    network = new_model(model, 3, CLASSES, seed=0).to(runtime.device)
    stream = torch.Generator().manual_seed(0)
    pace.ready(data_bytes=subset.images.numel())
    while True:
        extract(network, augment(subset.images, stream), normalize, runtime.low_precision, runtime, "benchmark")
        pace.step(images)


def fit(pace: Pace, *, images: int, dimension: int, views: int, epochs: int, device: str) -> None:
    """Fit a classifier on stored views, a whole fit a step; items are images of one view."""
    on_device(pace, device)
    runtime = Runtime.choose(device)
    labels = torch.arange(images) % CLASSES
    stream = torch.Generator().manual_seed(0)
    stored = [(torch.randn(images, dimension, generator=stream).to(runtime.low_precision), labels)] * views
    spec = StageSpec(
        data=data_spec(load_images(None, CLASSES)), train=STAGE2.model_copy(update={"epochs": epochs}), views=views
    )
    counts = torch.bincount(labels, minlength=CLASSES).tolist()
    pace.ready()
    while True:
        fit_classifier(spec, stored, counts, 0)
        pace.step(images)


def rerun(pace: Pace, *, data: str | None, images: int, batch: int, model: str, device: str) -> None:
    """Fit a classifier while the backbone runs again for every batch, with our own augmentation, type and layout."""
    on_device(pace, device)
    runtime = Runtime.choose(device)
    dtype = runtime.low_precision
    subset = load_images(data, images)
    normalize, augment = Normalizer.of(subset.images).to(runtime.device), build(AUGMENT)
    network = new_model(model, 3, CLASSES, seed=0).to(runtime.device).eval()
    pixels, labels = subset.images.to(runtime.device), subset.labels.to(runtime.device)
    classifier = nn.Linear(network.feature_dim, CLASSES, device=runtime.device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4, fused=True)
    stream = torch.Generator(runtime.device).manual_seed(0)
    pace.ready()
    while True:
        order = torch.randperm(images, device=runtime.device)
        for rows in torch.split(order, CHUNK_BATCHES * batch):
            augmented = augment(pixels[rows], stream)
            for x, y in zip(torch.split(augmented, batch), torch.split(labels[rows], batch), strict=True):
                with torch.no_grad(), torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
                    features = network.features(normalize(x))
                loss = F.cross_entropy(classifier(features.float()), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                pace.step(len(y))


# -- the whole swap ---------------------------------------------------------------------------------------------------


SHORT_STAGE1 = TrainSpec(steps=1, batch=128, learning_rate=0.1, weight_decay=2e-4, schedule="onecycle")
STAGE2 = TrainSpec(epochs=10, batch=512, learning_rate=0.05, weight_decay=2e-4)


def _settings(model: str, stage1: TrainSpec, views: int, profile: str) -> Settings:
    recipe = Recipe(
        name="benchmark", card="", converged=False, model=model, stage1=stage1, stage2=STAGE2, views=views
    )  # fmt: skip
    return Settings(profile=profile, protocol="nested", recipe=recipe, seeds=(0,))


def _data(data: str | None, train_images: int, test_images: int) -> ImageData:
    everything = load_images(data, train_images + test_images)
    rows = range(train_images + test_images)
    train, test = everything.take(rows[:train_images]), everything.take(rows[train_images:])
    return ImageData("benchmark", _copy(train), _copy(test))


def _copy(images: ImageSet) -> ImageSet:
    return ImageSet(images.images.contiguous(), images.labels.contiguous(), images.class_names)


def swap_once(
    pace: Pace,
    *,
    data: str | None,
    train_images: int,
    test_images: int,
    steps: int,
    batch: int,
    model: str,
    views: int,
    profile: str,
    device: str,
) -> dict[str, int]:
    """Run one swap from an empty store; a step is whatever our progress counts."""
    on_device(pace, device)
    images = _data(data, train_images, test_images)
    settings = _settings(model, SHORT_STAGE1.model_copy(update={"steps": steps, "batch": batch}), views, profile)
    with TemporaryDirectory() as folder:
        lab = _lab(images, folder, device, Paced(pace))
        sets = training_sets(lab, settings, 0)
        pace.ready(**{f"{name}_images": len(chosen.rows) for name, chosen in sets.items()})
        swap(lab, settings)
    return {"trainings": lab.trained}


def swap_repeatedly(
    pace: Pace,
    *,
    data: str | None,
    train_images: int,
    test_images: int,
    batch: int,
    model: str,
    profile: str,
    device: str,
) -> None:
    """Run swaps of one epoch and one view, each from an empty store; a step is a swap, items are images of D*."""
    on_device(pace, device)
    images = _data(data, train_images, test_images)
    stage1 = SHORT_STAGE1.model_copy(update={"steps": None, "epochs": 1, "batch": batch})
    settings = _settings(model, stage1, 1, profile)
    pace.ready(
        data_bytes=sum(split.images.numel() for split in (images.train, images.test) if isinstance(split, ImageSet))
    )
    while True:
        with TemporaryDirectory() as folder:
            swap(_lab(images, folder, device, Quiet()), settings)
        pace.step(train_images)


def _lab(images: ImageData, folder: str, device: str, progress: Progress) -> Stages:
    return Stages(images, Store(Path(folder)), Runtime.choose(device, progress=progress))


# -- geometry ---------------------------------------------------------------------------------------------------------


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


def geometry(pace: Pace, *, rows: int, dimension: int, classes: int, permutations: int, device: str) -> None:
    """Measure everything, once a step; items are rows."""
    target = Runtime.choose(device).device
    features = make_features(rows, dimension, classes)
    tensors = [value.to(target) for value in vars(features).values()]
    names = [str(k) for k in range(classes)]
    pace.ready(data_bytes=4 * rows * dimension)
    while True:
        describe(tensors[0], tensors[1], tensors[2], tensors[3], names, permutations=permutations)
        pace.step(rows)


def save_features(pace: Pace, *, folder: str, rows: int, dimension: int, classes: int) -> None:
    """Write feature files train.npz and unseen.npz for the comparison of whole processes, and end."""
    made = make_features(rows, dimension, classes)
    np.savez(f"{folder}/train.npz", features=made.train.numpy(), labels=made.train_labels.numpy())
    np.savez(f"{folder}/unseen.npz", features=made.unseen.numpy(), labels=made.unseen_labels.numpy())
    pace.ready()


# -- profiles ---------------------------------------------------------------------------------------------------------


# The first kind that fits: a compiled kernel's name lists what was fused, a backward kernel's holds the forward's.
KINDS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "cudnn_convolution", "thnn_conv2d", "_convolution_pointwise"),
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


def profile_training(
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
        Training(spec, subset, Normalizer.of(subset.images), 0, runtime, Path(scratch), "benchmark").run()
    found = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in progress.profiler.key_averages():
        found[_kind(event.key)] += event.self_cpu_time_total / 1000 / steps
    found["whole step"] = progress.seconds * 1000 / steps
    return found


def _kind(key: str) -> str:
    name = key.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "other operations")


def profile_geometry(
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
