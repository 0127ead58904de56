"""Kernels of our own, for what the libraries leave slow on a CPU: batch normalisation and convolutions' gradients."""

from torch import nn

from tailscope.kernels import batch_norm, convolution


def fuse(model: nn.Module) -> bool:
    """Let the blocks of a network use our kernels where they can; return whether this machine can."""
    if not batch_norm.available():
        return False
    ours = {
        "batch_norm_relu": batch_norm.fused_batch_norm_relu,
        "convolve": convolution.fast_convolve,
    }
    for module in model.modules():
        for name, function in ours.items():
            if hasattr(module, name):
                setattr(module, name, function)
    return True
