"""A frozen network as a function from images to penultimate features."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tailscope.encoders.foreign import foreign_code
from tailscope.encoders.preprocessing import Preprocessing
from tailscope.errors import UserError
from tailscope.linear_layer import LinearLayer

FeatureFunction = Callable[[nn.Module, Tensor], Tensor]
_PROBE_PIXELS = 64


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

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, d] of inputs [B, C, H, W].

        Raises:
            UserError: the model fails.
        """
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
    """Return two preprocessed images of noise [2, C, H, W], to try a model on.

    Args:
        preprocessing: what the model wants to see.
        size: height and width of the images, those of the data where known.

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
    """Return what a function of the model and the probe returns, in eval mode and without gradients.

    Raises:
        UserError: the model fails.
    """
    with torch.no_grad(), foreign_code(f"{name}: fails on an input of shape {list(x.shape)}", mend):
        return function(model.eval(), x)


def measure(name: str, model: nn.Module, function: FeatureFunction, x: Tensor, mend: str = "") -> Tensor:
    """Return the features [2, d] of the probe.

    Args:
        name: what messages call the model.
        model: the network.
        function: (model, inputs) -> features.
        x: the probe.
        mend: what the user may do if the model fails on an input of this size.

    Raises:
        UserError: the model fails on its input, or what comes out is no matrix of finite features, one row an image.
    """
    features = run(name, model, function, x, mend)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
        shape = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise UserError(f"{name}: its features are {shape}, not [B, d]; let a method features(x) return them pooled")
    if features.is_meta or not features.is_floating_point() or not bool(torch.isfinite(features).all()):
        what = "on the meta device" if features.is_meta else f"of {str(features.dtype).removeprefix('torch.')}"
        if not features.is_meta and features.is_floating_point():
            what = "NaN or infinite"
        raise UserError(f"{name}: its features of an image of noise are {what}; check the network and its weights")
    return features


def require_independent(name: str, model: nn.Module, function: FeatureFunction, x: Tensor, features: Tensor) -> None:
    """Check that an image's features do not depend on the rest of its batch, nor on chance.

    Raises:
        UserError: they do, by batch normalisation without running statistics, say, or by dropout that is always on.
    """
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
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple | list):
        items = enumerate(output)
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
    logits = classifier.logits(features)
    return any(is_decision(logits, part) for part in parts_of(output).values())
