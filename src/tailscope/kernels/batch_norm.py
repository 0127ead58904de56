"""relu(batch_norm(x) + shortcut) and its gradients in one go, for channels-last activations on the CPU."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from tailscope.kernels.build import library, pointers

_CHANNELS = 16  # how many are handled together
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
TYPES = tuple(_NAMES)


def available() -> bool:
    """Whether the kernel can be used on this machine; compiles it the first time."""
    return library("batch_norm") is not None


def fits(norm: nn.BatchNorm2d) -> bool:
    """Whether the kernel knows this layer, in its present mode."""
    usual = norm.affine and norm.track_running_stats and norm.num_features % _CHANNELS == 0
    # In evaluation there is no gradient.
    return usual and (norm.momentum is not None if norm.training else not torch.is_grad_enabled())


def evaluate(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Return relu(norm(x) + shortcut) with the running statistics; reads activations [B, C, H, W] once."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    offset = norm.bias - norm.running_mean * scale
    out = torch.empty_like(x)
    _kernel("apply", x)(*pointers(x, shortcut, out, scale, offset), *_size(x), torch.get_num_threads())
    return out


def train(
    norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, totals: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return relu(norm(x) + shortcut) with the batch's statistics, and these; move the running ones.

    Reads activations [B, C, H, W] twice, and once with `totals`. The statistics are float32 [2, C], means and inverse
    standard deviations.

    Args:
        norm: the layer.
        x: what is normalised.
        shortcut: what is added, if anything.
        totals: float64 [parts, 2, C], sums and sums of squares over parts of x, where whoever made x has them.
    """
    assert norm.momentum is not None
    out, statistics = torch.empty_like(x), torch.empty((2, norm.num_features))
    _kernel("forward", x)(
        *pointers(x, shortcut, out, norm.weight, norm.bias, norm.running_mean, norm.running_var),
        *pointers(norm.num_batches_tracked, statistics, totals),
        ctypes.c_int64(0 if totals is None else len(totals)),
        *_size(x),
        ctypes.c_float(norm.eps),
        ctypes.c_float(norm.momentum),
        torch.get_num_threads(),
    )
    return out, statistics


def gradients(
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    x: Tensor,
    out: Tensor | None,
    arriving: list[Tensor],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of x, of the shortcut, of weight and of bias.

    Args:
        weight: float32 [C].
        bias: float32 [C].
        statistics: what `train` returned.
        x: what `train` was given, [B, C, H, W].
        out: what `train` returned; None where there was no shortcut.
        arriving: one or two gradients [B, C, H, W], which are added up on the way.
    """
    of_x = torch.empty_like(x)
    of_shortcut = None if out is None else torch.empty_like(x)
    of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
    first, second = (*arriving, None)[:2]
    _kernel("backward", x)(
        *pointers(first, second, out, x, weight, bias, statistics, of_x, of_shortcut, of_weight, of_bias),
        *_size(x),
        torch.get_num_threads(),
    )
    return of_x, of_shortcut, of_weight, of_bias


def _kernel(direction: str, x: Tensor) -> Any:
    return getattr(library("batch_norm"), f"{direction}_{_NAMES[x.dtype]}")


def _size(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """Return rows and channels."""
    return ctypes.c_int64(x.numel() // x.shape[1]), ctypes.c_int64(x.shape[1])
