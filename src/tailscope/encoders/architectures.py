"""Untrained networks of every kind of name, each with its penultimate features and its preprocessing."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from tailscope.array_files import message_of
from tailscope.encoders import checkpoints
from tailscope.encoders.checkpoints import Checkpoint
from tailscope.encoders.encoder import FeatureFunction, InputOf, by_method, by_timm, last_linear
from tailscope.encoders.preprocessing import (
    CIFAR,
    Normalization,
    Preprocessing,
    Wishes,
    by_imagenet,
    centre_crop,
    whole_image,
)
from tailscope.errors import UserError
from tailscope.models import MODELS
from tailscope.models.resnet import CifarResNet

_CLASSES_OF_AN_UNTRAINED_MODEL = 10
_PROJECTS_CLASSIFIER = "classifier"


@dataclass(frozen=True, eq=False)
class Architecture:
    """A network and what is known about it.

    Attributes:
        model: the network.
        function: (model, inputs) -> penultimate features [B, d].
        how: `function` in words.
        classifiers: names of its classifier layers.
        preprocessing: what it wants to see.
        notes: what the user should know, about the preprocessing above all.
        source: SHA-256 of the user's module that made the network; empty for others.
    """

    model: nn.Module
    function: FeatureFunction
    how: str
    classifiers: tuple[str, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()
    source: str = ""


def project(call: str, channels: int, stored: Checkpoint | None, wishes: Wishes) -> Architecture:
    """Build one of the project's own models, which takes as many channels as the checkpoint's.

    The weights of the field's codebases, whose classifiers have other names, were trained on CIFAR normalised by its
    usual constants.

    Args:
        call: call-string of the registry, such as "resnet32(width=64)".
        channels: of the images, where there is no checkpoint.
        stored: the weights to come. Nothing is allocated before they are known to fit: the file bounds the network.
        wishes: about the preprocessing.

    Raises:
        UserError: the model is unknown, cannot be built, or is not the checkpoint's.
    """
    foreign = False
    if stored is not None:
        own = checkpoints.backbone_of(_made(call, channels, "meta"), (_PROJECTS_CLASSIFIER,))
        for place in checkpoints.places(stored, own)[:1]:
            state = place.state()
            foreign = f"{_PROJECTS_CLASSIFIER}.weight" not in state
            if state["conv1.weight"].ndim == 4:
                channels = state["conv1.weight"].shape[1]
                own = checkpoints.backbone_of(_made(call, channels, "meta"), (_PROJECTS_CLASSIFIER,))
        checkpoints.require_fit(stored, own, call, (_PROJECTS_CLASSIFIER,))
    model = _made(call, channels, "cpu")
    if isinstance(model, CifarResNet):
        normalization = wishes.normalization(CIFAR if foreign and channels == 3 else "data", channels)
        preprocessing = whole_image(wishes, normalization, channels)
    else:
        preprocessing = by_imagenet(wishes, channels)
    return Architecture(model, by_method, "features(x)", (_PROJECTS_CLASSIFIER,), preprocessing)


def _made(call: str, channels: int, device: str) -> nn.Module:
    try:
        with torch.device(device):
            model: nn.Module = MODELS.make(call, channels, _CLASSES_OF_AN_UNTRAINED_MODEL)
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes beyond memory, or beyond what counts them
        raise UserError(f"model {call}: cannot be built ({message_of(error)[:80]}); make it smaller") from None
    return model


def from_timm(name: str, pretrained: bool, wishes: Wishes) -> Architecture:
    """Build a timm model; it says itself what it wants to see.

    Raises:
        UserError: timm is not installed, does not know the name, or cannot get the weights.
    """
    timm = _timm(name)
    if not timm.is_model(name):
        raise UserError(
            f"timm:{name}: timm {timm.__version__} has no such model; known: {_ours()}, torchvision:NAME, "
            "MODULE:FACTORY and those of timm.list_models()"
        )
    try:
        with _tensors_only():
            model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # hub, network and disk each have their own exceptions
        if not pretrained:
            raise
        raise UserError(_no_weights(f"timm:{name}", error)) from None
    config = timm.data.resolve_model_data_config(model)
    normalization = wishes.normalization(Normalization(tuple(config["mean"]), tuple(config["std"])), 3)
    config |= {"mean": normalization.mean, "std": normalization.std}
    if wishes.image_size is not None:
        config["input_size"] = (config["input_size"][0], wishes.image_size, wishes.image_size)
    preprocessing = Preprocessing(timm.data.create_transform(**config, is_training=False))
    if wishes.resize is not None:
        crop, resize = wishes.sizes(config["input_size"][-1], None)
        interpolation = timm.data.transforms.str_to_interp_mode(config["interpolation"])
        preprocessing = centre_crop(crop, resize, interpolation, normalization)
    named = model.pretrained_cfg.get("classifier") or ()
    classifiers = (named,) if isinstance(named, str) else tuple(named)
    return Architecture(model, by_timm, "forward_head(pre_logits=True)", classifiers, preprocessing)


def from_torchvision(name: str, pretrained: bool, wishes: Wishes) -> Architecture:
    """Build a torchvision classification model, with the preprocessing of its weights.

    Args:
        name: the model's, and after a dot which of its published weights, if not the best: `resnet50.IMAGENET1K_V1`.
        pretrained: load those weights.
        wishes: about the preprocessing.

    Raises:
        UserError: torchvision has no such model or weights, its classifier is not linear, or the weights cannot be had.
    """
    name, _, published = name.partition(".")
    if name not in list_models(module=torchvision.models):
        raise UserError(f"torchvision:{name}: torchvision {torchvision.__version__} has no such classification model")
    known = get_model_weights(name)
    if published and published not in known.__members__:
        raise UserError(f"torchvision:{name}.{published}: no such weights; known: {', '.join(known.__members__)}")
    weights = known[published or "DEFAULT"]
    # These two warn without it, and would take another initialisation.
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    try:
        with _tensors_only():
            model = get_model(name, weights=weights) if pretrained else get_model(name, weights=None, **options)
    except OSError as error:  # URLError among them
        raise UserError(_no_weights(f"torchvision:{name}", error)) from None
    layer = last_linear(model)
    if layer is None:
        raise UserError(f"torchvision:{name}: has no linear classifier; wrap it as module:factory with features(x)")
    preset = weights.transforms()
    normalization = wishes.normalization(Normalization(tuple(preset.mean), tuple(preset.std)), 3)
    crop, resize = wishes.sizes(preset.crop_size[0], preset.resize_size[0])
    preprocessing = centre_crop(crop, resize, preset.interpolation, normalization)
    others = sorted({each.transforms().resize_size[0] for each in known} - {preset.resize_size[0]})
    notes: tuple[str, ...] = ()
    if not pretrained and not published and wishes.resize is None and wishes.image_size is None:
        other = f"; other weights of it were made for --resize {', '.join(map(str, others))}" if others else ""
        notes = (
            f"torchvision:{name}: the images are resized to {resize} and cropped to {crop}, {weights.name}'s{other}",
        )
    return Architecture(model, InputOf(layer), f"input of {layer}", (layer,), preprocessing, notes)


def _ours() -> str:
    return ", ".join(entry.name for entry in MODELS)


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise UserError(f"model {name!r}: not one of {_ours()}; for timm's, pip install 'tailscope[timm]'") from None


def _no_weights(name: str, error: Exception) -> str:
    return f"{name}: no pretrained weights on this machine ({message_of(error)[:120]}); give a file with --checkpoint"


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make torch.load refuse everything but tensors, also where torchvision calls it without saying so."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
