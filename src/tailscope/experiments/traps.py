"""Traps that published long-tailed results fell into, looked for in what a run is about to do, before it trains.

Each function returns a line that says what was found and what would mend it, or None. None of them stops a run: where
something cannot work at all, it is refused elsewhere.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence

from tailscope.data.images import ImageFiles, Images, ImageSet
from tailscope.data.sources import ImageData
from tailscope.spec import StageSpec
from tailscope.training.recipes import RECIPES, Recipe

LONG_FOR_MIXUP = 200
"""Epochs from which published long-tailed results gain by MixUp: 200 (Zhong et al. 2021) to 400 (Zhang et al. 2021)."""

ENOUGH = 20
"""Test images of a class with which an accuracy of 50 % is known to 22 points either way."""

_OFF_BY = 0.02
"""Of the stated imbalance factor: truncation to whole images moves it by less where a class has 50 images."""


def traps(
    data: ImageData, profile: str, counts: Sequence[int], recipe: Recipe, stages: Iterable[StageSpec]
) -> list[str]:
    """Return what a run may trip over, one line each.

    Args:
        data: the whole data set.
        profile: as the user wrote it.
        counts: images of each class of the subset that was drawn by it.
        recipe: how the stages are trained.
        stages: those of the run.
    """
    stages = list(stages)
    found = [*of_data(data), of_profile(profile, counts), of_rate(recipe), *of_samplers(stages)]
    found += [line for stage in stages for line in of_stage(stage)]
    return [line for line in dict.fromkeys(found) if line is not None]


def of_data(data: ImageData) -> Iterator[str]:
    """Yield what is wrong with the division of a data set into training and test images."""
    shared = shared_images(data.train, data.test)
    if shared:
        yield (
            f"{shared:,} of {len(data.test):,} test images are training images too, which may move the test accuracy by"
            f" {100 * shared / len(data.test):.2g} points; take them out of one of the two"
        )
    counts = data.test.counts()
    few = [n for n in counts if n < ENOUGH]
    if few:
        points = 100 * 1.96 * math.sqrt(0.25 / max(1, min(few)))
        yield (
            f"{len(few)} of {len(counts)} classes have fewer than {ENOUGH} test images, the smallest {min(few)}: such"
            f" an accuracy is uncertain by up to {min(100, points):.0f} points either way"
        )


def shared_images(train: Images, test: Images) -> int:
    """Return how many test images are among the training images: by their pixels, or of files by their path."""
    if isinstance(train, ImageSet) and isinstance(test, ImageSet):
        known = set(_digests(train))
        return sum(digest in known for digest in _digests(test))
    if isinstance(train, ImageFiles) and isinstance(test, ImageFiles):
        known_files = set(_files(train))
        return sum(file in known_files for file in _files(test))
    return 0


def _files(images: ImageFiles) -> Iterator[str]:
    """Yield where each image lies, links followed: two lists may name one file by two ways."""
    return (os.path.realpath(images.root / path) for path in images.paths)


def _digests(images: ImageSet) -> Iterator[bytes]:
    return (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.images.numpy())


def of_profile(profile: str, counts: Sequence[int]) -> str | None:
    """Tell where the drawn counts are not of the imbalance factor that a profile states.

    >>> of_profile("exp:100", [142, 30, 1])
    'profile exp:100: the counts run from 142 to 1, a factor of 142, not 100; say that factor, or take more images'
    """
    kind, _, factor = profile.partition(":")
    found = max(counts) / max(1, min(counts))
    if kind not in ("exp", "step") or abs(found / float(factor) - 1) <= _OFF_BY:
        return None
    return (
        f"profile {profile}: the counts run from {max(counts):,} to {min(counts):,}, a factor of {found:.4g}, not"
        f" {factor}; say that factor, or take more images"
    )


def of_rate(recipe: Recipe) -> str | None:
    """Tell where a recipe's batch was changed and its learning rate was not changed with it (Goyal et al. 2017)."""
    base = RECIPES.get(recipe.name.partition("(")[0])
    if base is None or recipe.stage1.batch == base.stage1.batch:
        return None
    scale = recipe.stage1.batch / base.stage1.batch
    wanted = base.stage1.learning_rate * scale
    if 0.5 <= recipe.stage1.learning_rate / wanted <= 2:
        return None
    return (
        f"learning rate {recipe.stage1.learning_rate:g} with batches of {recipe.stage1.batch}: recipe {base.name} has"
        f" {base.stage1.learning_rate:g} for batches of {base.stage1.batch}, so take about {wanted:.2g}"
    )


def of_samplers(stages: Iterable[StageSpec]) -> Iterator[str]:
    """Yield each sampler without effect: all that it draws from, not only the full set, has classes of one size."""
    sizes: dict[str, list[set[int]]] = {}
    for stage in stages:
        sizes.setdefault(stage.sampler, []).append({n for n in stage.data.counts if n})
    for sampler, found in sizes.items():
        if sampler != "instance" and all(len(one) == 1 for one in found):
            images = " or ".join(f"{n:,}" for n in sorted(set.union(*found)))
            yield (
                f"sampler {sampler} takes no effect: every class has {images} images; leave it out, or draw a"
                " long-tailed set by --profile"
            )


def of_stage(stage: StageSpec) -> Iterator[str]:
    """Yield what a stage's parts do not do, or do badly, on its data."""
    epochs = stage.train.lengths(sum(stage.data.counts))[0]
    if stage.mix is not None and stage.mix.startswith("mixup") and epochs < LONG_FOR_MIXUP:
        yield (
            f"MixUp for {epochs} epochs: published gains on long-tailed data come with {LONG_FOR_MIXUP} epochs or more,"
            " shorter training may lose by it"
        )
    if stage.bn_mode == "shifted":
        yield (
            "batch-norm statistics are estimated anew for stage 2 (shifted): the features that its classifier gets are"
            " not those that stage 1 ended with"
        )
