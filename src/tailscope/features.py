"""Features of images under a frozen backbone."""

import torch
from torch import Tensor

from tailscope.models.resnet import CifarResNet
from tailscope.training.runtime import Runtime
from tailscope.training.step import Normalizer

BATCH = 500


def extract(
    model: CifarResNet, images: Tensor, normalize: Normalizer, dtype: torch.dtype, runtime: Runtime, label: str
) -> Tensor:
    """Return the penultimate features of un-augmented or already augmented images.

    The model runs in eval mode: batch normalisation uses its running statistics and does not move.

    Args:
        model: the backbone, on the runtime's device.
        images: uint8 [n, H, W, C].
        normalize: the pixel statistics that the backbone was trained with.
        dtype: of convolutions: float32 for geometry and test accuracy, the training's for stage 2.
        runtime: device and progress.
        label: what progress calls this.

    Returns:
        Features [n, d] on the CPU: float32, or bfloat16 as computed (no bits are lost).
    """
    runtime.progress.safe_point()
    model.eval()
    normalize = normalize.to(runtime.device)
    rows = []
    low = dtype != torch.float32
    with (
        runtime.threads_for(images, BATCH),
        runtime.progress.task(label, len(images)) as advance,
        torch.inference_mode(),
    ):
        for batch in torch.split(images, BATCH):
            x = normalize(batch.to(runtime.device, non_blocking=True))
            with torch.autocast(runtime.device.type, dtype=dtype, enabled=low):
                rows.append(model.features(x).cpu())
            advance(len(batch))
    # Tensors made in inference mode cannot take part in autograd later; a clone outside of it can.
    return torch.cat(rows).clone()
