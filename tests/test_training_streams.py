"""Initialisation, order, augmentation and mixing have streams of their own; where a run computes changes none."""

import contextlib
from dataclasses import replace

import pytest
import torch

from tailscope.errors import UserError
from tailscope.kernels import norm_act
from tailscope.progress import Quiet
from tailscope.seeds import derive, numpy_stream, torch_stream
from tailscope.training import runtime as runtime_module
from tailscope.training.runtime import COMPILE_FROM_STEPS, Runtime
from tailscope.training.stage1 import _Batches, new_model
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1


def batches(epoch=0, seed=0, steps=5, images=None, **changes):
    """Return an epoch's batches as one tensor each of images, labels, and mixing weights and partners."""
    images = images or digits()
    spec = stage1_spec(images, **changes)
    drawn = list(_Batches(spec, images.images, images.labels, 10, seed).epoch(epoch, steps))
    mixes = [(b.lam, b.partner) for b in drawn]
    return torch.cat([b.images for b in drawn]), torch.cat([b.labels for b in drawn]), mixes


def test_the_order_depends_on_seed_and_epoch_alone():
    labels = batches()[1]
    for changes in ({"augment": ()}, {"augment": ("autoaugment", "flip")}, {"mix": "mixup"}, {"model": "resnet20"}):
        assert torch.equal(batches(**changes)[1], labels)
    assert not torch.equal(batches(seed=1)[1], labels)
    assert not torch.equal(batches(epoch=1)[1], labels)
    assert torch.equal(batches(seed=0)[1], labels)


def test_the_augmentation_does_not_depend_on_mixing_and_the_mixing_not_on_augmentation():
    images, _, mixes = batches(mix="mixup")
    assert torch.equal(images, batches()[0])
    assert not torch.equal(images, batches(seed=1)[0])
    assert not torch.equal(images, batches(epoch=1)[0])
    others = batches(mix="mixup", augment=("autoaugment",))[2]
    for (lam, partner), (other_lam, other_partner) in zip(mixes, others, strict=True):
        assert torch.equal(lam, other_lam)
        assert torch.equal(partner, other_partner)
        assert torch.equal(partner.sort().values, torch.arange(len(partner)))
        assert 0 <= lam <= 1
    assert len({float(lam) for lam, _ in mixes}) == len(mixes)


def test_an_epoch_sees_every_image_once_and_the_last_batch_is_short():
    images = digits()
    found, labels, mixes = batches(augment=())
    assert len(mixes) == 5
    assert len(found) == 300
    assert torch.equal(labels.sort().values, images.labels.sort().values)
    rows = {image.numpy().tobytes() for image in images.images}
    assert {image.numpy().tobytes() for image in found} == rows


def test_a_cut_epoch_is_the_beginning_of_a_whole_one():
    whole, cut = batches(augment=(), mix="mixup"), batches(augment=(), mix="mixup", steps=2)
    assert torch.equal(cut[0], whole[0][:128])
    assert torch.equal(cut[1], whole[1][:128])


def test_the_initialisation_depends_on_the_seed_alone_and_leaves_the_global_stream():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = new_model("resnet8", 1, 10, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same_state(first, new_model("resnet8", 1, 10, seed=0).state_dict())
    other = new_model("resnet8", 1, 10, seed=1).state_dict()
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_training_neither_reads_nor_moves_the_global_streams(tmp_path):
    images = digits(80)
    spec = stage1_spec(images, steps=3, augment=("crop", "flip", "autoaugment"), mix="mixup")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = train_stage1(spec, images, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = train_stage1(spec, images, tmp_path / "b")
    assert_same_state(first, again)
    other, _ = train_stage1(spec, images, tmp_path / "c", seed=1)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_streams_differ_by_every_part_of_their_name():
    names = [(seed, *path) for seed in (0, 1, 2**63, 10**30) for path in [(), ("order",), ("order", 0), ("augment", 0)]]
    seeds = [derive(*name) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.rand(3, generator=torch_stream(0, "a")), torch.rand(3, generator=torch_stream(0, "a")))
    assert (numpy_stream(0, "a").random(3) == numpy_stream(0, "a").random(3)).all()


def test_threads_and_progress_do_not_change_a_bit(tmp_path):
    images = digits()
    spec = stage1_spec(images, steps=6)
    first, _ = train_stage1(spec, images, tmp_path / "a")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again, meta = train_stage1(spec, images, tmp_path / "b", runtime=replace(CPU, progress=Quiet()))
        assert torch.get_num_threads() == 2  # given back
        assert meta["device"]["threads"] == 1  # those that trained
    finally:
        torch.set_num_threads(threads)
    assert_same_state(first, again)


def test_threads_are_given_back_after_a_failure():
    threads = torch.get_num_threads()
    with contextlib.suppress(ZeroDivisionError), CPU.threads_for(digits().images, 64):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads
    with CPU.threads_for(torch.zeros(1, 32, 32, 3), 128):
        assert torch.get_num_threads() == threads


def test_compiling_is_decided_by_the_plan_alone(monkeypatch):
    monkeypatch.setattr(runtime_module, "can_compile", lambda: True)
    assert not replace(CPU, compile=None).should_compile(10**9) or not norm_act.available()
    monkeypatch.setattr(norm_act, "available", lambda: False)
    auto = replace(CPU, compile=None)
    assert not auto.should_compile(COMPILE_FROM_STEPS - 1)
    assert auto.should_compile(COMPILE_FROM_STEPS)
    assert replace(CPU, compile=True).should_compile(1)
    assert not replace(CPU, compile=False).should_compile(10**9)
    monkeypatch.setattr(runtime_module, "can_compile", lambda: False)
    assert not auto.should_compile(10**9)


def test_without_compiler_or_headers_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(runtime_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(runtime_module.sysconfig, "get_path", lambda *_, **__: "/nowhere")
    assert not runtime_module.can_compile()
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not runtime_module.can_compile()


@pytest.mark.parametrize("device", ["tpu", "", "cuda9000", "CPU", "cpu:x", "cuda:-1", "cuda:x", "mps"])
def test_an_unknown_device_is_one_line(device):
    with pytest.raises(UserError, match="--device") as raised:
        Runtime.choose(device)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_one_line():
    with pytest.raises(UserError, match="take cpu"):
        Runtime.choose("cuda")
    assert Runtime.choose("auto").device == torch.device("cpu")
