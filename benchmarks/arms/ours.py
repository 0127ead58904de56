"""Our engine, through the functions that the command line calls."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.arms.common import STAGE1, Paced, data_spec, load_images, on_device
from benchmarks.workers import Pace
from tailscope.data.imageset import ImageSet
from tailscope.spec import StageSpec
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import train_backbone
from tailscope.training.step import Normalizer

AUGMENT = ("crop(padding=4)", "flip")


def stage1_spec(subset: ImageSet, batch: int, model: str) -> StageSpec:
    """Return the paper's stage 1 on some images, with crop and flip."""
    train = STAGE1.model_copy(update={"batch": batch})
    return StageSpec(data=data_spec(subset), train=train, model=model, augment=AUGMENT)


def train(
    pace: Pace,
    *,
    data: str | None,
    images: int,
    batch: int,
    model: str,
    device: str,
    compile: bool | None = None,
    mixup: bool = False,
    autoaugment: bool = False,
) -> None:
    """Train a backbone by the paper's recipe: sampling, augmentation, step and checkpoints, everything included.

    `compile` overrides what the engine would choose.
    """
    on_device(pace, device)
    subset = load_images(data, images)
    spec = stage1_spec(subset, batch, model).model_copy(
        update={
            "augment": (*AUGMENT, "autoaugment()") if autoaugment else AUGMENT,
            "mix": "mixup(alpha=1.0)" if mixup else None,
        }
    )
    runtime = Runtime.choose(device, compile=compile, progress=Paced(pace))
    normalize = Normalizer.of(subset.images)
    pace.ready()
    with TemporaryDirectory() as scratch:
        train_backbone(spec, subset, normalize, 0, runtime, Path(scratch), "benchmark")
