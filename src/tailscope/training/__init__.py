"""One training loop, two stages, and the recipes they follow as data."""

from typing import Any

from tailscope.classifiers import CLASSIFIERS
from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, PHOTO_AUGMENTATIONS, SAMPLERS, SYSTEMS, TASKS, WEIGHTS
from tailscope.networks import LAST_LAYERS, MODELS
from tailscope.registry import Registry

__all__ = ["REGISTRIES", "SCHEDULES"]

SCHEDULES: Registry[list[float]] = Registry("schedule", "tailscope.training.recipes:SCHEDULES")
REGISTRIES: dict[str, Registry[Any]] = {
    "methods to compare": SYSTEMS,
    "models": MODELS,
    "last layers": LAST_LAYERS,
    "losses": LOSSES,
    "class weights": WEIGHTS,
    "samplers": SAMPLERS,
    "augmentations": AUGMENTATIONS,
    "augmentations of photographs in files": PHOTO_AUGMENTATIONS,
    "mixings": MIXINGS,
    "pre-training tasks": TASKS,
    "schedules": SCHEDULES,
    "classifiers on features": CLASSIFIERS,
}
"""What can be named, by what lists call it; recipes that take values are in `training.recipes`."""
