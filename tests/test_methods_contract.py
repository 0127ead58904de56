"""What every registered method promises; a new entry is checked from the day it is registered."""

import pytest
import torch

from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, SAMPLERS

COUNTS = torch.tensor([40, 12, 5, 1])
LABELS = torch.arange(4).repeat_interleave(COUNTS)
REGISTRIES = [AUGMENTATIONS, LOSSES, MIXINGS, SAMPLERS]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def names(registry):
    return [entry.name for entry in registry]


@pytest.fixture(autouse=True)
def _global_stream_untouched():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_every_entry_has_a_one_line_summary(registry):
    for entry in registry:
        assert entry.summary.endswith((".", ").")), entry.name
        assert registry.canonical(registry.canonical(entry.name)) == registry.canonical(entry.name)


@pytest.mark.parametrize("shape", [(7, 8, 8, 1), (5, 32, 32, 3), (3, 12, 20, 3), (1, 8, 8, 3), (0, 8, 8, 3)], ids=str)
@pytest.mark.parametrize("name", names(AUGMENTATIONS))
def test_augmentation(name, shape):
    augment = AUGMENTATIONS.make(name)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator(1))
    original = images.clone()
    out = augment(images, generator())
    assert (out.dtype, out.shape, out.device) == (images.dtype, images.shape, images.device)
    assert out.is_contiguous()
    assert torch.equal(images, original), "the input was written to"
    assert torch.equal(out, augment(images, generator()))


@pytest.mark.parametrize("name", names(AUGMENTATIONS))
def test_augmentation_depends_on_the_generator(name):
    augment = AUGMENTATIONS.make(name)
    images = torch.randint(256, (64, 8, 8, 3), dtype=torch.uint8, generator=generator(1))
    assert not torch.equal(augment(images, generator(1)), augment(images, generator(2)))


@pytest.mark.parametrize("n", [0, 1, 58, 200])
@pytest.mark.parametrize("name", names(SAMPLERS))
def test_sampler(name, n):
    labels = torch.where(LABELS == 3, 4, LABELS)  # class 3 of 6 is empty, and so is 5
    draw = SAMPLERS.make(name, labels, 6)
    indices = draw(n, generator())
    assert (indices.dtype, indices.shape, indices.device) == (torch.int64, (n,), labels.device)
    assert ((indices >= 0) & (indices < len(labels))).all()
    assert torch.equal(indices, draw(n, generator()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", names(LOSSES))
def test_loss(name, dtype):
    loss = LOSSES.make(name, COUNTS)
    logits = (20 * torch.randn(32, 4, generator=generator())).to(dtype).requires_grad_()
    labels = torch.randint(4, (32,), generator=generator())
    values = loss(logits, labels)
    assert (values.dtype, values.shape, values.device) == (torch.float32, (32,), logits.device)
    assert values.isfinite().all()
    assert torch.equal(values, loss(logits, labels))
    values.mean().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", names(LOSSES))
def test_loss_of_certain_predictions_is_finite(name):
    logits = torch.tensor([[1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0]]).requires_grad_()
    for labels in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        values = LOSSES.make(name, COUNTS)(logits, labels)
        assert values.isfinite().all()
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", names(LOSSES))
def test_loss_allows_classes_without_images(name):
    logits = torch.randn(8, 6, generator=generator()).requires_grad_()
    labels = torch.arange(8) % 4
    values = LOSSES.make(name, torch.tensor([40, 12, 5, 1, 0, 0]))(logits, labels)
    assert values.isfinite().all()
    values.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", names(LOSSES))
def test_loss_compiles_as_one_graph(name):
    loss = LOSSES.make(name, COUNTS)
    logits, labels = torch.randn(8, 4, generator=generator()), torch.arange(8) % 4
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


@pytest.mark.parametrize("name", names(MIXINGS))
def test_mixing(name):
    mixing = MIXINGS.make(name)
    lam, partner = mixing.draw(5, 32, generator())
    assert (lam.dtype, lam.shape, partner.dtype, partner.shape) == (torch.float32, (5,), torch.int64, (5, 32))
    assert ((lam >= 0) & (lam <= 1)).all()
    assert torch.equal(partner.sort(1).values, torch.arange(32).expand(5, 32))
    again = mixing.draw(5, 32, generator())
    assert torch.equal(lam, again[0])
    assert torch.equal(partner, again[1])
    assert not torch.equal(lam, mixing.draw(5, 32, generator(1))[0])
