"""AutoAugment (Cubuk et al. 2019) for whole batches: torchvision's policies and kernels, a draw for every image.

`torchvision.transforms.v2.AutoAugment` draws once a call, so a batch would share one draw. Here every image draws its
own sub-policy, and images with the same operation, magnitude and sign go through torchvision's kernel together. The
pixels are those that torchvision gives each image alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from tailscope.errors import UserError
from tailscope.methods import AUGMENTATIONS

BINS = 10  # magnitudes of an operation, as torchvision's transform has them


class Choices(NamedTuple):
    """What happens to each of n images, in two steps one after the other."""

    sub_policy: torch.Tensor  # int64 [n]
    applied: torch.Tensor  # bool [n, 2]: is the step's operation applied
    negative: torch.Tensor  # bool [n, 2]: is its magnitude negated, where the operation has a sign


class Operation(NamedTuple):
    """One kernel call's settings; the bin is None for an operation without a magnitude."""

    name: str
    bin: int | None
    negative: bool


class BatchedAutoAugment:
    """AutoAugment of uint8 images [n, H, W, C], C = 1 or 3, with draws of its own for every image."""

    def __init__(self, policy: AutoAugmentPolicy, excluded: frozenset[str]) -> None:
        self._reference = AutoAugment(policy)
        sub_policies = self._reference._policies
        space = self._reference._AUGMENTATION_SPACE
        self._probability = torch.tensor([[p for _, p, _ in steps] for steps in sub_policies])
        self._operations: list[Operation] = []
        self._index = torch.full((len(sub_policies), 2, 2), -1)  # of an operation, by sub-policy, step and sign
        for row, steps in enumerate(sub_policies):
            for step, (name, _, magnitude_bin) in enumerate(steps):
                signed = space[name][1]
                for negative in (0, 1) if name.lower() not in excluded else ():
                    operation = Operation(name, magnitude_bin, bool(negative and signed))
                    if operation not in self._operations:
                        self._operations.append(operation)
                    self._index[row, step, negative] = self._operations.index(operation)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw and apply; the images are left as they are and a new tensor is returned."""
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, n: int, generator: torch.Generator) -> Choices:
        """Draw sub-policies, uniformly, and for both steps whether it is applied, and its sign."""
        device = generator.device
        sub_policy = torch.randint(len(self._probability), (n,), generator=generator, device=device)
        uniform = torch.rand(2, n, 2, generator=generator, device=device)
        return Choices(sub_policy, uniform[0] < self._probability.to(device)[sub_policy], uniform[1] < 0.5)

    def apply(self, images: torch.Tensor, choices: Choices) -> torch.Tensor:
        """Return the images after both steps of their choices, which may lie on another device."""
        # The kernels are vectorised for, and their rounding is defined by, contiguous channels-first images.
        out = images.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        index = self._index.to(choices.sub_policy.device)
        for step in (0, 1):
            chosen = index[choices.sub_policy, step, choices.negative[:, step].long()]
            chosen = torch.where(choices.applied[:, step], chosen, -1)
            sizes = torch.bincount(chosen + 1, minlength=len(self._operations) + 1).tolist()
            groups = torch.split(torch.argsort(chosen, stable=True).to(images.device, non_blocking=True), sizes)
            for operation, members in zip(self._operations, groups[1:], strict=True):
                if len(members):
                    out.index_copy_(0, members, self._transform(out.index_select(0, members), operation))
        return out.permute(0, 2, 3, 1).contiguous()

    def _transform(self, images: torch.Tensor, operation: Operation) -> torch.Tensor:
        """Apply one operation to images [n, C, H, W] with torchvision's magnitudes for this size and its kernel."""
        magnitudes = self._reference._AUGMENTATION_SPACE[operation.name][0](BINS, *images.shape[-2:])
        magnitude = 0.0 if operation.bin is None else float(magnitudes[operation.bin])
        if operation.negative:
            magnitude = -magnitude
        result: torch.Tensor = self._reference._apply_image_or_video_transform(
            images, operation.name, magnitude, self._reference.interpolation, self._reference._fill
        )
        return result


@AUGMENTATIONS.register("autoaugment")
def autoaugment(policy: str = "cifar10", exclude: Sequence[str] = ()) -> BatchedAutoAugment:
    """AutoAugment with a draw for every image (Cubuk et al. 2019; torchvision's policies).

    No policy flips images, so only `flip` mirrors them. Some change what a digit or a letter is: `exclude=("invert",)`
    keeps dark and light apart. By torchvision's rule Equalize leaves images of fewer than 256 pixels as they are.

    Args:
        policy: "cifar10", "imagenet" or "svhn".
        exclude: operations that do nothing where the policy names them, by torchvision's names in any case, such as
            "invert", "rotate", "shearx"; all else keeps its probability.

    Raises:
        UserError: an unknown policy or operation.
    """
    policies = {p.value: p for p in AutoAugmentPolicy}
    if policy not in policies:
        raise UserError(f"autoaugment(policy={policy!r}): known policies: {', '.join(policies)}")
    known = [name.lower() for name in AutoAugment._AUGMENTATION_SPACE]
    if isinstance(exclude, str):
        raise UserError(f"autoaugment(exclude={exclude!r}): give a tuple of operations, like ('invert',)")
    for name in exclude:
        if str(name).lower() not in known:
            raise UserError(f"autoaugment(exclude={exclude!r}): unknown {name!r}; known: {', '.join(known)}")
    return BatchedAutoAugment(policies[policy], frozenset(str(name).lower() for name in exclude))
