"""Interchangeable parts of a training run: losses, samplers, augmentations, mixings, each in a registry."""

from tailscope.methods.augmentations import AUGMENTATIONS
from tailscope.methods.autoaugment import BatchedAutoAugment
from tailscope.methods.losses import LOSSES
from tailscope.methods.mixing import MIXINGS
from tailscope.methods.samplers import SAMPLERS

__all__ = ["AUGMENTATIONS", "LOSSES", "MIXINGS", "SAMPLERS", "BatchedAutoAugment"]
