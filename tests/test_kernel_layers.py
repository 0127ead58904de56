"""A layer with our kernels: its gradients against float64, and where it has to stand back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tailscope.kernels import batch_norm
from tailscope.kernels.layers import fast_layer, layer
from training_setups import activations

pytestmark = pytest.mark.skipif(not batch_norm.available(), reason="no C++ compiler")


def modules(inputs=16, outputs=16, norm=None, **options):
    torch.manual_seed(0)
    settings = {"kernel_size": 3, "padding": 1, "bias": False} | options
    conv = nn.Conv2d(inputs, outputs, **settings).to(memory_format=torch.channels_last)
    return conv, nn.BatchNorm2d(outputs, **(norm or {}))


def gradients(function, conv, norm, x, shortcut, weights):
    """Return every gradient of a loss in which the two names of the result have weights of their own."""
    leaves = [t for t in (x, shortcut, conv.weight, norm.weight, norm.bias) if t is not None and t.requires_grad]
    outs = function(conv, norm, x, shortcut)
    loss = sum((w * out.double()).sum() for w, out in zip(weights, outs, strict=True) if w is not None)
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


@settings(max_examples=30, deadline=None)
@given(
    stride=st.integers(1, 2),
    inputs=st.sampled_from([3, 16, 32]),
    with_shortcut=st.booleans(),
    used=st.sampled_from(["first", "second", "both"]),
    images_need_none=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_gradients_equal_those_of_pytorch(stride, inputs, with_shortcut, used, images_need_none, seed):
    """In float32, whichever of the two names a loss depends on."""
    x = activations((3, inputs, 6, 6), seed).requires_grad_(not images_need_none)
    size = (3, 16, 6 // stride, 6 // stride)
    shortcut = activations(size, seed + 1).requires_grad_() if with_shortcut else None
    weights = [
        activations(size, seed + n).double() if used in (name, "both") else None
        for n, name in ((2, "first"), (3, "second"))
    ]
    found = gradients(fast_layer, *modules(inputs, stride=stride), x, shortcut, weights)
    exact = gradients(layer, *modules(inputs, stride=stride), x, shortcut, weights)
    for got, want in zip(found, exact, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9


def test_moves_the_running_statistics_and_counts_batches():
    x = activations((4, 16, 6, 6), 0)
    for _ in range(3):
        (conv, ours), (_, theirs) = modules(), modules()
        fast_layer(conv, ours, x)
        layer(conv, theirs, x)
        for name, expected in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], expected, rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == 1


def test_autocast_decides_the_type():
    conv, norm = modules()
    x = activations((4, 16, 6, 6), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, again = fast_layer(conv, norm, x)
        expected, _ = layer(*modules(), x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, again)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_a_result_that_nobody_uses_costs_nothing():
    conv, norm = modules()
    out, _ = fast_layer(conv, norm, activations((4, 16, 6, 6), 0).requires_grad_())
    (out.detach() * conv.weight.sum()).sum().backward()
    assert norm.weight.grad is None


def known(case):
    """Return the modules, x and a shortcut of a case that the kernels do not know."""
    conv, norm = modules(
        outputs=12 if case == "12 channels" else 16,
        norm={"no weights": {"affine": False}, "no running statistics": {"track_running_stats": False}}.get(case),
        **{"bias": {"bias": True}, "padding by name": {"padding": "same"}}.get(case, {}),
    )
    x = activations((1 if case == "one image" else 2, 16, 4, 4), 0)
    shortcut = conv(x).detach()
    if case == "gradients in evaluation":
        norm.eval()
    elif case == "float64":
        conv, norm, x, shortcut = conv.double(), norm.double(), x.double(), shortcut.double()
    elif case == "rows first":
        x = x.contiguous()
    elif case == "mixed types":
        shortcut = shortcut.double()
    return conv, norm, x, shortcut


@pytest.mark.parametrize(
    "case",
    [
        "gradients in evaluation",
        "12 channels",
        "float64",
        "rows first",
        "no weights",
        "mixed types",
        "no running statistics",
        "bias",
        "padding by name",
        "one image",
    ],
)
def test_stands_back_for_what_the_kernels_do_not_know(case, monkeypatch):
    monkeypatch.setattr(batch_norm, "_kernel", lambda *_: pytest.fail("the kernel was used"))
    found, _ = fast_layer(*known(case))
    expected, _ = layer(*known(case))
    assert torch.equal(found, expected)


def test_evaluation_reads_the_running_statistics():
    conv, norm = modules()
    norm.running_mean.normal_()
    x, before = activations((4, 16, 6, 6), 0), norm.running_var.clone()
    norm.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast_layer(conv, norm, x)[0], layer(conv, norm, x)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(norm.running_var, before)
