"""Kernels of our own, for what the libraries leave slow on a CPU: 3x3 convolutions and what lies between them."""

from torch import nn

from tailscope.kernels import batch_norm
from tailscope.kernels.layers import fast_layer, layer


def fuse(model: nn.Module) -> bool:
    """Let the layers of a network use our kernels where they can; return whether this machine can."""
    if not batch_norm.available():
        return False
    for module in model.modules():
        if getattr(module, "layer", None) is layer:
            module.layer = fast_layer  # type: ignore[assignment]  # modules may have any attribute
    return True
