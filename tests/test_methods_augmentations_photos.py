"""Augmentation of photographs: torchvision's own transforms, seeded for every image; nothing else decides a draw."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from image_trees import photos as draw_photos
from tailscope.data import folders
from tailscope.data.decoding import decode, earlier_draws
from tailscope.data.images import ImageFiles
from tailscope.errors import UserError
from tailscope.methods import augmentations
from tailscope.methods.augmentations import PHOTO_AUGMENTATIONS
from tailscope.seeds import derive, keyed

CALLS = ("resized_crop(size=16)", "color_jitter", "flip")
SEED_OF = partial(derive, 3, "augment", 1)


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def images(tmp_path: Path) -> ImageFiles:
    draw_photos(tmp_path, [5, 3], split="train")
    return folders.load_lists(str(tmp_path / "train.txt"), None)["train"]


def test_training_images_are_torchvisions(image):
    transform = v2.Compose(
        [v2.RandomResizedCrop(16, antialias=True), v2.ColorJitter(0.4, 0.4, 0.4, 0), v2.RandomHorizontalFlip()]
    )
    for seed in range(5):
        with keyed(seed):
            ours = augmentations.training(CALLS)(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            assert np.array_equal(ours.numpy(), np.asarray(transform(image)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA"])
def test_evaluated_images_are_centre_crops_whatever_the_mode(image, mode):
    image = image.convert(mode)
    ours = augmentations.evaluation(("resized_crop(size=28)", "flip"))(image)
    expected = v2.CenterCrop(28)(v2.Resize(32, antialias=True)(image.convert("RGB")))
    assert np.array_equal(ours.numpy(), np.asarray(expected))
    assert augmentations.training(CALLS)(image).shape == (16, 16, 3)


def test_a_key_decides_the_draw_and_leaves_the_global_stream_alone(image):
    transform = augmentations.training(CALLS)

    def draw(seed: int) -> bytes:
        with keyed(seed):
            return transform(image).numpy().tobytes()

    before = torch.get_rng_state()
    assert len({draw(seed) for seed in range(20)}) == 20
    assert draw(7) == draw(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_photograph_augmentation_has_a_summary_and_works_as_it_is(image):
    for entry in PHOTO_AUGMENTATIONS:
        assert entry.summary.endswith((".", ").")), entry.name
        assert isinstance(PHOTO_AUGMENTATIONS.make(entry.name)(image), Image.Image)


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        (("flip",), "the first must be resized_crop"),
        (("resized_crop", "crop"), "unknown photograph augmentation 'crop'; known: autoaugment_imagenet, color_jitter"),
        (("resized_crop(size=7)",), "size must be at least 8"),
        (("resized_crop", "color_jitter(hue=0.9)"), "color_jitter: "),
    ],
)
def test_augmentations_that_cannot_be(calls, says):
    with pytest.raises(UserError, match=says):
        augmentations.training(calls)


@given(st.lists(st.integers(0, 5), max_size=30))
def test_earlier_draws_count(rows):
    assert earlier_draws(np.array(rows, dtype=np.int64)).tolist() == [rows[:i].count(r) for i, r in enumerate(rows)]


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning", "ignore:This DataLoader will create")
def test_neither_workers_nor_batches_nor_places_change_a_draw(images):
    def decoded(batches: list[list[int]], repeats: list[list[int]], workers: int) -> dict[tuple[str, int], bytes]:
        loader = decode(
            images, augmentations.training(CALLS), batches, workers=workers, seed_of=SEED_OF, repeats=repeats
        )
        return {
            (images.ids[row], again): image.numpy().tobytes()
            for batch, repeat in zip(loader, repeats, strict=True)
            for image, row, again in zip(batch.images, batch.rows.tolist(), repeat, strict=True)
        }

    first = decoded([[0, 1, 2, 3], [4, 1, 1, 7]], [[0, 0, 0, 0], [0, 1, 2, 0]], workers=0)
    assert len(set(first.values())) == len(first) == 8  # an image that is drawn again is augmented anew
    assert decoded([[7, 1], [1, 4], [1, 0], [3, 2]], [[0, 1], [2, 0], [0, 0], [0, 0]], workers=2) == first
    part = images.take([3, 2, 1, 0])  # a subset, in another order
    alone = decode(part, augmentations.training(CALLS), [[0, 3]], workers=0, seed_of=SEED_OF)
    assert [image.numpy().tobytes() for image in next(iter(alone)).images] == [
        first[images.ids[3], 0],
        first[images.ids[0], 0],
    ]
