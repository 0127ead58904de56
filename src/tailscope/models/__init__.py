"""Networks: every model is `classifier(features(x))`."""

from tailscope.models.resnet import MODELS, CifarResNet, count_parameters

__all__ = ["MODELS", "CifarResNet", "count_parameters"]
