"""AutoAugment of batches against torchvision's own transform, one image at a time."""

import itertools

import pytest
import torch
from scipy.stats import chisquare
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide

from tailscope.errors import UserError
from tailscope.methods.augmentations import Choices, autoaugment, autoaugment_filled, rand_augment, trivial_augment

POLICIES = [policy.value for policy in AutoAugmentPolicy]
SHAPES = [(32, 32, 3), (8, 8, 1), (13, 9, 3)]


def every_draw():
    """All sub-policies x applied or not x both signs, in both steps: each operation, magnitude and sign occurs."""
    rows = list(itertools.product(range(25), *[(False, True)] * 4))
    table = torch.tensor(rows)
    return Choices(table[:, 0], table[:, 1:3].bool(), table[:, 3:5].bool())


def torchvision_on_one_image(transform, image, choices, i, monkeypatch):
    """Run torchvision's transform on image [H, W, C] with its random numbers replaced by draw i."""
    space = transform._AUGMENTATION_SPACE
    steps = transform._policies[int(choices.sub_policy[i])]
    uniform = []
    for step, (name, _, _) in enumerate(steps):
        uniform.append(0.0 if choices.applied[i, step] else 2.0)
        if choices.applied[i, step] and space[name][1]:
            uniform.append(0.0 if choices.negative[i, step] else 1.0)
    numbers = iter(uniform)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_: choices.sub_policy[i])
        patch.setattr(torch, "rand", lambda *_: torch.tensor(next(numbers)))
        out = transform(image.permute(2, 0, 1).contiguous())
    assert next(numbers, None) is None, "the draws were not used up"
    return out.permute(1, 2, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_draw_equals_torchvision_bit_for_bit(policy, shape, monkeypatch):
    choices = every_draw()
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (len(choices.sub_policy), *shape), dtype=torch.uint8, generator=stream)
    images[::2] = images[::2] // 3 + 40  # low contrast as well: otherwise autocontrast does nothing
    out = autoaugment(policy).apply(images, choices)
    transform = AutoAugment(AutoAugmentPolicy(policy))
    expected = torch.stack(
        [torchvision_on_one_image(transform, images[i], choices, i, monkeypatch) for i in range(len(images))]
    )
    assert torch.equal(out, expected)
    untouched = ~choices.applied.any(1)
    assert torch.equal(out[untouched], images[untouched])
    assert (out != images).flatten(1).any(1).float().mean() > 0.4  # a quarter of the draws apply nothing


def test_a_fill_shows_where_a_shift_uncovers_pixels():
    images = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    choices = Choices(torch.tensor([21]), torch.tensor([[True, False]]), torch.tensor([[False, False]]))
    out = autoaugment_filled(fill=77).apply(images, choices)
    uncovered = int(150 / 331 * 32)
    assert (out[0, :uncovered] == 77).all()
    assert (out[0, uncovered:] == 255).all()


CASES = {
    "rand_augment": (rand_augment(2, 9), RandAugment(2, 9), 1),
    "trivial_augment": (trivial_augment(), TrivialAugmentWide(), 31),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_random_operations_equal_torchvisions_on_each_image(name, shape):
    augment, transform, bins = CASES[name]
    space = list(transform._AUGMENTATION_SPACE.items())
    drawn = torch.tensor(list(itertools.product(range(len(space)), range(bins), (0, 1)))).T[:, :, None]
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (drawn.shape[1], *shape), dtype=torch.uint8, generator=stream)
    out = augment.apply(images, drawn)
    for i, (operation, at, negative) in enumerate(drawn[:, :, 0].T.tolist()):
        kind, (magnitudes, signed) = space[operation]
        values = magnitudes(31, *shape[:2])
        magnitude = 0.0 if values is None else float(values[at if bins > 1 else 9])
        expected = transform._apply_image_or_video_transform(
            images[i].permute(2, 0, 1).contiguous(),
            kind,
            -magnitude if signed and negative else magnitude,
            transform.interpolation,
            transform._fill,
        )
        assert torch.equal(out[i], expected.permute(1, 2, 0)), (kind, magnitude)


@pytest.mark.parametrize("name", CASES)
def test_random_operations_are_drawn_uniformly(name):
    augment, transform, bins = CASES[name]
    operation, at, negative = augment.draw(20_000, torch.Generator().manual_seed(0))
    kinds = len(transform._AUGMENTATION_SPACE)
    cells = (operation * bins + at) * 2 + negative
    assert chisquare(torch.bincount(cells.flatten(), minlength=kinds * bins * 2).numpy()).pvalue > 0.001
    if operation.shape[1] == 2:  # the two steps know nothing of each other
        pairs = operation[:, 0] * kinds + operation[:, 1]
        assert chisquare(torch.bincount(pairs, minlength=kinds**2).numpy()).pvalue > 0.001


def test_draws_have_the_published_probabilities():
    choices = autoaugment().draw(200_000, torch.Generator().manual_seed(0))
    assert chisquare(torch.bincount(choices.sub_policy, minlength=25).numpy()).pvalue > 0.001
    assert chisquare(torch.bincount(choices.negative.long() @ torch.tensor([2, 1])).numpy()).pvalue > 0.001
    for k, steps in enumerate(AutoAugment(AutoAugmentPolicy.CIFAR10)._policies):
        rows = choices.applied[choices.sub_policy == k].long()
        observed = torch.bincount(rows @ torch.tensor([2, 1]), minlength=4).double()
        p, q = (probability for _, probability, _ in steps)
        expected = len(rows) * torch.tensor([(1 - p) * (1 - q), (1 - p) * q, p * (1 - q), p * q], dtype=torch.float64)
        assert observed[expected == 0].sum() == 0
        assert chisquare(observed[expected > 0].numpy(), expected[expected > 0].numpy()).pvalue > 1e-4


def test_magnitudes_follow_the_image_size():
    image = torch.full((1, 331, 331, 1), 255, dtype=torch.uint8)
    choices = Choices(torch.tensor([21]), torch.tensor([[True, False]]), torch.tensor([[False, False]]))
    out = autoaugment().apply(image, choices)  # sub-policy 21 begins with TranslateY at its largest: 150 of 331 rows
    assert (out[0, :150] == 0).all()
    assert (out[0, 150:] == 255).all()


def test_excluded_operations_do_nothing_and_others_stay():
    choices = every_draw()
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(256, (len(choices.sub_policy), 8, 8, 1), dtype=torch.uint8, generator=stream)
    only_first = choices._replace(applied=choices.applied & torch.tensor([True, False]))
    out = autoaugment(exclude=("invert",)).apply(images, only_first)
    inverts = choices.sub_policy == 0  # (Invert, Contrast)
    assert torch.equal(out[inverts], images[inverts])
    assert torch.equal(out[~inverts], autoaugment().apply(images, only_first)[~inverts])
    everything = tuple(AutoAugment._AUGMENTATION_SPACE)
    assert torch.equal(autoaugment(exclude=everything).apply(images, choices), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "cifar"}, "unknown policy 'cifar'; did you mean 'cifar10'\\? known: imagenet, cifar10, svhn"),
        ({"exclude": "invert"}, r"give a tuple of operations, like \('invert',\)"),
        ({"exclude": ("hflip",)}, "unknown operation 'hflip'; known: shearx"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        autoaugment(**arguments)


@pytest.mark.parametrize("call", [lambda: rand_augment(0), lambda: rand_augment(2, 31)])
def test_mistakes_in_rand_augment_are_named(call):
    with pytest.raises(UserError, match=r"num_ops must be positive and magnitude lie in 0 \.\.\. 30"):
        call()


def test_torchvision_still_has_the_parts_we_use():
    """The tables and the dispatch are private in torchvision: this fails first if a release moves them."""
    transform = AutoAugment(AutoAugmentPolicy.CIFAR10)
    assert len(transform._policies) == 25
    assert transform._policies[1] == (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9))
    magnitudes, signed = transform._AUGMENTATION_SPACE["Rotate"]
    assert signed
    assert magnitudes(10, 32, 32).tolist() == pytest.approx([30 * k / 9 for k in range(10)])
    image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    out = transform._apply_image_or_video_transform(image, "Invert", 0.0, transform.interpolation, transform._fill)
    assert (out == 255).all()
