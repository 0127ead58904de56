"""From a model's name and a checkpoint to an `Encoder`: whatever the name says, a stored backbone or the user's module.

Only what the user types is ever imported: a name from a store or another file never comes to `_call`. A store may come
from a stranger. What its descriptions name is looked up among the project's own networks and nowhere else, and sizes
are bounded by the stored weights, which the network must fit.
"""

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tailscope import seeds
from tailscope.data.images import PIL_MODES
from tailscope.encoders import checkpoints, networks
from tailscope.encoders.preprocessing import Preprocessing, Wishes, by_data
from tailscope.errors import UserError, foreign_code
from tailscope.methods import for_photos
from tailscope.methods.augmentations import size_of
from tailscope.networks import MODELS
from tailscope.registry import split_call
from tailscope.store import Artifact, Store
from tailscope.store.care import describe
from tailscope.tables.checks import listed
from tailscope.tables.table import LinearLayer

PREFIX = "store:"
_LARGEST = 1024  # side in pixels beyond which no backbone was trained


@dataclass(frozen=True, eq=False)
class StoredBackbone:
    """A trained backbone.

    Attributes:
        model: the call-string of its network.
        checkpoint: its weights.
        rows: of the true training set, which it was trained on.
        counts: [C] of those rows.
        image_size: side of the images that it was trained on where they were cropped from files, None elsewhere.
        branches, saw_the_rest: how many it ends in; whether it saw the other images, too, without their labels.
    """

    model: str
    checkpoint: Path
    rows: npt.NDArray[np.int64]
    counts: tuple[int, ...]
    image_size: int | None
    branches: int = 1
    saw_the_rest: bool = False


def find_stored(root: Path | None, key: str) -> StoredBackbone:
    """Return the backbone whose key begins with `key`: the `key` in a result's `provenance`.

    Raises:
        UserError: no store is given, it is not there or damaged, or not exactly one backbone has such a key.
    """
    if root is None:
        raise UserError(f"--model {PREFIX}{key}: give the store's folder with --store, OUT/store of the experiment")
    if not root.is_dir():
        raise UserError(f"--store {root}: no such folder")
    store = Store(root)
    keys = store.keys("stage1")
    matching = [known for known in keys if known.startswith(key)]
    if not key or len(matching) != 1:
        what = "no such backbone" if not matching else f"{len(matching)} backbones"
        have = listed([f"{known[:12]} ({describe(store.meta('stage1', known))})" for known in keys])
        raise UserError(f"--model {PREFIX}{key}: {what}; {root} has {have if keys else 'none'}")
    return _stored_backbone(store.read("stage1", matching[0]), store.tensors_file("stage1", matching[0]))


def _stored_backbone(artifact: Artifact, path: Path) -> StoredBackbone:
    """Return the backbone of an entry, of which only what a training of ours may have written is believed."""
    try:
        spec = artifact.meta["spec"]
        model, augment = str(spec["model"]), [str(call) for call in spec["augment"]]
        counts = tuple(int(n) for n in spec["data"]["counts"])
        rows = artifact.tensors["rows"].numpy()
        plugins = {str(name): str(sha256) for name, sha256 in spec.get("plugins", [])}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path.parent}: is no backbone that tailscope stored ({why})") from None
    try:
        MODELS.parse(model)
        size = size_of(augment) if for_photos(augment) else None
    except UserError as error:
        looked_up = "names in a file are only looked up, never run"
        mend = f"; it was trained with --import {', '.join(plugins)}" if plugins else ""
        raise UserError(f"{path.parent / 'meta.json'}: {error}; {looked_up}{mend}") from None
    if (plugin := MODELS.plugin(model)) is not None and plugins.get(plugin.name) != plugin.sha256:
        raise UserError(
            f"{path.parent}: {plugin.name} has changed since its network {model} was trained; restore that file, or if"
            f" the network is the same give --model '{model}' --checkpoint {path}"
        )
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0 or rows.min() < 0:
        raise UserError(f"{path}: its rows {list(rows.shape)} are no row numbers of training images")
    if size is not None and not 1 <= size <= _LARGEST:
        raise UserError(f"{path.parent / 'meta.json'}: images of {size} pixels; at most {_LARGEST} are believed")
    branches, others = (spec.get(name) is not None for name in ("second_sampler", "unlabelled"))
    return StoredBackbone(model, path, rows, counts, size, 1 + branches, others)


_UNTRAINED = {"timm": "random", "torchvision": "random", "project": "random", "user": "as the factory made them"}
_POOLED = re.compile(r"features?|feat|pool|embed|penultimate", re.IGNORECASE)
"""Items of a model's output that are its features, by name, such as transformers' `pooler_output`."""

_CLASSIFIER = re.compile(r"(^|\.)(classifier|linear|fc|heads?|logits)$")
_CLASSIFIER_TYPE = re.compile(r"linear|classifier|cos(ine|norm)|arcface", re.IGNORECASE)


def load(
    model: str,
    checkpoint: Path | None = None,
    *,
    checkpoint_key: str | None = None,
    pretrained: bool = False,
    channels: int = 3,
    wishes: Wishes | None = None,
    classes: int | None = None,
    branches: int = 1,
) -> networks.Encoder:
    """Build a network, load its weights, and find its penultimate features.

    Args:
        model: one of the project's (`resnet32`, `resnet32(width=64)`), `torchvision:NAME`, `timm:NAME` or any timm
            name, or `module:factory` of the user's own. It may import and run what it names: never pass what was read
            from a file without looking it up in `MODELS`, as `find_stored` does.
        checkpoint: local weights. Without, weights are random, and the same in every process.
        checkpoint_key: which of the checkpoint's networks, such as `ema`, where several fit.
        pretrained: take the weights that timm or torchvision publish, from their cache or the network.
        channels: of the images, for models without a checkpoint that do not say it themselves.
        wishes: size and normalisation of the input, where the model's own are not wanted, and the data's size.
        classes: how many the data have: an output of that width is no feature.
        branches: of one of the project's, 2 where it was trained as BBN is (`networks.resnets.add_branch`).

    Raises:
        UserError: the model is unknown or needs a package that is not installed; the checkpoint is missing, damaged or
            does not fit; no pretrained weights can be had; or the model does not give features [B, d].
    """
    if checkpoint is not None and pretrained:
        raise UserError("--checkpoint and --pretrained: give one of them")
    kind = _kind(model)[0]
    if pretrained and kind in ("project", "user"):
        raise UserError(f"--pretrained: there are no published weights of {model}; give a file with --checkpoint")
    if checkpoint_key is not None and checkpoint is None:
        raise UserError(f"--checkpoint-key {checkpoint_key}: goes with --checkpoint FILE")
    wishes = wishes or Wishes()
    stored = None if checkpoint is None else checkpoints.read(checkpoint)
    built = _built(model, channels, stored, pretrained, wishes, classes, branches)
    notes, classifier, layer = list(built.notes), None, None
    if stored is not None:
        classifier, layer, said = checkpoints.fit(stored, built.model, model, built.classifiers, checkpoint_key)
        classifier = classifier and _named(classifier, stored)
        notes += said
    elif pretrained or kind == "user":
        classifier = _own_classifier(model, built)
    else:
        notes = [f"{model}: the weights are random; give --checkpoint FILE for trained ones"]
    built.model.eval().requires_grad_(False)
    x = networks.probe(built.preprocessing, wishes.data_size)
    features = networks.measure(model, built.model, built.function, x, "" if built.preprocessing.owner else wishes.mend)
    if classifier is not None and not networks.explains(classifier, built.model, features, x):
        classifier = None
        notes.append(f"{model}: its classifier is not linear in the features and was left out")
    return networks.Encoder(
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
        layer,
    )


def _built(
    model: str,
    channels: int,
    stored: checkpoints.Checkpoint | None,
    pretrained: bool,
    wishes: Wishes,
    classes: int | None,
    branches: int = 1,
) -> networks.Architecture:
    """Build an untrained network, or one with published weights."""
    kind, name = _kind(model)
    with seeds.keyed(seeds.derive(0, "encoder")):
        match kind:
            case "timm":
                return networks.from_timm(name, pretrained, wishes)
            case "torchvision":
                return networks.from_torchvision(name, pretrained, wishes)
            case "user":
                return _from_user(name, channels, wishes, classes)
            case _:
                return networks.project(name, channels, stored, wishes, branches)


def find_layer(
    model: str, checkpoint: Path, checkpoint_key: str | None = None
) -> tuple[LinearLayer, checkpoints.Layer]:
    """Return a checkpoint's linear classifier and where in the file it is; arguments are those of `load`.

    Raises:
        UserError: as `load`; or the checkpoint has no classifier that is one linear layer.
    """
    stored, (kind, name) = checkpoints.read(checkpoint), _kind(model)
    if kind == "user":  # no image is seen, so what its features are cannot be tried
        made, _ = _call(name)
        network, _ = _plain(name, made[0] if isinstance(made, tuple) else made)
        classifiers = tuple(filter(None, [networks.last_linear(network)]))
    else:
        built = _built(model, 3, stored, False, Wishes(normalize="none") if kind == "project" else Wishes(), None)
        network, classifiers = built.model, built.classifiers
    classifier, layer, notes = checkpoints.fit(stored, network, model, classifiers, checkpoint_key)
    if classifier is None or layer is None:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"{checkpoint}: has no classifier of {model} that is one linear layer{why}")
    return _named(classifier, stored), layer


def _named(classifier: LinearLayer, stored: checkpoints.Checkpoint) -> LinearLayer:
    """Return a checkpoint's classifier with the names that the checkpoint gives its classes."""
    fitting = len(stored.class_names or ()) == len(classifier.weight)
    return replace(classifier, class_names=stored.class_names) if fitting else classifier


def _kind(model: str) -> tuple[str, str]:
    """Split a model's name into its kind and what names it there."""
    kind, colon, name = model.partition(":")
    if colon:
        return (kind, name) if kind in ("timm", "torchvision") else ("user", model)
    own = {entry.name for entry in MODELS}
    return ("project" if model.partition("(")[0].strip() in own else "timm"), model


def _own_classifier(model: str, built: networks.Architecture) -> LinearLayer | None:
    """Return the classifier that a trained model came with."""
    layer = built.model.get_submodule(built.classifiers[0]) if len(built.classifiers) == 1 else None
    if not isinstance(layer, torch.nn.Linear):
        return None
    return LinearLayer.from_arrays(layer.weight, layer.bias, source=model)


def _from_user(name: str, channels: int, wishes: Wishes, classes: int | None) -> networks.Architecture:
    """Call `module:factory`, imported as from the current directory; call-strings set the factory's arguments.

    The factory returns a model, or a model and its transform (image -> tensor [3, H, W]). Penultimate features are
    those of a method `features(x)`, else timm's, else the input of the last linear layer if this ends the model, else
    the model's output, or the pooled item of it; of the width of `classes` that is refused, as logits.
    """
    made, source = _call(name)
    model, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{name}: returned a {type(model).__name__}, not a torch.nn.Module or a pair with a transform")
    model, notes = _plain(name, model)
    if transform is None:
        preprocessing, said = by_data(wishes, _channels_of(model, channels))
        if not wishes.given:
            said += "; --image-size, --resize and --normalize change that, or a transform that the factory returns"
        notes += (f"{name}: {said}",)
    elif not callable(transform):
        raise UserError(f"{name}: returned a {type(transform).__name__} as its transform, which cannot be called")
    elif wishes.given:
        raise UserError(f"{wishes.given[0]}: {name} brings a transform of its own; change that")
    else:
        preprocessing = Preprocessing(transform, owner=name)
    x = networks.probe(preprocessing, wishes.data_size)
    function, how, classifiers, more = _checked_features(
        name, model, x, classes, "" if preprocessing.owner else wishes.mend
    )
    return networks.Architecture(model, function, how, classifiers, preprocessing, (*notes, *more), source)


def _checked_features(
    name: str, model: nn.Module, x: Tensor, classes: int | None, mend: str
) -> tuple[networks.FeatureFunction, str, tuple[str, ...], tuple[str, ...]]:
    """Return what `_features_of` finds, which are no logits and the same in every batch, and what is to be said."""
    function, how, classifiers = _features_of(name, model, x, mend)
    features = networks.measure(name, model, function, x, mend)
    require_no_logits(name, how, features.shape[1], classes)
    networks.require_independent(name, model, function, x, features)
    said = {
        "output": f"{name}: the features are the model's output; if those are logits, give it features(x)",
        "output[": f"{name}: the features are {how} of the model",
    }
    return function, how, classifiers, tuple(text for kind, text in said.items() if how[:7] == kind)


def require_no_logits(name: str, how: str, width: int, classes: int | None) -> None:
    """Refuse a model's output for features where it is as wide as the data have classes."""
    if how.startswith("output") and width == classes:
        raise UserError(
            f"{name}: its {how} has {classes} values, as many as the data has classes: these are logits, not features; "
            "give the model a method features(x)"
        )


def of_module(model: nn.Module, images: Tensor) -> networks.Encoder:
    """Find the features of a network that lies ready, and its classifier; it stays where and as it is.

    Args:
        model: in evaluation mode; what wraps it for parallel or compiled training is left out.
        images: a few inputs [B, C, H, W] of it.

    Raises:
        UserError: the network fails on these images, or does not give features [B, d].
    """
    model = _unwrapped(model)
    name, first = type(model).__name__, next(model.parameters(), None)
    x = images if first is None else images.to(first.device)
    function, how, classifiers, notes = _checked_features(name, model, x, None, "")
    features = networks.measure(name, model, function, x)
    architecture = networks.Architecture(model, function, how, classifiers, Preprocessing(_as_given), notes)
    classifier = _own_classifier(name, architecture)
    if classifier is not None and not networks.explains(classifier, model, features, x):
        classifier, notes = None, (*notes, f"{name}: its classifier is not linear in the features and was left out")
    preprocessing, width = architecture.preprocessing, features.shape[1]
    return networks.Encoder(name, model, function, how, preprocessing, width, "as given", classifier, notes)


def _as_given(image: Any) -> Any:
    """Stand for what the user's program did to an image."""
    return image


def _call(name: str) -> tuple[Any, str]:
    """Return what the factory makes, and the SHA-256 of its module's source."""
    module_name, _, call = name.partition(":")
    function, args, kwargs = split_call(call, "factory")
    with foreign_code(name):
        sys.path.insert(0, here := str(Path.cwd()))
        try:
            module = importlib.import_module(module_name)
            made = getattr(module, function)(*args, **kwargs)
        finally:
            sys.path.remove(here)
    try:
        source = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
    except (OSError, TypeError):  # compiled, or gone
        source = ""
    return made, source


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the network without what wraps it."""
    wrapped: Any = model
    while isinstance(wrapped, nn.Module):
        parallel = isinstance(model := wrapped, nn.DataParallel | nn.parallel.DistributedDataParallel)
        wrapped = getattr(model, "module" if parallel else "_orig_mod", None)
    return model


def _plain(name: str, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network without what wraps it, in float32 on the CPU, and a note where that changes it."""
    model = _unwrapped(model)
    empty = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise UserError(f"{name}: {empty[0]!r} lies on the meta device: the network has no weights")
    low = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    with foreign_code(f"{name}: cannot be moved to the CPU as float32"):
        model = model.to("cpu").float() if low else model.to("cpu")
    what = ", ".join(str(dtype).removeprefix("torch.") for dtype in low)
    return model, (f"{name}: its {what} weights compute in float32",) if low else ()


def _channels_of(model: nn.Module, channels: int) -> int:
    """Return how many channels the first convolution takes, or those of the data."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels in PIL_MODES else channels


def _features_of(
    name: str, model: nn.Module, x: Tensor, mend: str
) -> tuple[networks.FeatureFunction, str, tuple[str, ...]]:
    """Return the features' function, that in words, and the names of linear classifiers on them."""
    layer = networks.last_linear(model)
    method = getattr(model, "features", None)
    if callable(method) and not isinstance(method, nn.Module):
        return networks.by_method, "features(x)", _unused(name, model, networks.by_method, layer, x, mend)
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        return networks.by_timm, "forward_head(pre_logits=True)", _unused(name, model, networks.by_timm, layer, x, mend)
    with _outputs_of(model) as outputs:
        parts = networks.parts_of(networks.run(name, model, nn.Module.__call__, x, mend))
    made = outputs.get(layer or "", ())[-1:]
    if any(_decides(logits, part) for logits in made for part in parts.values()):
        return networks.InputOf(layer or ""), f"input of {layer}", (str(layer),)
    part = _pooled(name, parts)
    _refuse_logits(name, model, outputs, parts[part])
    _refuse_changed_logits(name, model, outputs, parts[part])
    return _PartOfOutput(part), part, ()


def _decides(logits: Tensor, output: Tensor) -> bool:
    """Whether an output is these logits, their softmax, or either times a temperature."""
    if networks.is_decision(logits, output):
        return True
    return output.shape == logits.shape and networks.is_decision(logits / logits.norm(), output / output.norm())


class _PartOfOutput:
    """An item of a model's output, [B, d], perhaps with trailing dimensions of 1. Goes for any model."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Run the model and return that item."""
        part = networks.parts_of(model(x))[self.part]
        return part.flatten(1) if part.ndim > 2 and part.shape[2:].numel() == 1 else part


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, by the module's name, what every module gives."""
    outputs: dict[str, list[Tensor]] = {}
    names = {module: name for name, module in model.named_modules() if name}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        if module in names and isinstance(output, Tensor):
            outputs.setdefault(names[module], []).append(output)

    with register_module_forward_hook(keep):
        yield outputs


def _unused(
    name: str, model: nn.Module, function: networks.FeatureFunction, layer: str | None, x: Tensor, mend: str
) -> tuple[str, ...]:
    """Return the last linear layer, unless the features themselves need it: then it is no classifier."""
    with _outputs_of(model) as outputs:
        networks.run(name, model, function, x, mend)
    return () if layer is None or layer in outputs else (layer,)


def _refuse_logits(name: str, model: nn.Module, outputs: dict[str, list[Tensor]], output: Tensor) -> None:
    """Refuse a model that ends in a classifier which is no `nn.Linear`: its output would be written as features.

    It is known by the name or the type of the last layer with parameters, or of what that is part of.
    """
    owners = [path for path, module in model.named_modules() if path and [*module.parameters(recurse=False)]]
    path = owners[-1] if owners else ""
    while path:
        module = model.get_submodule(path)
        kind = str(getattr(module, "original_name", type(module).__name__))
        is_output = isinstance(module, torch.jit.ScriptModule) or any(
            torch.equal(made.flatten(1), output.flatten(1)) for made in outputs.get(path, ())[-1:]
        )
        if is_output and (_CLASSIFIER.search(path) or _CLASSIFIER_TYPE.search(kind)):
            raise UserError(
                f"{name}: ends in {path} ({kind}), which is no nn.Linear: the output is logits, not features; give the "
                "model a method features(x)"
            )
        path = path.rpartition(".")[0]


def _refuse_changed_logits(name: str, model: nn.Module, outputs: dict[str, list[Tensor]], output: Tensor) -> None:
    """Refuse logits that were scaled, shifted or squashed behind their classifier; an embedding may be normalised.

    They are as wide as the last linear layer that ran, which is named like a classifier.
    """
    layers = [path for path in outputs if isinstance(model.get_submodule(path), nn.Linear)]
    if not layers or not _CLASSIFIER.search(layers[-1]):
        return
    logits, output = outputs[layers[-1]][-1], output.flatten(1)
    if logits.shape == output.shape and not torch.allclose(nn.functional.normalize(logits, dim=1), output, atol=1e-5):
        raise UserError(
            f"{name}: its output is as wide as {layers[-1]}, {output.shape[1]}, and is made from it: these are logits, "
            "not features; give the model a method features(x)"
        )


def _pooled(name: str, parts: dict[str, Tensor]) -> str:
    """Return which part of the output is the features: the only one, or the one that is called so."""
    if list(parts) == ["output"]:
        return "output"
    flat = {key: part for key, part in parts.items() if part.ndim >= 2 and part.shape[2:].numel() == 1}
    named = [key for key in flat if _POOLED.search(key.partition("[")[2])]
    found = named or list(flat)
    if len(found) != 1 or "logits" in found[0]:
        have = ", ".join(f"{key} {list(part.shape)}" for key, part in parts.items()) or "no tensors"
        raise UserError(f"{name}: returns {have}, and it is not clear which are features; give it a method features(x)")
    return found[0]
