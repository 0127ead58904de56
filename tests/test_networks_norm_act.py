"""Batch norm, shortcut and ReLU in one kernel, against PyTorch's in float64, and where it has to stand back."""

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tailscope.networks import MODELS, norm_act
from tailscope.networks.norm_act import NormAct
from training_setups import activations, assert_same_state, digits, stage1_spec, train_stage1

pytestmark = pytest.mark.skipif(not norm_act.available(), reason="no C++ compiler")


def norm_of(channels, seed=0, **options):
    norm = NormAct(channels, **options)
    stream = torch.Generator().manual_seed(seed)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None:
            tensor.data = torch.rand(channels, generator=stream) + 0.5
    return norm


def run(norm, x, shortcut, arriving):
    """Return the result, gradients of x, shortcut, weight and bias, and the running statistics."""
    leaves = [t for t in (x, shortcut) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    out = norm(x, shortcut)
    gradients = torch.autograd.grad(out, [*leaves, norm.weight, norm.bias], arriving)
    return out.detach(), list(gradients), [norm.running_mean, norm.running_var]


def masked_reference(norm, x, shortcut, arriving, out):
    """The written-out operation in float64, with the kinks of ReLU where the kernel's result has them."""
    norm, x = norm.double(), x.detach().double().requires_grad_()
    shortcut = None if shortcut is None else shortcut.detach().double().requires_grad_()
    z = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    result = (z if shortcut is None else z + shortcut) * (out > 0)
    leaves = [t for t in (x, shortcut, norm.weight, norm.bias) if t is not None]
    gradients = torch.autograd.grad(result, leaves, arriving.double())
    return result.detach(), list(gradients), [norm.running_mean, norm.running_var]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(2, 5), st.sampled_from([16, 32, 48, 64, 128, 160]), st.integers(3, 9), st.integers(3, 9)
    ),
    with_shortcut=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mean=st.sampled_from([0.0, -3.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_written_out_operation_in_float64(shape, with_shortcut, dtype, mean, seed):
    x = activations(shape, seed, dtype, mean)
    shortcut = activations(shape, seed + 1, dtype) if with_shortcut else None
    arriving = activations(shape, seed + 2, dtype)
    found, gradients, running = run(norm_of(shape[1]), x, shortcut, arriving)
    expected, exact, exact_running = masked_reference(norm_of(shape[1]), x, shortcut, arriving, found)
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
    shape=st.tuples(st.integers(2, 3), st.sampled_from([16, 32, 64, 80]), st.integers(1, 5), st.integers(1, 5)),
    with_shortcut=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_evaluation_equals_the_written_out_operation(shape, with_shortcut, dtype, seed):
    x, norm = activations(shape, seed, dtype), norm_of(shape[1]).eval()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    shortcut = activations(shape, seed + 1, dtype) if with_shortcut else None
    with torch.no_grad():
        found = norm(x, shortcut)
        exact = nn.BatchNorm2d.forward(norm.double(), x.double())
    exact = F.relu(exact if shortcut is None else exact + shortcut.double())
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), exact, **close)
    assert found.dtype == dtype
    assert all(torch.equal(before[name], tensor.to(before[name])) for name, tensor in norm.state_dict().items())


def test_the_operators_are_what_torch_library_expects():
    """Schemas, fake tensors, and what the compiler assumes of them."""
    x, shortcut, norm = activations((2, 16, 4, 4), 0), activations((2, 16, 4, 4), 1), norm_of(16)
    weight, bias = norm.weight.detach(), norm.bias.detach()
    _, statistics = torch.ops.tailscope.norm_act(x, shortcut, weight, bias, 1e-5)
    for operator, given_ in (
        ("norm_act", (x, shortcut, weight, bias, 1e-5)),
        ("norm_act", (x, None, weight, bias, 1e-5)),
        ("norm_act_backward", (x, shortcut, x, weight, bias, statistics)),
        ("norm_act_backward", (x, None, x, weight, bias, statistics)),
        ("scale_shift_relu", (x, shortcut, weight, bias)),
    ):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(getattr(torch.ops.tailscope, operator).default, given_, test_utils=tests)


def test_counts_batches_and_moves_statistics_as_batch_norm_does():
    x, ours, theirs = activations((4, 16, 6, 6), 0), NormAct(16), nn.BatchNorm2d(16)
    for _ in range(3):
        ours(x)
        theirs(x)
    assert isinstance(ours, nn.BatchNorm2d)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=1e-5, atol=1e-6)
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, (1e-4, 1e-3)), (torch.bfloat16, (0.03, 0.25))])
def test_a_network_is_the_same_with_and_without_the_kernel(monkeypatch, dtype, close):
    torch.manual_seed(0)
    network = MODELS.make("resnet8(width=16)", 3, 10).to(memory_format=torch.channels_last)
    x = activations((8, 3, 16, 16), 0)

    def outcome():
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = network(x)
        logits.float().square().sum().backward()
        return logits.detach().float(), network.conv1.weight.grad.clone()

    fused = outcome()
    monkeypatch.setattr(NormAct, "fused", False)
    plain = outcome()
    for got, want, tolerance in zip(fused, plain, close, strict=True):
        assert 0 < (got - want).norm() <= tolerance * want.norm()


def test_the_compiler_sees_one_graph():
    network = MODELS.make("resnet8(width=16)", 3, 10).to(memory_format=torch.channels_last)
    x = activations((2, 3, 8, 8), 0)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_result_that_nobody_uses_costs_nothing():
    norm, x = NormAct(16), activations((4, 16, 6, 6), 0).requires_grad_()
    (norm(x).detach() * norm.bias.sum()).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is None


def unusual(case):
    """Return a module, x and a shortcut that the kernel does not know."""
    channels = 12 if case == "12 channels" else 16
    options = {"no weights": {"affine": False}, "no running statistics": {"track_running_stats": False}}
    norm = norm_of(channels, **options.get(case, {"momentum": None} if case == "cumulative average" else {}))
    x, shortcut = (activations((1 if case == "one image" else 2, channels, 4, 4), seed) for seed in (0, 1))
    if case == "gradients in evaluation":
        norm.eval()
    elif case == "float64":
        norm, x, shortcut = norm.double(), x.double(), shortcut.double()
    elif case == "rows first":
        x = x.contiguous()
    elif case == "mixed types":
        shortcut = shortcut.double()
    elif case == "switched off":
        norm.fused = False
    return norm, x, shortcut


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
        "cumulative average",
        "one image",
        "switched off",
    ],
)
def test_stands_back_for_what_the_kernel_does_not_know(case, monkeypatch):
    monkeypatch.setattr(norm_act, "_call", lambda *_: pytest.fail("the kernel was used"))
    norm, x, shortcut = unusual(case)
    expected = F.relu(nn.BatchNorm2d.forward(unusual(case)[0], x) + shortcut)
    assert torch.equal(norm(x, shortcut), expected)


def test_a_shortcut_in_another_layout_is_added_all_the_same():
    x, shortcut = activations((2, 16, 4, 4), 0), activations((2, 16, 4, 4), 1)
    assert torch.equal(norm_of(16)(x, shortcut.contiguous()), norm_of(16)(x, shortcut))


def test_a_mean_far_from_zero_does_not_cancel_the_variance():
    x = activations((16, 16, 32, 32), 0, mean=1_000.0)
    norm = norm_of(16)
    norm(x)
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
            outcomes.append(run(norm_of(32), x, x.detach().clone(), gradient))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-5, atol=1e-4)


def test_is_reproducible_to_the_bit():
    x, gradient = activations((8, 32, 16, 16), 1, torch.bfloat16), activations((8, 32, 16, 16), 2, torch.bfloat16)
    first, second = (run(norm_of(32), x, x.detach().clone(), gradient) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_diverged_stays_visible(bad):
    x = activations((2, 16, 4, 4), 0)
    x[0, 3, 0, 0] = bad
    assert norm_of(16)(x)[:, 3].isnan().all()


def test_training_is_the_same_without_the_kernel(tmp_path, monkeypatch):
    """In float32; and the kernel was used, else this would compare PyTorch with itself."""
    images = digits()
    spec = stage1_spec(images, model="resnet8(width=16)", steps=20, train={"learning_rate": 0.02})
    state, fused = train_stage1(spec, images, tmp_path / "fused")
    monkeypatch.setattr(norm_act, "available", lambda: False)
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
    norm_act.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        assert not norm_act.available()
        _, meta = train_stage1(stage1_spec(digits(), steps=2), digits(), tmp_path)
        assert meta["fused"] is False
    finally:
        norm_act.library.cache_clear()


def test_a_compiler_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\necho broken >&2\n[ "$1" = --version ]\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    norm_act.library.cache_clear()
    try:
        assert norm_act.library() is None
        assert "training will be slower" in caplog.text
        assert "broken failed" in caplog.text
        assert list((tmp_path / "cache" / "tailscope").iterdir()) == []
    finally:
        norm_act.library.cache_clear()


def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: commands.append(command) or real(command, **options)
    )
    for _ in range(2):
        norm_act.library.cache_clear()
        assert norm_act.library() is not None
    norm_act.library.cache_clear()
    assert sum("-c" in command for command in commands) == 1
    assert [file.suffix for file in (tmp_path / "tailscope").iterdir()] == [".so"]
