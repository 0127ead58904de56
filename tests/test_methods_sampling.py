"""Samplers against the frequencies they promise."""

import pytest
import torch
from scipy.stats import chisquare

from tailscope.errors import UserError
from tailscope.methods import SAMPLERS

COUNTS = torch.tensor([100, 0, 25, 9, 1, 0])
LABELS = torch.arange(6).repeat_interleave(COUNTS)[torch.randperm(135, generator=torch.Generator().manual_seed(0))]
NONEMPTY = COUNTS[COUNTS > 0].double()


def draw(name, n, seed=0):
    return SAMPLERS.make(name, LABELS, 6)(n, torch.Generator().manual_seed(seed))


def test_instance_is_successive_permutations():
    indices = draw("instance", 300)
    everything = torch.arange(135)
    assert torch.equal(indices[:135].sort().values, everything)
    assert torch.equal(indices[135:270].sort().values, everything)
    assert len(indices[270:].unique()) == 30
    assert not torch.equal(indices[:135], indices[135:270])


@pytest.mark.parametrize(("name", "power"), [("class_balanced", 0.0), ("square_root", 0.5), ("reverse", -1.0)])
def test_classes_and_images_have_the_promised_frequencies(name, power):
    n = 100_000
    indices = draw(name, n)
    share = NONEMPTY**power / (NONEMPTY**power).sum()
    drawn = torch.bincount(LABELS[indices], minlength=6)
    assert drawn[COUNTS == 0].sum() == 0
    assert chisquare(drawn[COUNTS > 0].numpy(), (n * share).numpy()).pvalue > 0.001
    per_image = torch.bincount(indices, minlength=135)
    for k in torch.nonzero(COUNTS).flatten():
        times = per_image[LABELS.eq(k)]
        assert (times > 0).all()
        assert len(times) == 1 or chisquare(times.numpy()).pvalue > 0.001


def test_effective_numbers_weigh_each_image_by_its_class():
    n, beta = 100_000, 0.95
    drawn = torch.bincount(LABELS[draw(f"effective_number(beta={beta})", n)], minlength=6)[COUNTS > 0]
    weight = torch.tensor([size * (1 - beta) / (1 - beta ** float(size)) for size in NONEMPTY.tolist()])
    assert chisquare(drawn.numpy(), (n * weight / weight.sum()).numpy()).pvalue > 0.001
    with pytest.raises(UserError, match=r"effective_number\(beta=1.0\): beta must lie in \[0, 1\)"):
        draw("effective_number(beta=1)", 1)


def test_class_aware_takes_turns():
    indices = draw("class_aware", 4 * 27)
    rounds = LABELS[indices].reshape(27, 4)
    assert torch.equal(rounds.sort(1).values, torch.tensor([0, 2, 3, 4]).expand(27, 4))
    assert len({tuple(row) for row in rounds.tolist()}) > 10  # each round in an order of its own
    for k, size in ((0, 100), (2, 25), (3, 9), (4, 1)):
        mine = indices[LABELS[indices] == k]
        for start in range(0, 27, size):
            turn = mine[start : start + size]
            assert len(turn.unique()) == len(turn)


def test_deferred_sampling_is_one_sampler_before_its_start_and_another_from_then_on():
    deferred = SAMPLERS.make("drs(start=0.5, then='square_root')", LABELS, 6)
    for progress, name in ((0.0, "instance"), (0.499, "instance"), (0.5, "square_root"), (0.9, "square_root")):
        assert torch.equal(deferred(300, torch.Generator().manual_seed(0), progress), draw(name, 300))


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.9, 1.0])
def test_progressive_sampling_goes_from_images_to_classes(progress):
    n = 50_000
    indices = SAMPLERS.make("progressive", LABELS, 6)(n, torch.Generator().manual_seed(0), progress)
    share = (1 - progress) * NONEMPTY / 135 + progress / 4
    drawn = torch.bincount(LABELS[indices], minlength=6)
    assert drawn[COUNTS == 0].sum() == 0
    assert chisquare(drawn[COUNTS > 0].numpy(), (n * share).numpy()).pvalue > 0.001
    for k in torch.nonzero(COUNTS > 1).flatten():
        times = torch.bincount(indices, minlength=135)[LABELS.eq(k)]
        assert chisquare(times.numpy()).pvalue > 0.001


@pytest.mark.parametrize("call", ["drs(start=1)", "drs(then='drs')", "drs(then='none of them')"])
def test_what_deferred_sampling_cannot_do_is_refused(call):
    with pytest.raises(UserError):
        SAMPLERS.make(call, LABELS, 6)
