"""Untrained networks of every kind of name, each with its penultimate features and its preprocessing."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms import InterpolationMode

from tailscope.array_files import message_of
from tailscope.encoders.encoder import FeatureFunction, InputOf, last_linear, measure, probe
from tailscope.encoders.preprocessing import (
    CIFAR,
    IMAGENET,
    Normalization,
    Preprocessing,
    Wishes,
    centre_crop,
    whole_image,
)
from tailscope.errors import UserError
from tailscope.models import MODELS, CifarResNet
from tailscope.registry import split_call

_CLASSES_OF_AN_UNTRAINED_MODEL = 10
_CROP_SHARE = 224 / 256


@dataclass(frozen=True, eq=False)
class Architecture:
    """A network and what is known about it.

    Attributes:
        model: the network.
        function: (model, inputs) -> penultimate features [B, d].
        how: `function` in words.
        classifiers: names of its classifier layers.
        preprocessing: what it wants to see.
    """

    model: nn.Module
    function: FeatureFunction
    how: str
    classifiers: tuple[str, ...]
    preprocessing: Preprocessing


def project(call: str, channels: int, foreign: bool, wishes: Wishes) -> Architecture:
    """Build one of the project's own models.

    Args:
        call: call-string of the registry, such as "resnet32(width=64)".
        channels: of the images.
        foreign: whether the weights come from one of the field's codebases, which normalise CIFAR by its constants.
        wishes: about the preprocessing.
    """
    model: nn.Module = MODELS.make(call, channels, _CLASSES_OF_AN_UNTRAINED_MODEL)
    if isinstance(model, CifarResNet):
        normalization = wishes.normalization(CIFAR if foreign and channels == 3 else "data", channels)
        preprocessing = whole_image(wishes.image_size, normalization, channels)
    else:
        preprocessing = _imagenet(wishes, channels)
    return Architecture(model, _by_method, "features(x)", ("classifier",), preprocessing)


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
    transform = timm.data.create_transform(**config, is_training=False)
    named = model.pretrained_cfg.get("classifier") or ()
    classifiers = (named,) if isinstance(named, str) else tuple(named)
    return Architecture(model, _by_timm, "forward_head(pre_logits=True)", classifiers, Preprocessing(transform))


def from_torchvision(name: str, pretrained: bool, wishes: Wishes) -> Architecture:
    """Build a torchvision classification model, with the preprocessing of its best published weights.

    Raises:
        UserError: torchvision has no such model, its classifier is not linear, or the weights cannot be had.
    """
    if name not in list_models(module=torchvision.models):
        raise UserError(f"torchvision:{name}: torchvision {torchvision.__version__} has no such classification model")
    weights = get_model_weights(name)["DEFAULT"]
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
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    if wishes.image_size is not None:
        crop, resize = wishes.image_size, round(resize / crop * wishes.image_size)
    preprocessing = centre_crop(crop, resize, preset.interpolation, normalization)
    return Architecture(model, InputOf(layer), f"input of {layer}", (layer,), preprocessing)


def from_user(name: str, wishes: Wishes) -> Architecture:
    """Call `module:factory`, imported as from the current directory; call-strings set the factory's arguments.

    The factory returns a model, or a model and its transform (image -> tensor [3, H, W]). Penultimate features are
    those of a method `features(x)`, else timm's, else the input of the last linear layer if this ends the model, else
    the model's output.

    Raises:
        UserError: the module or the factory is not there, or fails.
    """
    module_name, _, call = name.partition(":")
    function, args, kwargs = split_call(call, "factory")
    try:
        with _current_directory_first():
            made = getattr(importlib.import_module(module_name), function)(*args, **kwargs)
    except Exception as error:  # anything may go wrong inside a user's module
        raise UserError(f"{name}: {type(error).__name__}: {message_of(error)}") from error
    model, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{name}: returned a {type(model).__name__}, not a torch.nn.Module or a pair with a transform")
    preprocessing = _imagenet(wishes, 3) if transform is None else Preprocessing(transform)
    chosen, how, classifiers = _features_of(name, model, preprocessing)
    return Architecture(model, chosen, how, classifiers, preprocessing)


def _features_of(
    name: str, model: nn.Module, preprocessing: Preprocessing
) -> tuple[FeatureFunction, str, tuple[str, ...]]:
    layer = last_linear(model)
    classifiers = () if layer is None else (layer,)
    method = getattr(model, "features", None)
    if callable(method) and not isinstance(method, nn.Module):
        return _by_method, "features(x)", classifiers
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        return _by_timm, "forward_head(pre_logits=True)", classifiers
    if layer is not None and _ends_with(name, model, layer, probe(preprocessing)):
        return InputOf(layer), f"input of {layer}", classifiers
    return _by_output, "output", ()


def _ends_with(name: str, model: nn.Module, layer: str, x: Tensor) -> bool:
    """Whether the layer's output is the model's."""
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        whole = measure(name, model, _by_output, x)
    finally:
        handle.remove()
    return bool(outputs) and outputs[-1].shape == whole.shape and bool((outputs[-1] == whole).all())


def _by_method(model: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = model.features(x)  # type: ignore[operator]
    return features


def _by_timm(model: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    return features


def _by_output(model: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = model(x)
    return features


def _imagenet(wishes: Wishes, channels: int) -> Preprocessing:
    normalization = wishes.normalization(IMAGENET, channels)
    crop = wishes.image_size or 224
    return centre_crop(crop, round(crop / _CROP_SHARE), InterpolationMode.BILINEAR, normalization, channels)


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


@contextmanager
def _current_directory_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
