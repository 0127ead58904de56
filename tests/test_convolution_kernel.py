"""Our convolutions and their gradients, against PyTorch's in float64, and where they have to stand back."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import training_setups
from tailscope.kernels import convolution, fuse
from tailscope.models import MODELS
from training_setups import assert_same_state, digits, stage1_spec, train_stage1

activations = partial(training_setups.activations, dtype=torch.bfloat16)
pytestmark = pytest.mark.skipif(not convolution.available(), reason="no bfloat16 arithmetic, or no C++ compiler")


def layer_of(inputs, outputs, **options):
    torch.manual_seed(inputs + outputs)
    settings = {"kernel_size": 3, "padding": 1, "bias": False} | options
    return nn.Conv2d(inputs, outputs, **settings).to(memory_format=torch.channels_last)


def run(layer, x, gradient):
    """Return the gradients of x and of the weights."""
    weight = layer.weight.detach().to(x.dtype)
    return convolution.gradients(layer, x, weight, gradient, of_x=True)


shapes = {
    "images": st.integers(1, 20),
    "channels": st.tuples(st.sampled_from([16, 32, 48]), st.sampled_from([16, 32, 80])),
    "height": st.integers(1, 9),
    "width": st.sampled_from([2, 4, 8, 16, 24]),
    "stride": st.integers(1, 2),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=60, deadline=None)
@example(images=9, channels=(64, 64), height=8, width=8, stride=1, seed=0)  # more images than are interleaved at a time
@example(images=2, channels=(16, 16), height=40, width=32, stride=1, seed=0)  # one image is more than that
@example(images=1, channels=(16, 16), height=1, width=2, stride=1, seed=0)
@example(images=2, channels=(16, 32), height=6, width=48, stride=2, seed=0)  # three tiles side by side
@given(**shapes)
def test_gradients_equal_those_in_float64(images, channels, height, width, stride, seed):
    inputs, outputs = channels
    x, layer = activations((images, inputs, height, width), seed), layer_of(inputs, outputs, stride=stride)
    exact_x, exact_weight = x.double().requires_grad_(), layer.weight.detach().bfloat16().double().requires_grad_()
    exact = F.conv2d(exact_x, exact_weight, stride=stride, padding=1)
    gradient = activations(exact.shape, seed + 1)
    of_x, of_weight = run(layer, x, gradient)
    exact.backward(gradient.double())
    torch.testing.assert_close(of_x.double(), exact_x.grad, rtol=2e-2, atol=2e-2)
    assert of_x.is_contiguous(memory_format=torch.channels_last)
    assert of_weight.dtype == torch.float32
    scale = exact_weight.grad.abs().max()
    close = {"rtol": 1e-4, "atol": 1e-4} if stride == 1 else {"rtol": 1e-2, "atol": 1e-2}  # PyTorch rounds to bfloat16
    torch.testing.assert_close(of_weight.double() / scale, exact_weight.grad / scale, **close)


def forward(layer, x):
    return convolution.forward(layer, x, layer.weight.detach().to(x.dtype), totals=True)


@settings(max_examples=60, deadline=None)
@example(images=2, channels=(16, 32), height=6, width=48, stride=2, seed=0)  # three tiles side by side
@given(**shapes)
def test_results_and_their_sums_equal_those_in_float64(images, channels, height, width, stride, seed):
    inputs, outputs = channels
    x, layer = activations((images, inputs, height, width), seed), layer_of(inputs, outputs, stride=stride)
    out, totals = forward(layer, x)
    exact = F.conv2d(x.double(), layer.weight.detach().bfloat16().double(), stride=stride, padding=1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)
    assert out.is_contiguous(memory_format=torch.channels_last)
    known = height % stride == 0 and width // stride % 8 == 0
    assert (totals is not None) == known
    if totals is not None:
        wanted = torch.stack([exact.sum((0, 2, 3)), exact.square().sum((0, 2, 3))])
        torch.testing.assert_close(totals.sum(0), wanted, rtol=1e-4, atol=1e-3)


def test_a_mean_far_from_zero_does_not_cancel_the_variance():
    """A channel of the kernel's result is 1,000 plus a little, away from the borders; x and weights are exact."""
    layer, x = layer_of(16, 16), activations((4, 16, 32, 32), 0)
    with torch.no_grad():
        layer.weight.zero_()[:, 0, 1, 1] = 1_000.0
        layer.weight[:, 1, 1, 1] = 1.0
    x[:, 0] = 1.0
    _, totals = forward(layer, x)
    sums, squares = totals.sum(0) / (4 * 32 * 32)
    torch.testing.assert_close(squares - sums**2, x[:, 1].double().var(unbiased=False).expand(16), rtol=1e-4, atol=0)


def test_sums_are_taken_only_where_they_are_wanted():
    layer, x = layer_of(16, 16), activations((2, 16, 8, 8), 0)
    out, totals = convolution.forward(layer, x, layer.weight.detach().bfloat16(), totals=False)
    assert totals is None
    assert torch.equal(out, forward(layer, x)[0])


def test_the_number_of_threads_changes_nothing_but_rounding():
    x, gradient, layer = activations((7, 32, 8, 8), 1), activations((7, 16, 8, 8), 2), layer_of(32, 16)
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for n in (1, 2, 3, 9):  # nine threads: two of them have no image
            torch.set_num_threads(n)
            outcomes.append((*run(layer, x, gradient), forward(layer, x)[0], forward(layer, x)[1].sum(0)))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-4, atol=1e-3)


def test_is_reproducible_to_the_bit():
    x, gradient, layer = activations((7, 32, 8, 8), 1), activations((7, 16, 8, 8), 2), layer_of(32, 16)
    first, second = ((*run(layer, x, gradient), *forward(layer, x)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_diverged_stays_visible(bad):
    x, gradient = activations((2, 16, 4, 4), 0), activations((2, 16, 4, 4), 1)
    gradient[0, 3, 1, 1] = bad
    of_weight = run(layer_of(16, 16), x, gradient)[1]
    assert not of_weight[3].isfinite().any()
    assert of_weight[:3].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_diverged_stays_visible_in_results_and_sums(bad):
    x, layer = activations((2, 16, 8, 8), 0), layer_of(16, 16)
    x[1, 3, 5, 5] = bad
    out, totals = forward(layer, x)
    assert not out[1, :, 4:7, 4:7].isfinite().any()
    assert out[1, :, :4].isfinite().all()
    assert not totals.sum(0).isfinite().any()
    assert not run(layer, x, out)[0][1, :, 5, 5].isfinite().any()


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        ({"stride": 2}, (2, 16, 4, 4), torch.bfloat16),
        ({"kernel_size": 1, "padding": 0}, (2, 16, 4, 4), torch.bfloat16),
        ({"padding": 0}, (2, 16, 4, 4), torch.bfloat16),
        ({"dilation": 2, "padding": 2}, (2, 16, 4, 4), torch.bfloat16),
        ({"groups": 16}, (2, 16, 4, 4), torch.bfloat16),
        ({"stride": (1, 2)}, (2, 16, 8, 16), torch.bfloat16),
        ({"padding": 1, "stride": 3}, (2, 16, 24, 24), torch.bfloat16),
        ({}, (2, 16, 4, 5), torch.bfloat16),
        ({}, (2, 16, 8, 8), torch.float32),
        ({}, (2, 3, 8, 8), torch.bfloat16),
    ],
)
def test_stands_back_for_what_the_kernel_does_not_know(options, shape, dtype, monkeypatch):
    monkeypatch.setattr(convolution, "_call", lambda *_: pytest.fail("the kernel was used"))
    layer, x = layer_of(shape[1], 16, **options).to(dtype), activations(shape, 0, dtype=dtype).requires_grad_()
    out = layer(x)
    assert torch.equal(convolution.forward(layer, x.detach(), layer.weight.detach(), totals=True)[0], out)
    gradient = activations(out.shape, 1, dtype=dtype)
    out.backward(gradient)
    of_x, of_weight = convolution.gradients(layer, x.detach(), layer.weight.detach(), gradient, of_x=True)
    assert torch.equal(of_x, x.grad)
    assert of_weight.dtype == torch.float32
    assert torch.equal(of_weight, layer.weight.grad.float())
    assert convolution.gradients(layer, x.detach(), layer.weight.detach(), gradient, of_x=False)[0] is None


def test_a_network_learns_the_same_with_it(monkeypatch):
    """One step of a network: every gradient is as near to that of float64 as PyTorch's own bfloat16 gradients are."""
    torch.manual_seed(0)
    model = MODELS.make("resnet8(width=16)", 3, 10).to(memory_format=torch.channels_last)
    x, y = torch.randn(32, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(32) % 10

    def gradients(dtype):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            F.cross_entropy(model(x.to(torch.float64 if dtype == torch.float64 else x.dtype)), y).backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    theirs = gradients(torch.bfloat16)
    assert fuse(model)
    used = []
    real = convolution._weight_gradient
    monkeypatch.setattr(convolution, "_weight_gradient", lambda *given: used.append(1) or real(*given))
    ours = gradients(torch.bfloat16)
    assert len(used) == 4  # of six 3x3 convolutions of blocks, two have stride 2
    model.double()
    exact = gradients(torch.float64)
    for name, wanted in exact.items():
        error, their_error = ((found[name] - wanted).norm() / wanted.norm() for found in (ours, theirs))
        assert error < 1.5 * their_error + 0.01, name


def test_a_run_repeats_to_the_bit(tmp_path):
    images = digits()
    spec = stage1_spec(images, model="resnet8(width=16)", steps=6)
    assert_same_state(*(train_stage1(spec, images, tmp_path / name)[0] for name in ("a", "b")))
