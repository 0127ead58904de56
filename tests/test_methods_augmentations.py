"""Crop and flip against loops over images, and the law of their draws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from tailscope.errors import UserError
from tailscope.methods import AUGMENTATIONS
from tailscope.methods.augmentations import build, crop, cutout, flip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 4), st.integers(0, 99))
def test_each_crop_is_a_window_of_the_zero_padded_image(height, width, channels, padding, seed):
    images = torch.randint(1, 256, (5, height, width, channels), dtype=torch.uint8, generator=generator(seed))
    out = crop(padding)(images, generator(seed))
    for image, got in zip(images.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape)[:, :, 0]
        assert (windows == got).all((2, 3, 4)).any()


def test_crop_offsets_are_uniform_and_independent():
    images = torch.zeros(60_000, 9, 9, 1, dtype=torch.uint8)
    images[:, 4, 4] = 1  # one bright pixel shows the offset
    where = crop(2)(images, generator())[..., 0].flatten(1).float().argmax(1)
    offsets = torch.bincount((where // 9 - 2) * 5 + where % 9 - 2, minlength=25)
    assert len(offsets) == 25
    assert chisquare(offsets.numpy()).pvalue > 0.001


def test_flip_mirrors_half_of_the_images():
    images = torch.randint(256, (10_000, 4, 6, 3), dtype=torch.uint8, generator=generator())
    out = flip()(images, generator())
    mirrored = (out == images.flip(2)).flatten(1).all(1)
    assert (mirrored ^ (out == images).flatten(1).all(1)).all()
    assert binomtest(int(mirrored.sum()), 10_000).pvalue > 0.001


@given(st.integers(2, 12), st.integers(2, 12), st.floats(0.05, 1), st.integers(0, 255), st.integers(0, 99))
def test_cutout_paints_one_square_around_some_pixel(height, width, share, fill, seed):
    images = torch.randint(256, (4, height, width, 3), dtype=torch.uint8, generator=generator(seed))
    out = cutout(share, fill)(images, generator(seed))
    half = max(1, int(np.round(share * min(height, width))) // 2)
    for image, got in zip(images.numpy(), out.numpy(), strict=True):
        possible = []
        for y in range(height):
            for x in range(width):
                painted = image.copy()
                painted[max(0, y - half) : y + half, max(0, x - half) : x + half] = fill
                possible.append(painted)
        assert any((got == painted).all() for painted in possible)


def test_the_centres_of_cutout_are_uniform():
    painted = (cutout(0.25, fill=1)(torch.zeros(50_000, 8, 8, 1, dtype=torch.uint8), generator())[..., 0] > 0).flatten(
        1
    )
    # Two by two pixels before and at the centre: its last row and column tell it.
    last = 63 - painted.flip(1).float().argmax(1)
    assert chisquare(torch.bincount(last, minlength=64).numpy()).pvalue > 0.001


def test_build_applies_in_order_on_one_stream():
    images = torch.randint(256, (20, 8, 8, 3), dtype=torch.uint8, generator=generator())
    stream = generator(3)
    expected = flip()(crop(2)(images, stream), stream)
    assert torch.equal(build(["crop(2)", "flip"])(images, generator(3)), expected)
    assert torch.equal(build([])(images, generator()), images)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="padding must be 0 or more"):
        AUGMENTATIONS.make("crop(padding=-1)")
    with pytest.raises(UserError, match=r"cutout\(share=0.0, fill=0\): share must lie in \(0, 1\]"):
        AUGMENTATIONS.make("cutout(share=0)")
    with pytest.raises(UserError, match="unknown augmentation 'cutoff'; did you mean 'cutout'"):
        build(["crop", "cutoff"])
