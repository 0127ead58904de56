"""Batch normalisation that compiles well on a CPU."""

import torch
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; compiled on a CPU, mean and variance come from one pass over the activations.

    The compiler's own statistics (Welford's update) do not vectorise well on CPUs. Sums of x and x^2 in float32 do, and
    fuse with what surrounds them; the variance loses digits only where the mean is many standard deviations away from
    zero, which the output of a convolution without bias is not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same, normalised; running statistics move in training mode."""
        if self.training and torch.compiler.is_compiling() and x.device.type == "cpu":
            return self._one_pass(x)
        return super().forward(x)

    def _one_pass(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        values = x.float()
        mean = values.mean((0, 2, 3))
        variance = ((values * values).mean((0, 2, 3)) - mean * mean).clamp(min=0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        with torch.no_grad():
            n = x.numel() // x.shape[1]
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (n / (n - 1)), self.momentum)
        return (values * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)
