"""Our whole 2x2 swap: two backbones, four classifiers on stored views, and the evaluation."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.arms.common import Paced, load_images, on_device
from benchmarks.workers import Pace
from tailscope.data.imageset import ImageSet
from tailscope.data.sources import ImageData
from tailscope.experiments.lab import Lab
from tailscope.experiments.runs import training_sets
from tailscope.experiments.settings import Settings
from tailscope.experiments.swap import swap
from tailscope.progress import Progress, Quiet
from tailscope.spec import TrainSpec
from tailscope.store import Store
from tailscope.training.recipes import Recipe
from tailscope.training.runtime import Runtime

STAGE1 = TrainSpec(steps=1, batch=128, learning_rate=0.1, weight_decay=2e-4, schedule="onecycle")
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


def once(
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
    settings = _settings(model, STAGE1.model_copy(update={"steps": steps, "batch": batch}), views, profile)
    with TemporaryDirectory() as folder:
        lab = _lab(images, folder, device, Paced(pace))
        sets = training_sets(lab, settings, 0)
        pace.ready(**{f"{name}_images": len(chosen.rows) for name, chosen in sets.items()})
        swap(lab, settings)
    return {"trainings": lab.trained}


def repeatedly(
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
    stage1 = STAGE1.model_copy(update={"steps": None, "epochs": 1, "batch": batch})
    settings = _settings(model, stage1, 1, profile)
    pace.ready(
        data_bytes=sum(split.images.numel() for split in (images.train, images.test) if isinstance(split, ImageSet))
    )
    while True:
        with TemporaryDirectory() as folder:
            swap(_lab(images, folder, device, Quiet()), settings)
        pace.step(train_images)


def _lab(images: ImageData, folder: str, device: str, progress: Progress) -> Lab:
    return Lab(images, Store(Path(folder)), Runtime.choose(device, progress=progress))
