"""Losses for long-tailed classification.

A factory takes the training counts (int64 [C], on the device of the logits) and returns `loss(logits, labels)`:
logits [B, C] of any float type, labels int64 [B], result float32 [B]. Nothing is reduced: the mean, MixUp's weights
and any other weighting happen in the caller. All arithmetic is in float32.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.nn.functional import cross_entropy as softmax_cross_entropy

from tailscope.registry import Registry

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register("cross_entropy")
def cross_entropy(counts: torch.Tensor, /) -> Loss:
    """Softmax cross-entropy, -log p_y."""

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return softmax_cross_entropy(logits.float(), labels, reduction="none")

    return loss
