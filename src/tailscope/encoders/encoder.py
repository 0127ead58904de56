"""A frozen network as a function from images to penultimate features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

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

    def features(self, x: Tensor) -> Tensor:
        """Return the features [B, d] of inputs [B, C, H, W]."""
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
        }


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


def probe(preprocessing: Preprocessing) -> Tensor:
    """Return two preprocessed images of noise [2, C, H, W], to try a model on."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, _PROBE_PIXELS, _PROBE_PIXELS, 3), generator=generator, dtype=torch.uint8)
    return torch.stack([preprocessing(Image.fromarray(image.numpy())) for image in pixels])


def measure(name: str, model: nn.Module, function: FeatureFunction, x: Tensor) -> Tensor:
    """Return the features [2, d] of the probe.

    Raises:
        UserError: the model fails on its input, or what comes out is no matrix of features.
    """
    try:
        with torch.no_grad():
            features = function(model.eval(), x)
    except Exception as error:  # anything may go wrong inside a user's model
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{name}: fails on an input of shape {list(x.shape)} ({reason}); try --image-size") from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"{name}: its features are {shape}, not [B, d]; give the model a method features(x) -> [B, d]")
    return features


def explains(classifier: LinearLayer, model: nn.Module, features: Tensor, x: Tensor) -> bool:
    """Whether the model's output is that linear classifier on those features, on the probe."""
    with torch.no_grad():
        output = model.eval()(x)
    if not isinstance(output, Tensor) or output.shape != (len(x), len(classifier.weight)):
        return False
    error = (classifier.logits(features) - output.float()).abs().max()
    return bool(error <= 1e-3 * output.abs().max())
