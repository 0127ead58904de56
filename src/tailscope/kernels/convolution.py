"""3x3 convolutions and their gradients, our own on processors that multiply bfloat16, else PyTorch's."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailscope.kernels.build import library, pointers

_CHANNELS = 16  # how many are handled together
_PIXELS = 8  # likewise


def available() -> bool:
    """Whether the kernels can be used on this machine; compiles them the first time.

    Not on processors that multiply whole tiles (AMX): PyTorch's convolutions use them and are three times as fast.
    """
    if _multiplies_tiles():
        return False
    compiled = [library("convolution"), library("weight_gradient")]
    return all(one is not None and bool(one.supported()) for one in compiled)


@functools.cache
def _multiplies_tiles() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return any(line.startswith("flags") and "amx_bf16" in line.split() for line in lines)
    except OSError:
        return False


def forward(layer: nn.Conv2d, x: Tensor, weight: Tensor, *, totals: bool) -> tuple[Tensor, Tensor | None]:
    """Return the convolution [B, out, H', W'] and, where they cost next to nothing, sums over it for batch norm.

    The sums are float64 [threads, 2, out]: each thread's sums of a channel's values and of their squares, taken before
    the result is rounded; None where PyTorch computes, or without `totals`.

    Args:
        layer: a convolution without bias.
        x: activations [B, in, H, W], channels-last.
        weight: the layer's, in the activations' type, channels-last.
        totals: whether the sums are wanted.
    """
    if not (_fits(layer, x) and available()):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups), None
    stride, threads = layer.stride[0], torch.get_num_threads()
    images, channels, height, width = x.shape
    size = (images, layer.out_channels, height // stride, width // stride)
    out = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    sums = torch.zeros((threads, 2, layer.out_channels), dtype=torch.float64) if totals else None
    sizes = _sizes(images, height, width, channels, layer.out_channels, stride)
    _call("convolution", "convolve", *pointers(x, weight, out, sums), *sizes, threads)
    return out, sums


def gradients(
    layer: nn.Conv2d, x: Tensor, weight: Tensor, arriving: Tensor, *, of_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of x (where `of_x`) and, in float32, of the weights.

    Args:
        layer: a convolution without bias.
        x: activations [B, in, H, W], channels-last.
        weight: the layer's, in the activations' type, channels-last.
        arriving: the gradient of what the layer returned, [B, out, H', W'].
        of_x: whether the gradient of x is wanted.
    """
    our_x = of_x and _fits(layer, x) and available()
    our_weight = _fits_weight_gradient(layer, x) and available()
    by_x: Tensor | None = None
    by_weight: Tensor | None = None
    theirs = [of_x and not our_x, not our_weight, False]
    if any(theirs):
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
            theirs,
        )
    if our_x:
        by_x = _input_gradient(layer, x, weight, arriving)
    if our_weight:
        return by_x, _weight_gradient(x, arriving)
    assert by_weight is not None
    return by_x, by_weight.float()


def _fits(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether the kernels know this case: bfloat16, 3x3, padding 1, stride 1 or 2, a result 8n wide, 16k channels."""
    height, width = x.shape[2:]
    stride = layer.stride[0]
    return (
        _usual(layer, x)
        and layer.stride in ((1, 1), (2, 2))
        and height % stride == width % stride == 0
        and width // stride % _PIXELS == 0
    )


def _fits_weight_gradient(layer: nn.Conv2d, x: Tensor) -> bool:
    """Whether that kernel knows this case: as above, but of stride 1 and any even width."""
    return _usual(layer, x) and layer.stride == (1, 1) and x.shape[3] % 2 == 0


def _usual(layer: nn.Conv2d, x: Tensor) -> bool:
    return (
        x.dtype == torch.bfloat16
        and layer.kernel_size == (3, 3)
        and layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.in_channels % _CHANNELS == layer.out_channels % _CHANNELS == 0
    )


def _input_gradient(layer: nn.Conv2d, x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of x [B, in, H, W] from that of the result [B, out, H', W']."""
    images, channels, height, width = x.shape
    of_x = torch.empty_like(x)
    sizes = _sizes(images, height, width, channels, layer.out_channels, layer.stride[0])
    _call("convolution", "input_gradient", *pointers(gradient, weight, of_x), *sizes, torch.get_num_threads())
    return of_x


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Activations [B, in, H, W] and gradients [B, out, H, W] -> float32 [out, in, 3, 3]."""
    images, channels, height, width = x.shape
    of_weight = torch.empty((gradient.shape[1], channels, 3, 3), dtype=torch.float32, memory_format=torch.channels_last)
    sizes = _sizes(images, height, width, channels, gradient.shape[1])
    _call("weight_gradient", "weight_gradient", *pointers(x, gradient, of_weight), *sizes, torch.get_num_threads())
    return of_weight


def _sizes(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


def _call(name: str, function: str, *arguments: object) -> None:
    getattr(library(name), function)(*arguments)
