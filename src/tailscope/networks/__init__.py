"""Networks: every model is `classifier(features(x))`.

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
