"""A layer of a residual network, relu(norm(conv(x)) + shortcut): written out, and with our kernels on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailscope.kernels import batch_norm, convolution

Twice = tuple[Tensor, Tensor]
"""One activation under two names, for the next convolution and for the next shortcut. Their gradients arrive apart, so
that a kernel can add them up while it reads them."""


def layer(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None = None) -> Twice:
    """Return relu(norm(conv(x)) + shortcut) for activations [B, C, H, W], with PyTorch's own operations."""
    out = norm(conv(x))
    out = F.relu(out if shortcut is None else out + shortcut)
    return out, out


def fast_layer(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None = None) -> Twice:
    """Return what `layer` returns, beyond rounding, with little between the convolutions.

    Activations pass twice through memory forward and twice backward, once in evaluation; arithmetic between them is
    float32, and so is the gradient of the weights. Falls back on `layer` for what the kernels do not know: other types,
    layouts and devices, unusual convolutions, channels that are no multiple of 16, single images, gradients in
    evaluation, and machines without a compiler.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    known = _usual(conv) and batch_norm.fits(norm) and _fits(x, dtype) and (shortcut is None or shortcut.dtype == dtype)
    if not (known and batch_norm.available()):
        return layer(conv, norm, x, shortcut)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    if not norm.training:
        between, _ = convolution.forward(conv, x.to(dtype), _rounded(conv.weight, dtype), totals=False)
        out = batch_norm.evaluate(norm, between, shortcut)
        return out, out
    twice: Twice = _Layer.apply(x.to(dtype), shortcut, conv.weight, norm.weight, norm.bias, conv, norm)
    return twice


def _usual(conv: nn.Conv2d) -> bool:
    return conv.bias is None and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _fits(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.device.type == "cpu"
        and dtype in batch_norm.TYPES
        and x.dim() == 4
        and len(x) > 1  # one value a channel has no variance: PyTorch says so
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, memory_format=torch.channels_last)


class _Layer(torch.autograd.Function):
    """The kernels with their gradient. Keeps the activations, and a result that the next layer keeps in any case."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        offset: Tensor,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
    ) -> Twice:
        rounded = _rounded(weight, x.dtype)
        between, totals = convolution.forward(conv, x, rounded, totals=True)
        out, statistics = batch_norm.train(norm, between, shortcut, totals)
        ctx.save_for_backward(x, rounded, scale, offset, statistics, between, None if shortcut is None else out)
        ctx.conv = conv
        ctx.set_materialize_grads(False)
        return out, out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scale, offset, statistics, between, out = ctx.saved_tensors
        arriving = [g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None]
        of_between, of_shortcut, of_scale, of_offset = batch_norm.gradients(
            scale, offset, statistics, between, out, arriving
        )
        of_x, of_weight = convolution.gradients(ctx.conv, x, weight, of_between, of_x=ctx.needs_input_grad[0])
        return of_x, of_shortcut, of_weight, of_scale, of_offset, None, None
