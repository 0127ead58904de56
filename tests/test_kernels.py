"""The fused batch norm against PyTorch's in float64, and where it has to stand back."""

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tailscope.kernels import batch_norm, build
from tailscope.kernels.batch_norm import fused_batch_norm_relu
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1

pytestmark = pytest.mark.skipif(not batch_norm.available(), reason="no C++ compiler")


def activations(shape, seed, dtype=torch.float32, mean=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    return x.to(dtype).to(memory_format=torch.channels_last)


def norm_of(channels, seed=0):
    norm = nn.BatchNorm2d(channels)
    stream = torch.Generator().manual_seed(seed)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data = torch.rand(channels, generator=stream) + 0.5
    return norm


def run(function, norm, x, shortcut, gradient):
    """Return the result, gradients of x, shortcut, weight and bias, and the running statistics."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    shortcut = None if shortcut is None else shortcut.detach().clone(memory_format=torch.preserve_format)
    shortcut = None if shortcut is None else shortcut.requires_grad_()
    out = function(norm, x, shortcut)
    out.backward(gradient)
    grads = [x.grad, None if shortcut is None else shortcut.grad, norm.weight.grad, norm.bias.grad]
    return out.detach(), [g for g in grads if g is not None], [norm.running_mean, norm.running_var]


def masked_reference(norm, x, shortcut, gradient, out):
    """The written-out operation in float64, with the kinks of ReLU where the kernel's result has them."""
    norm = norm.double()
    norm.weight.grad = norm.bias.grad = None

    def function(norm, x, shortcut):
        z = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
        return (z if shortcut is None else z + shortcut) * (out.double() > 0)

    return run(function, norm, x.double(), None if shortcut is None else shortcut.double(), gradient.double())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 5), st.sampled_from([16, 32, 48, 64, 128, 160]), st.integers(3, 9), st.integers(3, 9)
    ),
    with_shortcut=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mean=st.sampled_from([0.0, -3.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_written_out_operation_in_float64(shape, with_shortcut, dtype, mean, seed):
    x = activations(shape, seed, dtype, mean)
    shortcut = activations(shape, seed + 1, dtype) if with_shortcut else None
    gradient = activations(shape, seed + 2, dtype)
    found, gradients, running = run(fused_batch_norm_relu, norm_of(shape[1]), x, shortcut, gradient)
    expected, exact, exact_running = masked_reference(norm_of(shape[1]), x, shortcut, gradient, found)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), expected.clamp(min=0), **close)
    for got, want in zip(gradients, exact, strict=True):
        scale = float(want.abs().max()) or 1.0
        torch.testing.assert_close(got.double() / scale, want / scale, **close)
    for got, want in zip(running, exact_running, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([16, 32, 64, 80]), st.integers(1, 5), st.integers(1, 5)),
    with_shortcut=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_evaluation_equals_the_written_out_operation(shape, with_shortcut, dtype, seed):
    x, norm = activations(shape, seed, dtype), norm_of(shape[1]).eval()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    shortcut = activations(shape, seed + 1, dtype) if with_shortcut else None
    with torch.no_grad():
        found = fused_batch_norm_relu(norm, x, shortcut)
        exact = norm.double()(x.double())
    exact = F.relu(exact if shortcut is None else exact + shortcut.double())
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), exact, **close)
    assert found.dtype == dtype
    assert all(torch.equal(before[name], tensor.to(before[name])) for name, tensor in norm.state_dict().items())


def test_a_mean_far_from_zero_does_not_cancel_the_variance():
    x = activations((16, 16, 32, 32), 0, mean=1_000.0)
    norm = norm_of(16)
    fused_batch_norm_relu(norm, x)
    variance = x.double().var(dim=(0, 2, 3))
    torch.testing.assert_close(
        norm.running_var.double(), 0.9 * norm_of(16).running_var + 0.1 * variance, rtol=1e-5, atol=0
    )


def test_the_number_of_threads_changes_nothing_but_rounding():
    x, gradient = activations((8, 32, 16, 16), 1), activations((8, 32, 16, 16), 2)
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outcomes.append(run(fused_batch_norm_relu, norm_of(32), x, x, gradient))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-5, atol=1e-4)


def test_is_reproducible_to_the_bit():
    x, gradient = activations((8, 32, 16, 16), 1, torch.bfloat16), activations((8, 32, 16, 16), 2, torch.bfloat16)
    first, second = (run(fused_batch_norm_relu, norm_of(32), x, x, gradient) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_diverged_stays_visible(bad):
    x = activations((2, 16, 4, 4), 0)
    x[0, 3, 0, 0] = bad
    assert fused_batch_norm_relu(norm_of(16), x)[:, 3].isnan().all()


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
    ],
)
def test_stands_back_for_what_the_kernel_does_not_know(case, monkeypatch):
    monkeypatch.setattr(batch_norm, "_kernel", lambda *_: pytest.fail("the kernel was used"))
    channels = 12 if case == "12 channels" else 16
    x, norm = activations((2, channels, 4, 4), 0), norm_of(channels)
    shortcut = x.double() if case == "mixed types" else x
    if case == "gradients in evaluation":
        norm.eval()
    elif case == "float64":
        x, norm, shortcut = x.double(), norm.double(), x.double()
    elif case == "rows first":
        x = x.contiguous()
    elif case == "no weights":
        norm = nn.BatchNorm2d(16, affine=False)
    elif case == "no running statistics":
        norm = nn.BatchNorm2d(16, track_running_stats=False)
    out = fused_batch_norm_relu(norm, x, shortcut)
    assert out.shape == x.shape


def test_training_is_the_same_without_the_kernel(tmp_path, monkeypatch):
    """In float32; and the kernel was used, else this would compare PyTorch with itself."""
    images = digits()
    spec = stage1_spec(images, model="resnet8(width=16)", steps=20, train={"learning_rate": 0.02})
    state, fused = train_stage1(spec, images, tmp_path / "fused")
    monkeypatch.setattr(batch_norm, "available", lambda: False)
    plain_state, plain = train_stage1(spec, images, tmp_path / "plain")
    assert (fused["fused"], plain["fused"]) == (True, False)
    assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert fused["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-5)
    assert fused["losses"] != plain["losses"]
    assert state.keys() == plain_state.keys()
    for name, expected in plain_state.items():
        torch.testing.assert_close(state[name], expected, rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_fused_run_repeats_to_the_bit(tmp_path):
    images = digits()
    spec = stage1_spec(images, model="resnet8(width=16)", steps=6)
    assert_same_state(*(train_stage1(spec, images, tmp_path / name)[0] for name in ("a", "b")))


def test_without_a_compiler_training_goes_on(tmp_path, monkeypatch):
    build.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        assert not batch_norm.available()
        _, meta = train_stage1(stage1_spec(digits(), steps=2), digits(), tmp_path)
        assert meta["fused"] is False
        assert CPU.should_compile(10) is False
    finally:
        build.library.cache_clear()


def test_a_compiler_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\necho broken >&2\n[ "$1" = --version ]\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    try:
        assert build.library("batch_norm") is None
        assert "training will be slower" in caplog.text
        assert "broken failed" in caplog.text
        assert list((tmp_path / "cache" / "tailscope").iterdir()) == []
    finally:
        build.library.cache_clear()


def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: commands.append(command) or real(command, **options)
    )
    for _ in range(2):
        build.library.cache_clear()
        assert build.library("batch_norm") is not None
    build.library.cache_clear()
    assert sum("-c" in command for command in commands) == 1
    assert [file.suffix for file in (tmp_path / "tailscope").iterdir()] == [".so"]
