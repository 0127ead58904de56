"""Networks: every model is `classifier(features(x))`."""

from typing import TYPE_CHECKING

from tailscope.registry import Registry

if TYPE_CHECKING:
    from tailscope.models.resnet import CifarResNet

__all__ = ["MODELS"]

MODELS: Registry["CifarResNet"] = Registry(
    "model", "tailscope.models.resnet:MODELS", "tailscope.models.resnet10:MODELS"
)
