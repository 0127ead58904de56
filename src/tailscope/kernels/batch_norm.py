"""ReLU(batch_norm(x) + shortcut): written out, and fused for channels-last activations on the CPU."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailscope.kernels.build import library, pointers

_CHANNELS = 16
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def batch_norm_relu(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Return relu(norm(x) + shortcut) for activations [B, C, H, W], with PyTorch's own operations."""
    out = norm(x)
    return F.relu(out if shortcut is None else out + shortcut)


def fused_batch_norm_relu(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Return what `batch_norm_relu` returns, beyond rounding, reading and writing the activations as little as can be.

    Training takes two passes over the activations forward and two backward, evaluation one, in float32 arithmetic and
    with nothing stored but the result. Falls back on `batch_norm_relu` for what the kernel does not know: gradients
    in evaluation, other types, layouts and devices, channels that are no multiple of 16, and machines without a
    compiler.
    """
    if not (_usual(norm) and _fits(x) and (shortcut is None or shortcut.dtype == x.dtype) and available()):
        return batch_norm_relu(norm, x, shortcut)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    if not norm.training:
        return _evaluate(norm, x, shortcut)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    out: Tensor = _BatchNormReLU.apply(
        x, shortcut, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum
    )
    return out


def available() -> bool:
    """Whether the fused kernel can be used on this machine; compiles it the first time."""
    return library("batch_norm") is not None


def _usual(norm: nn.BatchNorm2d) -> bool:
    learns = norm.training and norm.momentum is not None
    return norm.affine and norm.track_running_stats and (learns or not (norm.training or torch.is_grad_enabled()))


def _fits(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in _NAMES
        and x.shape[1] % _CHANNELS == 0
        and x.numel() > x.shape[1]  # one value a channel has no variance: PyTorch says so
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def _evaluate(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Return the result with the running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    offset = norm.bias - norm.running_mean * scale
    out = torch.empty_like(x)
    _kernel("apply", x)(*pointers(x, shortcut, out, scale, offset), *_size(x), torch.get_num_threads())
    return out


class _BatchNormReLU(torch.autograd.Function):
    """The kernel with its gradient. Keeps x and the result, which the convolutions around it keep in any case."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
    ) -> Tensor:
        out = torch.empty_like(x)
        mean, rstd = torch.empty_like(weight), torch.empty_like(weight)
        _kernel("forward", x)(
            *pointers(x, shortcut, out, weight, bias, running_mean, running_var, mean, rstd),
            *_size(x),
            ctypes.c_float(eps),
            ctypes.c_float(momentum),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, out, weight, mean, rstd)
        ctx.mark_non_differentiable(running_mean, running_var)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, out, weight, mean, rstd = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        of_x = torch.empty_like(x)
        of_shortcut = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(weight)
        _kernel("backward", x)(
            *pointers(gradient, out, x, weight, mean, rstd, of_x, of_shortcut, of_weight, of_bias),
            *_size(x),
            torch.get_num_threads(),
        )
        return of_x, of_shortcut, of_weight, of_bias, None, None, None, None


def _kernel(direction: str, x: Tensor) -> Any:
    return getattr(library("batch_norm"), f"{direction}_{_NAMES[x.dtype]}")


def _size(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """Return rows and channels."""
    return ctypes.c_int64(x.numel() // x.shape[1]), ctypes.c_int64(x.shape[1])
