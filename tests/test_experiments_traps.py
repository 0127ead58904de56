"""Traps: each one laid on purpose is told, and a run without it is told nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from image_trees import photos
from tailscope.data import folders, sources
from tailscope.data.sources import ImageData
from tailscope.errors import UserError
from tailscope.experiments.traps import of_data, of_profile, of_rate, of_samplers, of_stage, shared_images, traps
from tailscope.spec import DataSpec
from tailscope.training.recipes import RECIPES, recipe_by_name
from tailscope.verbs import check


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return sources.load("digits")


def data_spec(counts):
    return DataSpec(
        name="d", fingerprint="0", profile="p", protocol="nested", subset_seed=0, indices_sha256="0", counts=counts
    )


def test_a_clean_run_is_told_nothing(digits):
    recipe = RECIPES["paper"]
    stage = recipe.backbone(data_spec((500, 50, 5)), mix=True)
    balanced = recipe.classifier(data_spec((500, 50, 5)), sampler="class_balanced")
    assert traps(digits, "exp:100", [500, 50, 5], recipe, [stage, balanced]) == []


def test_test_images_that_were_trained_on_are_counted(digits):
    leaky = dataclasses.replace(digits, train=digits.test.take(np.arange(0, len(digits.test), 3)))
    (line,) = of_data(leaky)
    n, share = len(digits.test), 100 * len(leaky.train) / len(digits.test)
    assert line.startswith(f"{len(leaky.train):,} of {n:,} test images are training images too, which may move")
    assert f" by {share:.2g} points;" in line


def test_files_are_the_same_by_their_path(tmp_path):
    photos(tmp_path, [5, 3], split="train")
    images = folders.load_lists(str(tmp_path / "train.txt"), None)["train"]
    (tmp_path / "linked").symlink_to(images.root, target_is_directory=True)
    by_another_way = dataclasses.replace(images, root=tmp_path / "linked").take(np.arange(3))
    assert shared_images(images, by_another_way) == 3
    assert shared_images(images.take(np.arange(4)), images.take(np.arange(4, 8))) == 0


def test_few_test_images_of_a_class_are_told(digits):
    rows = np.concatenate([np.flatnonzero(digits.test.labels.numpy() == k)[: 5 if k == 3 else 30] for k in range(10)])
    (line,) = of_data(dataclasses.replace(digits, test=digits.test.take(rows)))
    # 1.96 times sqrt(1/4 / 5) is 0.438.
    assert line == (
        "1 of 10 classes have fewer than 20 test images, the smallest 5: such an accuracy is uncertain by up to 44"
        " points either way"
    )


@pytest.mark.parametrize(
    ("profile", "counts", "told"),
    [
        ("exp:100", [5000, 500, 50], False),
        ("exp:100", [5000, 500, 83], True),  # the counts of a code base that calls them factor 100
        ("step:10", [99, 9], True),
        ("counts:9,1", [9, 1], False),
        ("balanced", [9, 9], False),
    ],
)
def test_counts_that_are_not_the_stated_factor(profile, counts, told):
    assert (of_profile(profile, counts) is not None) == told


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("imagenet", None),
        ("imagenet(batch=2048)", "so take about 0.8"),
        ("imagenet(batch=2048, learning_rate=0.8)", None),
        ("imagenet(batch=64)", "so take about 0.025"),
        ("paper(learning_rate=0.01)", None),
    ],
)
def test_a_rate_that_does_not_go_with_the_batch(recipe, told):
    line = of_rate(recipe_by_name(recipe))
    assert line is None if told is None else told in line


def test_a_sampler_on_equal_classes_takes_no_effect():
    stage = RECIPES["fast"].classifier(data_spec((40, 40, 0)), sampler="class_balanced")
    (line,) = of_samplers([stage])
    assert line.startswith("sampler class_balanced takes no effect: every class has 40 images")
    unequal = RECIPES["fast"].classifier(data_spec((40, 39)), sampler="class_balanced")
    assert list(of_samplers([unequal])) == []
    assert list(of_samplers([stage, unequal])) == []  # the full set beside the long-tailed one
    assert list(of_samplers([RECIPES["fast"].classifier(data_spec((40, 40)))])) == []


def test_a_sampler_that_the_long_tailed_backbone_needs_is_no_trap(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), np.uint8)
    labels = np.repeat([0, 1], 50)
    arrays = {"train_images": images, "train_labels": labels, "test_images": 255 - images, "test_labels": labels}
    np.savez(tmp_path / "balanced.npz", **arrays)
    given = {"data": str(tmp_path / "balanced.npz"), "recipe": "demo", "sampler": "class_balanced"}
    assert not any("no effect" in line for line in check(**given, profile="exp:10")["traps"])
    assert any("every class has 50 images" in line for line in check(**given, profile="full")["traps"])


def test_mixup_in_a_short_schedule_is_told():
    (line,) = of_stage(RECIPES["fast"].backbone(data_spec((9000, 3000)), mix=True))
    assert line.startswith("MixUp for 32 epochs")


def test_statistics_that_move_are_told():
    (line,) = of_stage(RECIPES["paper"].with_bn_mode("shifted").classifier(data_spec((9, 3))))
    assert line.startswith("batch-norm statistics are estimated anew")


def test_constant_images_of_a_test_set_are_one_image_each(digits):
    blank = dataclasses.replace(digits.train, images=torch.zeros_like(digits.train.images))
    assert shared_images(blank, digits.test) == 0


def test_the_verb_says_what_it_found_and_that_it_found_nothing():
    assert check("digits", recipe="demo")["traps"][0].startswith("profile exp:100: the counts run from 124 to 1")
    assert check("digits", recipe="paper", profile="exp:124") == {"traps": []}


def test_the_verb_takes_what_swap_takes_and_refuses_what_swap_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSCOPE_STORE", str(tmp_path / "store"))
    assert any("MixUp for" in line for line in check("digits", recipe="demo", mix="mixup")["traps"])
    assert check("digits", recipe="demo", augment=["autoaugment"])["traps"]
    with pytest.raises(UserError, match=r"--devices, .* are for images in files"):
        check("digits", recipe="demo", devices=4)
    assert not list(tmp_path.iterdir())
