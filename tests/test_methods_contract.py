"""What every registered method promises; a new entry is checked from the day it is registered."""

from dataclasses import replace

import pytest
import torch

from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, SAMPLERS, WEIGHTS
from tailscope.networks import LAST_LAYERS
from tailscope.networks.last_layers import as_linear, computes_cosines
from test_training_resume import Interrupting, Stopped, stop
from training_setups import CPU, assert_same_state, digits, made_loss, stage1_spec, train_stage1

COUNTS = torch.tensor([40, 12, 5, 1])
LABELS = torch.arange(4).repeat_interleave(COUNTS)
REGISTRIES = [AUGMENTATIONS, LOSSES, WEIGHTS, MIXINGS, SAMPLERS, LAST_LAYERS]


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
    for progress in [(0.0,), (0.99,)] if "progress" in SAMPLERS.needs(name) else [()]:
        indices = draw(n, generator(), *progress)
        assert (indices.dtype, indices.shape, indices.device) == (torch.int64, (n,), labels.device)
        assert ((indices >= 0) & (indices < len(labels))).all()
        assert torch.equal(indices, draw(n, generator(), *progress))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", names(LOSSES))
def test_loss(name, dtype):
    loss = made_loss(name, COUNTS)
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
        values = made_loss(name, COUNTS)(logits, labels)
        assert values.isfinite().all()
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", names(LOSSES))
def test_loss_allows_classes_without_images(name):
    logits = torch.randn(8, 6, generator=generator()).requires_grad_()
    labels = torch.arange(8) % 4
    values = made_loss(name, torch.tensor([40, 12, 5, 1, 0, 0]))(logits, labels)
    assert values.isfinite().all()
    values.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", names(LOSSES))
def test_loss_compiles_as_one_graph(name):
    loss = made_loss(name, COUNTS)
    logits, labels = torch.randn(8, 4, generator=generator()), torch.arange(8) % 4
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


@pytest.mark.parametrize("name", names(WEIGHTS))
def test_class_weights(name):
    weights = WEIGHTS.make(name, torch.tensor([40, 12, 5, 1, 0]))
    for progress in (0.0, 0.5, 0.99):
        found = weights(torch.tensor(progress))
        assert (found.dtype, found.shape) == (torch.float32, (5,))
        assert ((found >= 0) & found.isfinite()).all()
        assert float(found[:4].mean()) == pytest.approx(1)
        assert torch.equal(WEIGHTS.make(name, torch.full((5,), 9))(torch.tensor(progress)), torch.ones(5))


def mixing_context(name):
    context = {"counts": COUNTS, "hidden": 2}
    return [value for need, value in context.items() if need in MIXINGS.needs(name)]


@pytest.mark.parametrize("name", names(MIXINGS))
def test_mixing(name):
    mixing = MIXINGS.make(name, *mixing_context(name))
    labels = torch.randint(4, (9, 32), generator=generator(2))
    mix = mixing.draw(labels, (6, 8), generator())
    shapes = {"images": (9, 32, 3, 6, 8), "labels": (9, 32), "partner": (9, 32), "hidden": (9, 2)}
    for part, tensor in mix._asdict().items():
        if tensor is not None:
            assert tensor.dtype == (torch.int64 if part == "partner" else torch.float32)
            assert len(tensor) == 9, "a step is the first dimension"
            assert tensor.expand(shapes[part]).shape == shapes[part]
            assert part == "partner" or ((tensor >= 0) & (tensor <= 1)).all()
    assert mix.labels is not None
    assert mix.partner.shape == (9, 32)
    assert ((mix.partner >= 0) & (mix.partner < 32)).all()
    again, other = (mixing.draw(labels, (6, 8), generator(seed)) for seed in (0, 1))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(mix, again, strict=True))
    assert not torch.equal(mix.labels, other.labels)
    assert [None if t is None else t.shape for t in mix] == [None if t is None else t.shape for t in other]


@pytest.mark.parametrize("name", names(LAST_LAYERS))
def test_last_layer(name):
    with torch.random.fork_rng():
        made = torch.nn.Linear(6, 4)
    layer = LAST_LAYERS.make(name, made)
    features = 5 * torch.randn(50, 6, generator=generator())
    logits = layer(features)
    assert (logits.shape, logits.dtype) == ((50, 4), torch.float32)
    weight, bias = as_linear(layer)
    assert (weight.dtype, weight.shape, bias.shape) == (torch.float32, (4, 6), (4,))
    assert torch.equal((features @ weight.T + bias).argmax(1), logits.argmax(1))
    if computes_cosines(name):
        assert layer.cosines(features).abs().max() <= 1 + 1e-6


def everything():
    for field, registry in {"loss": LOSSES, "weights": WEIGHTS, "mix": MIXINGS, "sampler": SAMPLERS}.items():
        for name in names(registry):
            cosine = registry is LOSSES and "cosine" in LOSSES.needs(name)
            changes = {field: name, **({"last_layer": "cosine"} if cosine else {})}
            yield pytest.param(changes, id=f"{field} {name}")
    yield from (pytest.param({"last_layer": name}, id=f"last layer {name}") for name in names(LAST_LAYERS))


@pytest.mark.parametrize("changes", list(everything()))
def test_every_default_trains_and_resumes_to_the_bit(changes, tmp_path):
    images = digits(80)  # a short batch an epoch
    spec = stage1_spec(images, steps=4, model="resnet8(width=4)", **changes)
    whole, meta = train_stage1(spec, images, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_stage1(spec, images, tmp_path / "cut", runtime=replace(CPU, progress=Interrupting(3, stop)))
    resumed, again = train_stage1(spec, images, tmp_path / "cut")
    assert_same_state(whole, resumed)
    assert again["losses"] == meta["losses"]
