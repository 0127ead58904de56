"""A frozen network as a function from images to penultimate features; and untrained ones of every kind of name."""

import hashlib
import importlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from tailscope.encoders import checkpoints
from tailscope.encoders.checkpoints import Checkpoint, Layer
from tailscope.encoders.preprocessing import (
    CIFAR,
    Normalization,
    Preprocessing,
    Wishes,
    by_imagenet,
    centre_crop,
    whole_image,
)
from tailscope.errors import UserError, foreign_code, guess, message_of
from tailscope.networks import MODELS
from tailscope.networks.resnets import CifarResNet, add_branch
from tailscope.tables.table import LinearLayer

FeatureFunction = Callable[[nn.Module, Tensor], Tensor]
_PROBE_PIXELS = 64
_CONNECT_SECONDS = 4.0
"""How long the host of published weights has to take a connection."""
_CLASSES_OF_AN_UNTRAINED_MODEL = 10
_PROJECTS_CLASSIFIER = "classifier"


@dataclass(frozen=True, eq=False)
class Encoder:
    """A network in eval mode, how to get features out of it, and what it wants to see.

    Attributes:
        name: the model, as the user wrote it.
        model: the network; batch normalisation uses its running statistics.
        function: (model, inputs [B, C, H, W]) -> features [B, d].
        how: `function` in words.
        preprocessing: image -> input [C, H, W].
        width: d.
        weights: where the weights come from: a file's name, "pretrained" or "random".
        classifier: the linear layer on the features, where trained weights have one.
        notes: what the user should know.
        source: SHA-256 of the user's module that made the network; empty for others.
        layer: where in its checkpoint the classifier is, if it is one layer there.
    """

    name: str
    model: nn.Module
    function: FeatureFunction
    how: str
    preprocessing: Preprocessing
    width: int
    weights: str
    classifier: LinearLayer | None = None
    notes: tuple[str, ...] = ()
    source: str = ""
    layer: Layer | None = None

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, d] of inputs [B, C, H, W]; a model that fails is one line."""
        with foreign_code(f"{self.name}: fails on an input of shape {list(x.shape)}"):
            return self.function(self.model, x)

    def weights_sha256(self) -> str:
        """Return the SHA-256 (hex) of all parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def spec(self) -> dict[str, Any]:
        """Return everything about the encoder that decides its features."""
        return {
            "model": self.name,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256(),
            "features": self.how,
            "preprocessing": self.preprocessing.describe(),
            **({"source_sha256": self.source} if self.source else {}),
        }


def by_method(model: nn.Module, x: Tensor) -> Tensor:
    """Return `model.features(x)`."""
    features: Tensor = model.features(x)  # type: ignore[operator]
    return features


def by_timm(model: nn.Module, x: Tensor) -> Tensor:
    """Return what timm's networks give to their classifier."""
    features: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    return features


class InputOf:
    """The input of a layer: penultimate features, where the layer is the classifier. Goes for any model."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Run the model and return what reaches the layer."""
        captured: list[Tensor] = []
        handle = model.get_submodule(self.layer).register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        try:
            model(x)
        finally:
            handle.remove()
        return captured[-1]


def last_linear(model: nn.Module) -> str | None:
    """Return the name of the last linear layer, in the order of construction.

    >>> last_linear(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4)))
    '2'
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def probe(preprocessing: Preprocessing, size: tuple[int, int] | None = None) -> Tensor:
    """Return two preprocessed images of noise [2, C, H, W], of the data's size where known, to try a model on.

    Raises:
        UserError: the user's own transform fails, or makes images of several sizes.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size or (_PROBE_PIXELS, _PROBE_PIXELS)
    pixels = torch.randint(256, (2, height, width, 3), generator=generator, dtype=torch.uint8)
    made = [preprocessing(Image.fromarray(image.numpy())) for image in pixels]
    if made[0].shape != made[1].shape:
        shapes = " and ".join(str(list(image.shape)) for image in made)
        raise UserError(f"{preprocessing.label} makes {shapes} of two images of {width} x {height} pixels")
    return torch.stack(made)


def run(name: str, model: nn.Module, function: Callable[[nn.Module, Tensor], Any], x: Tensor, mend: str) -> Any:
    """Return what a function of the model and the probe returns, in eval mode and without gradients."""
    with torch.no_grad(), foreign_code(f"{name}: fails on an input of shape {list(x.shape)}", mend):
        return function(model.eval(), x)


def measure(name: str, model: nn.Module, function: FeatureFunction, x: Tensor, mend: str = "") -> Tensor:
    """Return the features [2, d] of the probe; `mend` is what the user may do if the model fails on its size.

    Raises:
        UserError: the model fails on its input, or what comes out is no matrix of finite features, one row an image.
    """
    features = run(name, model, function, x, mend)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
        shape = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise UserError(f"{name}: its features are {shape}, not [B, d]; let a method features(x) return them pooled")
    what = ""
    if features.is_meta:
        what = "on the meta device"
    elif not features.is_floating_point():
        what = f"of {str(features.dtype).removeprefix('torch.')}"
    elif not bool(torch.isfinite(features).all()):
        what = "NaN or infinite"
    if what:
        raise UserError(f"{name}: its features of an image of noise are {what}; check the network and its weights")
    return features


def require_independent(name: str, model: nn.Module, function: FeatureFunction, x: Tensor, features: Tensor) -> None:
    """Refuse features that depend on the rest of their batch, or on chance."""
    among_others = measure(name, model, function, torch.cat([x[:1], x[:1]]))[:1]
    if bool((among_others - features[:1]).abs().max() > 1e-3 * features.abs().max()):
        raise UserError(
            f"{name}: the same image has other features in another batch: batch normalisation without running "
            "statistics, or dropout, is at work in eval mode"
        )


def parts_of(output: Any) -> dict[str, Tensor]:
    """Return the tensors in a model's output by name: the output itself, or the items of a tuple, dict or ModelOutput.

    >>> list(parts_of({"logits": torch.zeros(1), "loss": None})), list(parts_of((torch.zeros(1), torch.ones(1))))
    (["output['logits']"], ['output[0]', 'output[1]'])
    """
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, tuple | list):
        output = dict(enumerate(output))
    items = output.items() if isinstance(output, Mapping) else ()
    return {f"output[{key!r}]": value for key, value in items if isinstance(value, Tensor)}


def is_decision(logits: Tensor, output: Tensor) -> bool:
    """Whether an output is these logits, or their softmax or its logarithm: [B, C] alike, up to rounding."""
    if output.shape != logits.shape or logits.ndim != 2:
        return False
    logits, output = logits.float(), output.float()
    return any(
        bool((made - output).abs().max() <= 1e-3 * output.abs().max())
        for made in (logits, logits.softmax(1), logits.log_softmax(1))
    )


def explains(classifier: LinearLayer, model: nn.Module, features: Tensor, x: Tensor) -> bool:
    """Whether the model's output, or part of it, is that linear classifier on those features, on the probe."""
    with torch.no_grad():
        output = model.eval()(x)
    logits = classifier.logits(features.cpu())
    return any(is_decision(logits, part.cpu()) for part in parts_of(output).values())


@dataclass(frozen=True, eq=False)
class Architecture:
    """A network and what is known about it: what `Encoder` says, and the names of its classifier layers."""

    model: nn.Module
    function: FeatureFunction
    how: str
    classifiers: tuple[str, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()
    source: str = ""


def project(call: str, channels: int, stored: Checkpoint | None, wishes: Wishes, branches: int = 1) -> Architecture:
    """Build one of the project's own models, which takes as many channels as the checkpoint's, else as the images.

    The weights of the field's codebases, whose classifiers have other names, were trained on CIFAR normalised by its
    usual constants. Nothing is allocated before the checkpoint is known to fit: the file bounds the network.

    Raises:
        UserError: the model is unknown, cannot be built, or is not the checkpoint's.
    """
    foreign = False
    if stored is not None:
        own = checkpoints.backbone_of(_made(call, channels, "meta", branches), (_PROJECTS_CLASSIFIER,))
        for place in checkpoints.places(stored, own)[:1]:
            state = place.state()
            foreign = f"{_PROJECTS_CLASSIFIER}.weight" not in state
            first = state.get("conv1.weight")  # networks of plug-ins may have none, and take the images' channels
            if first is not None and first.ndim == 4:
                channels = first.shape[1]
                own = checkpoints.backbone_of(_made(call, channels, "meta", branches), (_PROJECTS_CLASSIFIER,))
        checkpoints.require_fit(stored, own, call, (_PROJECTS_CLASSIFIER,))
    model = _made(call, channels, "cpu", branches)
    by_itself = MODELS.plugin(call) is not None and wishes.image_size is None and wishes.data_size is not None
    if isinstance(model, CifarResNet) or by_itself:  # trained on images in memory, as they are
        normalization = wishes.normalization(CIFAR if foreign and channels == 3 else "data", channels)
        preprocessing = whole_image(wishes, normalization, channels)
    else:
        preprocessing = by_imagenet(wishes, channels)
    return Architecture(model, by_method, "features(x)", (_PROJECTS_CLASSIFIER,), preprocessing)


def _made(call: str, channels: int, device: str, branches: int) -> nn.Module:
    try:
        with torch.device(device):
            model, *others = (MODELS.make(call, channels, _CLASSES_OF_AN_UNTRAINED_MODEL) for _ in range(branches))
            for other in others:
                add_branch(model, other, call)
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes beyond memory, or beyond what counts them
        raise UserError(f"model {call}: cannot be built ({message_of(error)[:80]}); make it smaller") from None
    return model


def from_timm(name: str, pretrained: bool, wishes: Wishes) -> Architecture:
    """Build a timm model; it says itself what it wants to see."""
    timm = _timm(name)
    if not timm.is_model(name):
        near = guess(name, [*timm.list_models(), *(entry.name for entry in MODELS)])
        raise UserError(
            f"timm:{name}: timm {timm.__version__} has no such model;{near} known: {_ours()}, torchvision:NAME, "
            "MODULE:FACTORY and those of timm.list_models()"
        )
    try:
        with _tensors_only(), _at_hand(timm.models.get_pretrained_cfg(name)) if pretrained else nullcontext():
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

    A dot after the name says which of its published weights, if not the best: `resnet50.IMAGENET1K_V1`.
    """
    name, _, published = name.partition(".")
    if name not in list_models(module=torchvision.models):
        near = guess(name, list_models(module=torchvision.models))
        raise UserError(
            f"torchvision:{name}: torchvision {torchvision.__version__} has no such classification model;{near} known: "
            "those of torchvision.models.list_models()"
        )
    known = get_model_weights(name)
    if published and published not in known.__members__:
        members = known.__members__
        meant = f"{guess(published, members)} known: {', '.join(members)}"
        raise UserError(f"torchvision:{name}.{published}: no such weights;{meant}")
    weights = known[published or "DEFAULT"]
    # These two warn without it, and would take another initialisation.
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    try:
        with _tensors_only(), _at_hand(weights) if pretrained else nullcontext():
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
    if not (pretrained or published or wishes.resize or wishes.image_size):
        other = f"; other weights of it were made for --resize {', '.join(map(str, others))}" if others else ""
        sizes = f"the images are resized to {resize} and cropped to {crop}, {weights.name}'s"
        notes = (f"torchvision:{name}: {sizes}{other}",)
    return Architecture(model, InputOf(layer), f"input of {layer}", (layer,), preprocessing, notes)


def _ours() -> str:
    return ", ".join(entry.name for entry in MODELS)


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        near = guess(name, [entry.name for entry in MODELS])
        what = f"model {name!r}: not one of {_ours()};{near}"
        raise UserError(f"{what} for timm's, pip install 'tailscope[timm]'") from None


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
def _at_hand(weights: Any) -> Iterator[None]:
    """Look for published weights among those kept on this machine only, where their host is not to be reached.

    `weights` are timm's configuration or torchvision's entry. Without it the Hub's client tries for a minute.

    Raises:
        OSError: they are not kept here as a file of their own, and their host is not to be reached.
    """
    if getattr(weights, "hf_hub_id", None):
        from huggingface_hub import constants

        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before
        return
    url = str(weights.url or "")
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if url and not file.is_file() and not _reachable(url):
        raise OSError(f"{urlparse(url).hostname} does not answer")
    yield


def _reachable(url: str) -> bool:
    """Whether the host of a URL, or the proxy that leads there, takes a connection within a few seconds."""
    target = urlparse(url)
    proxy = None if proxy_bypass(target.hostname or "") else getproxies().get(target.scheme)
    target = urlparse(proxy) if proxy else target
    answered: list[bool] = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((target.hostname, target.port or 443), _CONNECT_SECONDS):
            answered.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # a name server that keeps silent has no timeout of its own
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return bool(answered)
