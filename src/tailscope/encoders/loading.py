"""From a model's name and a checkpoint to an `Encoder`."""

from pathlib import Path

import torch

from tailscope import seeds
from tailscope.encoders import architectures, checkpoints, user
from tailscope.encoders.architectures import Architecture
from tailscope.encoders.checkpoints import Checkpoint
from tailscope.encoders.encoder import Encoder, explains, measure, probe
from tailscope.encoders.preprocessing import Wishes
from tailscope.errors import UserError
from tailscope.linear_layer import LinearLayer
from tailscope.models import MODELS

_UNTRAINED = {"timm": "random", "torchvision": "random", "project": "random", "user": "as the factory made them"}


def load(
    model: str,
    checkpoint: Path | None = None,
    *,
    checkpoint_key: str | None = None,
    pretrained: bool = False,
    channels: int = 3,
    wishes: Wishes | None = None,
    classes: int | None = None,
) -> Encoder:
    """Build a network, load its weights, and find its penultimate features.

    Args:
        model: one of the project's (`resnet32`, `resnet10`, `resnet32(width=64)`), `torchvision:NAME`, `timm:NAME` or
            any timm name, or `module:factory` of the user's own. It may import and run what it names: never pass what
            was read from a file without looking it up in `MODELS` (as `tailscope.encoders.stored` does).
        checkpoint: local weights (see `tailscope.encoders.checkpoints`). Without, weights are random, and the same in
            every process.
        checkpoint_key: which of the checkpoint's networks, such as `ema`, where several fit.
        pretrained: take the weights that timm or torchvision publish, from their cache or the network.
        channels: of the images, for models without a checkpoint that do not say it themselves.
        wishes: size and normalisation of the input, where the model's own are not wanted, and the data's size.
        classes: how many the data have: an output of that width is no feature.

    Raises:
        UserError: the model is unknown or needs a package that is not installed; the checkpoint is missing, damaged or
            does not fit; no pretrained weights can be had; or the model does not give features [B, d].
    """
    if checkpoint is not None and pretrained:
        raise UserError("--checkpoint and --pretrained: give one of them")
    kind, name = _kind(model)
    if pretrained and kind in ("project", "user"):
        raise UserError(f"--pretrained: there are no published weights of {model}; give a file with --checkpoint")
    if checkpoint_key is not None and checkpoint is None:
        raise UserError(f"--checkpoint-key {checkpoint_key}: goes with --checkpoint FILE")
    wishes = wishes or Wishes()
    stored = None if checkpoint is None else checkpoints.read(checkpoint)
    with seeds.keyed(seeds.derive(0, "encoder")):
        built = _build(kind, name, stored, pretrained, channels, wishes, classes)
    notes, classifier = list(built.notes), None
    if stored is not None:
        fitted = checkpoints.fit(stored, built.model, model, built.classifiers, checkpoint_key)
        classifier = fitted.classifier
        notes += fitted.notes
    elif pretrained or kind == "user":
        classifier = _own_classifier(model, built)
    else:
        notes = [f"{model}: the weights are random; give --checkpoint FILE for trained ones"]
    built.model.eval().requires_grad_(False)
    x = probe(built.preprocessing, wishes.data_size)
    features = measure(model, built.model, built.function, x, "" if built.preprocessing.owner else wishes.mend)
    if classifier is not None and not explains(classifier, built.model, features, x):
        classifier = None
        notes.append(f"{model}: its classifier is not linear in the features and was left out")
    return Encoder(
        model,
        built.model,
        built.function,
        built.how,
        built.preprocessing,
        features.shape[1],
        checkpoint.name if checkpoint is not None else "pretrained" if pretrained else _UNTRAINED[kind],
        classifier,
        tuple(notes),
        built.source,
    )


def _kind(model: str) -> tuple[str, str]:
    """Split a model's name into its kind and what names it there."""
    kind, colon, name = model.partition(":")
    if colon:
        return (kind, name) if kind in ("timm", "torchvision") else ("user", model)
    own = {entry.name for entry in MODELS}
    return ("project" if model.partition("(")[0].strip() in own else "timm"), model


def _build(
    kind: str,
    name: str,
    stored: Checkpoint | None,
    pretrained: bool,
    channels: int,
    wishes: Wishes,
    classes: int | None,
) -> Architecture:
    if kind == "timm":
        return architectures.from_timm(name, pretrained, wishes)
    if kind == "torchvision":
        return architectures.from_torchvision(name, pretrained, wishes)
    if kind == "user":
        return user.from_user(name, channels, wishes, classes)
    return architectures.project(name, channels, stored, wishes)


def _own_classifier(model: str, built: Architecture) -> LinearLayer | None:
    """Return the classifier that a trained model came with."""
    layer = built.model.get_submodule(built.classifiers[0]) if len(built.classifiers) == 1 else None
    if not isinstance(layer, torch.nn.Linear):
        return None
    return LinearLayer.from_arrays(layer.weight, layer.bias, source=model)
