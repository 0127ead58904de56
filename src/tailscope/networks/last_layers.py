"""Last layers: how a network's classifier turns features into logits.

A factory takes the linear layer that the network was made with, so that initial weights and random draws are the same
whatever the last layer is, and returns the module that takes its place: features [B, d] of any float type -> logits
[B, C]. One that computes cosines has `cosines(features)`, float32 [B, C], for losses that need them, one that computes
squared distances `distances(features)`; both have `as_linear()`: the weight [C, d] and the bias [C] of a linear layer
that decides as they do. Where that one's logits are not the layer's own, `inputs(features)` are features of which
`on_inputs()`, a weight and a bias again, makes those.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailscope.errors import UserError
from tailscope.networks import LAST_LAYERS


@LAST_LAYERS.register("linear")
def linear(made: nn.Linear, /) -> nn.Module:
    """Linear: a weight vector and a bias for each class, as the network makes them."""
    return made


class CosineLayer(nn.Module):
    """Logits are `scale` times the cosine between a feature and each class's weight vector; there is no bias."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        """Start from `weight` [C, d], whose rows' lengths mean nothing."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = scale

    def cosines(self, features: Tensor) -> Tensor:
        """Features [B, d] -> cosines, float32 [B, C]; a feature of length 0 has the cosine 0 with all."""
        # In bfloat16 a cosine has two decimals, which a scale of 30 makes errors that are larger than margins.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.inputs(features), F.normalize(self.weight))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, d] -> logits, float32 [B, C]."""
        return self.scale * self.cosines(features)

    def as_linear(self) -> tuple[Tensor, Tensor]:
        """Return the rows at length 1 and zeros: `forward` without each sample's factor `scale / |feature|`."""
        weight = F.normalize(self.weight.detach())
        return weight, weight.new_zeros(len(weight))

    def inputs(self, features: Tensor) -> Tensor:
        """Return features at length 1, float32: what is linear here."""
        return F.normalize(features.float())

    def on_inputs(self) -> tuple[Tensor, Tensor]:
        """Return the rows at length `scale` and zeros."""
        weight, bias = self.as_linear()
        return self.scale * weight, bias


@LAST_LAYERS.register("cosine")
def cosine(made: nn.Linear, /, scale: float = 16.0) -> nn.Module:
    """Cosines between features and weight vectors, times `scale` (Gidaris and Komodakis 2018)."""
    if not scale > 0:
        raise UserError(f"last layer cosine(scale={scale}): scale must be positive")
    return CosineLayer(made.weight, scale)


class PrototypeLayer(nn.Module):
    """Logits are `-gamma` times the squared distance between a feature and each class's prototype."""

    def __init__(self, weight: Tensor, gamma: float) -> None:
        """Start with the rows of `weight` [C, d] as prototypes."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.gamma = gamma

    def distances(self, features: Tensor) -> Tensor:
        """Features [B, d] -> squared distances, float32 [B, C]."""
        with torch.autocast(features.device.type, enabled=False):  # differences of large numbers
            x, lengths = features.float(), self.weight.square().sum(1)
            return (x.square().sum(1, keepdim=True) - 2 * F.linear(x, self.weight) + lengths).clamp(min=0)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, d] -> logits, float32 [B, C]."""
        return -self.gamma * self.distances(features)

    def as_linear(self) -> tuple[Tensor, Tensor]:
        """Return `forward` without what all classes of a sample share, -gamma |feature|^2: it is linear."""
        weight = self.weight.detach()
        return 2 * self.gamma * weight, -self.gamma * weight.square().sum(1)


@LAST_LAYERS.register("prototypes")
def prototypes(made: nn.Linear, /, gamma: float = 1.0) -> nn.Module:
    """Minus gamma times the squared distance to a prototype of each class (Yang et al. 2018, section 3)."""
    if not gamma > 0:
        raise UserError(f"last layer prototypes(gamma={gamma}): gamma must be positive")
    return PrototypeLayer(made.weight, gamma)


def as_linear(layer: Any) -> tuple[Tensor, Tensor]:
    """Return weight [C, d] and bias [C], float32 on the CPU, of the linear layer that decides as a last layer does.

    The largest logit is the same class's for every feature; the logits may differ by a positive factor a sample.
    """
    weight, bias = (layer.weight.detach(), layer.bias.detach()) if isinstance(layer, nn.Linear) else layer.as_linear()
    return weight.cpu().float(), bias.cpu().float()


def as_sure(layer: Any) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Return what becomes of features, and the weight and bias that then make a last layer's own logits of them.

    They are its logits but for what all classes of a sample share: besides deciding alike, they are as sure.
    """
    if not hasattr(layer, "inputs"):
        return torch.Tensor.float, *as_linear(layer)
    weight, bias = layer.on_inputs()
    return layer.inputs, weight.cpu().float(), bias.cpu().float()


def computes(what: str, call: str) -> bool:
    """Whether the last layer of that call-string computes `cosines` or `distances`.

    >>> computes("cosines", "linear"), computes("cosines", "cosine(scale=30)"), computes("distances", "prototypes")
    (False, True, True)
    """
    made = nn.utils.skip_init(nn.Linear, 1, 1)  # type: ignore[no-untyped-call]  # draws no weights
    return hasattr(LAST_LAYERS.make(call, made), what)
