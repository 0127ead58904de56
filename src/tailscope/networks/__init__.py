"""Networks: every model is `classifier(features(x))`, and its `features` have the width `feature_dim`.

What changes activations between stages is given to `features` as `between(place, activations)`, for each of
`hidden_places`; a model without such places leaves both out. The last layer is chosen by a name of its own.

A kernel of our own for what the libraries leave slow on a CPU: what lies between two convolutions.
"""

from typing import TYPE_CHECKING

from tailscope.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from tailscope.networks.resnets import CifarResNet

__all__ = ["LAST_LAYERS", "MODELS"]
MODELS: Registry["CifarResNet"] = Registry("model", "tailscope.networks.resnets:MODELS")
LAST_LAYERS: Registry["nn.Module"] = Registry("last layer", "tailscope.networks.last_layers:LAST_LAYERS")
