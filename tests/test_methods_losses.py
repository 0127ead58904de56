"""Losses against their formulas, written out in double precision one sample at a time."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn.functional import binary_cross_entropy_with_logits

from tailscope.errors import UserError
from tailscope.methods import LOSSES, WEIGHTS
from tailscope.methods.mixing import Mix
from tailscope.training.objective import Objective
from test_methods_feature_losses import CASES as ON_FEATURES
from training_setups import digits, made_loss, stage1_spec

COUNTS = [500, 60, 60, 7, 1]
TOTAL = sum(COUNTS)
LOGITS = 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 5


def cross_entropy(z, y):
    return -math.log(softmax(z)[y])


def smoothed(z, targets):
    return -sum(t * math.log(p) for t, p in zip(targets, softmax(z), strict=True))


def focal(z, y, gamma):
    p = softmax(z)[y]
    return -((1 - p) ** gamma) * math.log(p)


def class_balanced(z, y, beta):
    weights = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return weights[y] * len(COUNTS) / sum(weights) * cross_entropy(z, y)


def logit_adjusted(z, y, tau):
    return cross_entropy([v + tau * math.log(n / TOTAL) for v, n in zip(z, COUNTS, strict=True)], y)


def ldam(z, y, max_margin, scale):
    margins = [n**-0.25 for n in COUNTS]
    margin = max_margin * margins[y] / max(margins)
    return cross_entropy([scale * (v - margin * (k == y)) for k, v in enumerate(z)], y)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def sigmoid_focal(z, y, gamma):
    right = [sigmoid(v if k == y else -v) for k, v in enumerate(z)]
    return sum(-((1 - p) ** gamma) * math.log(p) for p in right)


def class_balanced_focal(z, y, beta, gamma):
    weights = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return weights[y] * len(COUNTS) / sum(weights) * sigmoid_focal(z, y, gamma)


def equalization(z, y, gamma, threshold):
    return sparing(z, y, gamma, [n / TOTAL < threshold for n in COUNTS])


def sparing(z, y, gamma, rare):
    def weight(k):
        return 1 - gamma if rare[k] and k != y else 1

    return -math.log(math.exp(z[y]) / sum(weight(k) * math.exp(v) for k, v in enumerate(z)))


def label_smoothing(z, y, epsilon):
    return smoothed(z, [(1 - epsilon) * (k == y) + epsilon / 5 for k in range(5)])


def label_aware_smoothing(z, y, head, tail):
    e = tail + (head - tail) * math.sin(math.pi * (COUNTS[y] - 1) / (2 * (500 - 1)))
    return smoothed(z, [1 - e if k == y else e / 4 for k in range(5)])


CASES = [
    ("cross_entropy", cross_entropy),
    ("focal", lambda z, y: focal(z, y, 2)),
    ("focal(gamma=0.5)", lambda z, y: focal(z, y, 0.5)),
    ("class_balanced", lambda z, y: class_balanced(z, y, 0.9999)),
    ("class_balanced(beta=0.9)", lambda z, y: class_balanced(z, y, 0.9)),
    ("class_balanced(beta=0)", cross_entropy),
    ("balanced_softmax", lambda z, y: cross_entropy([v + math.log(n) for v, n in zip(z, COUNTS, strict=True)], y)),
    ("logit_adjustment(tau=1.5)", lambda z, y: logit_adjusted(z, y, 1.5)),
    ("ldam", lambda z, y: ldam(z, y, 0.5, 30)),
    ("ldam(max_margin=0.3, scale=2)", lambda z, y: ldam(z, y, 0.3, 2)),
    ("equalization", lambda z, y: equalization(z, y, 0.95, 0.003)),
    ("equalization(gamma=0.5, threshold=0.05)", lambda z, y: equalization(z, y, 0.5, 0.05)),
    ("equalization_tail", lambda z, y: sparing(z, y, 0.95, [False, False, False, True, True])),  # 8 of 628 images
    # The classes of 60 share a place: they have 128 of 628 images with those that are rarer, 20.4 %.
    ("equalization_tail(tail_ratio=0.2)", lambda z, y: sparing(z, y, 0.95, [False, False, False, True, True])),
    ("equalization_tail(tail_ratio=0.21)", lambda z, y: sparing(z, y, 0.95, [False, True, True, True, True])),
    ("equalization_tail(tail_ratio=0)", cross_entropy),
    ("sigmoid_focal", lambda z, y: sigmoid_focal(z, y, 2)),
    ("sigmoid_focal(gamma=0.5)", lambda z, y: sigmoid_focal(z, y, 0.5)),
    ("class_balanced_focal", lambda z, y: class_balanced_focal(z, y, 0.9999, 1)),
    ("class_balanced_focal(beta=0.9, gamma=2)", lambda z, y: class_balanced_focal(z, y, 0.9, 2)),
    ("class_balanced_sigmoid", lambda z, y: class_balanced_focal(z, y, 0.9999, 0)),
    ("label_smoothing", lambda z, y: label_smoothing(z, y, 0.1)),
    ("label_aware_smoothing", lambda z, y: label_aware_smoothing(z, y, 0.4, 0.1)),
]


@pytest.mark.parametrize(("call", "formula"), CASES, ids=[call for call, _ in CASES])
def test_loss_is_its_formula(call, formula):
    got = LOSSES.make(call, torch.tensor(COUNTS))(LOGITS, LABELS)
    expected = [formula(z, y) for z, y in zip(LOGITS.double().tolist(), LABELS.tolist(), strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=2e-6)


def test_every_loss_has_a_formula_here():
    written = {call.split("(")[0] for call, _ in [*CASES, *ON_FEATURES]}
    assert written == {entry.name for entry in LOSSES if entry.plugin is None}


def test_bfloat16_logits_lose_nothing_but_their_own_rounding():
    for entry in LOSSES:
        loss = made_loss(entry.name, torch.tensor(COUNTS))
        rounded = LOGITS.bfloat16()
        assert torch.equal(loss(rounded, LABELS), loss(rounded.float(), LABELS)), entry.name


def test_equal_counts_turn_the_counted_losses_into_cross_entropy():
    counts = torch.full((5,), 30)
    expected = LOSSES.make("cross_entropy", counts)(LOGITS, LABELS)
    for call in (
        *("class_balanced", "balanced_softmax", "equalization", "label_aware_smoothing(tail=0.0)"),
        *("logit_adjustment(tau=1.5)", "equalization_tail", "equalization_tail(tail_ratio=0.99)"),
    ):
        torch.testing.assert_close(LOSSES.make(call, counts)(LOGITS, LABELS), expected)
    margins = LOSSES.make("ldam(max_margin=0.3, scale=2)", counts)(LOGITS / 10, LABELS)
    torch.testing.assert_close(margins, LOSSES.make("cosface(margin=0.3, scale=2)", counts)(LOGITS / 10, LABELS))


def test_equal_counts_turn_sigmoid_losses_into_binary_cross_entropies():
    counts = torch.full((5,), 30)
    targets = torch.eye(5)[LABELS]
    expected = binary_cross_entropy_with_logits(LOGITS, targets, reduction="none").sum(1)
    for call in ("class_balanced_sigmoid", "class_balanced_focal(gamma=0)", "sigmoid_focal(gamma=0)"):
        torch.testing.assert_close(LOSSES.make(call, counts)(LOGITS, LABELS), expected)


def test_the_default_tail_of_cifar_10_lt_is_its_rarest_classes():
    """Where the threshold 0.003, of `equalization`, is below every class's share."""
    counts = torch.tensor([int(5000 * 0.01 ** (k / 9)) for k in range(10)])
    logits, labels = torch.zeros(10, 10), torch.arange(10)
    plain = LOSSES.make("cross_entropy", counts)(logits, labels)
    assert torch.equal(LOSSES.make("equalization", counts)(logits, labels), plain)
    spared = 10 - LOSSES.make("equalization_tail", counts)(logits, labels)[0].exp()
    assert round(float(spared) / 0.95) == 5  # 50 + 83 + 139 + 232 + 387 of 12,406 images are 7.2 %, 1,536 are 12.4 %


@pytest.mark.parametrize(
    "call",
    [
        "focal(gamma=-1)",
        "class_balanced(beta=1)",
        "logit_adjustment(tau=-1)",
        "ldam(scale=0)",
        "ldam(max_margin=-1)",
        "equalization(gamma=1)",
        "equalization_tail(gamma=1)",
        "equalization_tail(tail_ratio=1)",
        "sigmoid_focal(gamma=-1)",
        "class_balanced_focal(beta=1)",
        "label_smoothing(epsilon=2)",
        "label_aware_smoothing(head=0.1, tail=0.2)",
    ],
)
def test_hyperparameters_out_of_range_are_named(call):
    with pytest.raises(UserError, match=call.split("(")[0]):
        LOSSES.make(call, torch.tensor(COUNTS))


def effective(beta):
    return [(1 - beta) / (1 - beta**n) for n in COUNTS]


@pytest.mark.parametrize(
    ("call", "raw", "start"),
    [
        ("drw", effective(0.9999), 0.8),
        ("drw(start=0.5, beta=0.9)", effective(0.9), 0.5),
        ("effective_number(beta=0.99)", effective(0.99), 0.0),
        ("inverse", [1 / n for n in COUNTS], 0.0),
        ("inverse(power=0.5)", [n**-0.5 for n in COUNTS], 0.0),
    ],
)
def test_class_weights_are_their_formula_from_their_start_on(call, raw, start):
    named = call if "(" in call else f"{call}()"
    over_classes = WEIGHTS.make(call, torch.tensor(COUNTS))
    separator = "" if named.endswith("()") else ", "
    over_images = WEIGHTS.make(f"{named[:-1]}{separator}mean_over='images')", torch.tensor(COUNTS))
    per_image = sum(n * w for n, w in zip(COUNTS, raw, strict=True)) / TOTAL
    for progress in (0.0, start - 0.001, start, 0.999):
        at = torch.tensor(progress)
        if progress < start:
            assert torch.equal(over_classes(at), torch.ones(5))
            assert torch.equal(over_images(at), torch.ones(5))
        else:
            np.testing.assert_allclose(over_classes(at).numpy(), np.array(raw) * 5 / sum(raw), rtol=1e-6)
            np.testing.assert_allclose(over_images(at).numpy(), np.array(raw) / per_image, rtol=1e-6)


def test_weights_by_the_effective_number_make_cross_entropy_the_class_balanced_loss():
    counts = torch.tensor(COUNTS)
    weights = WEIGHTS.make("effective_number(beta=0.99)", counts)(torch.tensor(0.0))
    weighted = weights[LABELS] * LOSSES.make("cross_entropy", counts)(LOGITS, LABELS)
    torch.testing.assert_close(weighted, LOSSES.make("class_balanced(beta=0.99)", counts)(LOGITS, LABELS))


def test_weights_over_the_batchs_mean_are_pytorchs_weighted_cross_entropy():
    images = digits()
    weights = torch.tensor([(1 - 0.99) / (1 - 0.99**n) for n in images.counts()])
    spec = stage1_spec(images, weights="batch_mean(of='effective_number(beta=0.99)')")
    objective = Objective(spec, images.counts(), 32, 0, torch.device("cpu"))
    logits, labels = torch.randn(60, 10, generator=torch.Generator().manual_seed(0)), images.labels[:60]
    published = torch.nn.functional.cross_entropy(logits, labels, weight=weights)
    torch.testing.assert_close(objective(logits, torch.zeros(60, 32), labels), published)
    partner = torch.arange(60).flip(0)
    mixed = objective(logits, torch.zeros(60, 32), labels, Mix(labels=torch.tensor([0.3]), partner=partner))
    other = torch.nn.functional.cross_entropy(logits, labels.flip(0), weight=weights)
    torch.testing.assert_close(mixed, 0.3 * published + 0.7 * other)


@pytest.mark.parametrize(
    "call",
    [
        "batch_mean(of='batch_mean')",
        "batch_mean(of='none of them')",
        "drw(start=1)",
        "drw(beta=1)",
        "drw(mean_over='batch')",
        "inverse(mean_over='')",
    ],
)
def test_class_weights_without_a_meaning_are_refused(call):
    with pytest.raises(UserError):
        WEIGHTS.make(call, torch.tensor(COUNTS))
