"""Stage 2: a new linear classifier on features of a frozen backbone."""

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tailscope.methods import LOSSES
from tailscope.seeds import derive, torch_stream
from tailscope.spec import StageSpec
from tailscope.store import Meta, Tensors
from tailscope.training.runtime import arithmetic
from tailscope.training.schedules import SCHEDULES

View = tuple[Tensor, Tensor]
"""Features [n, d] and labels int64 [n] of one augmented view of the training data."""


def fit_classifier(
    spec: StageSpec,
    views: Sequence[View],
    counts: Sequence[int],
    seed: int,
    start: tuple[Tensor, Tensor] | None = None,
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

    Returns:
        `weight` float32 [C, d] and `bias` float32 [C], and a description.
    """
    started = time.monotonic()
    n = len(views[0][1])
    epochs, steps = spec.train.lengths(n)
    per_epoch = -(-n // spec.train.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "classifier"))
        classifier = nn.Linear(views[0][0].shape[1], len(counts))
    if start:
        classifier.load_state_dict(dict(zip(("weight", "bias"), start, strict=True)))
    loss_of = LOSSES.make(spec.loss, torch.tensor(counts))
    optimizer = torch.optim.SGD(
        classifier.parameters(),
        lr=spec.train.learning_rate,
        momentum=spec.train.momentum,
        nesterov=spec.train.nesterov,
        weight_decay=spec.train.weight_decay,
        fused=True,
    )
    multipliers = iter(SCHEDULES.make(spec.train.schedule, steps, per_epoch))
    losses = []
    for epoch in range(epochs):
        features, labels = views[epoch % len(views)]
        order = torch.randperm(n, generator=torch_stream(seed, "stage2", "order", epoch))
        features, labels = features[order].float(), labels[order]
        epoch_losses = []
        batches = zip(torch.split(features, spec.train.batch), torch.split(labels, spec.train.batch), strict=True)
        for (x, y), rate in zip(batches, itertools.islice(multipliers, per_epoch), strict=False):
            optimizer.param_groups[0]["lr"] = spec.train.learning_rate * rate
            loss = loss_of(classifier(x), y).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            epoch_losses.append(loss.detach())
        losses.append(float(torch.stack(epoch_losses).mean()))
    meta: Meta = {
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "losses": losses,
        "seconds": time.monotonic() - started,
        "bn_mode": spec.bn_mode,
        "arithmetic": arithmetic(torch.device("cpu"), torch.float32),
    }
    return {"weight": classifier.weight.detach(), "bias": classifier.bias.detach()}, meta
