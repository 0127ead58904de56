"""What a stage minimises: its loss, with what this asks for, and the weight of each class.

Both stages, every engine and the choice between engines compute it here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailscope.errors import UserError
from tailscope.methods import LOSSES, MIXINGS, WEIGHTS
from tailscope.methods.mixing import Mix, Mixing
from tailscope.seeds import derive, keyed
from tailscope.spec import StageSpec
from tailscope.training.recipes import COMPUTES, require_fitting

NOT_MIXED = Mix()


class Objective:
    """The mean loss of a batch.

    Attributes:
        needs: what the loss asks for (`methods.losses`).
        own: the loss as a module, whose parameters are trained too; an empty one where it has none.
        progress: the share of the training that is done, float32 [].
        branches: how many branches the features come from; with two, the first half of a batch is the batch of the one.
    """

    def __init__(
        self, spec: StageSpec, counts: Sequence[int], feature_dim: int, seed: int, device: torch.device
    ) -> None:
        """Make the loss of a stage on `counts` training images a class; `feature_dim` is the width of the features.

        Raises:
            UserError: the parts of the stage do not fit each other.
        """
        require_fitting(spec)
        self.needs = frozenset(LOSSES.needs(spec.loss))
        per_class = torch.tensor(counts, device=device)
        context = (per_class, feature_dim) if "features" in self.needs else (per_class,)
        with keyed(derive(seed, "loss")):
            self._loss: Any = LOSSES.make(spec.loss, *context)
        self.own = self._loss.to(device) if isinstance(self._loss, nn.Module) else nn.Module()
        self._works_on = next((COMPUTES[need][0] for need in sorted(self.needs) if need in COMPUTES), None)
        self._weights = WEIGHTS.make(spec.weights, per_class) if spec.weights else None
        self._by_batch = bool(spec.weights) and "batch" in WEIGHTS.needs(str(spec.weights))
        self.progress = torch.zeros((), device=device)
        self.branches = spec.branches
        self._moves = spec.weights is not None or "progress" in self.needs or self.branches == 2

    def at(self, progress: float) -> None:
        """Say which share of the training is done before the next step."""
        if self._moves:  # otherwise nobody asks, and each step would launch a kernel for it
            self.progress.fill_(progress)

    def logits(self, last_layer: Any, features: Tensor) -> Tensor:
        """Return what the loss works on, [B, C]: logits, or the cosines or distances that it needs."""
        found: Tensor = getattr(last_layer, self._works_on)(features) if self._works_on else last_layer(features)
        return found

    def weighed(self, features: Tensor) -> Tensor:
        """Return what the last layer sees in training: of two branches 2 alpha f_c beside 2 (1 - alpha) f_r.

        With alpha = 1 - progress^2 (Zhou et al. 2020, equations 1 and 5, the progress by steps and not by epochs). The
        factor 2 is that of the authors' code: in evaluation, where alpha is 1/2, the features are f_c beside f_r.
        """
        if self.branches == 1:
            return features
        first, second = features.chunk(2, 1)
        alpha = self._alpha()
        return 2 * torch.cat([alpha * first, (1 - alpha) * second], 1)

    def _alpha(self) -> Tensor:
        return 1 - self.progress.square()

    def __call__(
        self, logits: Tensor, features: Tensor, labels: Tensor, mix: Mix = NOT_MIXED, weights: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss of a batch from what `logits` returned, features [B, d] and labels [B].

        Of a mixed batch it is the mixture of the two labels' losses (Zhang et al. 2018, equation 1); of two branches,
        with labels [2 B], alpha times that of the first B and 1 - alpha times that of the others (Zhou et al. 2020,
        equation 3). `weights`, like labels, weigh the losses of single images.
        """
        each = partial(self._each, logits, features)
        if self.branches == 2:
            (own, others), (of_own, of_others) = labels.chunk(2), (None, None) if weights is None else weights.chunk(2)
            return (self._alpha() * each(own, of_own) + (1 - self._alpha()) * each(others, of_others)).mean()
        losses = each(labels, weights)
        if mix.labels is not None and mix.partner is not None:
            partners = each(labels[mix.partner], None if weights is None else weights[mix.partner])
            losses = mix.labels * losses + (1 - mix.labels) * partners
        return losses.mean()

    def _each(self, logits: Tensor, features: Tensor, labels: Tensor, of_images: Tensor | None) -> Tensor:
        given = {"features": features.float(), "progress": self.progress}
        losses: Tensor = self._loss(logits, labels, **{k: v for k, v in given.items() if k in self.needs})
        if self._weights is not None:
            weights = self._weights(self.progress)[labels]
            losses = weights * losses / weights.mean() if self._by_batch else weights * losses
        return losses if of_images is None else of_images * losses


def mixing_of(spec: StageSpec, counts: Sequence[int], model: nn.Module) -> Mixing | None:
    """Return the mixing of a stage, if it has one.

    Raises:
        UserError: it mixes activations inside of the network, which has no place for that.
    """
    if spec.mix is None:
        return None
    needs, places = MIXINGS.needs(spec.mix), int(getattr(model, "hidden_places", 0))
    if "hidden" in needs and not places:
        raise UserError(f"mixing {spec.mix}: mixes activations between stages, for which {spec.model} has no place")
    context = {"counts": torch.tensor(counts), "hidden": places}
    return MIXINGS.make(spec.mix, *(value for name, value in context.items() if name in needs))
