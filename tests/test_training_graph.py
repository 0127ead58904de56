"""Captured steps: everything but CUDA's own capture is tested on the CPU, with one that replays by running again."""

import pytest
import torch

from tailscope.methods import LOSSES
from tailscope.spec import TrainSpec
from tailscope.training.graph import WARM_UP, CudaCapture, GraphedStep
from tailscope.training.runtime import Runtime
from tailscope.training.stage1 import new_model
from tailscope.training.step import Normalizer, Stepper, loss_function
from training_setups import CPU, assert_same_state, digits, stage1_spec, train_stage1

TRAIN = TrainSpec(
    steps=12, batch=16, learning_rate=0.05, momentum=0.9, weight_decay=1e-3, schedule="one_cycle()", precision="fp32"
)


class Again:
    """Replays by running what was recorded again, on the tensors that were there at the recording."""

    def __init__(self):
        self.warmed, self.recorded, self.replayed = 0, 0, 0

    def warm_up(self, step, *given):
        self.warmed += 1
        return step(*given)

    def record(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            work()

        return replay


class Refuses(Again):
    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")


def trained(capture, mix, batches=8, tail=True):
    """Return the losses and the state after some full batches and, now and then, a short one."""
    images = digits()
    model = new_model("resnet8", images.images.shape[-1], images.num_classes, 0).train()
    loss = LOSSES.make("cross_entropy", torch.tensor(images.counts()))
    compute = loss_function(model, loss, Normalizer.of(images.images), torch.float32)
    stepper = Stepper(model, compute, TRAIN, compile=False, capture=capture)
    stream, losses = torch.Generator().manual_seed(0), []
    for number in range(batches):
        rows = torch.randint(len(images), (5 if tail and number % 3 == 2 else 16,), generator=stream)
        lam = torch.rand((), generator=stream) if mix else None
        partner = torch.randperm(len(rows), generator=stream) if mix else None
        losses.append(stepper(images.images[rows], images.labels[rows], 1 / (number + 1), lam, partner))
    return torch.stack(losses), stepper.state()


@pytest.mark.parametrize("mix", [False, True])
def test_a_captured_step_takes_every_batch_rate_and_mixture_that_it_is_given(mix):
    capture = Again()
    losses, state = trained(capture, mix)
    expected_losses, expected = trained(None, mix)
    full = 8 - 2  # the third and the sixth batch are short
    assert (capture.warmed, capture.recorded, capture.replayed) == (WARM_UP, 1, full - WARM_UP)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)  # the rate is rounded to float32
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len({float(loss) for loss in losses}) == len(losses)  # a loss that is handed out is not overwritten


def test_where_the_capture_fails_steps_go_on_as_they_are(caplog):
    losses, state = trained(Refuses(), mix=False)
    assert caplog.text.count("training will be slower") == 1
    assert "not permitted" in caplog.text
    expected_losses, expected = trained(Again(), mix=False)
    assert torch.equal(losses, expected_losses)
    assert_same_state(state, expected)


def test_other_mistakes_in_a_step_are_not_hidden():
    def broken(*given):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        GraphedStep(broken, Again())(torch.ones(1))


def test_on_a_cpu_nothing_is_captured(tmp_path, monkeypatch):
    monkeypatch.setattr(GraphedStep, "__init__", lambda *_: pytest.fail("a step was captured"))
    _, meta = train_stage1(stage1_spec(digits(), steps=6), digits(), tmp_path)
    assert CPU.device.type == "cpu"
    assert meta["steps"] == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_captured_training_is_the_same_training(tmp_path, monkeypatch):
    spec, images = stage1_spec(digits(), steps=40), digits()
    runtime = Runtime.choose("cuda", compile=False)
    state, meta = train_stage1(spec, images, tmp_path / "captured", runtime=runtime)
    again, _ = train_stage1(spec, images, tmp_path / "again", runtime=runtime)
    assert_same_state(state, again)
    monkeypatch.setattr(CudaCapture, "record", Refuses().record)
    _, plain = train_stage1(spec, images, tmp_path / "plain", runtime=runtime)
    assert meta["losses"] == pytest.approx(plain["losses"], rel=1e-3)
