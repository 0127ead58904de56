"""3x3 convolutions whose weights' gradient is our own kernel, on processors that multiply bfloat16."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailscope.kernels.build import library, pointers

_CHANNELS = 16


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return layer(x): activations [B, in, H, W] -> [B, out, H', W']."""
    out: Tensor = layer(x)
    return out


def fast_convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return layer(x) in bfloat16, with a gradient of the weights that is summed in float32 and stays in float32.

    For what the kernel does not know, `convolve`: other kernels than 3x3 with stride 1 and padding 1, other types,
    layouts and devices, channels that are no multiple of 16, odd widths, and processors without bfloat16.
    """
    if not (torch.is_grad_enabled() and _usual(layer) and _fits(x) and available()):
        return convolve(layer, x)
    out: Tensor = _Convolution.apply(x, layer.weight)
    return out


def available() -> bool:
    """Whether the kernel can be used on this machine; compiles it the first time."""
    compiled = library("convolution")
    return compiled is not None and bool(compiled.supported())


def _usual(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.bias is None
        and layer.weight.requires_grad
        and layer.in_channels % _CHANNELS == layer.out_channels % _CHANNELS == 0
    )


def _fits(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.dim() == 4
        and x.shape[3] % 2 == 0
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


class _Convolution(torch.autograd.Function):
    """A 3x3 convolution of bfloat16 activations with float32 weights, which are rounded for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rounded = weight.to(x.dtype, memory_format=torch.channels_last)
        ctx.save_for_backward(x, rounded)
        return F.conv2d(x, rounded, padding=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        of_x = None
        if ctx.needs_input_grad[0]:
            only_x = [True, False, False]
            of_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, only_x
            )[0]
        return of_x, _weight_gradient(x, gradient) if ctx.needs_input_grad[1] else None


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Activations [B, in, H, W] and gradients [B, out, H, W] -> float32 [out, in, 3, 3]."""
    images, channels, height, width = x.shape
    of_weight = torch.empty((gradient.shape[1], channels, 3, 3), dtype=torch.float32, memory_format=torch.channels_last)
    sizes = [ctypes.c_int64(n) for n in (images, height, width, channels, gradient.shape[1])]
    compiled = library("convolution")
    assert compiled is not None
    compiled.weight_gradient(*pointers(x, gradient, of_weight), *sizes, torch.get_num_threads())
    return of_weight
