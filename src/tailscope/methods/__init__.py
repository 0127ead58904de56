"""Interchangeable parts of a training run, each in a registry, from losses and samplers to tasks of pre-training.

What is registered is read from the modules' source, so that the registries can be listed without PyTorch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tailscope.registry import Registry, split_call

if TYPE_CHECKING:
    from tailscope.methods.augmentations import Augmentation, Photo
    from tailscope.methods.losses import ClassWeights, Loss
    from tailscope.methods.mixing import Mixing
    from tailscope.methods.pretraining import Task
    from tailscope.methods.sampling import Sampler
    from tailscope.methods.systems import System

__all__ = [
    "AUGMENTATIONS",
    "LOSSES",
    "MIXINGS",
    "PHOTO_AUGMENTATIONS",
    "SAMPLERS",
    "SYSTEMS",
    "TASKS",
    "WEIGHTS",
    "for_photos",
]
LOSSES: Registry["Loss"] = Registry(
    "loss",
    "tailscope.methods.losses:LOSSES",
    "tailscope.methods.feature_losses:LOSSES",
    offers=("cosine", "distance", "features", "progress", "unmixed"),
)
WEIGHTS: Registry["ClassWeights"] = Registry("class weights", "tailscope.methods.losses:WEIGHTS", offers=("batch",))
SAMPLERS: Registry["Sampler"] = Registry("sampler", "tailscope.methods.sampling:SAMPLERS", offers=("progress",))
AUGMENTATIONS: Registry["Augmentation"] = Registry("augmentation", "tailscope.methods.augmentations:AUGMENTATIONS")
PHOTO_AUGMENTATIONS: Registry["Photo"] = Registry(
    "photograph augmentation", "tailscope.methods.augmentations:PHOTO_AUGMENTATIONS"
)
MIXINGS: Registry["Mixing"] = Registry("mixing", "tailscope.methods.mixing:MIXINGS", offers=("counts", "hidden"))
TASKS: Registry["Task"] = Registry("pre-training task", "tailscope.methods.pretraining:TASKS")
SYSTEMS: Registry["System"] = Registry("method", "tailscope.methods.systems:SYSTEMS")


def for_photos(calls: Sequence[str]) -> bool:
    """Whether call-strings name augmentations of photographs in files, and not of tensors in memory.

    >>> for_photos(["resized_crop(size=32)", "flip"]), for_photos(["crop", "flip"]), for_photos([])
    (True, False, False)
    """
    return bool(calls) and split_call(calls[0])[0] == "resized_crop"
