"""What is made of an epoch: divergence is an error, and checkpoints cost a twentieth of the time at most."""

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from tailscope.errors import UserError
from tailscope.methods import LOSSES
from tailscope.progress import Deadline, Quiet, TimeIsUp
from tailscope.spec import StageSpec, TrainSpec
from tailscope.store.files import CHECKPOINT
from tailscope.training import loop
from tailscope.training.extract import fit_classifier
from tailscope.training.loop import SPACING, Epochs, History, Keeper
from tailscope.training.recipes import RECIPES, recipe_by_name
from tailscope.training.step import Flat
from test_training_resume import Interrupting, Stopped, stop
from training_setups import CPU, assert_same_state, data_spec, digits, stage1_spec, train_stage1

# -- divergence -----------------------------------------------------------------------------------------------------


def stage(epochs=4, rate=0.5, model="resnet8"):
    train = TrainSpec(epochs=epochs, batch=64, learning_rate=rate, schedule="multistep(warmup=0, drops=(2,))")
    return StageSpec(data=data_spec(digits()), train=train, model=model)


def losses_of(values):
    return [torch.tensor(float(value)) for value in values]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9))
def test_the_mean_of_finite_losses_is_their_mean(values):
    assert Epochs(stage(), 300, "lt").mean_loss(0, losses_of(values)) == pytest.approx(
        math.fsum(values) / len(values), rel=1e-5, abs=1
    )


@given(st.integers(0, 3), st.integers(0, 4), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_the_first_loss_that_is_not_finite_is_named(epoch, step, value, after):
    values = [1.0] * 5
    values[step] = value
    if after:  # NaN spreads to all that follows, and infinities of both signs cancel to NaN
        values[step + 1 :] = [math.nan] * (4 - step)
    with pytest.raises(UserError) as raised:
        Epochs(stage(), 300, "lt").mean_loss(epoch, losses_of(values))
    said = str(raised.value)
    assert f"the loss is {value}" in said
    if epoch == step == 0:
        assert "before anything was learnt" in said
    else:
        rate = 0.5 if epoch < 2 else 0.005
        assert f"epoch {epoch + 1} of 4, step {step + 1} of 5, learning rate {rate}; take a lower one" in said


class Recorder(Quiet):
    """Progress that counts epochs begun."""

    begun = 0

    def safe_point(self):
        self.begun += 1


def poisoned(at):
    """Return a loss that is NaN at the call of that number, counted from 0, and cross-entropy else."""

    calls = iter(range(10**6))

    def loss(logits, labels):
        value = nn.functional.cross_entropy(logits, labels, reduction="none")
        return value * torch.nan if next(calls) == at else value

    return loss


def test_a_training_that_diverges_ends_with_its_epoch_and_keeps_the_one_before(tmp_path, monkeypatch):
    """300 images are five steps an epoch: step 8 is the fourth of the second epoch; eight epochs are planned."""
    spec, images, progress = stage1_spec(digits(), steps=40), digits(), Recorder()
    with pytest.raises(Stopped):
        train_stage1(spec, images, tmp_path / "good", runtime=replace(CPU, progress=Interrupting(6, stop)))
    monkeypatch.setattr(LOSSES, "make", lambda *_: poisoned(8))
    with pytest.raises(UserError, match=r"^tiny: training diverged, the loss is nan in epoch 2 of 8, step 4 of 5,"):
        train_stage1(spec, images, tmp_path / "bad", runtime=replace(CPU, progress=progress))
    assert progress.begun == 2
    good, kept = (load_file(tmp_path / name / CHECKPOINT) for name in ("good", "bad"))
    assert_same_state(good, kept)


def test_weights_that_end_without_numbers_are_no_result(tmp_path, monkeypatch):
    """The last step's loss is computed before the step that breaks the weights."""

    def breaking(logits, labels):
        value = nn.functional.cross_entropy(logits, labels, reduction="none")
        value.register_hook(lambda gradient: gradient * torch.nan)
        return value

    monkeypatch.setattr(LOSSES, "make", lambda *_: breaking)
    spec = stage1_spec(digits(), steps=1)
    with pytest.raises(UserError, match="weights are no longer finite in epoch 1 of 1, step 1 of 1"):
        train_stage1(spec, digits(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_real_divergence_of_stage_2_is_one_line(epochs):
    """Weight decay times the rate above 2 makes weights grow by themselves."""
    train = TrainSpec(epochs=epochs, batch=16, learning_rate=1e6, weight_decay=10, schedule="multistep(warmup=0)")
    spec = StageSpec(data=data_spec(digits()), train=train)
    view = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), digits().labels
    with pytest.raises(UserError, match=rf"^on lt: training diverged, .* of {epochs}, .* for stage 2$"):
        fit_classifier(spec, [view], digits().counts(), 0, label="on lt")


def test_the_command_ends_with_one_line_and_nothing_is_stored(tailscope_, tmp_path):
    recipe = ("--recipe", "demo(learning_rate=1e30)")
    ended = tailscope_("swap", "--data", "digits", "--profile", "exp:10", *recipe, "--seeds", "1", "--out", tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(
        r"error: seed 0: backbone on lt: training diverged, the loss is (nan|inf) in epoch 1 of \d+, step \d+ of \d+,"
        r" learning rate \S+e\+29; take a lower one, as in --recipe 'NAME\(learning_rate=1e\+29\)'\n",
        ended.err,
    )
    assert not list(tmp_path.glob("store/stage1/*"))
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("name", ["demo", "fast", "paper", "imagenet"])
def test_the_mend_that_is_named_can_be_taken(name):
    recipe = recipe_by_name(f"{name}(learning_rate=0.02)")
    assert recipe.stage1 == RECIPES[name].stage1.model_copy(update={"learning_rate": 0.02})
    known = {"name": name, "card": RECIPES[name].card, "stage1": RECIPES[name].stage1}
    assert recipe.model_copy(update=known) == RECIPES[name]
    with pytest.raises(UserError, match=f"--recipe {name}.*greater than 0"):
        recipe_by_name(f"{name}(learning_rate=0)")


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_flat_copy_is_a_copy_of_every_tensor():
    stream = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(4, 3, 2, 2, generator=stream).to(memory_format=torch.channels_last),
        "steps": torch.tensor(7),
        "bias": torch.randn(5, generator=stream, requires_grad=True),
        "half": torch.randn(3, 2, generator=stream).bfloat16(),
        "none": torch.empty(0, 3),
    }
    flat = Flat(tensors)
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    assert_same_state(flat.tensors(), expected)
    assert list(flat.tensors()) == list(tensors)
    assert all(t.dtype == expected[name].dtype and not t.requires_grad for name, t in flat.tensors().items())
    assert flat.finite()
    assert not Flat({**expected, "half": torch.tensor([1, math.inf]).bfloat16()}).finite()


SELDOM = 10**9
"""As spacing: a checkpoint after the first epoch and after the last, and none between."""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.lists(st.floats(0.001, 5), min_size=60, max_size=60))
def test_writing_takes_a_twentieth_and_a_kill_costs_little(durations, costs):
    """A day of epochs of any length, with a disk of any speed: the promises of `Keeper` hold at every moment."""
    clock, written, writing = Clock(), [], iter(costs)

    def save(path, tensors, meta):
        clock.now += next(writing)
        written.append((clock.now, meta["epochs"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_tensors", save)
        keeper, history, trained, ends = Keeper(Path(), clock), History(), 0.0, []
        for number, duration in enumerate(durations):
            clock.now += duration
            trained += duration
            history.epochs, before = number + 1, len(written)
            last = number + 1 == len(durations)
            keeper.keep(Flat({"w": torch.zeros(1)}), history, last=last)
            ends.append((clock.now, number + 1))
            took = costs[before - 1] if before else 0.0
            if number == 0 or last or duration > SPACING * took * (1 + 1e-9):  # times are rounded sums
                assert written[-1][1] == number + 1  # an epoch this long is kept at its end
            elif written[-1][1] <= number:  # less than 20 writings ago
                assert clock.now - written[-1][0] < SPACING * took
    first, final = costs[0], costs[len(written) - 1]
    assert sum(costs[: len(written)]) <= trained / SPACING + first + final + max(costs[: len(written)])
    assert [epoch for _, epoch in written] == sorted({epoch for _, epoch in written})


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeIsUp, SystemExit, Stopped, MemoryError])
def test_what_ends_a_training_early_leaves_its_last_finished_epoch(error, tmp_path, monkeypatch):
    """It ends in the third epoch."""
    monkeypatch.setattr(loop, "SPACING", SELDOM)

    def end():
        raise error

    spec, images = stage1_spec(digits(), steps=25), digits()
    with pytest.raises(error):
        train_stage1(spec, images, tmp_path, runtime=replace(CPU, progress=Interrupting(13, end)))
    assert int(load_file(tmp_path / CHECKPOINT)["model.bn1.num_batches_tracked"]) == 10


def test_a_limit_of_time_leaves_the_last_finished_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SPACING", SELDOM)
    ticks = iter(range(100))
    deadline = Deadline(Quiet(), 5, clock=lambda: next(ticks))  # epochs begin at 1, 2 and 3, and at 4 no more
    with pytest.raises(TimeIsUp):
        train_stage1(stage1_spec(digits(), steps=50), digits(), tmp_path, runtime=replace(CPU, progress=deadline))
    assert int(load_file(tmp_path / CHECKPOINT)["model.bn1.num_batches_tracked"]) == 15


def test_a_disk_that_is_full_does_not_hide_what_ended_the_training(tmp_path, monkeypatch):
    def full(*_):
        raise UserError("no space left")

    spec, written, real = stage1_spec(digits(), steps=25), [], loop.save_tensors
    monkeypatch.setattr(loop, "SPACING", SELDOM)
    monkeypatch.setattr(loop, "save_tensors", lambda *a: full() if written else written.append(real(*a)))
    with pytest.raises(Stopped):
        train_stage1(spec, digits(), tmp_path, runtime=replace(CPU, progress=Interrupting(13, stop)))
    monkeypatch.setattr(loop, "save_tensors", full)
    with pytest.raises(UserError, match="no space left"):
        train_stage1(spec, digits(), tmp_path / "other")


def test_an_epoch_that_was_kept_in_memory_is_gone_on_from_to_the_bit(tmp_path, monkeypatch):
    spec, images = stage1_spec(digits(), steps=25, mix="mixup"), digits()
    whole, meta = train_stage1(spec, images, tmp_path / "whole")
    monkeypatch.setattr(loop, "SPACING", SELDOM)
    for steps in (8, 9):
        with suppress(Stopped):
            train_stage1(spec, images, tmp_path / "cut", runtime=replace(CPU, progress=Interrupting(steps, stop)))
    resumed, again = train_stage1(spec, images, tmp_path / "cut")
    assert_same_state(whole, resumed)
    assert json.dumps(again["losses"]) == json.dumps(meta["losses"])
