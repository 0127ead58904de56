"""Our engine, through the functions that the command line calls."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.arms.common import STAGE1, Paced, data_spec, load_images, on_device
from benchmarks.workers import Pace
from tailscope.data.imageset import ImageSet
from tailscope.spec import StageSpec
from tailscope.training.graph import capturing
from tailscope.training.runtime import Engine, Runtime
from tailscope.training.stage1 import Training, train_backbone
from tailscope.training.step import Normalizer

SIDES = (32, 32)
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
    pace.told["engine"] = engine = chosen(Training(spec, subset, SIDES, normalize, 0, runtime, None, ""))
    runtime = replace(runtime, engine=engine)
    with TemporaryDirectory() as scratch:
        train_backbone(spec, subset, normalize, 0, runtime, Path(scratch), "benchmark")
