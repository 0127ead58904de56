"""ResNet-10 for 224x224 images (Liu et al. 2019): one basic block in each of the four stages of He et al. 2016."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from tailscope.errors import UserError
from tailscope.models import MODELS


class ResNet10(nn.Module):
    """The ImageNet stem and four blocks with 1x, 2x, 4x and 8x `width` channels.

    `forward(x) == classifier(features(x))`; `features` returns the globally average-pooled [B, 8 * width] vectors.
    The names of the layers are torchvision's, apart from the classifier.
    """

    def __init__(self, width: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"model resnet10(width={width}): width must be positive")
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.classifier = nn.Linear(8 * width, num_classes)
        self.feature_dim = 8 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], normalised -> penultimate features [B, 8 * width]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.mean(x, dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], normalised -> logits [B, classes]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == channels:
        return nn.Sequential(BasicBlock(in_channels, channels))
    shortcut = nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))
    return nn.Sequential(BasicBlock(in_channels, channels, stride, shortcut))


@MODELS.register("resnet10")  # type: ignore[arg-type]  # the registry is typed for the CIFAR networks alone
def resnet10(in_channels: int, num_classes: int, /, width: int = 64) -> ResNet10:
    """ResNet-10 for 224x224 images, 512-d features: the paper's ImageNet-LT backbone."""
    return ResNet10(width, in_channels, num_classes)
