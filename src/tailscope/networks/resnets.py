"""Residual networks for CIFAR with option-A shortcuts (He et al. 2016, section 4.2), for 8x8 images and photographs.

ResNet-10 for 224x224 images (Liu et al. 2019) has one basic block in each of the four stages of He et al. 2016.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, conv1x1

from tailscope.errors import UserError
from tailscope.networks import MODELS
from tailscope.networks.norm_act import NormAct

Between = Callable[[int, Tensor], Tensor]
"""What becomes of the activations [B, C, H, W] between two stages of a network, by the place's number."""


def _unchanged(place: int, activations: Tensor) -> Tensor:
    return activations


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels with zeros (option A: no parameters)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = NormAct(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = NormAct(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]."""
        out: Tensor = self.bn1(self.conv1(x))
        if self.stride != 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        out = self.bn2(self.conv2(out), x)
        return out


class CifarResNet(nn.Module):
    """A residual network of depth 6n+2: three stages of n blocks with 1x, 2x and 4x `width` channels.

    `forward(x) == classifier(features(x))`; `features` returns the globally average-pooled [B, 4 * width] vectors.
    """

    hidden_places = 2
    last_stage = "layer3"

    def __init__(self, depth: int, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"depth {depth} is not 6n+2")
        if width < 1:
            raise UserError(f"model resnet{depth}(width={width}): width must be positive")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = NormAct(width)
        self.layer1 = _stage(blocks, width, width, 1)
        self.layer2 = _stage(blocks, width, 2 * width, 2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2)
        self.classifier: nn.Module = nn.Linear(4 * width, num_classes)
        self.feature_dim = 4 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: Tensor, between: Between = _unchanged) -> Tensor:
        """Images [B, C, H, W], normalised -> penultimate features [B, 4 * width]."""
        out = self.layer1(self.bn1(self.conv1(x)))
        out = self.layer3(between(1, self.layer2(between(0, out))))
        pooled: Tensor = out.mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], normalised -> logits [B, classes]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = CifarBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(blocks - 1)))


class TwoBranches(nn.Module):
    """Two blocks side by side, whose channels [B, 2 C, H, W] come after each other, the first block's first.

    In training a batch [2 B, ...] is two of B: the first block sees the first one, the second block the second.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        """Take in the two blocks."""
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """[2 B, in, H, W] in training, [B, in, H, W] in evaluation -> [B, 2 C, H', W']."""
        own, others = x.chunk(2) if self.training else (x, x)
        return torch.cat([self.first(own), self.second(others)], 1)


def add_branch(model: Any, other: Any, call: str) -> None:
    """Let a network end in two branches that share all but the last residual block, as in BBN (Zhou et al. 2020).

    The second block and its part of the classifier's weights are those of `other`, which is made like `model`. Features
    are those of both branches, and the classifier adds up W_c f_c and W_r f_r. What is before the branches normalises
    the two batches of a step together, where the authors' code shows it one after the other.

    Raises:
        UserError: the network, `call`, does not say which is its `last_stage`: the name of a sequence of blocks.
    """
    stages = [getattr(one, getattr(one, "last_stage", ""), None) for one in (model, other)]
    layers = [one.classifier for one in (model, other)]
    first, second = stages
    if not (isinstance(first, nn.Sequential) and isinstance(second, nn.Sequential)):
        raise UserError(
            f"model {call}: cannot end in two branches: it does not say which of its stages is the last (`last_stage`)"
        )
    first[-1] = TwoBranches(first[-1], second[-1])
    weight = torch.cat([layer.weight.detach() for layer in layers], 1)
    classifier = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(layers[0].bias)
    model.classifier, model.feature_dim = classifier, weight.shape[1]


@MODELS.register("resnet20")
def resnet20(in_channels: int, num_classes: int, /, width: int = 16) -> CifarResNet:
    """ResNet-20 for 32x32 images, 64-d features."""
    return CifarResNet(20, width, in_channels, num_classes)


@MODELS.register("resnet32")
def resnet32(in_channels: int, num_classes: int, /, width: int = 16) -> CifarResNet:
    """ResNet-32 for 32x32 images, 64-d features: the paper's CIFAR backbone."""
    return CifarResNet(32, width, in_channels, num_classes)


@MODELS.register("resnet44")
def resnet44(in_channels: int, num_classes: int, /, width: int = 16) -> CifarResNet:
    """ResNet-44 for 32x32 images, 64-d features."""
    return CifarResNet(44, width, in_channels, num_classes)


@MODELS.register("resnet56")
def resnet56(in_channels: int, num_classes: int, /, width: int = 16) -> CifarResNet:
    """ResNet-56 for 32x32 images, 64-d features."""
    return CifarResNet(56, width, in_channels, num_classes)


@MODELS.register("resnet8")
def resnet8(in_channels: int, num_classes: int, /, width: int = 8) -> CifarResNet:
    """ResNet-8, a tiny network for 8x8 images (digits), 32-d features."""
    return CifarResNet(8, width, in_channels, num_classes)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters.

    >>> count_parameters(MODELS.make("resnet32", 3, 10))
    464154
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class ResNet10(nn.Module):
    """The ImageNet stem and four blocks with 1x, 2x, 4x and 8x `width` channels.

    `forward(x) == classifier(features(x))`; `features` returns the globally average-pooled [B, 8 * width] vectors.
    The names of the layers are torchvision's, apart from the classifier.
    """

    hidden_places = 3
    last_stage = "layer4"

    def __init__(self, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"model resnet10(width={width}): width must be positive")
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _photo_stage(width, width, 1)
        self.layer2 = _photo_stage(width, 2 * width, 2)
        self.layer3 = _photo_stage(2 * width, 4 * width, 2)
        self.layer4 = _photo_stage(4 * width, 8 * width, 2)
        self.classifier: nn.Module = nn.Linear(8 * width, num_classes)
        self.feature_dim = 8 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor, between: Between = _unchanged) -> Tensor:
        """Images [B, C, H, W], normalised -> penultimate features [B, 8 * width]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(between(0, self.layer1(x)))
        x = self.layer4(between(2, self.layer3(between(1, x))))
        return torch.mean(x, dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], normalised -> logits [B, classes]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def _photo_stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == channels:
        return nn.Sequential(BasicBlock(in_channels, channels))
    shortcut = nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))
    return nn.Sequential(BasicBlock(in_channels, channels, stride, shortcut))


@MODELS.register("resnet10")  # type: ignore[arg-type]  # the registry is typed for the CIFAR networks alone
def resnet10(in_channels: int, num_classes: int, /, width: int = 64) -> ResNet10:
    """ResNet-10 for 224x224 images, 512-d features: the paper's ImageNet-LT backbone."""
    return ResNet10(width, in_channels, num_classes)
