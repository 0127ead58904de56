"""Networks: every model is `classifier(features(x))`."""

from tailscope.models.resnet import MODELS, CifarResNet, count_parameters
from tailscope.models.resnet10 import ResNet10

__all__ = ["MODELS", "CifarResNet", "ResNet10", "count_parameters"]
