"""Gradients of convolutions; that of a 3x3 kernel's weights is our own, on processors that multiply bfloat16."""

import ctypes

import torch
from torch import Tensor, nn

from tailscope.kernels.build import library, pointers

_CHANNELS = 16


def available() -> bool:
    """Whether the kernel can be used on this machine; compiles it the first time."""
    compiled = library("convolution")
    return compiled is not None and bool(compiled.supported())


def gradients(
    layer: nn.Conv2d, x: Tensor, weight: Tensor, arriving: Tensor, *, of_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of x (where `of_x`) and, in float32, of the weights.

    Args:
        layer: a convolution without bias.
        x: activations [B, in, H, W], channels-last.
        weight: the layer's, in the activations' type.
        arriving: the gradient of what the layer returned, [B, out, H', W'].
        of_x: whether the gradient of x is wanted.
    """
    ours = _fits(layer, x) and available()
    by_x: Tensor | None = None
    by_weight: Tensor | None = None
    if of_x or not ours:
        by_x, by_weight, _ = torch.ops.aten.convolution_backward.default(
            arriving,
            x,
            weight,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0, 0],
            layer.groups,
            [of_x, not ours, False],
        )
    if ours:
        return by_x, _weight_gradient(x, arriving)
    assert by_weight is not None
    return by_x, by_weight.float()


def _fits(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether the kernel knows this case: bfloat16, 3x3, stride and padding 1, 16k channels, even width."""
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.in_channels % _CHANNELS == layer.out_channels % _CHANNELS == 0
        and x.dtype == torch.bfloat16
        and x.shape[3] % 2 == 0
    )


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Activations [B, in, H, W] and gradients [B, out, H, W] -> float32 [out, in, 3, 3]."""
    images, channels, height, width = x.shape
    of_weight = torch.empty((gradient.shape[1], channels, 3, 3), dtype=torch.float32, memory_format=torch.channels_last)
    sizes = [ctypes.c_int64(n) for n in (images, height, width, channels, gradient.shape[1])]
    compiled = library("convolution")
    assert compiled is not None
    compiled.weight_gradient(*pointers(x, gradient, of_weight), *sizes, torch.get_num_threads())
    return of_weight
