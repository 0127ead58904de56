"""MixUp's draws against the Beta law and uniform permutations."""

import pytest
import torch
from scipy.stats import beta, chisquare, kstest

from tailscope.errors import UserError
from tailscope.methods import MIXINGS


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_weights_follow_beta(alpha):
    lam, _ = MIXINGS.make(f"mixup(alpha={alpha})").draw(5000, 1, torch.Generator().manual_seed(1))
    assert kstest(lam.double().numpy(), beta(alpha, alpha).cdf).pvalue > 0.001


def test_partners_are_uniform_permutations():
    _, partner = MIXINGS.make("mixup").draw(12_000, 4, torch.Generator().manual_seed(1))
    codes, times = (partner @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)
    assert len(codes) == 24
    assert chisquare(times.numpy()).pvalue > 0.001


def test_alpha_must_be_positive():
    with pytest.raises(UserError, match="alpha must be positive"):
        MIXINGS.make("mixup(alpha=0)")
