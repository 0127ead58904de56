"""Stage 1 on images in files: against a training loop written out by hand, cut by cut, and after an interruption."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from image_trees import photos as draw_photos
from tailscope.data.images import Images
from tailscope.data.sources import ImageData, load
from tailscope.device import Solo
from tailscope.errors import UserError
from tailscope.experiments.stages import IMAGENET, require_trainable
from tailscope.methods import LOSSES, MIXINGS, augmentations
from tailscope.seeds import derive, keyed, torch_stream
from tailscope.spec import DataSpec, StageSpec, TrainSpec
from tailscope.training import SCHEDULES
from tailscope.training.loop import Training, cut, new_model
from test_training_resume import Interrupting, Stopped, stop
from training_setups import CPU, assert_same_state

AUGMENT = ("resized_crop(size=16)", "flip")
SEED = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """45 images: with batches of 16 the last of an epoch is short."""
    root = tmp_path_factory.mktemp("photos")
    draw_photos(root, [20, 15, 10], split="train", side=20)
    return load(f"list:{root / 'train.txt'},{root / 'train.txt'}").train


def stage(data: Images, **changes) -> StageSpec:
    spec = DataSpec(
        name="tiny", fingerprint="", profile="full", protocol="nested", subset_seed=0, indices_sha256="",
        counts=tuple(data.counts()),
    )  # fmt: skip
    train = {
        "epochs": 3,
        "batch": 16,
        "learning_rate": 0.005,
        "schedule": "multistep(warmup=0, drops=(2,), factor=0.1)",
    }
    train |= changes.pop("train", {})
    values = {"model": "resnet10(width=4)", "augment": AUGMENT, **changes}
    return StageSpec(data=spec, train=TrainSpec(**train), **values)


def train(spec: StageSpec, data: Images, scratch: Path, *, workers: int = 0, runtime=CPU):
    scratch.mkdir(parents=True, exist_ok=True)
    return Training(spec, data, IMAGENET, SEED, runtime, scratch, "tiny", workers=workers).run()


def by_hand(spec: StageSpec, data: Images) -> tuple[dict, list[float]]:
    """The same training in plain words: micro-batches on copies of the network, what they give added up."""
    model = new_model(spec.model, 3, data.num_classes, SEED).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, weight_decay=spec.train.weight_decay)
    transform, epoch_losses = augmentations.training(spec.augment), []
    rates = iter(SCHEDULES.make(spec.train.schedule, 9, 3))
    for epoch in range(3):
        order = torch.randperm(len(data), generator=torch_stream(SEED, "order", epoch)).tolist()
        losses = []
        for step, start in enumerate(range(0, len(order), 16)):
            rows = order[start : start + 16]
            parts = [p.tolist() for p in np.array_split(rows, -(-len(rows) * spec.train.micro_batches // 16))]
            copies, total = [], 0.0
            for m, part in enumerate(parts):
                images = []
                for row in part:
                    with keyed(derive(SEED, "augment", epoch, data.paths[row], 0)):
                        images.append(transform(data.image(row)))
                x = ((torch.stack(images).float() - IMAGENET.mean) / IMAGENET.std).permute(0, 3, 1, 2)
                y = data.labels[part]
                twin = copy.deepcopy(model)
                if spec.mix is None:
                    loss = cross_entropy(twin(x), y)
                else:
                    mix_stream = torch_stream(SEED, "mix", epoch, step, m)
                    _, (lam,), (partner,), _ = MIXINGS.make(spec.mix).draw(y[None], x.shape[2:], mix_stream)
                    logits = twin(lam * x + (1 - lam) * x[partner])
                    loss = lam * cross_entropy(logits, y) + (1 - lam) * cross_entropy(logits, y[partner])
                (loss * len(part) / len(rows)).backward()
                copies.append(twin)
                total += loss.item() * len(part) / len(rows)
            for p, *twins in zip(model.parameters(), *(c.parameters() for c in copies), strict=True):
                p.grad = sum(t.grad for t in twins)
            for b, *twins in zip(model.buffers(), *(c.buffers() for c in copies), strict=True):
                b.copy_(sum(twins) / len(twins))
            optimizer.param_groups[0]["lr"] = 0.005 * next(rates)
            optimizer.step()
            losses.append(total)
        epoch_losses.append(float(np.mean(losses)))
    return model.state_dict(), epoch_losses


@pytest.mark.parametrize(
    ("micro_batches", "mix", "images"),
    [(1, None, 45), (2, None, 45), (4, "mixup(alpha=1.0)", 45), (2, None, 35)],
    ids=["whole", "halves", "mixed quarters", "last batch whole"],
)
def test_training_is_the_loop_written_out(data, tmp_path, micro_batches, mix, images):
    data = data.take(np.arange(45 - images, 45))
    spec = stage(data, train={"micro_batches": micro_batches}, mix=mix)
    state, meta = train(spec, data, tmp_path)
    expected, losses = by_hand(spec, data)
    assert meta["losses"] == pytest.approx(losses, rel=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert (meta["epochs"], meta["steps"], meta["processes"]) == (3, 9, 1)


def test_micro_batches_change_the_statistics_and_so_the_result(data, tmp_path):
    whole, _ = train(stage(data), data, tmp_path / "1")
    halves, _ = train(stage(data, train={"micro_batches": 2}), data, tmp_path / "2")
    assert (whole["bn1.running_mean"] - halves["bn1.running_mean"]).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning", "ignore:This DataLoader will create")
def test_workers_change_no_bit(data, tmp_path):
    spec = stage(data, train={"micro_batches": 2}, sampler="class_balanced")
    alone, meta = train(spec, data, tmp_path / "0")
    helped, helped_meta = train(spec, data, tmp_path / "2", workers=2)
    assert_same_state(alone, helped)
    assert meta["losses"] == helped_meta["losses"]


def test_a_task_without_labels_is_learnt_from_files_too(data, tmp_path):
    spec = stage(data, train={"micro_batches": 2}, task="rotation(length=1.0)")
    alone, meta = train(spec, data, tmp_path / "0")
    assert alone["classifier.weight"].shape[0] == 4
    helped, helped_meta = train(spec, data, tmp_path / "2", workers=2)
    assert_same_state(alone, helped)
    assert meta["losses"] == helped_meta["losses"]


def test_an_interruption_costs_no_bit(data, tmp_path):
    spec = stage(data, mix="mixup(alpha=1.0)")
    whole, meta = train(spec, data, tmp_path / "whole")
    for steps in (5, 2):  # in the second epoch, and again in the same
        with pytest.raises(Stopped):
            train(spec, data, tmp_path / "cut", runtime=replace(CPU, progress=Interrupting(steps, stop)))
    kept = load_file(tmp_path / "cut" / "checkpoint.safetensors")
    assert int(kept["model.bn1.num_batches_tracked"]) == 3
    resumed, resumed_meta = train(spec, data, tmp_path / "cut")
    assert_same_state(whole, resumed)
    assert resumed_meta["losses"] == meta["losses"]


def test_a_training_that_diverges_is_one_line_and_keeps_the_epoch_before(data, tmp_path, monkeypatch):
    """45 images in batches of 16: step 5 is the second of the second epoch."""
    calls = iter(range(100))

    def loss(logits, labels):
        value = cross_entropy(logits, labels, reduction="none")
        return value * torch.nan if next(calls) == 4 else value

    monkeypatch.setattr(LOSSES, "make", lambda *_: loss)
    with pytest.raises(UserError, match=r"^tiny: training diverged, the loss is nan in epoch 2 of 3, step 2 of 3,"):
        train(stage(data), data, tmp_path)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert int(kept["model.bn1.num_batches_tracked"]) == 3
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_an_image_that_vanishes_ends_the_training_with_its_line(data, tmp_path):
    draw_photos(tmp_path, [4, 4], split="train", side=20)
    own = load(f"list:{tmp_path / 'train.txt'},{tmp_path / 'train.txt'}").train
    (tmp_path / "train" / "n01" / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"train.txt line 7: train/n01/2.jpg \(missing\)"):
        train(stage(own), own, tmp_path / "scratch")


@given(st.integers(1, 70), st.integers(2, 70), st.integers(1, 8))
def test_micro_batches_part_a_batch_evenly(rows, batch, micro_batches):
    micro_batches, rows = min(micro_batches, batch // 2), min(rows, batch)
    parts = cut(np.arange(rows), batch, micro_batches)
    assert np.concatenate([*parts, np.arange(0)]).tolist() == (list(range(rows)) if rows > 1 else [])
    sizes = [len(part) for part in parts]
    assert len(sizes) <= micro_batches
    assert not sizes or max(sizes) - min(sizes) <= 1
    if rows == batch:
        assert max(sizes) == -(-batch // micro_batches)


@pytest.mark.parametrize(
    ("augment", "micro_batches", "says"),
    [
        (("crop(padding=4)", "flip"), 1, r"need an augmentation that makes them one size, not crop\(padding=4\), flip"),
        ((), 1, "not none; take --recipe imagenet or imagenet-fast"),
        (AUGMENT, 9, "--micro-batches 9: must be a multiple of the 1 processes and at most half the batch of 16"),
    ],
)
def test_stages_that_files_refuse(data, augment, micro_batches, says):
    spec = stage(data, train={"micro_batches": micro_batches})
    with pytest.raises(UserError, match=says):
        require_trainable(ImageData("photos", data, data), Solo(), spec.train, augment)


def test_steps_may_end_within_an_epoch(data, tmp_path):
    spec = stage(data, train={"epochs": None, "steps": 4})
    _, meta = train(spec, data, tmp_path)
    assert (meta["epochs"], meta["steps"], len(meta["losses"])) == (2, 4, 2)
    seen = len(data) + 16  # three batches, the last one short, and a full one
    assert len(data) < 3 * 16
    assert meta["images_per_second"] * meta["seconds"] == pytest.approx(seen)
