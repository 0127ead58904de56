"""What mixings draw, against the laws and rules of their papers."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, chisquare, kstest

from tailscope.errors import UserError
from tailscope.methods import MIXINGS


def draw(call, labels, *context, size=(8, 8), seed=1):
    return MIXINGS.make(call, *context).draw(labels, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_weights_follow_beta(alpha):
    mix = draw(f"mixup(alpha={alpha})", torch.zeros(5000, 1, dtype=torch.int64))
    assert torch.equal(mix.images.flatten(), mix.labels.flatten())
    assert kstest(mix.labels.flatten().double().numpy(), beta(alpha, alpha).cdf).pvalue > 0.001


def test_partners_are_uniform_permutations():
    partner = draw("mixup", torch.zeros(12_000, 4, dtype=torch.int64)).partner
    codes, times = (partner @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)
    assert len(codes) == 24
    assert chisquare(times.numpy()).pvalue > 0.001


@pytest.mark.parametrize(
    ("call", "context", "says"),
    [
        ("mixup(alpha=0)", (), "alpha must be positive"),
        ("remix(alpha=0)", (torch.tensor([1]),), "alpha must be positive"),
        ("remix(kappa=0.5)", (torch.tensor([1]),), "kappa must be at least 1"),
        ("remix(tau=2)", (torch.tensor([1]),), "tau lie in"),
        ("manifold_mixup(alpha=0)", (2,), "alpha must be positive"),
        ("cutmix(alpha=0)", (), "alpha must be positive"),
        ("cutmix(probability=0)", (), "probability must be above 0"),
    ],
)
def test_values_without_a_meaning_are_refused(call, context, says):
    with pytest.raises(UserError, match=says):
        MIXINGS.make(call, *context)


@pytest.mark.parametrize("kappa", [1.0, 3.0])
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 1.0])
def test_remix_labels_by_the_rule_of_its_paper(kappa, tau):
    counts = [90, 30, 29, 1]
    labels = torch.arange(400).view(100, 4) * 7 % 4
    mix = draw(f"remix(kappa={kappa}, tau={tau})", labels, torch.tensor(counts))
    plain = draw("mixup", labels)
    assert torch.equal(mix.images, plain.images)
    assert torch.equal(mix.partner, plain.partner)
    seen = set()
    for step in range(100):
        for i in range(4):
            lam = float(mix.images[step].squeeze())
            n_i, n_j = counts[labels[step, i]], counts[labels[step, mix.partner[step, i]]]
            expected = lam
            if n_i / n_j >= kappa and lam < tau:
                expected = 0.0
            if n_i / n_j <= 1 / kappa and 1 - lam < tau:
                expected = 1.0
            assert float(mix.labels[step, i]) == expected
            seen.add(expected if expected in (0, 1) else "lam")
    assert seen == ({"lam"} if tau == 0 else {0.0, 1.0} if tau == kappa == 1 else {0.0, 1.0, "lam"})


def test_cutmix_weighs_labels_by_the_pixels_that_stay():
    mix = draw("cutmix(alpha=1.0, probability=0.5)", torch.zeros(4000, 2, dtype=torch.int64), size=(10, 6))
    assert mix.images.shape == (4000, 1, 1, 10, 6)
    assert set(mix.images.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mix.labels, mix.images.sum((2, 3, 4)) / 60)
    whole = (mix.labels == 1).float().mean()
    assert 0.5 < whole < 0.65  # one half is left alone, and some boxes are smaller than a pixel
    for own in mix.images[:50, 0, 0] == 1:
        cut = (~own).nonzero()
        if len(cut):  # what is cut is one box
            height, width = (cut.max(0).values - cut.min(0).values + 1).tolist()
            assert height * width == len(cut)


def test_the_boxes_of_cutmix_are_those_of_the_published_code():
    """`rand_bbox` written out, with the same draws."""
    labels, (height, width) = torch.zeros(300, 2, dtype=torch.int64), (32, 20)
    mix = draw("cutmix(probability=1)", labels, size=(height, width))
    stream = np.random.default_rng(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(1))))
    lam, _, (y, x) = stream.beta(1, 1, 300), stream.random(300), stream.random((2, 300))
    for step in range(300):
        cut_height, cut_width = (int(length * np.sqrt(1 - lam[step])) for length in (height, width))
        cy, cx = int(y[step] * height), int(x[step] * width)
        top, bottom = (np.clip(cy + sign * (cut_height // 2), 0, height) for sign in (-1, 1))
        left, right = (np.clip(cx + sign * (cut_width // 2), 0, width) for sign in (-1, 1))
        expected = np.ones((height, width))
        expected[top:bottom, left:right] = 0
        assert np.array_equal(mix.images[step, 0, 0].numpy(), expected)


def test_manifold_mixup_mixes_at_one_place_drawn_uniformly():
    mix = draw("manifold_mixup(alpha=2.0)", torch.zeros(3000, 2, dtype=torch.int64), 2)
    weights = torch.cat([mix.images.view(3000, 1), mix.hidden], 1)
    mixed = weights != 1
    assert (mixed.sum(1) == 1).all()
    assert torch.equal(weights[mixed], mix.labels.flatten())
    assert chisquare(mixed.sum(0).numpy()).pvalue > 0.001
    assert kstest(mix.labels.flatten().double().numpy(), beta(2, 2).cdf).pvalue > 0.001
