"""The optimised training against a loop that any textbook on PyTorch would print."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tailscope.data.images import ImageSet
from tailscope.device import can_compile, has_bf16
from tailscope.methods import MIXINGS
from tailscope.methods.augmentations import build
from tailscope.seeds import torch_stream
from tailscope.training.loop import new_model
from tailscope.training.step import Normalizer
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1

STEPS = 20
RATE = 0.02
"""Low, for at a rate that trains well rounding that moves one unit across zero grows to a per cent in 20 steps."""


def textbook(spec, images: ImageSet, seed: int) -> tuple[nn.Module, list[float]]:
    """Train with nn.CrossEntropyLoss and torch.optim.SGD on float images; return the model and the steps' losses."""
    pixels = images.images.numpy().astype(np.float64) / 255
    mean, std = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    model = new_model(spec.model, images.images.shape[3], images.num_classes, seed)
    model = model.to(memory_format=torch.contiguous_format).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    augment = build(spec.augment)
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS:
        order = torch.randperm(len(images), generator=torch_stream(seed, "order", epoch))
        augmented = augment(images.images[order], torch_stream(seed, "augment", epoch))
        x = torch.from_numpy((augmented.numpy() / 255 - mean) / std).float().permute(0, 3, 1, 2).contiguous()
        y = images.labels[order]
        mix_stream = torch_stream(seed, "mix", epoch)
        whole = len(images) // 64 * 64
        mixes: list[tuple[torch.Tensor, torch.Tensor]] = []
        for labels in (y[:whole].view(-1, 64), y[None, whole:]):
            mix = MIXINGS.make("mixup").draw(labels, (8, 8), mix_stream)
            mixes += zip(mix.labels, mix.partner, strict=True)
        for (lam, partner), xb, yb in zip(mixes, x.split(64), y.split(64), strict=True):
            # One cycle: from a tenth of the rate up to it over the first quarter of the steps, then down to 0.
            t = len(losses) / STEPS
            optimizer.param_groups[0]["lr"] = RATE * (0.1 + 0.9 * t / 0.25 if t < 0.25 else (1 - t) / 0.75)
            optimizer.zero_grad()
            if spec.mix:
                logits = model(lam * xb + (1 - lam) * xb[partner])
                loss = lam * criterion(logits, yb) + (1 - lam) * criterion(logits, yb[partner])
            else:
                loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epoch += 1
    return model, losses


def epoch_means(losses: list[float], per_epoch: int) -> list[float]:
    return [float(np.mean(losses[i : i + per_epoch])) for i in range(0, len(losses), per_epoch)]


@pytest.mark.parametrize("mix", [None, "mixup"], ids=["plain", "mixup"])
def test_twenty_steps_equal_the_textbook(mix, tmp_path):
    images = digits()  # 300: four full batches and a short one an epoch
    spec = stage1_spec(images, steps=STEPS, mix=mix, train={"learning_rate": RATE})
    state, meta = train_stage1(spec, images, tmp_path, seed=3)
    model, losses = textbook(spec, images, seed=3)
    assert meta["losses"] == pytest.approx(epoch_means(losses, 5), rel=2e-4)
    assert losses[-1] < 0.9 * losses[0]  # it did learn, so an equality of untrained models is not what is seen
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_the_comparison_with_the_textbook_can_fail(tmp_path):
    images = digits()
    _, losses = textbook(stage1_spec(images), images, seed=3)
    differing = [
        *({"train": change} for change in ({"nesterov": False}, {"momentum": 0.89}, {"learning_rate": 1.02 * RATE})),
        *({"augment": ()}, {"mix": "mixup"}, {"loss": "label_smoothing(epsilon=0.01)"}),
    ]
    for number, changes in enumerate(differing):
        train = {"learning_rate": RATE, **changes.pop("train", {})}
        spec = stage1_spec(images, steps=STEPS, train=train, **changes)
        _, meta = train_stage1(spec, images, tmp_path / str(number), seed=3)
        assert meta["losses"] != pytest.approx(epoch_means(losses, 5), rel=2e-4)


@pytest.mark.parametrize("shape", [(50, 8, 8, 1), (7, 5, 9, 3), (1, 2, 3, 4)])
def test_normalizer_is_numpys_mean_and_std(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalizer = Normalizer.of(images)
    pixels = images.numpy().astype(np.float64)
    np.testing.assert_allclose(normalizer.mean.numpy(), pixels.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(normalizer.std.numpy(), pixels.std(axis=(0, 1, 2)), rtol=1e-6)
    expected = (pixels - pixels.mean(axis=(0, 1, 2))) / pixels.std(axis=(0, 1, 2))
    out = normalizer(images)
    np.testing.assert_allclose(out.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [0, 17, 255])
def test_a_constant_channel_becomes_zero_not_nan(value):
    images = torch.full((4, 3, 3, 2), value, dtype=torch.uint8)
    images[0, 0, 0, 1] = 9
    normalizer = Normalizer.of(images)
    assert normalizer.std[0] == 1
    assert torch.equal(normalizer(images)[:, 0], torch.zeros(4, 3, 3))


def state_distance(a, b):
    """Return the length of the difference as a share of the first state's."""
    flat, other = (torch.cat([state[name].double().flatten() for name in a]) for state in (a, b))
    return float((flat - other).norm() / flat.norm())


def test_bf16_stays_near_fp32(tmp_path):
    images = digits()
    spec = stage1_spec(images, steps=STEPS)
    state, meta = train_stage1(spec, images, tmp_path / "fp32")
    low = replace(CPU, low_precision=torch.bfloat16)
    low_state, low_meta = train_stage1(spec, images, tmp_path / "bf16", runtime=low)
    assert (meta["precision"], low_meta["precision"]) == ("float32", "bfloat16")
    assert low_meta["losses"] == pytest.approx(meta["losses"], rel=0.05)
    assert low_meta["losses"] != meta["losses"]
    assert {t.dtype for t in low_state.values()} == {torch.float32, torch.int64}  # master weights stay fp32
    assert state_distance(state, low_state) < 0.15
    # A recipe that asks for fp32 gets it wherever it runs.
    full = stage1_spec(images, steps=STEPS, train={"precision": "fp32"})
    full_state, full_meta = train_stage1(full, images, tmp_path / "full", runtime=low)
    assert full_meta["precision"] == "float32"
    assert_same_state(full_state, state)


def test_native_bf16_is_only_claimed_where_the_processor_says_so():
    assert isinstance(has_bf16("cpu"), bool)
    if has_bf16("cpu"):
        assert torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_equal_eager_ones(precision, tmp_path):
    images = digits()
    runtime = replace(CPU, low_precision=torch.bfloat16 if precision == "bf16" else torch.float32)
    tolerance = 5e-3 if precision == "fp32" else 0.02
    # The second model re-uses the first one's code, and must not re-use its weights.
    for seed, mix in ((0, None), (1, None), (2, "mixup")):
        spec = stage1_spec(images, steps=STEPS, mix=mix, train={"learning_rate": RATE})
        _, eager = train_stage1(spec, images, tmp_path / f"eager{seed}", seed=seed, runtime=runtime)
        compiled_runtime = replace(runtime, engine="compiled")
        _, compiled = train_stage1(spec, images, tmp_path / f"c{seed}", seed=seed, runtime=compiled_runtime)
        assert (eager["compiled"], compiled["compiled"]) == (False, True)
        assert compiled["losses"] == pytest.approx(eager["losses"], rel=tolerance)


def test_many_models_share_one_compiled_step(tmp_path, monkeypatch):
    """PyTorch compiles a function eight times at most; a ladder of three seeds trains twelve models."""
    from torch._dynamo.utils import counters

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", **options))
    torch.compiler.reset()
    counters.clear()
    images = digits(80)
    for seed in range(10):
        spec = stage1_spec(images, steps=2, mix="mixup" if seed % 2 else None)
        runtime = replace(CPU, engine="compiled")
        _, compiled = train_stage1(spec, images, tmp_path / f"c{seed}", seed=seed, runtime=runtime)
        _, eager = train_stage1(spec, images, tmp_path / f"e{seed}", seed=seed)
        assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # with and without mixing
