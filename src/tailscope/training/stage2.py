"""Stage 2: a new linear classifier on features of a frozen backbone."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tailscope.methods import LOSSES
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training.epochs import Epochs, Flat
from tailscope.training.runtime import arithmetic
from tailscope.training.step import sgd

View = tuple[Tensor, Tensor]
"""Features [n, d] and labels int64 [n] of one augmented view of the training data."""


def fit_classifier(
    spec: StageSpec,
    views: Sequence[View],
    counts: Sequence[int],
    seed: int,
    start: tuple[Tensor, Tensor] | None = None,
    label: str = "classifier",
) -> tuple[Tensors, Meta]:
    """Fit softmax regression by SGD; epoch e sees view e modulo the number of views.

    With a frozen backbone in eval mode this equals training the classifier on top of it, at the cost of one extraction
    a view instead of one an epoch and classifier.

    Args:
        spec: the stage; its sampler has been applied when the views were drawn.
        views: the augmented views, all of n samples.
        counts: images per class of the training data, for losses that need them.
        seed: of initialisation and order.
        start: weight [C, d] and bias [C] to start from; None: new random ones.
        label: what messages call this training.

    Returns:
        `weight` float32 [C, d] and `bias` float32 [C], and a description.

    Raises:
        UserError: the training diverged.
    """
    started = time.monotonic()
    n = len(views[0][1])
    epochs = Epochs(spec, n, label)
    with keyed(derive(seed, "classifier")):
        classifier = nn.Linear(views[0][0].shape[1], len(counts))
    if start:
        classifier.load_state_dict(dict(zip(("weight", "bias"), start, strict=True)))
    loss_of = LOSSES.make(spec.loss, torch.tensor(counts))
    optimizer = sgd(classifier, spec.train, spec.train.learning_rate)
    losses = []
    for epoch in range(epochs.number):
        features, labels = views[epoch % len(views)]
        order = torch.randperm(n, generator=torch_stream(seed, "stage2", "order", epoch))
        features, labels = features[order].float(), labels[order]
        epoch_losses = []
        batches = zip(torch.split(features, spec.train.batch), torch.split(labels, spec.train.batch), strict=True)
        for (x, y), rate in zip(batches, epochs.multipliers(epoch), strict=False):
            optimizer.param_groups[0]["lr"] = spec.train.learning_rate * rate
            loss = loss_of(classifier(x), y).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            epoch_losses.append(loss.detach())
        losses.append(epochs.mean_loss(epoch, epoch_losses))
    epochs.require_finite(epochs.number - 1, Flat(classifier.state_dict()))
    meta: Meta = {
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "epochs": epochs.number,
        "steps": epochs.steps,
        "losses": losses,
        "seconds": time.monotonic() - started,
        "bn_mode": spec.bn_mode,
        "arithmetic": arithmetic(torch.device("cpu"), torch.float32),
    }
    return {"weight": classifier.weight.detach(), "bias": classifier.bias.detach()}, meta
