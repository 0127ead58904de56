"""Limits of the machine: a step's convolutions alone, matrix products, and reading memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.arms.common import CLASSES, fast_dtype, on_device
from benchmarks.workers import Pace
from tailscope.models import MODELS
from tailscope.models.resnet import CifarResNet
from tailscope.training.runtime import keep_freed_memory


@dataclass(frozen=True)
class Convolution:
    """Operands of one convolution's forward and backward; the first of a network needs no gradient of its input."""

    layer: nn.Conv2d
    x: Tensor
    weight: Tensor
    gradient: Tensor
    needs_input_gradient: bool

    def forward(self) -> Tensor:
        """Return the output."""
        return F.conv2d(self.x, self.weight, None, self.layer.stride, self.layer.padding)

    def backward(self) -> None:
        """Compute both gradients."""
        given = (self.gradient, self.x, self.weight, None, self.layer.stride, self.layer.padding)
        mask = [self.needs_input_gradient, True, False]
        torch.ops.aten.convolution_backward(*given, [1, 1], False, [0, 0], 1, mask)


def convolutions_of(network: CifarResNet, batch: int, dtype: torch.dtype, device: torch.device) -> list[Convolution]:
    """Return random operands for every convolution of the network at 32x32, in channels-last layout."""
    shapes: list[tuple[nn.Conv2d, tuple[int, ...], tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        shapes.append((module, tuple(inputs[0].shape[1:]), tuple(output.shape[1:])))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()

    def operand(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last)

    return [
        Convolution(
            layer=module,
            x=operand(batch, *inputs),
            weight=operand(*module.weight.shape),
            gradient=operand(batch, *outputs),
            needs_input_gradient=i > 0,
        )
        for i, (module, inputs, outputs) in enumerate(shapes)
    ]


@torch.no_grad()
def convolutions(pace: Pace, *, batch: int, model: str, device: str) -> None:
    """Run the convolutions and the classifier's product of one step, forward and backward, and nothing else.

    Type, layout and allocator are those of our step. Outputs live until the backward pass, as in a real step.
    """
    keep_freed_memory()
    target, dtype = on_device(pace, device), fast_dtype(device)
    network = MODELS.make(model, 3, CLASSES)
    layers = convolutions_of(network, batch, dtype, target)
    features = torch.randn(batch, network.feature_dim, device=target).to(dtype)
    weight = torch.randn(CLASSES, network.feature_dim, device=target).to(dtype)
    pace.ready()
    while True:
        outputs = [layer.forward() for layer in layers]
        logits = features @ weight.T
        _ = logits @ weight, logits.T @ features
        for layer in reversed(layers):
            layer.backward()
            outputs.pop()
        pace.step(batch)


def matrix_product(pace: Pace, *, size: int, device: str) -> None:
    """Multiply square float32 matrices; items are floating-point operations."""
    target = on_device(pace, device)
    a, b = torch.randn(size, size, device=target), torch.randn(size, size, device=target)
    out = torch.empty_like(a)
    pace.ready()
    while True:
        torch.mm(a, b, out=out)
        pace.step(2 * size**3)


def read_memory(pace: Pace, *, megabytes: int, device: str) -> None:
    """Add up float32 numbers that fit no cache; items are bytes."""
    target = on_device(pace, device)
    numbers = torch.ones(megabytes << 18, device=target)
    pace.ready()
    while True:
        numbers.sum()
        pace.step(megabytes << 20)
